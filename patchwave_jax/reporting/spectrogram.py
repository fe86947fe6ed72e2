"""A picture of a clip, in constant memory: its waveform and its mel spectrogram."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int16, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.generation.clips import WAV_HEADER_BYTES

COLUMNS = 1200  # of the picture: longer clips are subsampled, shorter ones have fewer
FRAME_SAMPLES = 1024
HOP_SAMPLES = 256  # the minimum between columns
MELS = 80


def mel_filters() -> Float64[np.ndarray, "M F"]:
    """Triangles on the mel scale (HTK's formula), each of unit sum."""
    bins = np.fft.rfftfreq(FRAME_SAMPLES, 1 / SAMPLE_RATE)
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    low, peak, high = (edges[i : MELS + i, None] for i in range(3))
    triangles = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak))
    triangles = np.maximum(triangles, 0)
    return triangles / np.maximum(triangles.sum(1, keepdims=True), 1e-12)


def mel_spectrogram(frames: Int16[np.ndarray, "T S"]) -> Float64[np.ndarray, "M T"]:
    """Mel power of each frame, in dB of a full-scale sine."""
    windowed = frames / 32768 * np.hanning(FRAME_SAMPLES) * 4 / FRAME_SAMPLES
    power = np.abs(np.fft.rfft(windowed)) ** 2
    return 10 * np.log10(mel_filters() @ power.T + 1e-10)


def frames_at(
    pcm: Int16[np.ndarray, " n"], starts: Int64[np.ndarray, " T"]
) -> Int16[np.ndarray, "T S"]:
    """The frames that begin at `starts`, padded with zeros."""
    frames = np.zeros((starts.size, FRAME_SAMPLES), np.int16)
    for frame, start in zip(frames, starts, strict=True):
        found = pcm[start : start + FRAME_SAMPLES]
        frame[: found.size] = found
    return frames


def show_mel(axes: Axes, power: Float64[np.ndarray, "M T"], seconds: float, **style: Any) -> None:
    """Draws a mel spectrogram over `seconds`."""
    extent = (0.0, seconds, 0.0, float(MELS))
    axes.imshow(power, origin="lower", aspect="auto", extent=extent, **style)


def plot(wav: Path, prompt_samples: int, title: str) -> Path:
    """Draws a WAV file that this package wrote, with the prompt marked, to a PNG beside it."""
    pcm = np.memmap(wav, "<i2", "r", WAV_HEADER_BYTES)
    step = max(HOP_SAMPLES, -(-pcm.size // COLUMNS))
    starts = np.arange(0, max(pcm.size, 1), step)
    stretches = [pcm[start : start + step] / 32768 for start in starts]
    low, high = ([extreme(x) for x in stretches] for extreme in (np.min, np.max))
    seconds = starts / SAMPLE_RATE
    figure = Figure(figsize=(12, 6), layout="constrained")
    wave, mel = figure.subplots(2, sharex=True)
    wave.fill_between(seconds, low, high, linewidth=0.5, step="post")
    wave.set(title=title, ylabel="amplitude", ylim=(-1, 1))
    power = mel_spectrogram(frames_at(pcm, starts))
    show_mel(mel, power, float(seconds[-1] + step / SAMPLE_RATE), vmin=-90, vmax=0)
    mel.set(xlabel="seconds", ylabel="mel band, to 8 kHz")
    for axes in (wave, mel):
        if prompt_samples:
            axes.axvline(prompt_samples / SAMPLE_RATE, color="red", linewidth=1)
    path = wav.with_suffix(".png")
    figure.savefig(path, dpi=100)
    return path
