"""Audio files to training windows: build once with TFDS, then read at random with grain."""
