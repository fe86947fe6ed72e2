"""TFDS builder of YouTube-Mix: four hours of one piano track in numbered one-minute files."""

import re
from pathlib import Path

from patchwave_jax.data import audio
from patchwave_jax.data.builder import AudioBuilder, Planned
from patchwave_jax.errors import UserError, shown

NUM_FILES = 241  # of the published set
_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)(?P<suffix>\.[^.]+)")
_COMPANIONS = (".md", ".csv")  # what comes with a download and can't be mistaken for audio
_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class Builder(AudioBuilder):
    """TFDS builder of YouTube-Mix."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put out000.wav to out240.wav of krandiash/youtubemix (Hugging Face, gated) in one folder."
    )

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """Splits the numbered files at int(.88 n) and int(.94 n), as SaShiMi does.

        A set that already lies in train, val (or validation) and test folders keeps that split.
        The files of a split are one recording.
        """
        inside = {path.name for path in source.iterdir() if path.is_dir()}
        if {"train", "test"} <= inside <= set(_FOLDERS):
            if stray := sorted(path.name for path in source.iterdir() if audio.is_audio(path)):
                raise UserError(f"{source} has both split folders and {', '.join(stray)}")
            return [
                Planned(path, f"{path.parent.name}/{path.name}", _FOLDERS[folder], "")
                for folder in sorted(inside, key=list(_FOLDERS).index)
                for path in numbered_files(source / folder, first=None)
            ]
        files = numbered_files(source, first=0)
        if len(files) < 3:
            raise UserError(f"{source} holds {len(files)} files; three splits need at least 3")
        borders = int(0.88 * len(files)), int(0.94 * len(files))
        if borders[0] == borders[1]:  # of the very smallest sets, which the rule leaves without
            borders = borders[0] - 1, borders[0]
        train, validation = borders
        return [
            Planned(
                path,
                path.name,
                "train" if i < train else "validation" if i < validation else "test",
                "",
            )
            for i, path in enumerate(files)
        ]


def numbered_files(folder: Path, first: int | None) -> list[Path]:
    """The folder's files in order of their numbers, which must run on without a gap.

    Args:
      folder: Holds the files, e.g. out000.wav, and at most .md and .csv files beside them.
      first: The number to start from; None for whatever is lowest.

    Raises:
      UserError: naming every stray, doubled or missing file. Any of them would shift the split.
    """
    names = sorted(path.name for path in folder.iterdir())
    matches = {
        name: match
        for name in names
        if audio.is_audio(folder / name) and (match := _NUMBERED.fullmatch(name))
    }
    if not matches:
        raise UserError(f"{folder} holds no numbered audio files such as out000.wav")
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
    doubled = [name for same in numbers.values() if len(same) > 1 for name in same]
    problems = {"stray": sorted(stray), "missing": missing, "doubled": doubled}
    if any(problems.values()):
        raise UserError(
            f"{folder} is not a run of numbered files, which would shift the split: "
            + "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
            + "; move away what does not belong there, and fetch what is missing"
        )
    return [folder / numbers[i][0] for i in sorted(numbers)]


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return shown(", ".join(names[:most])) + more
