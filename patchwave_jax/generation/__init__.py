"""Sampling from a model, and the clips that it leaves."""
