"""The audio of `piano_demo`, as package data."""
