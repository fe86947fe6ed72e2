"""Judges what a model generates against the music that really followed: is it still piano?

Everything is measured second by second. A clip fails, in the words of `judge`, where it has become
much louder than its prompt, noise, or silence, or where no note is struck any more.

Dimensions: `T` samples, `S` seconds, `M` mel bands.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int16, Int64
from scipy import ndimage

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.reporting.spectrogram import FRAME_SAMPLES, frames_at, mel_spectrogram

LOUDER_DB = 12.0  # than the loudest second of the prompt; of real continuations a few reach 9
TREBLE_DB = -15.0  # energy above `TREBLE_HZ` over all energy; piano has -30 to -40
TREBLE_HZ = 4000
FLATNESS = 0.02  # piano has 0.001, white noise 0.6
SILENCE_DBFS = -60.0
SILENT_SECONDS = 2
ONSET_HOP = 128  # samples
ONSET_DB = 1.2  # mean rise of the mel bands over `ONSET_RISE` hops, above its running median
ONSET_MEDIAN = 1.0  # seconds
ONSET_RISE = 4
ONSET_APART = 0.06  # seconds
ONSET_RANGE_DB = 50.0  # below the clip's loudest band; weaker bands are not heard


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Measurements of each second of a clip."""

    dbfs: Float64[np.ndarray, " S"]  # root mean square, full scale 1
    treble_db: Float64[np.ndarray, " S"]
    flatness: Float64[np.ndarray, " S"]  # geometric over arithmetic mean of the power spectrum
    mel_db: Float64[np.ndarray, "S M"]
    onsets: Int64[np.ndarray, " S"]


def measure(pcm: Int16[np.ndarray, " T"]) -> Seconds:
    """Measures the whole seconds of a clip."""
    seconds = pcm.size // SAMPLE_RATE
    if not seconds:
        raise ValueError(f"{pcm.size} samples are less than a second")
    pieces = pcm[: seconds * SAMPLE_RATE].reshape(seconds, SAMPLE_RATE)
    power = np.stack([_power_spectrum(piece) for piece in pieces])
    treble = np.fft.rfftfreq(FRAME_SAMPLES, 1 / SAMPLE_RATE) >= TREBLE_HZ
    starts = np.arange(0, SAMPLE_RATE - FRAME_SAMPLES + 1, FRAME_SAMPLES // 2)
    mel = [mel_spectrogram(frames_at(piece, starts)).mean(1) for piece in pieces]
    squares = np.square(pieces / 32768).mean(1)
    times = onset_times(pcm)
    return Seconds(
        dbfs=10 * np.log10(squares + 1e-10),
        treble_db=10 * np.log10(power[:, treble].sum(1) / power.sum(1)),
        flatness=np.exp(np.log(power).mean(1)) / power.mean(1),
        mel_db=np.stack(mel),
        onsets=np.histogram(times, np.arange(seconds + 1))[0],
    )


def _power_spectrum(pcm: Int16[np.ndarray, " T"]) -> Float64[np.ndarray, " F"]:
    starts = np.arange(0, pcm.size - FRAME_SAMPLES + 1, FRAME_SAMPLES // 2)
    frames = frames_at(pcm, starts) / 32768 * np.hanning(FRAME_SAMPLES)
    return (np.abs(np.fft.rfft(frames)) ** 2).mean(0) + 1e-12


def onset_times(pcm: Int16[np.ndarray, " T"]) -> Float64[np.ndarray, " n"]:
    """Seconds at which notes begin: peaks of the mean rise of the mel bands (spectral flux)."""
    starts = np.arange(0, max(1, pcm.size - FRAME_SAMPLES), ONSET_HOP)
    mel = mel_spectrogram(frames_at(pcm, starts))
    mel = np.maximum(mel, mel.max() - ONSET_RANGE_DB)
    rise = np.maximum(mel[:, ONSET_RISE:] - mel[:, :-ONSET_RISE], 0).mean(0)
    apart = round(ONSET_APART * SAMPLE_RATE / ONSET_HOP)
    padded = np.pad(rise, apart)
    highest = np.lib.stride_tricks.sliding_window_view(padded, 2 * apart + 1).max(1)
    usual = ndimage.median_filter(rise, round(ONSET_MEDIAN * SAMPLE_RATE / ONSET_HOP))
    peaks = np.flatnonzero((rise == highest) & (rise > usual + ONSET_DB))
    peaks = peaks[np.diff(peaks, prepend=-apart - 1) > apart]
    return (peaks + ONSET_RISE / 2) * ONSET_HOP / SAMPLE_RATE + FRAME_SAMPLES / 2 / SAMPLE_RATE


def judge(prompt: Seconds, made: Seconds, real: Seconds) -> list[str]:
    """Why a continuation fails, each reason with the second (from 1) at which it begins."""
    reasons = []
    for what, wrong in (
        ("too loud", made.dbfs > prompt.dbfs.max() + LOUDER_DB),
        ("treble", made.treble_db > TREBLE_DB),
        ("noise", made.flatness > FLATNESS),
    ):
        # What is as quiet as silence has no spectrum to judge.
        wrong = wrong & (made.dbfs > SILENCE_DBFS)
        if wrong.any():
            reasons.append(f"{what} in second {np.flatnonzero(wrong)[0] + 1}")
    silent = (made.dbfs < SILENCE_DBFS) & (real.dbfs[: made.dbfs.size] >= SILENCE_DBFS)
    if silent.sum() > SILENT_SECONDS:
        reasons.append(f"silent from second {np.flatnonzero(silent)[0] + 1}")
    if not made.onsets.sum():
        reasons.append("no onset")
    return reasons
