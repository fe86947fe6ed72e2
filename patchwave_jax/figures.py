"""Figures of a run, by matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchwave_jax.errors import UserError
from patchwave_jax.tally import MODEL, Point, Tally

INK, FAINT = "#1f2933", "#9aa5b1"
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2")
YARDSTICK_COLOURS = {
    "order-0": "#c3c9d1",
    "previous-sample": "#aab2bd",
    "linear-32": "#c99a5b",
    "block-adaptive-32": "#b4637a",
    "block-adaptive-256": "#6d5a9c",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def make(
    rows: int = 1, height: float = 3.6, width: float = 7.6, **kwargs
) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes above each other, and they."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, **kwargs)
    return figure, list(axes[:, 0])


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the path's suffix."""
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, dpi=160)
    except ValueError as error:
        raise UserError(f"{path} can't be drawn: {error}") from error


def context_curves(tallies: Mapping[str, Tally]) -> Figure:
    """Bits against the available context, of one or several runs by label, with intervals.

    The yardsticks of the last run are drawn where they were measured.
    """
    figure, (axes,) = make(height=4.0)
    for (label, tally), colour in zip(tallies.items(), COLOURS * len(tallies), strict=False):
        curve(axes, tally.by_context(), colour, label, log=True)
    tally = list(tallies.values())[-1]
    for name in tally.names:
        if name != MODEL:
            points = tally.by_context(name)
            colour = YARDSTICK_COLOURS[name]
            axes.plot(_across(points, True), _bits(points), "--", color=colour, lw=1.2, label=name)
    axes.set(xlabel="context available to the prediction (samples)", ylabel="bits per sample")
    context_axis(axes, max(int(t.context_max) for t in tallies.values()))
    axes.legend(fontsize=8, ncols=2)
    return figure


def position_curve(tally: Tally, sample_rate: int) -> Figure:
    """Bits against the position in the clip."""
    figure, (axes,) = make(height=2.8)
    points = tally.by_position()
    seconds = [point.mean / sample_rate for point in points]
    axes.plot(seconds, _bits(points), color=COLOURS[0], marker="o", ms=2.5, lw=1.5)
    axes.set(xlabel="position in the clip (s)", ylabel="bits per sample")
    return figure


def curve(axes: Axes, points: Sequence[Point], colour: str, label: str, log: bool) -> None:
    """A line through the bins with its interval as a band."""
    x = _across(points, log)
    axes.plot(x, _bits(points), color=colour, marker="o", ms=3, lw=1.8, label=label)
    low = [math.nan if p.bits_low is None else p.bits_low for p in points]
    high = [math.nan if p.bits_high is None else p.bits_high for p in points]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def context_axis(axes: Axes, longest: int) -> None:
    """A log axis of samples, from none to `longest`, and the seconds they last above it."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, longest * 1.3)
    ticks = [1, *(4**k for k in range(2, 12) if 4**k < 0.6 * longest), longest]
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.minorticks_off()


def _across(points: Sequence[Point], log: bool) -> list[float]:
    return [max(point.mean, 1.0) if log else point.mean for point in points]


def _bits(points: Sequence[Point]) -> list[float]:
    return [point.nll_bits for point in points]


def _short(samples: int) -> str:
    if samples < 1_000:
        return str(samples)
    if samples < 1_000_000:
        return f"{samples / 1_000:.3g}k"
    return f"{samples / 1_000_000:.3g}M"
