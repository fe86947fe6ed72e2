"""Figures of a run, by matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.calibration import EDGES, Calibration
from patchwave_jax.evaluation.nll import LN2, MODEL, NllAccumulator, Point, Row
from patchwave_jax.reporting.spectrogram import (
    FRAME_SAMPLES,
    HOP_SAMPLES,
    frames_at,
    mel_spectrogram,
    show_mel,
)

INK, FAINT = "#1f2933", "#9aa5b1"
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2")
CLASSICAL_COLOURS = {
    "order-0": "#c3c9d1",
    "previous-sample": "#aab2bd",
    "linear-32": "#c99a5b",
    "block-adaptive-32": "#b4637a",
    "block-adaptive-256": "#6d5a9c",
}
LEAST_CONTEXT = 64  # samples, of a curve against context
NARROW = 3.9  # inches, of figures that stand three in a row
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
}


def make(
    rows: int = 1, height: float = 3.6, width: float = 4.9, **kwargs
) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` axes above each other, and the axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, **kwargs)
    return figure, list(axes[:, 0])


def save(figure: Figure, target: Path | io.BytesIO, kind: str | None = None) -> None:
    """Writes a figure as `kind`, or in the format of the path's suffix."""
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(target, dpi=160, format=kind)
    except ValueError as error:
        raise UserError(f"{target} can't be drawn: {error}") from error


def context_curves(nlls: Mapping[str, NllAccumulator], width: float = NARROW) -> Figure:
    """Bits against the available context, of one or several runs by label, with intervals.

    Left out are bins of few units, which say little, and contexts of a few samples, whose bits are
    off any scale. The classical baselines of the last run are drawn where they come near.
    """
    figure, (axes,) = make(height=0.85 * width, width=width)
    curves = {label: _reliable(nll.by_context()) for label, nll in nlls.items()}
    for (label, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        curve(axes, [max(point.mean, 1.0) for point in points], points, colour, label)
    every = [point for points in curves.values() for point in points]
    low = min(p.nll_bits if p.bits_low is None else p.bits_low for p in every)
    high = max(p.nll_bits if p.bits_high is None else p.bits_high for p in every)
    margin = 0.15 * (high - low) + 0.02
    axes.set_ylim(max(0, low - margin), high + margin)
    last = list(nlls.values())[-1]
    for name in last.names:
        points = _reliable(last.by_context(name))
        bits = [point.nll_bits for point in points]
        if name != MODEL and min(bits) < high + margin and max(bits) > low - margin:
            x, colour = [max(point.mean, 1.0) for point in points], CLASSICAL_COLOURS[name]
            axes.plot(x, bits, "--", color=colour, lw=1.2, label=name)
    axes.set(xlabel="context available to the prediction (samples)", ylabel="bits per sample")
    longest = max(nll.context_max for nll in nlls.values())
    context_axis(axes, max(1, min(point.low for point in every)), longest)
    if len(axes.lines) > 1:
        axes.legend(**LEGEND)
    return figure


def context_gain_curve(nll: NllAccumulator) -> Figure:
    """The cost of a short context, against that context (see `measure.context_gain`)."""
    figure, (axes,) = make(height=0.85 * NARROW, width=NARROW)
    points = _reliable(nll.by_context())
    axes.axhline(0, color=FAINT, lw=1)
    curve(axes, [point.mean for point in points], points, COLOURS[0])
    axes.set(xlabel="context available to the prediction (samples)", ylabel="extra bits per sample")
    context_axis(axes, max(1, points[0].low), nll.context_max)
    return figure


def _reliable(points: Sequence[Point]) -> Sequence[Point]:
    """The points with an interval and some context; all points if none has both."""
    return [p for p in points if p.bits_low is not None and p.low >= LEAST_CONTEXT] or points


def position_curve(nll: NllAccumulator) -> Figure:
    """Bits against the position in the clip."""
    figure, (axes,) = make(height=0.85 * NARROW, width=NARROW)
    points = nll.by_position()
    curve(axes, [point.mean / SAMPLE_RATE for point in points], points, COLOURS[0])
    axes.set(xlabel="position in the clip (s)", ylabel="bits per sample")
    return figure


def curve(
    axes: Axes, x: Sequence[float], points: Sequence[Row], colour: str, label: str | None = None
) -> None:
    """A line through the bins with its interval as a band."""
    bits = [point.nll_bits for point in points]
    axes.plot(x, bits, color=colour, marker="o", ms=3, lw=1.6, label=label)
    low = [math.nan if p.bits_low is None else p.bits_low for p in points]
    high = [math.nan if p.bits_high is None else p.bits_high for p in points]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def context_axis(axes: Axes, shortest: int, longest: int) -> None:
    """A log axis of samples."""
    axes.set_xscale("log")
    axes.set_xlim(shortest / 1.1, longest * 1.15)
    decades = longest / shortest > 100
    round_numbers = [m * 10**k for k in range(7) for m in ((1,) if decades else (1, 2, 5))]
    ticks = [n for n in round_numbers if shortest <= n < longest / 1.7] + [longest]
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.minorticks_off()


def _short(samples: int) -> str:
    if samples < 1_000:
        return str(samples)
    if samples < 1_000_000:
        return f"{samples / 1_000:.3g}k"
    return f"{samples / 1_000_000:.3g}M"


def loss_curves(
    training: Sequence[Mapping], validation: Sequence[Mapping], baselines: Mapping[str, float]
) -> Figure:
    """Train and validation bits over the steps, classical baselines (nats by name) as lines."""
    figure, (axes,) = make(height=3.9)
    steps, bits = [row["step"] for row in training], [row["nll_bits"] for row in training]
    axes.plot(steps, bits, color=COLOURS[0], lw=0.8, alpha=0.35)
    axes.plot(steps, _smooth(bits), color=COLOURS[0], lw=1.6, label="train")
    if validation:
        axes.plot(
            [row["step"] for row in validation],
            [row["nll_bits"] for row in validation],
            color=COLOURS[1],
            marker="o",
            ms=4,
            lw=1.8,
            label="validation",
        )
    top = 1.15 * float(np.quantile(bits, 0.98))
    for name, nats in baselines.items():
        if (value := nats / LN2) < top:
            colour = CLASSICAL_COLOURS[name]
            axes.axhline(value, color=colour, ls="--", lw=1.2)
            axes.annotate(
                name,
                (steps[0], value),
                (0, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set(xlabel="step", ylabel="bits per sample", ylim=(0, top))
    axes.legend(loc="lower right", ncols=2, **LEGEND)
    return figure


def rates(training: Sequence[Mapping]) -> Figure:
    """Learning rate and throughput over the steps."""
    figure, (rate, speed) = make(rows=2, height=3.9, sharex=True)
    steps = [row["step"] for row in training]
    rate.plot(steps, [row["learning_rate"] for row in training], color=COLOURS[0], lw=1.6)
    rate.set(ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    thousands = [row["targets_per_second"] / 1000 for row in training]
    speed.plot(steps, thousands, color=COLOURS[2], lw=1.2)
    speed.set(xlabel="step", ylabel="k targets / s", ylim=(0, max(thousands) * 1.15))
    return figure


def reliability(calibration: Calibration) -> Figure:
    """How often a code occurred, against its predicted probability."""
    figure, (axes,) = make(height=3.9)
    axes.plot([1e-6, 1], [1e-6, 1], color=FAINT, lw=1, ls="--", label="perfectly calibrated")
    some = calibration.came >= 5  # fewer say little about a rate
    axes.plot(
        calibration.stated[some], calibration.occurred[some], color=COLOURS[0], marker="o", ms=4
    )
    axes.set(
        xscale="log", yscale="log", xlim=(1e-5, 1.3), ylim=(1e-5, 1.3),
        xlabel="predicted probability of a code", ylabel="share of such codes that occurred",
    )  # fmt: skip
    axes.legend(**LEGEND)
    return figure


def probability_histogram(calibration: Calibration) -> Figure:
    """The predicted probability of the code that occurred."""
    figure, (axes,) = make(height=3.9)
    share = 100 * calibration.came / calibration.came.sum()
    axes.bar(EDGES[:-1], share, np.diff(EDGES), align="edge", color=COLOURS[0], edgecolor="white")
    axes.set(
        xscale="log",
        xlabel="predicted probability of the code that occurred",
        ylabel="% of samples",
    )
    return figure


def excerpt(pcm: np.ndarray, bits: np.ndarray) -> Figure:
    """Waveform, mel spectrogram and the surprise of each sample, above each other."""
    figure, (wave, mel, surprise) = make(
        rows=3, height=5.2, sharex=True, gridspec_kw={"height_ratios": [1, 1.8, 1.2]}
    )
    seconds = np.arange(len(pcm)) / SAMPLE_RATE
    wave.plot(seconds, pcm / 32768, color=INK, lw=0.3)
    wave.set(ylabel="waveform")
    centred = np.pad(pcm, FRAME_SAMPLES // 2)
    power = mel_spectrogram(frames_at(centred, np.arange(0, len(pcm), HOP_SAMPLES)))
    show_mel(mel, power, len(pcm) / SAMPLE_RATE, vmin=power.max() - 70, cmap="magma")
    mel.set(ylabel="mel band", xlim=(0, len(pcm) / SAMPLE_RATE))
    mel.grid(False)
    step = SAMPLE_RATE // 100
    whole = len(bits) // step * step
    stretches = bits[:whole].reshape(-1, step)
    at = (np.arange(len(stretches)) + 0.5) * step / SAMPLE_RATE
    low, high = np.quantile(stretches, [0.1, 0.9], axis=1)
    surprise.fill_between(at, low, high, color=COLOURS[1], alpha=0.25, lw=0)
    surprise.plot(at, stretches.mean(1), color=COLOURS[1], lw=1.1)
    surprise.set(xlabel="seconds", ylabel="surprise (bits)")
    surprise.set_ylim(bottom=0)
    return figure


def _smooth(values: Sequence[float], most: int = 25) -> np.ndarray:
    """Means of the newest values, fewer at the start."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - most)
    return (sums[ends] - sums[starts]) / (ends - starts)
