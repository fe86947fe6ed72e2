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
from jaxtyping import Array, Float, Float32, Int32, UInt8
from scipy.signal import windows

from patchwave_jax.data import quantisers
from patchwave_jax.models import ring
from patchwave_jax.models.base import Latent
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.patchwave.heads import Conditioning, Mixture
from patchwave_jax.models.predictors.bank import LIMIT, BankState, Prediction

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
# Of training rows that contradict their plan:
DRIFT_DB = 6.0
EVENT_SAMPLES = 12_000
LEAVING_SAMPLES = 1_000
RETURN_SAMPLES = 3_000


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
        given: Int32[Array, "B Z"],
    ) -> tuple[Int32[Array, "B Z"], Float32[Array, " B"]]:
        """A plan and its log-probability in nats; levels of `given` from 0 on are kept."""
        inputs, before = self.inputs(x, *conditioning)
        shared, total = self.hidden(inputs), jnp.float32(0)
        plan = jnp.zeros(given.shape, jnp.int32)
        for i in range(self.size):
            logits = self._logits(i, shared, before, plan)
            above = jnp.cumsum(jnp.exp(logits), -1) < uniforms[:, i, None]
            drawn = jnp.minimum(above.sum(-1), NUM_LEVELS - 1)
            drawn = jnp.where(given[:, i] < 0, drawn, given[:, i])
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


class PlannedState(NamedTuple):
    """State of `B` streams before their newest sample is observed."""

    codes: UInt8[Array, "B 2R"]  # ring of the newest samples
    bank: BankState
    prediction: Prediction  # of the next sample, and the bank's features
    features: Float32[Array, "B C"]
    spent: Float32[Array, " B"]  # sum of squared errors in this block
    recent: Float32[Array, "B Q"]  # levels of the bands
    plan: Int32[Array, "B Z"]  # of the current block
    plan_log_prob: Float32[Array, " B"]


class PlannedMixture(Mixture):
    """A logistic mixture around the bank's predictions whose loudness is the plan's.

    The error's scale is the planned one. A component's mean is a convex combination of the bank's
    predictions plus an offset.
    """

    def __init__(self, config: PatchWaveConfig, quantiser: str, *, rngs: nnx.Rngs):
        self.components, self.quantiser = config.mixture_components, quantiser
        self.bank, self.grid = config.predictor_bank(quantiser), config.adaptive_block_samples
        self.plan = Plan(config, self.bank.num_features, rngs=rngs)
        self.outputs = 3 + self.bank.count
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        spread = np.zeros((self.components, self.outputs), np.float32)
        spread[:, 2] = np.linspace(-2, 1, self.components)
        count = self.outputs * self.components
        dtype = jnp.dtype(config.compute_dtype)
        self.linear = nnx.Linear(
            config.readout_width, count, kernel_init=small, dtype=dtype, rngs=rngs
        )
        assert self.linear.bias is not None
        self.linear.bias[...] = jnp.asarray(spread.reshape(-1))

    @property
    def lookback(self) -> int:
        return self.bank.lookback

    def condition(
        self,
        codes: UInt8[Array, "B T"],
        first: int,
        position: int = 0,
        plan: Int32[Array, "B Z"] | None = None,
        excess: Float32[Array, "B n Z"] | None = None,
    ) -> Conditioning:
        """As `LogisticMixture.condition`. `plan` is given for one target inside a block.

        `excess` are levels that each sample has too much of for the plan that it is told.
        """
        size, rows = self.plan.block_samples, codes.shape[0]
        inside, count = position % size, codes.shape[1] - first
        first -= inside
        prediction, features = self.bank.predict(codes, first)
        waveform, _ = self.bank.decode(codes)
        both = jnp.stack([waveform[:, first:], waveform[:, first:] - prediction.mean])
        both = jnp.pad(both, ((0, 0), (0, 0), (0, -(inside + count) % size)))
        targets, errors = both.reshape(2, rows, -1, size)
        errors = jnp.square(errors)
        if plan is None:
            levels = [level(errors.mean(-1))[..., None], band_levels(targets)]
            levels = jnp.concatenate(levels, -1)
            levels = levels if excess is None else levels - excess[:, ::size]
            plan = jnp.clip(jnp.round(levels), 0, NUM_LEVELS - 1).astype(jnp.int32)
        else:
            plan = plan[:, None]
        plan = _repeat(plan, size)[:, : inside + count]
        spent = jnp.pad(jnp.cumsum(errors[..., :-1], -1), ((0, 0), (0, 0), (1, 0)))
        spent = spent.reshape(rows, -1)[:, : inside + count]
        left = jnp.broadcast_to(size - np.arange(inside + count) % size, spent.shape)
        recent = self._levels(waveform, first, inside + count)
        measured = Measured(plan, spent, left, recent)
        return (), jax.tree.map(lambda x: x[:, inside:], (prediction, features, measured))

    def levels(
        self, codes: UInt8[Array, "B T"], first: int, position: int = 0
    ) -> Float32[Array, "B n Q"]:
        """Levels of the bands before each of the samples from `first` on, and after the last."""
        waveform, _ = self.bank.decode(codes)
        offset, count = position % self.grid, codes.shape[1] - first + 1
        return self._levels(waveform, first - offset, offset + count)[:, offset:]

    def _levels(
        self, waveform: Float32[Array, "B T"], first: int, count: int
    ) -> Float32[Array, "B n Q"]:
        """Levels of the newest block's length of samples, measured again every `grid` samples."""
        size, cells = self.plan.block_samples, -(-count // self.grid)
        padded = jnp.pad(waveform, ((0, 0), (size, 0)))
        index = first + np.arange(cells)[:, None] * self.grid + np.arange(size)
        return _repeat(band_levels(padded[:, index]), self.grid)[:, :count]

    def readout_inputs(
        self,
        x: Float[Array, "*shape D"],
        prediction: Prediction,
        features: Float32[Array, "*shape C"],
        measured: Measured,
    ) -> Float32[Array, "*shape E"]:
        residual = level(jnp.square(prediction.scale))[..., None]
        change = measured.plan - jnp.concatenate([residual, measured.recent], -1)
        size = self.plan.block_samples
        budget = jnp.log(measured.error_power(size) / power(measured.plan[..., 0]))
        place = jnp.stack([budget, measured.left / size], -1)
        more = features, measured.plan / 8 - 2, jnp.clip(change / 4, -LIMIT, LIMIT), place
        return jnp.concatenate([x, *(f.astype(x.dtype) for f in more)], -1)

    def _mixture(
        self, hidden: Array, prediction: Prediction, *features: Any
    ) -> tuple[Array, Array, Array]:
        raw, measured = self.linear(hidden).astype(jnp.float32), features[-1]
        raw = raw.reshape(*raw.shape[:-1], self.components, self.outputs)
        assert prediction.differences is not None
        assert prediction.log_trust is not None
        assert prediction.rounding is not None
        trust = jax.nn.softmax(raw[..., 3:] + prediction.log_trust[..., None, :])
        lean = (trust * prediction.differences[..., None, :]).sum(-1)
        means = prediction.mean[..., None] + lean * prediction.scale[..., None]
        planned = measured.error_power(self.plan.block_samples)
        scale = jnp.sqrt(planned + prediction.rounding)[..., None]
        log_scales = jnp.clip(jnp.clip(raw[..., 2], -8, 0.7) + jnp.log(scale), -14.0, 2.0)
        means = means + jnp.clip(raw[..., 1], -4, 4) * scale
        return jax.nn.log_softmax(raw[..., 0]), means, log_scales

    # Generation, one sample at a time.

    @property
    def _recent(self) -> int:
        return max(self.plan.block_samples, self.bank.step_lookback)

    def init_state(self, rows: int) -> PlannedState:
        codes = jnp.full((rows, 2 * self._recent), quantisers.SILENCE, jnp.uint8)
        zeros, each = jnp.zeros(rows), jnp.zeros((rows, self.bank.count))
        return PlannedState(
            codes,
            self.bank.init_state(rows),
            Prediction(zeros, zeros, each, each, zeros),
            jnp.zeros((rows, self.bank.num_features)),
            zeros,
            jnp.zeros((rows, BANDS)),
            jnp.zeros((rows, self.plan.size), jnp.int32),
            zeros,
        )

    def prime(
        self, history: UInt8[Array, "B T"], end: Int32[Array, ""], position: Int32[Array, ""]
    ) -> PlannedState:
        """As `LogisticMixture.prime`, where a block begins: it has no plan yet."""
        missing = self.lookback + self.bank.block_samples + self._recent
        history = jnp.pad(history, ((0, 0), (missing, 0)), constant_values=quantisers.SILENCE)
        end = end + missing
        codes = jax.lax.dynamic_slice_in_dim(history, end - self._recent, self._recent, 1)
        bank = self.bank.prime(history, end, position)
        state = self.init_state(history.shape[0])
        return state._replace(codes=ring.from_newest(codes, position), bank=bank)

    def step(
        self, state: PlannedState, code: UInt8[Array, " B"], position: Int32[Array, ""]
    ) -> PlannedState:
        codes, size = ring.put(state.codes, position - 1, code), self.plan.block_samples
        recent = ring.newest(codes, position - 1, self._recent)
        newest = recent[:, recent.shape[1] - self.bank.step_lookback :]
        bank = self.bank.step(state.bank, newest, position)
        prediction, features = jax.tree.map(
            lambda x: x[:, 0], self.bank.describe_next(bank, newest, position)
        )
        error = self.bank.decode(code)[0] - state.prediction.mean
        spent = jnp.where(position % size == 0, 0, state.spent + jnp.square(error))

        def measure() -> Array:
            return band_levels(self.bank.decode(recent[:, recent.shape[1] - size :])[0])

        levels = jax.lax.cond(position % self.grid == 0, measure, lambda: state.recent)
        return PlannedState(
            codes, bank, prediction, features, spent, levels, state.plan, state.plan_log_prob
        )

    def begin(
        self, state: PlannedState, x: Float[Array, "B D"], position: Array, latent: Latent
    ) -> PlannedState:
        """The state with a plan for the block that begins at `position`, after the step."""
        _, conditioning = self.condition_next(state, position)
        plan, log_prob = self.plan.draw(x, conditioning, *latent)
        return state._replace(plan=plan, plan_log_prob=log_prob)

    def condition_next(self, state: PlannedState, position: Int32[Array, ""]) -> Conditioning:
        size = self.plan.block_samples
        left = jnp.broadcast_to(size - position % size, state.spent.shape)
        measured = Measured(state.plan, state.spent, left, state.recent)
        return (), (state.prediction, state.features, measured)


def _repeat(x: Array, count: int) -> Array:
    """Each of the second axis `count` times."""
    repeated = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], count, *x.shape[2:]))
    return repeated.reshape(x.shape[0], -1, *x.shape[2:])


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
