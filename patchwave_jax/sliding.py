"""The evaluation protocol: sliding windows with one knob, `stride_patches`.

A clip is cut into windows of `N` patches that advance by `stride_patches`. The first counts all
its samples, their context growing from nothing; each later one counts its newest
`stride_patches` patches, whose context is at least `N - stride_patches + 1` patches. So
`stride_patches = N` is "every context from scratch" and `stride_patches = 1` "every sample with
the whole context". Every sample of a clip counts once. What lies before the clip is silence.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8

from patchwave_jax import quantisers
from patchwave_jax.checkpoint import Checkpoints, abstract
from patchwave_jax.config import Config
from patchwave_jax.data.index import Split
from patchwave_jax.data.windows import Clip, clips
from patchwave_jax.errors import UserError
from patchwave_jax.step import (
    LN2,
    by_rows,
    choose_chunks,
    graphdef_and_params,
    make_mesh,
    replicated,
)


class Window(NamedTuple):
    """The targets `first` to `end` of a clip (in samples), read from `patches` tokens."""

    clip: int
    first: int
    end: int
    patches: int
    newest: int  # patches of targets


class Scored(NamedTuple):
    """A window with the log-probability of each of its targets."""

    window: Window
    log_probs: Float32[np.ndarray, " targets"]  # nats
    contexts: np.ndarray  # samples of the clip that each target's prediction saw


@dataclasses.dataclass(frozen=True)
class Result:
    """An NLL with everything it depends on."""

    nll_nats: float
    nll_bits: float
    quantiser: str
    targets: int
    context_min: int
    context_mean: float
    context_max: int
    stride_patches: int
    clip_samples: int | None

    def __str__(self) -> str:
        return (
            f"{self.nll_bits:.4f} bits ({self.nll_nats:.4f} nats) per sample, quantiser "
            f"{self.quantiser}, {self.targets:,} targets, context {self.context_min:,} to "
            f"{self.context_max:,} samples (mean {self.context_mean:,.0f})"
        )


def default_stride(config: Config) -> int:
    """Half the context for the dense objective; the paper's whole context for `last`."""
    return 1 if config.objective == "last" else max(1, config.patches // 2)


def plan(
    lengths: Iterable[int], config: Config, stride: int, max_targets: int = 0, seed: int = 0
) -> list[Window]:
    """The windows over clips of these lengths.

    With `max_targets`, about so many targets from windows at even distances; where they start
    is drawn, so that every window is as likely.
    """
    size, patches = config.model.patch_samples, config.patches
    if not 1 <= stride <= patches:
        raise UserError(f"--stride_patches must be from 1 to the context's {patches}, got {stride}")
    windows = []
    for clip, length in enumerate(lengths):
        first, end = 0, min(patches * size, length)
        # A causal model has no use for patches past the clip's end.
        shown = min(patches, -(-length // size)) if config.objective == "dense" else patches
        windows.append(Window(clip, first, end, shown, shown))
        while end < length:
            first, end = end, min(end + stride * size, length)
            windows.append(Window(clip, first, end, patches, stride))
    total = sum(w.end - w.first for w in windows)
    if max_targets and total > max_targets:
        count = max(1, round(len(windows) * max_targets / total))
        offset = np.random.default_rng(seed).uniform()
        picks = ((np.arange(count) + offset) * len(windows) / count).astype(int)
        windows = [windows[i] for i in picks]
    return windows


class Evaluator:
    """A model's jitted log-probabilities of windows, for one configuration and mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        graphdef, self.abstract_params = graphdef_and_params(config)
        # Windows shorter than the machine's appetite go in together.
        self.rows = mesh.size * max(1, 64_000 // config.context_samples)
        plain = dataclasses.replace(config.train, hop=1)
        phase_chunk, chunk_patches = choose_chunks(
            dataclasses.replace(config, train=plain), self.rows // mesh.size, mesh.devices.flat[0]
        )

        def log_probs(params: Any, segments: jax.Array, newest: int) -> jax.Array:
            model = nnx.merge(graphdef, params)
            patches = segments.shape[1] // config.model.patch_samples - 1
            return model.dense_log_prob(
                segments,
                newest=newest,
                phase_chunk=phase_chunk,
                chunk_patches=chunk_patches if patches % chunk_patches == 0 else 0,
            )

        self._log_probs = jax.jit(
            log_probs,
            static_argnums=2,
            in_shardings=(replicated(mesh), by_rows(mesh)),
            out_shardings=replicated(mesh),
        )

    def score(
        self, params: Any, codes_of_clip: Any, windows: Iterable[Window]
    ) -> Iterator[Scored]:
        """Log-probabilities of each window; `codes_of_clip(i)` gives the codes of clip i."""
        waiting: dict[tuple[int, int], list[tuple[Window, UInt8[np.ndarray, " T"]]]]
        waiting = collections.defaultdict(list)
        clip, codes = -1, np.empty(0, np.uint8)
        for window in windows:
            if window.clip != clip:
                clip, codes = window.clip, codes_of_clip(window.clip)
            group = waiting[window.patches, window.newest]
            group.append((window, self._segment(codes, window)))
            if len(group) == self.rows:
                yield from self._run(params, group)
                group.clear()
        for group in waiting.values():
            if group:
                yield from self._run(params, group)

    def _segment(self, codes: UInt8[np.ndarray, " T"], window: Window) -> UInt8[np.ndarray, " T"]:
        size = self.config.model.patch_samples
        end = window.first + window.newest * size
        start = end - (window.patches + 1) * size
        segment = np.full(end - start, quantisers.SILENCE, np.uint8)
        low, high = max(start, 0), min(end, codes.size)
        segment[low - start : high - start] = codes[low:high]
        return segment

    def _run(self, params: Any, group: list[tuple[Window, np.ndarray]]) -> Iterator[Scored]:
        segments = np.stack([segment for _, segment in group])
        padding = np.repeat(segments[:1], self.rows - len(group), 0)
        newest = group[0][0].newest
        batch = np.concatenate([segments, padding])
        log_probs = np.asarray(self._log_probs(params, batch, newest))
        size = self.config.model.patch_samples
        for (window, _), row in zip(group, log_probs, strict=False):
            index = np.arange(window.end - window.first)
            reach = (window.patches - window.newest + index // size + 1) * size
            contexts = np.minimum(window.first + index, reach)
            yield Scored(window, row[: index.size], contexts)


def codes_reader(split: Split, chosen: list[Clip], quantiser: str):
    """A function from a clip's index to its codes."""

    def read(index: int) -> UInt8[np.ndarray, " T"]:
        clip = chosen[index]
        return quantisers.get(quantiser).encode(split.read(clip.recording, clip.start, clip.length))

    return read


def evaluate_split(
    evaluator: Evaluator,
    params: Any,
    split: Split,
    *,
    stride_patches: int | None = None,
    clip_samples: int | None = None,
    max_targets: int = 0,
) -> Result:
    """The NLL of a split; see this module's docstring for the protocol."""
    config = evaluator.config
    stride = default_stride(config) if stride_patches is None else stride_patches
    chosen = list(clips(split, clip_samples, drop_last=False))
    windows = plan([clip.length for clip in chosen], config, stride, max_targets)
    reader = codes_reader(split, chosen, config.data.quantiser)
    total, targets, context_sum, shortest, longest = 0.0, 0, 0.0, 2**62, 0
    for scored in evaluator.score(params, reader, windows):
        total -= float(scored.log_probs.sum(dtype=np.float64))
        targets += scored.log_probs.size
        context_sum += float(scored.contexts.sum(dtype=np.float64))
        shortest = min(shortest, int(scored.contexts.min()))
        longest = max(longest, int(scored.contexts.max()))
    nats = total / targets
    return Result(
        nll_nats=nats,
        nll_bits=nats / LN2,
        quantiser=config.data.quantiser,
        targets=targets,
        context_min=shortest,
        context_mean=context_sum / targets,
        context_max=longest,
        stride_patches=stride,
        clip_samples=clip_samples,
    )


def load(workdir: str | os.PathLike[str], step: int | None = None) -> tuple[Evaluator, Any, int]:
    """The evaluator and parameters of a run's best (or given) checkpoint, and its step."""
    mesh = make_mesh()
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.choose(step)
        evaluator = Evaluator(checkpoints.record(step).config, mesh)
        shapes = abstract(evaluator.abstract_params, replicated(mesh))
        return evaluator, checkpoints.restore_params(step, shapes), step
