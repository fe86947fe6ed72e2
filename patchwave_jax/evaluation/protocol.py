"""The evaluation protocol: sliding windows with one knob, `stride`.

A clip is cut into windows of `N` units (patches, or halves of a baseline's window) that advance by
`stride` units. The first counts all its samples, their context growing from nothing; each later
one counts its newest `stride` units, whose context is at least `N - stride + 1` units. So `stride`
N is "every context from scratch" and `stride` 1 "every sample with the whole context". Every
sample of a clip counts once. What lies before the clip is silence.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError


class Window(NamedTuple):
    """The targets `first` to `end` of a clip (in samples), read from a window of `units`."""

    clip: int
    first: int
    end: int
    units: int
    last_n: int  # units of targets


class Scored(NamedTuple):
    """A window with the log-probability of each of its targets."""

    window: Window
    log_probs: Float32[np.ndarray, " targets"]  # nats
    contexts: Int64[np.ndarray, " targets"]  # samples of the clip that each prediction saw


def default_stride(config: Config) -> int:
    """Half the context for a causal model; 1, the paper's whole context, for a bidirectional."""
    return max(1, config.window_units // 2) if config.causal else 1


def check_stride(stride: int, config: Config) -> None:
    """Raises `UserError` if windows can't advance by `stride`."""
    if not 1 <= stride <= config.window_units:
        raise UserError(
            f"--stride_patches must be from 1 to the context's {config.window_units}, got {stride}"
        )


def plan(
    lengths: Iterable[int], config: Config, stride: int, max_targets: int = 0, seed: int = 0
) -> list[Window]:
    """The windows over clips of these lengths.

    With `max_targets`, about as many targets: windows of at most `stride` units, one drawn from
    each of equally long runs of them, so that all are equally likely.

    Raises:
      UserError: if the stride is out of range.
    """
    check_stride(stride, config)
    size, units = config.window_unit, config.window_units
    windows = []
    for clip, length in enumerate(lengths):
        first, end = 0, min(units * size, length)
        # A causal model has no use for units past the clip's end.
        shown = min(units, -(-length // size)) if config.causal else units
        windows.append(Window(clip, first, end, shown, shown))
        while end < length:
            first, end = end, min(end + stride * size, length)
            windows.append(Window(clip, first, end, units, stride))
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
    """A window as windows of at most `stride` units of targets, whose predictions are the same.

    Only a clip's first window has more.
    """
    size = config.window_unit
    for first in range(window.first, window.end, stride * size):
        last_n = min(stride, window.last_n - (first - window.first) // size)
        units = window.units
        if config.causal:  # a window that grows from the clip's start
            units -= window.last_n - last_n - (first - window.first) // size
        yield Window(window.clip, first, min(first + last_n * size, window.end), units, last_n)


def segment(window: Window, codes: Any, config: Config, begin: int = 0) -> UInt8[np.ndarray, " S"]:
    """What the model reads for a window and in front of it; silence where the clip has nothing.

    `codes`, an array [T] or what is sliced like one, are those of the clip from its sample `begin`
    on.
    """
    end = window.first + window.last_n * config.window_unit
    start = end - window.units * config.window_unit - config.history
    read = np.full(end - start, quantisers.SILENCE, np.uint8)
    low, high = max(start, begin), min(end, begin + codes.size)
    read[low - start : high - start] = codes[low - begin : high - begin]
    return read


def contexts(window: Window, config: Config) -> Int64[np.ndarray, " targets"]:
    """Samples of the clip that each target's prediction sees."""
    index = np.arange(window.end - window.first)
    older = (window.units - window.last_n) * config.window_unit
    return np.minimum(window.first + index, config.model.context_of(index, older))
