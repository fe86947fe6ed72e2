"""The panels of the report: figures as images, and clips with players."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from matplotlib.figure import Figure

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import protocol
from patchwave_jax.evaluation.calibration import Calibration
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.measure import Targets
from patchwave_jax.evaluation.nll import LN2, MODEL, NllAccumulator
from patchwave_jax.reporting import figures

EXCERPTS = 4
EXCERPT_SECONDS = 6
MOST_GENERATED = 24
GENERATED_SECONDS = 30  # of each clip, at most


def picture(figure: Figure, title: str, words: str = "", kind: str = "svg") -> dict[str, str]:
    """A figure as a panel."""
    content = io.BytesIO()
    figures.save(figure, content, kind)
    mime = "image/svg+xml" if kind == "svg" else f"image/{kind}"
    image = _data_uri(mime, content.getvalue())
    return {"title": title, "words": words, "image": image, "audio": ""}


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def player(pcm: np.ndarray, rate: int = SAMPLE_RATE) -> str:
    """PCM as a WAV in a data URI."""
    content = io.BytesIO()
    sf.write(content, pcm, rate, format="WAV", subtype="PCM_16")
    return _data_uri("audio/wav", content.getvalue())


def context_panels(
    nll: NllAccumulator,
    growing: NllAccumulator,
    shortage: NllAccumulator | None,
    config: Config,
) -> Iterator[dict[str, str]]:
    """The figures of the value of context."""
    whole = f"{config.context_samples:,}"
    if shortage is not None:
        yield picture(
            figures.context_gain_curve(shortage),
            "What a short context costs",
            f"Extra bits compared with at least half of {whole} samples of context, on the same "
            "targets. Band: 95% interval.",
        )
    yield picture(
        figures.context_curves({MODEL: growing}),
        "Bits against available context",
        f"Every window of {whole} samples from scratch. Band: 95% interval, mostly of how hard "
        "the targets of a point are: each has its own.",
    )
    yield picture(figures.position_curve(nll), "Bits against position in the clip")


def calibration_panels(calibration: Calibration) -> list[dict[str, str]]:
    """The figures of calibration."""
    return [
        picture(figures.reliability(calibration), "How often a code occurs"),
        picture(
            figures.probability_histogram(calibration), "Probability of the code that occurred"
        ),
    ]


def excerpts(evaluator: Evaluator, params: Any, targets: Targets) -> Iterator[dict[str, str]]:
    """Excerpts of held-out audio with the surprise of every sample."""
    config, size = evaluator.config, EXCERPT_SECONDS * SAMPLE_RATE
    quantiser = quantisers.get(config.data.quantiser)
    lengths = [clip.length for clip in targets.clips]
    total = sum(lengths)
    count = min(EXCERPTS, max(1, total // size))
    for i in range(count):
        place = int((i + 0.5) / count * total)
        clip = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        first = place - sum(lengths[:clip]) - size // 2
        first = min(max(first, 0), max(lengths[clip] - size, 0))
        end = min(first + size, lengths[clip])
        windows = protocol.plan(lengths, config, targets.stride_patches)
        windows = [w for w in windows if w.clip == clip and w.first < end and w.end > first]
        bits = np.zeros(end - first)
        for window, log_probs, _ in evaluator.score(params, targets.codes, windows):
            low, high = max(window.first, first), min(window.end, end)
            bits[low - first : high - first] = (
                -log_probs[low - window.first : high - window.first] / LN2
            )
        pcm = quantiser.decode(targets.codes(clip)[first:end])
        begin = targets.clips[clip].start + first
        shown = picture(
            figures.excerpt(pcm, bits),
            f"{targets.clips[clip].file}, from {begin / SAMPLE_RATE:.1f} s",
            f"{bits.mean():.3f} bits per sample",
            "png",
        )
        yield shown | {"audio": player(pcm)}


def generated(workdir: Path, extra: Path | None) -> list[dict[str, str]]:
    """The generated clips, with what is recorded of them."""
    folders = [extra] if extra else [workdir / "samples", workdir / "generated"]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.wav"))]
    clips = []
    for path in [p for p in paths if not p.stem.endswith("_original")][:MOST_GENERATED]:
        try:
            duration, rate = sf.info(path).duration, sf.info(path).samplerate
            pcm, _ = sf.read(path, frames=GENERATED_SECONDS * rate, dtype="int16")
        except sf.SoundFileError as error:
            raise UserError(f"{path} can't be read as audio ({error}); move it away") from error
        about = path.with_suffix(".json")
        known = json.loads(about.read_text()) if about.exists() else {}
        words = ", ".join([f"{duration:.1f} s", *_of_a_clip(known.get("settings", {}) | known)])
        if len(pcm):
            title = str(path.relative_to(extra or workdir))
            clips.append({"title": title, "words": words, "audio": player(pcm, rate)})
    return clips


def _of_a_clip(known: dict[str, Any]) -> Iterator[str]:
    """The recorded facts of a generated clip that differ from the defaults."""
    if known.get("bits_per_sample") is not None:
        yield f"{known['bits_per_sample']:.3f} bits per sample"
    usual = {"step": None, "prompt": "", "temperature": None, "top_k": 0, "top_p": 1, "seed": None}
    for name, nothing in usual.items():
        value = known.get(name)
        if isinstance(value, (str, int, float)) and value != nothing:
            yield f"{name} {value}"
