"""A picture of a clip, in constant memory: its waveform and its mel spectrogram."""

from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float64, Int16
from matplotlib.figure import Figure

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.generation.clips import WAV_HEADER_BYTES

matplotlib.use("agg")

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


def plot(wav: Path, prompt_samples: int, title: str) -> Path:
    """Draws a WAV file that this package wrote, with the prompt marked, to a PNG beside it."""
    pcm = np.memmap(wav, "<i2", "r", WAV_HEADER_BYTES)
    step = max(HOP_SAMPLES, -(-pcm.size // COLUMNS))
    starts = np.arange(0, max(pcm.size, 1), step)
    frames = np.zeros((starts.size, FRAME_SAMPLES), np.int16)
    low, high = np.zeros(starts.size), np.zeros(starts.size)
    for i, start in enumerate(starts):
        frame = pcm[start : start + FRAME_SAMPLES]
        frames[i, : frame.size] = frame
        stretch = pcm[start : start + step]
        low[i], high[i] = stretch.min() / 32768, stretch.max() / 32768
    seconds = starts / SAMPLE_RATE
    figure = Figure(figsize=(12, 6), layout="constrained")
    wave, mel = figure.subplots(2, sharex=True)
    wave.fill_between(seconds, low, high, linewidth=0.5, step="post")
    wave.set(title=title, ylabel="amplitude", ylim=(-1, 1))
    extent = (0.0, float(seconds[-1] + step / SAMPLE_RATE), 0.0, float(MELS))
    mel.imshow(
        mel_spectrogram(frames), origin="lower", aspect="auto", extent=extent, vmin=-90, vmax=0
    )
    mel.set(xlabel="seconds", ylabel="mel band, to 8 kHz")
    for axes in (wave, mel):
        if prompt_samples:
            axes.axvline(prompt_samples / SAMPLE_RATE, color="red", linewidth=1)
    path = wav.with_suffix(".png")
    figure.savefig(path, dpi=100)
    return path
