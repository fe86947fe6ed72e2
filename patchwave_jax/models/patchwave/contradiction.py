"""Training rows that contradict their plan, so that a model learns to come back to it.

Dimensions as in `patchwave_jax.models.patchwave.plan`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from patchwave_jax.models.patchwave.plan import BANDS, EDGES_HZ, RATE, STEP_DB

DRIFT_DB = 6.0
EVENT_SAMPLES = 12_000
LEAVING_SAMPLES = 1_000
RETURN_SAMPLES = 3_000


class Contradiction(NamedTuple):
    """Training rows whose loudness has left the plan and returns to it."""

    waveform: Float32[Array, "B T"]
    excess: Float32[Array, "B T Z"]  # levels above the plan
    weight: Float32[Array, "B T"]  # of each target: 0 where the row leaves its plan


def contradict(waveform: Float32[Array, "B T"], key: Array) -> Contradiction:
    """Rows with a gain that returns to 1 again and again, of all bands, of one band or of none."""
    (rows, samples), keys = waveform.shape, jax.random.split(key, 4)
    events = samples // EVENT_SAMPLES + 2
    peaks = DRIFT_DB * jax.random.normal(keys[0], (rows, events))
    headroom = -20 * jnp.log10(jnp.maximum(jnp.abs(waveform).max(1, keepdims=True), 1e-3))
    peaks = jnp.minimum(peaks, headroom)
    shift = jax.random.randint(keys[1], (rows, 1), 0, EVENT_SAMPLES)
    time = shift + jnp.arange(samples)
    event, since = time // EVENT_SAMPLES, time % EVENT_SAMPLES
    peak = jnp.take_along_axis(peaks, event, 1)
    before = jnp.take_along_axis(peaks, jnp.maximum(event - 1, 0), 1)
    before *= math.exp(-(EVENT_SAMPLES - LEAVING_SAMPLES) / RETURN_SAMPLES)
    rising = before + (peak - before) * since / LEAVING_SAMPLES
    falling = peak * jnp.exp(-(since - LEAVING_SAMPLES) / RETURN_SAMPLES)
    leaving = since < LEAVING_SAMPLES
    decibels = jnp.where(leaving, rising, falling)

    spectrum = jnp.fft.rfft(waveform)
    frequency = np.arange(spectrum.shape[1]) * RATE / samples
    band = np.searchsorted(EDGES_HZ, frequency, side="right")
    kind = jax.random.randint(keys[2], (rows,), -2 * BANDS, 2 * BANDS)  # half: none
    everything = (kind >= 0) & (kind < BANDS)
    chosen = everything[:, None] | (kind[:, None] - BANDS == np.arange(BANDS))
    moved = jnp.fft.irfft(jnp.where(chosen[:, band], spectrum, 0), samples)
    excess = decibels[..., None] * jnp.concatenate([everything[:, None], chosen], 1)[:, None]
    gain = 10 ** (decibels / 20) - 1
    weight = jnp.where(leaving & (kind >= 0)[:, None], 0.0, 1.0)
    return Contradiction(waveform + gain * moved, excess / STEP_DB, weight)
