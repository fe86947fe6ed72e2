"""The bank of linear predictors that the logistic mixture is built around.

The bank runs all predictors, tracks how wrong each was lately, and describes both to the network:
the weighted mean of the predictions, a scale of the error to expect, and features for the readout.
`Predictor` is the interface of one; `PatchWaveConfig.predictor_bank` lists the configured ones.

A block begins at every `block_samples`-th sample of a patch, so the two forms of the model agree
when the patch form is given the position of its target. They agree for targets whose window is at
least as long as the predictors' lookback. For shorter windows the predictors of the dense form see
the whole segment before a target: up to a patch less one sample more than the network's context.

Dimensions as in `patchwave_jax.models.patchwave.model`; `J` predictors, `C` features.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models import ring

LAGS = 16  # newest errors of each predictor among the features
ERROR_SPANS = (8, 32, 128)  # samples over which its mean squared errors are taken
LIMIT = 8.0  # of features that are in units of the error scale


class Prediction(NamedTuple):
    """What the mixture is built around, for each target; in the waveform, full scale 1."""

    mean: Float32[Array, "*shape"]
    scale: Float32[Array, "*shape"]  # of the error to expect
    differences: Float32[Array, "*shape J"] | None  # of each prediction and `mean`, over `scale`
    log_trust: Float32[Array, "*shape J"] | None = None  # weights of the mean, unnormalised
    rounding: Float32[Array, "*shape"] | None = None  # variance of the code's rounding at `mean`


@runtime_checkable
class Predictor(Protocol):
    """Predicts samples from those before them, without parameters, in blocks of a fixed grid.

    `AdaptivePredictors` documents shapes and arguments.
    """

    @property
    def count(self) -> int: ...
    @property
    def lookback(self) -> int: ...
    @property
    def step_lookback(self) -> int: ...
    def predict(self, waveform: Array, noise: Array, first: int) -> Array: ...
    def init_state(self, rows: int) -> Any: ...
    def prime(
        self, waveform: Array, noise: Array, begin: int, offset: Array, position: Array
    ) -> Any: ...
    def step(
        self, state: Any, waveform: Array, noise: Array, position: Array
    ) -> tuple[Any, Array]: ...


class BankState(NamedTuple):
    """State of `B` streams before their newest sample is observed."""

    predicted: Float32[Array, "B 2R J"]  # ring of the newest predictions
    predictors: list[Any]


@dataclasses.dataclass(frozen=True)
class PredictorBank:
    """All predictors of one configuration; without any it is false."""

    predictors: tuple[Predictor, ...]
    block_samples: int
    quantiser: str

    def __bool__(self) -> bool:
        return bool(self.predictors)

    @property
    def count(self) -> int:
        """J."""
        return sum(predictor.count for predictor in self.predictors)

    @property
    def num_features(self) -> int:
        """C."""
        return self.count * (LAGS + len(ERROR_SPANS) + 1) + 4 if self else 0

    @property
    def error_history(self) -> int:
        """Samples before a target whose prediction errors are among its features: whole blocks."""
        if not self:
            return 0
        return -(-max(ERROR_SPANS) // self.block_samples) * self.block_samples

    @property
    def lookback(self) -> int:
        """Samples before the first of a block that its predictions and features depend on."""
        return self.error_history + max((p.lookback for p in self.predictors), default=0)

    @property
    def step_lookback(self) -> int:
        """Samples that `step` and `describe_next` read: the newest ones."""
        return max([self.error_history, *(p.step_lookback for p in self.predictors)])

    def predict(
        self, codes: UInt8[Array, "B T"], first: int, offset: int = 0
    ) -> tuple[Prediction, Float32[Array, "B n C"]]:
        """Predictions and features of the samples from `first` on, `offset` samples into a block.

        Missing history is silence.
        """
        begin = first - offset
        missing = max(0, self.lookback - begin)
        known = jnp.pad(codes, ((0, 0), (missing, 0)), constant_values=quantisers.SILENCE)
        waveform, noise = self.decode(known)
        start = missing + begin - self.error_history
        predicted = self._predict(waveform, noise, start)
        block_offset = np.arange(codes.shape[1] - begin) % self.block_samples
        prediction, features = self._describe(
            predicted, waveform[:, start:], jnp.asarray(block_offset, jnp.float32)
        )
        if not offset:
            return prediction, features
        return jax.tree.map(lambda x: x[:, offset:], (prediction, features))

    def decode(
        self, codes: UInt8[Array, "*shape"]
    ) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
        """Centres of the codes' bins, in the waveform of full scale 1, and the variance in them."""
        quantiser, index = quantisers.get(self.quantiser), codes.astype(jnp.int32)
        noise = np.square(np.diff(quantiser.edges)) / 12
        return jnp.asarray(quantiser.centres)[index], jnp.asarray(noise)[index]

    def encode(self, waveform: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """Codes of a waveform of full scale 1."""
        edges = quantisers.get(self.quantiser).edges
        return jnp.searchsorted(edges[1:-1], waveform, method="compare_all").astype(jnp.uint8)

    def _predict(self, waveform: Array, noise: Array, first: int) -> Float32[Array, "B n J"]:
        made = [predictor.predict(waveform, noise, first) for predictor in self.predictors]
        return made[0] if len(made) == 1 else jnp.concatenate(made, -1)

    def _describe(
        self,
        predicted: Float32[Array, "B S J"],
        waveform: Float32[Array, "B S"],
        block_offset: Float32[Array, " n"],
    ) -> tuple[Prediction, Float32[Array, "B n C"]]:
        """Predictions and features of the last `n` samples, from the errors made before each.

        `predicted` and `waveform` begin with the `error_history`, m, before them; the last sample
        of `waveform` is not used. `block_offset` is a target's place in its block.
        """
        m = self.error_history
        count = predicted.shape[1] - m
        errors = (waveform[..., None] - predicted)[:, : m + count - 1]
        squares, means, span = jnp.square(errors), {}, 1
        for longer in ERROR_SPANS:  # means over the newest 8, 32 and 128, from shorter ones
            length = squares.shape[1] - longer + span
            pieces = [squares[:, i : i + length] for i in range(0, longer, span)]
            squares = jnp.stack(pieces).mean(0)
            means[longer], span = squares[:, length - count :], longer
        predicted = predicted[:, m:]
        trust = jnp.square(1 / (means[ERROR_SPANS[-1]] + 1e-12))
        mean = (predicted * trust).sum(-1) / trust.sum(-1)
        edges = quantisers.get(self.quantiser).edges
        width = jnp.diff(edges)[jnp.searchsorted(edges[1:-1], mean)]
        rounding = jnp.square(width) / 12
        scale = jnp.sqrt(means[ERROR_SPANS[1]].min(-1) + rounding + 1e-12)

        unit = scale[..., None]
        lags = [errors[:, m - lag : m - lag + count] / unit for lag in range(1, LAGS + 1)]
        differences = jnp.clip((predicted - mean[..., None]) / unit, -LIMIT, LIMIT)
        about = [
            jnp.log(scale) + 5.0,
            jnp.log(width / scale),
            jnp.broadcast_to(block_offset / self.block_samples - 0.5, mean.shape),
            LIMIT * mean,
        ]
        features = [
            jnp.clip(jnp.concatenate(lags, -1), -LIMIT, LIMIT),
            *(0.5 * jnp.log(x / jnp.square(unit) + 1e-6) for x in means.values()),
            differences,
            jnp.stack(about, -1),
        ]
        prediction = Prediction(mean, scale, differences, jnp.log(trust), rounding)
        return prediction, jnp.concatenate(features, -1)

    # Generation, one sample at a time.

    def init_state(self, rows: int) -> BankState:
        """A state of `rows` streams to be primed."""
        predicted = jnp.zeros((rows, 2 * (self.error_history + 1), self.count))
        return BankState(predicted, [predictor.init_state(rows) for predictor in self.predictors])

    def prime(
        self, history: UInt8[Array, "B T"], end: Int32[Array, ""], position: Int32[Array, ""]
    ) -> BankState:
        """The state before the sample at `end - 1` of `history`, which is number `position - 1`.

        `lookback` and a block of samples must precede `end`; what follows is not used.
        """
        lookback, block = self.lookback, self.block_samples
        offset = (position - 1) % block  # of the newest sample in its block
        padded = jnp.pad(history, ((0, 0), (0, block)))
        known = lax.dynamic_slice_in_dim(padded, end - 1 - offset - lookback, lookback + block, 1)
        waveform, noise = self.decode(known)
        predicted = self._predict(waveform, noise, lookback - self.error_history)
        newest = lax.dynamic_slice_in_dim(predicted, offset, self.error_history + 1, 1)
        states = [p.prime(waveform, noise, lookback, offset, position) for p in self.predictors]
        return BankState(ring.from_newest(newest, position), states)

    def step(
        self, state: BankState, recent: UInt8[Array, "B L"], position: Int32[Array, ""]
    ) -> BankState:
        """Observes the newest of the `recent` samples and predicts sample `position`."""
        waveform, noise = self.decode(recent)
        states, predicted = [], []
        for predictor, before in zip(self.predictors, state.predictors, strict=True):
            first = recent.shape[1] - predictor.step_lookback
            after, made = predictor.step(before, waveform[:, first:], noise[:, first:], position)
            states.append(after)
            predicted.append(made)
        return BankState(
            ring.put(state.predicted, position, jnp.concatenate(predicted, -1)), states
        )

    def describe_next(
        self, state: BankState, recent: UInt8[Array, "B L"], position: Int32[Array, ""]
    ) -> tuple[Prediction, Float32[Array, "B 1 C"]]:
        """Prediction and features of sample `position`, after the step."""
        known = jnp.pad(recent[:, recent.shape[1] - self.error_history :], ((0, 0), (0, 1)))
        predicted = ring.newest(state.predicted, position, self.error_history + 1)
        block_offset = (position % self.block_samples).astype(jnp.float32)[None]
        return self._describe(predicted, self.decode(known)[0], block_offset)
