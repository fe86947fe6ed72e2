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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float32, Int64, UInt8

from patchwave_jax.checkpoint import Checkpoints, abstract
from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.models.context_parallel import AXIS
from patchwave_jax.models.wavenet import WaveNetConfig
from patchwave_jax.runtime import distributed
from patchwave_jax.runtime.memory import choose_chunks
from patchwave_jax.runtime.mesh import by_rows, context_shards, make_mesh, one_device, replicated
from patchwave_jax.training.step import graphdef_and_params

BATCH_SAMPLES = 64_000  # of windows that a device scores at once, or one window if it is longer
RECURRENT_ROWS = 8  # of SampleRNN, whose steps read all weights for however few rows


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
    contexts: Int64[np.ndarray, " targets"]  # samples of the clip that each prediction saw


def default_stride(config: Config) -> int:
    """Half the context for the dense objective; the paper's whole context for `last`."""
    return 1 if config.objective == "last" else max(1, config.patches // 2)


def plan(
    lengths: Iterable[int], config: Config, stride: int, max_targets: int = 0, seed: int = 0
) -> list[Window]:
    """The windows over clips of these lengths.

    With `max_targets`, about so many targets: windows of at most `stride` patches, one drawn from
    each of equally long runs of them, so that all are as likely.
    """
    size, patches = config.patch_samples, config.patches
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
        windows = [piece for window in windows for piece in pieces(window, stride, config)]
        count = max(1, round(len(windows) * max_targets / total))
        rng = np.random.default_rng(seed)
        starts = np.arange(count) * len(windows) // count
        sizes = np.diff(starts, append=len(windows))
        picks = (starts + rng.integers(sizes) + rng.integers(len(windows))) % len(windows)
        windows = [windows[i] for i in np.sort(picks)]
    return windows


def pieces(window: Window, stride: int, config: Config) -> Iterator[Window]:
    """A window as windows of at most `stride` patches of targets, whose predictions are the same.

    Only a clip's first window has more.
    """
    size = config.patch_samples
    for first in range(window.first, window.end, stride * size):
        newest = min(stride, window.newest - (first - window.first) // size)
        patches = window.patches
        if config.objective == "dense":  # a window that grows from the clip's start
            patches -= window.newest - newest - (first - window.first) // size
        yield Window(window.clip, first, min(first + newest * size, window.end), patches, newest)


class Evaluator:
    """A model's jitted log-probabilities of windows, for one configuration and mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        graphdef, self.abstract_params = graphdef_and_params(config)
        each = max(1, BATCH_SAMPLES // config.context_samples)
        each = each if config.segments == 1 else max(each, RECURRENT_ROWS)
        self.rows = mesh.shape["data"] * each
        plain = dataclasses.replace(config, train=dataclasses.replace(config.train, hop=1))
        shards = context_shards(plain, mesh)
        self._sharing = shards.count if shards else 1
        phase_chunk, self._chunk_patches = choose_chunks(plain, each, one_device(mesh), shards)

        def own_log_probs(params: Any, segments: jax.Array, newest: int) -> jax.Array:
            model = nnx.merge(graphdef, params)
            patches = segments.shape[1] // config.patch_samples - 1
            return model.dense_log_prob(
                segments,
                newest=newest,
                phase_chunk=phase_chunk,
                chunk_patches=min(patches // self._sharing, self._chunk_patches),
                shards=shards,
            )

        def log_probs(params: Any, segments: jax.Array, newest: int) -> jax.Array:
            if shards is None:
                return own_log_probs(params, segments, newest)
            shared = jax.shard_map(
                lambda params, segments: own_log_probs(params, segments, newest),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("data")),
                out_specs=PartitionSpec("data", AXIS),
                check_vma=False,
            )
            out = shared(params, segments)  # device by device, and of each the patches in turn
            out = out.reshape(self.rows, shards.count, newest, -1)
            return jnp.swapaxes(out, 1, 2).reshape(self.rows, -1)

        self._log_probs = jax.jit(
            log_probs,
            static_argnums=2,
            in_shardings=(replicated(mesh), by_rows(mesh)),
            out_shardings=replicated(mesh),
        )

    def score(self, params: Any, codes_of_clip: Any, windows: Iterable[Window]) -> Iterator[Scored]:
        """Log-probabilities of each window; `codes_of_clip(i)` gives the codes of clip i.

        Windows of one shape come back in their order, those of different shapes interleaved.
        """

        def segments() -> Iterator[tuple[Window, UInt8[np.ndarray, " T"]]]:
            clip, codes = -1, np.empty(0, np.uint8)
            for window in windows:
                if window.clip != clip:
                    clip, codes = window.clip, codes_of_clip(window.clip)
                yield window, segment(window, codes, self.config.patch_samples)

        return self.score_segments(params, segments())

    def score_segments(
        self, params: Any, segments: Iterable[tuple[Window, UInt8[np.ndarray, " T"]]]
    ) -> Iterator[Scored]:
        """As `score`, of windows that come with their codes."""
        waiting: dict[tuple[int, int], list[tuple[Window, UInt8[np.ndarray, " T"]]]]
        waiting = collections.defaultdict(list)
        for window, codes in segments:
            shape = self._shape(window)
            group = waiting[shape]
            group.append((window, codes))
            if len(group) == self.rows:
                yield from self._run(params, shape, group)
                group.clear()
        for shape, group in waiting.items():
            if group:
                yield from self._run(params, shape, group)

    def _shape(self, window: Window) -> tuple[int, int]:
        """`(patches, newest)` of the program that computes a window.

        The windows of short clips, and pieces of a clip's first window, are of all lengths. They
        share a few programs, which read more patches than they need: silence behind the window,
        where a causal model's targets don't look.
        """
        if window.patches == self.config.patches:
            return window.patches, window.newest
        unit, most = self._sharing, self._sharing * self._chunk_patches  # that are encoded at once
        if window.patches > most:
            unit, most = most, self.config.patches
        patches = min(most, unit << (-(-window.patches // unit) - 1).bit_length())
        return patches, patches

    def _run(
        self, params: Any, shape: tuple[int, int], group: list[tuple[Window, np.ndarray]]
    ) -> Iterator[Scored]:
        (patches, newest), size = shape, self.config.patch_samples
        batch = np.full((self.rows, (patches + 1) * size), quantisers.SILENCE, np.uint8)
        for row, (_, codes) in zip(batch, group, strict=False):
            row[: codes.size] = codes
        own = distributed.own_rows(self.mesh, self.rows)
        placed = distributed.place_rows(self.mesh, batch[own], self.rows)
        log_probs = np.asarray(self._log_probs(params, placed, newest))
        for (window, _), row in zip(group, log_probs, strict=False):
            skipped = (window.patches - window.newest - patches + newest) * size
            row = row[skipped : skipped + window.end - window.first]
            yield Scored(window, row, contexts(window, self.config))


def segment(
    window: Window, codes: UInt8[np.ndarray, " T"], size: int, begin: int = 0
) -> UInt8[np.ndarray, " S"]:
    """What the model reads for a window, silence where the clip has nothing.

    `codes` are those of the clip from its sample `begin` on, `size` is a patch.
    """
    end = window.first + window.newest * size
    start = end - (window.patches + 1) * size
    read = np.full(end - start, quantisers.SILENCE, np.uint8)
    low, high = max(start, begin), min(end, begin + codes.size)
    read[low - start : high - start] = codes[low - begin : high - begin]
    return read


def contexts(window: Window, config: Config) -> Int64[np.ndarray, " targets"]:
    """Samples of the clip that each target's prediction sees."""
    index, size = np.arange(window.end - window.first), config.patch_samples
    older = (window.patches - window.newest) * size
    if not config.is_baseline:
        reach = older + (index // size + 1) * size
    elif isinstance(config.model, WaveNetConfig):
        reach = config.model.receptive_field
    else:
        reach = older + index
    return np.minimum(window.first + index, reach)


def load(
    workdir: str | os.PathLike[str], step: int | None = None, mesh: Mesh | None = None
) -> tuple[Evaluator, Any, int]:
    """The evaluator and parameters of a run's best (or given) checkpoint, and its step.

    `mesh` is all devices unless given.
    """
    mesh = mesh or make_mesh()
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.choose(step)
        evaluator = Evaluator(checkpoints.record(step).config, mesh)
        shapes = abstract(evaluator.abstract_params, replicated(mesh))
        return evaluator, checkpoints.restore_params(step, shapes), step
