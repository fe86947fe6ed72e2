"""The demo pieces, as package data."""
