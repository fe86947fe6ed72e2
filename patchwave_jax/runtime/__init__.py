"""Devices, processes, directories, signals."""
