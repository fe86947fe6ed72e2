"""TFDS builder of YouTube-Mix: four hours of one piano track in numbered one-minute files."""

import re
from pathlib import Path

from patchwave_jax.data import audio
from patchwave_jax.data.builder import AudioBuilder, Planned
from patchwave_jax.errors import UserError, listed

NUM_FILES = 241  # of the published dataset
_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)(?P<suffix>\.[^.]+)")
_COMPANIONS = (".md", ".csv")  # part of a download, and can't be mistaken for audio
_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class Builder(AudioBuilder):
    """TFDS builder of YouTube-Mix."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put out000.wav to out240.wav of krandiash/youtubemix (Hugging Face, gated) in one folder."
    )

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """Splits the numbered files at int(.88 n) and int(.94 n), as SaShiMi does.

        Files that are in train, val (or validation) and test folders already keep that split. The
        files of a split are one recording.
        """
        inside = {path.name for path in source.iterdir() if path.is_dir()}
        if {"train", "test"} <= inside <= set(_FOLDERS):
            if stray := sorted(path.name for path in source.iterdir() if audio.is_audio(path)):
                raise UserError(f"{source} has both split folders and {listed(stray)}")
            return [
                Planned(path, f"{path.parent.name}/{path.name}", _FOLDERS[folder], "")
                for folder in sorted(inside, key=list(_FOLDERS).index)
                for path in numbered_files(source / folder, first=None)
            ]
        files = numbered_files(source, first=0)
        if len(files) < 3:
            raise UserError(f"{source} has {len(files)} files, but three splits need at least 3")
        train, validation = int(0.88 * len(files)), int(0.94 * len(files))
        if train == validation:  # the published rule leaves few files no validation split
            train -= 1
        splits = ["train"] * train + ["validation"] * (validation - train)
        splits += ["test"] * (len(files) - validation)
        return [
            Planned(path, path.name, split, "") for path, split in zip(files, splits, strict=True)
        ]


def numbered_files(folder: Path, first: int | None) -> list[Path]:
    """The folder's files, sorted by number; the numbers must be consecutive.

    Args:
      folder: Has the files, such as out000.wav, and otherwise only .md and .csv files.
      first: The expected first number; None for any.

    Raises:
      UserError: naming every stray, duplicate or missing file, which would shift the split.
    """
    names = sorted(path.name for path in folder.iterdir())
    matches = {
        name: match
        for name in names
        if audio.is_audio(folder / name) and (match := _NUMBERED.fullmatch(name))
    }
    if not matches:
        raise UserError(f"{folder} has no numbered audio files such as out000.wav")
    kinds = [match["prefix"] + "#" + match["suffix"] for match in matches.values()]
    kind = max(sorted(set(kinds)), key=kinds.count)
    numbers: dict[int, list[str]] = {}
    stray = [n for n in names if n not in matches and Path(n).suffix.lower() not in _COMPANIONS]
    for name, match in matches.items():
        if match["prefix"] + "#" + match["suffix"] == kind:
            numbers.setdefault(int(match["number"]), []).append(name)
        else:
            stray.append(name)
    prefix, suffix = kind.split("#")
    width = min(len(match["number"]) for match in matches.values())
    missing, expected = [], min(numbers) if first is None else first
    for number in sorted(numbers):
        ends = dict.fromkeys((expected, number - 1)) if number > expected else {}
        missing += [" to ".join(f"{prefix}{end:0{width}}{suffix}" for end in ends)] if ends else []
        expected = number + 1
    duplicates = [name for same in numbers.values() if len(same) > 1 for name in same]
    problems = {"stray": sorted(stray), "missing": missing, "duplicates": duplicates}
    if any(problems.values()):
        raise UserError(
            f"the files in {folder} are not numbered consecutively, which would shift the split: "
            + "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
            + "; remove the files that don't belong there, and get the missing ones"
        )
    return [folder / numbers[i][0] for i in sorted(numbers)]
