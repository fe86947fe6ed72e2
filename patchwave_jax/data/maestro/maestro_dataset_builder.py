"""TFDS builder of MAESTRO v3: 199 hours of piano competition recordings."""

import csv
from pathlib import Path

from patchwave_jax.data.builder import AudioBuilder, Planned
from patchwave_jax.data.manifest import SPLITS
from patchwave_jax.errors import UserError, listed

_COLUMNS = {"split", "audio_filename"}


class Builder(AudioBuilder):
    """TFDS builder of MAESTRO."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Unpack maestro-v3.0.0.zip (magenta.tensorflow.org/datasets/maestro) and give the folder "
        "with maestro-v3.0.0.csv."
    )

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """The official split, from the dataset's table. A file is a recording."""
        tables = sorted(source.glob("maestro-v*.csv"))
        if len(tables) != 1:
            raise UserError(
                f"{source} has {len(tables)} tables maestro-v*.csv; give the folder with "
                "one, as unpacked from maestro-v3.0.0.zip"
            )
        with open(tables[0], newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or _COLUMNS - rows[0].keys():
            raise UserError(f"{tables[0]} lacks the columns {', '.join(sorted(_COLUMNS))}")
        names = [row["audio_filename"] for row in rows]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{tables[0]} lists files more than once: {listed(duplicates)}")
        if unknown := {str(row["split"]) for row in rows} - set(SPLITS):
            raise UserError(f"{tables[0]} has unknown splits: {', '.join(sorted(unknown))}")
        return [
            Planned(source / name, name, row["split"], name)
            for name, row in zip(names, rows, strict=True)
        ]
