"""The training step, its optimizer, and what watches a run."""
