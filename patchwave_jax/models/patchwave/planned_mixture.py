"""The head of a model with a plan: a logistic mixture that keeps to the loudness of its block.

Dimensions as in `patchwave_jax.models.patchwave.plan`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models import ring
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.patchwave.heads import Conditioning, Mixture
from patchwave_jax.models.patchwave.plan import (
    BANDS,
    NUM_LEVELS,
    Measured,
    Plan,
    band_levels,
    level,
    power,
)
from patchwave_jax.models.predictors.bank import LIMIT, BankState, Prediction


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
        self, state: PlannedState, x: Float[Array, "B D"], position: Array, uniforms: Array
    ) -> PlannedState:
        """The state with a plan for the block that begins at `position`, after the step."""
        _, conditioning = self.condition_next(state, position)
        plan, log_prob = self.plan.draw(x, conditioning, uniforms)
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
