"""From audio files to training windows: datasets built with TFDS, random access with grain."""
