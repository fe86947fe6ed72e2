"""Autoregressive models of raw 8-bit 16 kHz audio with contexts up to a million samples."""

__version__ = "0.1.0"
