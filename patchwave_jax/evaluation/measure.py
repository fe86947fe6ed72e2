"""Measures a model and classical baselines on a split: numbers with all that they depend on.

The protocol is that of `patchwave_jax.evaluation.protocol`. Clips of a given length start again at
each source file, as in the published protocol (Goel et al. 2022); otherwise a recording is a clip.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.data.index import Split
from patchwave_jax.data.windows import Clip, clips
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import protocol
from patchwave_jax.evaluation.classical import NAMES, ClassicalBaselines
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.nll import MODEL, NllAccumulator
from patchwave_jax.evaluation.protocol import Window

HISTORY_SAMPLES = 8_192  # that baselines read before a stretch: all that they depend on
STRETCH_SAMPLES = 262_144  # that baselines predict at once, at most


@dataclasses.dataclass(frozen=True)
class Result:
    """An NLL with everything it depends on."""

    nll_nats: float
    nll_bits: float
    bits_low: float | None  # 95% interval; None where there are too few units to resample
    bits_high: float | None
    interval_over: str
    quantiser: str
    targets: int
    context_min: int
    context_mean: float
    context_max: int
    stride_patches: int
    clip_samples: int | None
    drop_last: bool

    def __str__(self) -> str:
        interval = "no interval from"
        if self.bits_low is not None:
            interval = f"95% interval {self.bits_low:.4f} to {self.bits_high:.4f} over"
        return (
            f"{self.nll_bits:.4f} bits ({self.nll_nats:.4f} nats) per sample, {interval} "
            f"{self.interval_over}; quantiser {self.quantiser}, {self.targets:,} targets, context "
            f"{self.context_min:,} to {self.context_max:,} samples (mean {self.context_mean:,.0f})"
        )


class Targets(NamedTuple):
    """What is measured: windows over clips of a split, and the codes of the clips."""

    split: Split
    clips: list[Clip]
    windows: list[Window]
    stride_patches: int
    clip_samples: int | None
    drop_last: bool
    config: Config

    def codes(self, clip: int) -> Any:
        """Codes of a clip; read when sliced, unless the quantiser needs the whole clip."""
        return ClipCodes(self.split, self.clips[clip], self.config.data.quantiser)

    def accumulator(self) -> NllAccumulator:
        return NllAccumulator(self.split.recordings, self.clips, self.config.context_samples)


class ClipCodes:
    """A clip's codes as an array of `size` that reads only the slice that is asked for."""

    def __init__(self, split: Split, clip: Clip, quantiser: str):
        self.size = clip.length
        self._split, self._clip, self._quantiser = split, clip, quantisers.get(quantiser)
        # Scaled by the extremes of the whole clip.
        self._whole = self._read(0, clip.length) if quantiser == "sashimi" else None

    def __getitem__(self, piece: slice) -> UInt8[np.ndarray, " n"]:
        if self._whole is not None:
            return self._whole[piece]
        low, high, _ = piece.indices(self.size)
        return self._read(low, high)

    def _read(self, low: int, high: int) -> UInt8[np.ndarray, " n"]:
        pcm = self._split.read(self._clip.recording, self._clip.start + low, max(high - low, 0))
        return self._quantiser.encode(pcm)


def choose_targets(
    config: Config,
    split: Split,
    *,
    stride_patches: int | None = None,
    clip_samples: int | None = None,
    drop_last: bool = False,
    max_targets: int = 0,
    seed: int = 0,
) -> Targets:
    """The targets of `split` under a protocol; the defaults are those of training.

    Raises:
      UserError: if the stride or the clip length is out of range, or no clip is left.
    """
    stride = protocol.default_stride(config) if stride_patches is None else stride_patches
    if drop_last and clip_samples is None:
        raise UserError(
            "--drop_last needs --clip_samples, the length below which clips are left out"
        )
    chosen = list(clips(split, clip_samples, drop_last, per_file=clip_samples is not None))
    if not chosen:
        longest = max(file.num_samples for r in split.recordings for file in r.files)
        raise UserError(
            f"no file of {split.dataset} {split.name} holds a clip of --clip_samples="
            f"{clip_samples}: the longest has {longest} samples"
        )
    windows = protocol.plan([c.length for c in chosen], config, stride, max_targets, seed)
    return Targets(split, chosen, windows, stride, clip_samples, drop_last, config)


def measure(
    evaluator: Evaluator, params: Any, targets: Targets, nll: NllAccumulator | None = None
) -> NllAccumulator:
    """Adds the model's log-probabilities of `targets` to `nll`, a new one by default."""
    nll = nll or targets.accumulator()
    scored = evaluator.score(params, targets.codes, targets.windows)
    for item in _with_bar(scored, len(targets.windows), "windows"):
        nll.add(item.window.clip, item.window.first, item.contexts, item.log_probs)
    return nll


def measure_classical(
    baselines: ClassicalBaselines,
    targets: Targets,
    nll: NllAccumulator | None = None,
    names: Sequence[str] = NAMES,
) -> NllAccumulator:
    """Adds the classical baselines' log-probabilities of the same targets."""
    nll = nll or targets.accumulator()
    stretches = list(_stretches(targets.windows))
    for windows in _with_bar(stretches, len(stretches), "classical baselines"):
        clip, first, end = windows[0].clip, windows[0].first, windows[-1].end
        contexts = np.concatenate([protocol.contexts(window, targets.config) for window in windows])
        log_probs = classical_log_probs(baselines, targets.codes(clip), first, end, names)
        for name, values in log_probs.items():
            nll.add(clip, first, contexts, values, name)
    return nll


def context_gain(evaluator: Evaluator, params: Any, growing: Targets) -> NllAccumulator | None:
    """What a longer context gains over a short one, by the short one, on the same targets.

    `growing` has windows of the whole context from scratch (stride N). For each of their targets
    that has a whole context behind it, the nll holds by how much -log p falls when the
    context grows to at least half of the whole. None if there is no such target.
    """
    config, size = growing.config, growing.config.window_unit
    stride = config.window_units // 2
    short = [window for window in growing.windows if window.first > 0]
    if not short or stride == 0:
        return None
    long = [
        Window(w.clip, first, min(first + stride * size, w.end), config.window_units, stride)
        for w in short
        for first in range(w.first, w.end, stride * size)
    ]
    known: dict[tuple[int, int], protocol.Scored] = {}
    for item in _with_bar(evaluator.score(params, growing.codes, short), len(short), "windows"):
        known[item.window.clip, item.window.first] = item
    nll, span = growing.accumulator(), config.context_samples
    for item in _with_bar(evaluator.score(params, growing.codes, long), len(long), "windows"):
        clip, first, end, *_ = item.window
        begin = first // span * span  # of the short window: they follow each other
        _, log_probs, contexts = known[clip, begin]
        piece = slice(first - begin, end - begin)
        nll.add(clip, first, contexts[piece], log_probs[piece] - item.log_probs)
    return nll


def classical_log_probs(
    baselines: ClassicalBaselines, codes: Any, first: int, end: int, names: Sequence[str] = NAMES
) -> dict[str, Float32[np.ndarray, " n"]]:
    """Log-probabilities of the samples `first` to `end` of a clip, from all before them."""
    begin = max(0, (first - HISTORY_SAMPLES) // HISTORY_SAMPLES * HISTORY_SAMPLES)
    log_probs = baselines.log_probs(codes[begin:end], names)
    return {name: values[first - begin :] for name, values in log_probs.items()}


def _stretches(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Runs of windows whose targets follow each other."""
    run: list[Window] = []
    for window in windows:
        follows = run and window.clip == run[-1].clip and window.first == run[-1].end
        if run and not (follows and window.end - run[0].first <= STRETCH_SAMPLES):
            yield run
            run = []
        run.append(window)
    if run:
        yield run


def _with_bar(items: Iterable[Any], total: int, unit: str) -> Iterable[Any]:
    return tqdm(items, total=total, unit=unit, leave=False, disable=not sys.stderr.isatty())


def result(nll: NllAccumulator, targets: Targets, name: str = MODEL) -> Result:
    """The NLL of everything in `nll`."""
    row = nll.total(name)
    return Result(
        nll_nats=row.nll_nats,
        nll_bits=row.nll_bits,
        bits_low=row.bits_low,
        bits_high=row.bits_high,
        interval_over=nll.interval_over,
        quantiser=targets.config.data.quantiser,
        targets=row.targets,
        context_min=nll.context_min,
        context_mean=nll.context_mean,
        context_max=nll.context_max,
        stride_patches=targets.stride_patches,
        clip_samples=targets.clip_samples,
        drop_last=targets.drop_last,
    )


def evaluate_split(evaluator: Evaluator, params: Any, split: Split, **protocol: Any) -> Result:
    """The NLL of a split; `protocol` holds the keywords of `choose_targets`."""
    targets = choose_targets(evaluator.config, split, **protocol)
    return result(measure(evaluator, params, targets), targets)
