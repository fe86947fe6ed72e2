"""The plan: a few integers for every block of samples, drawn before the block.

A model that draws samples from a scale measured on its own samples is unstable: its loudness
wanders until it clips or dies. So the loudness of a block is a latent variable `z`: the level of
the prediction error and of octave bands, in steps of 3 dB. `z` is a function of the block's samples
and is predicted from the past, one level after the other; then come the samples given `z`. So
log p(z | past) + log p(samples | past, z) is a lower bound of the samples' log-likelihood (it would
be equal if the samples could not contradict `z`), and it is this sum that is reported.

Dimensions as in `patchwave_jax.models.patchwave.model`; `L` samples per block, `G` samples between
measurements of levels, `Q` bands, `Z = Q + 1` levels of a plan, `C` features of the bank.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32
from scipy.signal import windows

from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.predictors.bank import Prediction

RATE = 16_000
EDGES_HZ = (500, 1000, 2000, 4000)  # between the bands
BANDS = len(EDGES_HZ) + 1  # Q
assert PatchWaveConfig.latent_size == BANDS + 1
STEP_DB = 3.0
NUM_LEVELS = 32  # level 31 is a mean square of 1, full scale
COMPONENTS = 4  # of the mixture that a level is drawn from
HIDDEN = 128
UNIFORM = 1e-5  # probability shared by all levels, so that none costs more than 22 bits
MIN_LEFT, MIN_SHARE = 16, 0.1  # samples that share what is left of a block's error energy; floor


class Measured(NamedTuple):
    """What the plan adds to the conditioning of each target."""

    plan: Int32[Array, "*shape Z"]  # of its block
    spent: Float32[Array, "*shape"]  # sum of squared errors of its block's samples before it
    left: Int32[Array, "*shape"]  # samples of its block from it on
    recent: Float32[Array, "*shape Q"]  # levels of the bands just before it

    def error_power(self, block_samples: int) -> Float32[Array, "*shape"]:
        """The mean square that the plan leaves for the errors of the rest of the block."""
        planned = power(self.plan[..., 0])
        rest = (block_samples * planned - self.spent) / jnp.maximum(self.left, MIN_LEFT)
        return jnp.maximum(rest, MIN_SHARE * planned)


def level(power: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Mean squares in steps of `STEP_DB`, from 0 to `NUM_LEVELS` - 1."""
    steps = 10 / STEP_DB * jnp.log10(jnp.maximum(power, 1e-12))
    return jnp.clip(steps + NUM_LEVELS - 1, 0, NUM_LEVELS - 1)


def power(level: Array) -> Float32[Array, "*shape"]:
    """The mean square of a level."""
    return jnp.exp((level - (NUM_LEVELS - 1)) * np.float32(STEP_DB / 10 * math.log(10)))


def band_levels(frames: Float32[Array, "*shape L"]) -> Float32[Array, "*shape Q"]:
    """Levels of the octave bands of stretches of samples."""
    samples = frames.shape[-1]
    window = windows.tukey(samples, 0.5)
    index = np.arange(samples // 2 + 1)
    # A product, not an FFT: short, and in any layout.
    angles = 2 * math.pi / samples * np.outer(np.arange(samples), index)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], 1) * window[:, None]
    parts = jnp.asarray(waves, jnp.float32)
    squares = jnp.square(jnp.matmul(frames, parts, precision="highest"))
    frequency = index * RATE / samples
    band = np.searchsorted(EDGES_HZ, frequency, side="right")
    weight = np.where((frequency == 0) | (frequency == RATE / 2), 1, 2)[:, None]
    gather = (band[:, None] == np.arange(BANDS)) * weight / (samples * np.square(window).sum())
    return level(squares @ jnp.asarray(np.tile(gather, (2, 1)), jnp.float32))


class Plan(nnx.Module):
    """The distribution of a block's plan given what came before the block.

    Each level is drawn from a mixture of discretised Gaussians around the level before the block,
    given the levels drawn before it.
    """

    def __init__(self, config: PatchWaveConfig, features: int, *, rngs: nnx.Rngs):
        self.block_samples = config.plan_block_samples
        self.size = BANDS + 1  # Z
        self.hidden = nnx.Linear(config.width + features + self.size, HIDDEN, rngs=rngs)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        shape = (self.size, self.size, HIDDEN)
        self.earlier = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))
        self.output = nnx.Param(small(rngs.params(), (self.size, HIDDEN, 3 * COMPONENTS)))
        spread = np.zeros((self.size, 3, COMPONENTS), np.float32)
        spread[:] = (0, 0, -2, -2), (0, -1, 2, 6), (0, 0.5, 1, 1.5)
        self.bias = nnx.Param(jnp.asarray(spread.reshape(self.size, -1)))

    def inputs(
        self,
        x: Float[Array, "*shape D"],
        prediction: Prediction,
        features: Float32[Array, "*shape C"],
        measured: Measured,
    ) -> tuple[Float32[Array, "*shape E"], Float32[Array, "*shape Z"]]:
        """What the plan is predicted from at a block's first sample, and the levels before it."""
        residual = level(jnp.square(prediction.scale))[..., None]
        before = jnp.concatenate([residual, measured.recent], -1)
        return jnp.concatenate([x.astype(jnp.float32), features, before / 8 - 2], -1), before

    def log_prob(
        self,
        x: Float[Array, "*shape D"],
        prediction: Prediction,
        features: Array,
        measured: Measured,
    ) -> Float32[Array, "*shape"]:
        """Log-probability of the plan, in nats, at a block's first sample."""
        inputs, before = self.inputs(x, prediction, features, measured)
        shared, total = self.hidden(inputs), jnp.float32(0)
        for i in range(self.size):
            logits = self._logits(i, shared, before, measured.plan)
            total += jnp.take_along_axis(logits, measured.plan[..., i, None], -1)[..., 0]
        return total

    def draw(
        self,
        x: Float[Array, "B D"],
        conditioning: tuple[Any, ...],
        uniforms: Float32[Array, "B Z"],
    ) -> tuple[Int32[Array, "B Z"], Float32[Array, " B"]]:
        """A plan, and its log-probability in nats."""
        inputs, before = self.inputs(x, *conditioning)
        shared, total = self.hidden(inputs), jnp.float32(0)
        plan = jnp.zeros(uniforms.shape, jnp.int32)
        for i in range(self.size):
            logits = self._logits(i, shared, before, plan)
            above = jnp.cumsum(jnp.exp(logits), -1) < uniforms[:, i, None]
            drawn = jnp.minimum(above.sum(-1), NUM_LEVELS - 1)
            total += jnp.take_along_axis(logits, drawn[:, None], -1)[:, 0]
            plan = plan.at[:, i].set(drawn)
        return plan, total

    def _logits(
        self, i: int, shared: Array, before: Array, plan: Array
    ) -> Float32[Array, "*shape 32"]:
        """Log-probabilities of level `i`, given those of `plan` before it."""
        changes = jnp.clip((plan - before)[..., :i] / 4, -2, 2)
        hidden = jax.nn.relu(shared + changes @ self.earlier[...][i, :i])
        raw = hidden @ self.output[...][i] + self.bias[...][i]
        weights, offsets, log_scales = jnp.split(raw, 3, -1)
        means = (before[..., i, None] + offsets)[..., None]
        inverse = jnp.exp(-jnp.clip(log_scales, -2, 2))[..., None]
        edges = np.arange(1, NUM_LEVELS, dtype=np.float32) - 0.5
        below = jax.scipy.special.ndtr((edges - means) * inverse)
        ends = [(0, 0)] * (below.ndim - 1)
        below = jnp.pad(below, [*ends, (1, 0)]), jnp.pad(below, [*ends, (0, 1)], constant_values=1)
        mass = (jax.nn.softmax(weights)[..., None] * (below[1] - below[0])).sum(-2)
        return jnp.log((1 - UNIFORM) * mass + UNIFORM / NUM_LEVELS)
