"""TFDS builder of any tree of wav, flac, mp3 and ogg files."""

from pathlib import Path

import numpy as np

from patchwave_jax.data import audio, natural
from patchwave_jax.data.builder import AudioBuilder, Planned
from patchwave_jax.data.manifest import SPLITS
from patchwave_jax.errors import UserError, shown

_SHUFFLE_SEED = 0


class Builder(AudioBuilder):
    """TFDS builder of a folder of audio."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Give any folder with wav, flac, mp3 or ogg files in it."

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """Folders train, validation and test at the top if there are any, else 88/6/6 by file.

        The split by file is a shuffle with a fixed seed, so it depends on the set of names only,
        and leaves at least one file in each split. A file is a recording.
        """
        # A dead link or a pipe is planned, too, and then told when it is read.
        paths = [path for path in source.rglob("*") if audio.is_audio(path) and not path.is_dir()]
        names = sorted((path.relative_to(source).as_posix() for path in paths), key=natural.key)
        names = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
        if not names:
            raise UserError(f"{source} holds no {', '.join(audio.SUFFIXES)} file")
        if any((source / split).is_dir() for split in SPLITS):
            stray = [name for name in names if name.split("/")[0] not in SPLITS]
            if stray:
                raise UserError(
                    f"{source} has split folders, but outside them: {shown(', '.join(stray))}"
                )
            splits = [name.split("/")[0] for name in names]
            if "train" not in splits:
                raise UserError(f"{source} has split folders, but no audio in {source / 'train'}")
        else:
            splits = _shuffled_splits(source, len(names))
        return [
            Planned(source / name, name, split, name)
            for name, split in zip(names, splits, strict=True)
        ]


def _shuffled_splits(source: Path, num_files: int) -> list[str]:
    if num_files < 3:
        raise UserError(
            f"{source} holds {num_files} audio file(s), and three splits need 3; cut them up, or "
            "put them into folders train, validation and test"
        )
    held_out = max(1, round(0.06 * num_files))
    splits = ["train"] * (num_files - 2 * held_out) + ["validation"] * held_out
    splits += ["test"] * held_out
    # Philox and argsort, unlike Generator.shuffle, are the same in every version of numpy.
    order = np.argsort(np.random.Philox(key=_SHUFFLE_SEED).random_raw(num_files), kind="stable")
    return [splits[rank] for rank in order]
