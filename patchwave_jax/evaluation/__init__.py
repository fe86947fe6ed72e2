"""The protocol, the numbers it gives, and classical baselines."""
