"""TFDS builder of a folder of wav, flac, mp3 and ogg files, including subfolders."""

import re
from pathlib import Path

import numpy as np

from patchwave_jax.data import audio
from patchwave_jax.data.builder import AudioBuilder, Planned
from patchwave_jax.data.manifest import SPLITS
from patchwave_jax.errors import UserError, listed

_SHUFFLE_SEED = 0


class Builder(AudioBuilder):
    """TFDS builder of a folder of audio."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Give any folder that contains wav, flac, mp3 or ogg files."

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """Splits by top-level folders train, validation and test if there are any, else 88/6/6.

        The 88/6/6 split shuffles the files with a fixed seed, so it depends on the set of names
        only, and each split has at least one file. A file is a recording.
        """
        # Includes dead links and pipes, which are then reported when they are read.
        paths = [path for path in source.rglob("*") if audio.is_audio(path) and not path.is_dir()]
        names = sorted((path.relative_to(source).as_posix() for path in paths), key=_natural_key)
        names = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
        if not names:
            raise UserError(f"{source} has no {', '.join(audio.SUFFIXES)} file")
        if any((source / split).is_dir() for split in SPLITS):
            stray = [name for name in names if name.split("/")[0] not in SPLITS]
            if stray:
                raise UserError(f"{source} has split folders, but outside them: {listed(stray)}")
            splits = [name.split("/")[0] for name in names]
            if "train" not in splits:
                raise UserError(f"{source} has split folders, but no audio in {source / 'train'}")
        else:
            splits = _shuffled_splits(source, len(names))
        return [
            Planned(source / name, name, split, name)
            for name, split in zip(names, splits, strict=True)
        ]


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which runs of digits compare as numbers: file10 after file9."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _shuffled_splits(source: Path, num_files: int) -> list[str]:
    if num_files < 3:
        raise UserError(
            f"{source} has {num_files} audio file(s), but three splits need 3; cut them up, or "
            "put them into folders train, validation and test"
        )
    held_out = max(1, round(0.06 * num_files))
    splits = ["train"] * (num_files - 2 * held_out) + ["validation"] * held_out
    splits += ["test"] * held_out
    # Philox and argsort, unlike Generator.shuffle, are the same in every version of numpy.
    order = np.argsort(np.random.Philox(key=_SHUFFLE_SEED).random_raw(num_files), kind="stable")
    return [splits[rank] for rank in order]
