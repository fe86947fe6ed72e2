"""Natural order: file10 after file9."""

import re


def key(name: str) -> list[tuple[int, int, str]]:
    """Sort key of a name under which runs of digits compare as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
