"""TFDS builder of the five piano pieces that come with the package (CC0)."""

from pathlib import Path

from patchwave_jax.data import audio
from patchwave_jax.data.builder import AudioBuilder, Planned

# By piece, so that what is held out is music the model has never heard.
_SPLITS = {"demo4_petzold_minuet_anh114": "validation", "demo3_beethoven_moonlight1": "test"}


class Builder(AudioBuilder):
    """TFDS builder of the demo: 261 s to train on, 26 s for validation, 57 s to test on."""

    SOURCE = Path(__file__).parents[1] / "demo_audio"

    @staticmethod
    def plan(source: Path) -> list[Planned]:
        """Three pieces to train on and one each held out. A piece is a recording."""
        files = sorted(path for path in source.iterdir() if audio.is_audio(path))
        return [
            Planned(path, path.name, _SPLITS.get(path.stem, "train"), path.name) for path in files
        ]
