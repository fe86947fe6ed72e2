"""TFDS builder of the five piano pieces that are part of the package (CC0)."""

from pathlib import Path

from patchwave_jax.data import audio
from patchwave_jax.data.builder import AudioBuilder, Planned

# Split by piece, so that the model has not been trained on any part of a held-out piece.
_SPLITS = {"demo4_petzold_minuet_anh114": "validation", "demo3_beethoven_moonlight1": "test"}


class Builder(AudioBuilder):
    """TFDS builder of the demo: 261 s of training, 26 s of validation and 57 s of test audio."""

    SOURCE = Path(__file__).parents[1] / "demo_audio"

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """Three pieces for training, one each for validation and test. A piece is a recording."""
        files = sorted(path for path in source.iterdir() if audio.is_audio(path))
        return [
            Planned(path, path.name, _SPLITS.get(path.stem, "train"), path.name) for path in files
        ]
