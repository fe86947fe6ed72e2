"""Two heads over the same 256 codes, so that their NLLs compare: softmax and logistic mixture.

A head turns the readout's hidden vector into log-probabilities of codes, always in float32. It may
also read the codes before a target itself: `condition` gives what it needs of them as two tuples,
one with parameters behind it and one without, which the model passes on unseen to `readout_inputs`,
`log_prob`, `logits` and `drawing_logits`. For the softmax both tuples are empty.

Dimensions as in `patchwave_jax.models.patchwave.model`; `K` mixture components, `J` predictors.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64, Int32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models import ring
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.predictors.bank import LIMIT, BankState, Prediction

LOG_FLOOR = -32 * math.log(2)  # of a code's probability in the mixture, in nats
Conditioning = tuple[tuple[Any, ...], tuple[Any, ...]]  # with and without a gradient


class Softmax(nnx.Module):
    """A linear layer and a softmax over the 256 codes (the paper's head)."""

    plan = None
    lookback = 0  # samples before a target that `condition` reads

    def __init__(self, config: PatchWaveConfig, quantiser: str, *, rngs: nnx.Rngs):
        del quantiser
        dtype = jnp.dtype(config.compute_dtype)
        self.linear = nnx.Linear(config.readout_width, quantisers.NUM_CODES, dtype=dtype, rngs=rngs)

    def condition(self, codes: Array, first: int, position: int = 0) -> Conditioning:
        del codes, first, position
        return (), ()

    def readout_inputs(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        return x

    def logits(self, hidden: Float[Array, "*shape F"]) -> Float32[Array, "*shape 256"]:
        """Unnormalised log-probabilities of all codes."""
        return self.linear(hidden).astype(jnp.float32)

    drawing_logits = logits

    def log_prob(
        self, hidden: Float[Array, "*shape F"], codes: UInt8[Array, "*shape"]
    ) -> Float32[Array, "*shape"]:
        """Log-probability of `codes`, in nats."""
        logits = self.logits(hidden)
        chosen = jnp.take_along_axis(logits, codes[..., None].astype(jnp.int32), -1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, -1)

    def init_state(self, rows: int) -> tuple[()]:
        del rows
        return ()

    def prime(self, history: Array, end: Array, position: Array) -> tuple[()]:
        del history, end, position
        return ()

    def step(self, state: tuple[()], code: Array, position: Array) -> tuple[()]:
        del code, position
        return state

    def condition_next(self, state: tuple[()], position: Array) -> Conditioning:
        del state, position
        return (), ()


class MixtureState(NamedTuple):
    """State of `B` streams before their newest sample is observed."""

    codes: UInt8[Array, "B 2R"]  # ring of the newest samples
    bank: BankState | None


class Mixture(nnx.Module):
    """A mixture of discretised logistics in the waveform; a subclass has its parameters.

    The probability of a code is the mass of the mixture in its bin (PixelCNN++, Parallel WaveNet);
    the outermost bins are open, so the 256 masses sum to 1.

    Every code has a probability of 2^-32 in addition, so that no sample costs more than 32 bits:
    the tails of narrow logistics alone would make the cost of a click unbounded. The 256 floors
    together are below float32's rounding of 1; in 17 minutes of 16 kHz audio one is drawn once.
    """

    plan: Any = None  # see `patchwave_jax.models.patchwave.plan`
    quantiser: str

    def _mixture(
        self, hidden: Array, prediction: Prediction, *features: Any
    ) -> tuple[Array, Array, Array]:
        """Log-weights, means and log-scales of the components, [..., K]."""
        raise NotImplementedError

    def log_prob(
        self,
        hidden: Float[Array, "*shape F"],
        codes: UInt8[Array, "*shape"],
        prediction: Prediction,
        *features: Any,
    ) -> Float32[Array, "*shape"]:
        """Log-probability of `codes`, in nats."""
        edges = jnp.asarray(quantisers.get(self.quantiser).edges)
        index = codes.astype(jnp.int32)
        weights, means, log_scales = self._mixture(hidden, prediction, *features)
        low, high = edges[index][..., None], edges[index + 1][..., None]
        mass = _log_bin_mass(low, high, index[..., None], means, log_scales)
        return jnp.logaddexp(jax.nn.logsumexp(weights + mass, -1), LOG_FLOOR)

    def logits(
        self, hidden: Float[Array, "*shape F"], prediction: Prediction, *features: Any
    ) -> Float32[Array, "*shape 256"]:
        """Log-probabilities of all codes; they are normalised."""
        edges = jnp.asarray(quantisers.get(self.quantiser).edges)
        index = jnp.arange(quantisers.NUM_CODES)[:, None]
        weights, means, log_scales = (
            x[..., None, :] for x in self._mixture(hidden, prediction, *features)
        )
        mass = _log_bin_mass(edges[:-1, None], edges[1:, None], index, means, log_scales)
        return jnp.logaddexp(jax.nn.logsumexp(weights + mass, -1), LOG_FLOOR)

    def drawing_logits(
        self, hidden: Float[Array, "*shape F"], prediction: Prediction, *features: Any
    ) -> Float32[Array, "*shape 256"]:
        """The same from masses instead of their logarithms: many times as fast on CPUs."""
        edges = quantisers.get(self.quantiser).edges.copy()
        edges[[0, -1]] = -np.inf, np.inf
        weights, means, log_scales = (
            x[..., None] for x in self._mixture(hidden, prediction, *features)
        )
        inverse = jnp.exp(-log_scales)
        at = (edges - means) * inverse
        width = (edges[1:] - edges[:-1]) * inverse
        mass = jax.nn.sigmoid(at[..., 1:]) * jax.nn.sigmoid(-at[..., :-1]) * -jnp.expm1(-width)
        return jnp.log((jnp.exp(weights) * mass).sum(-2) + math.exp(LOG_FLOOR))


class LogisticMixture(Mixture):
    """A mixture of discretised logistics around linear predictions of the waveform.

    A component's mean is a linear prediction plus an offset in units of the prediction error's
    scale, so that training starts from linear prediction and learns the rest. Without a predictor
    bank the prediction is that of a learned predictor, of the newest `taps` samples; with one it is
    the bank's mean, and a component may lean towards each of its predictions and the learned one.
    """

    def __init__(self, config: PatchWaveConfig, quantiser: str, *, rngs: nnx.Rngs):
        self.components, self.taps = config.mixture_components, config.predictor_taps
        self.quantiser, self.bank = quantiser, config.predictor_bank(quantiser)
        # Of a component: weight, offset, scale, and how much it leans towards each prediction.
        self.outputs = 3 + (self.bank.count + 1 if self.bank else 0)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        self.linear = nnx.Linear(
            config.readout_width,
            self.outputs * self.components,
            kernel_init=small,
            dtype=jnp.dtype(config.compute_dtype),
            rngs=rngs,
        )
        spread = np.zeros((self.components, self.outputs), np.float32)
        spread[:, 2] = np.linspace(-2, 1, self.components)
        assert self.linear.bias is not None
        self.linear.bias[...] = jnp.asarray(spread.reshape(-1))
        self.predictor = nnx.Param(jnp.zeros(self.taps).at[-1].set(1.0))  # oldest sample first
        self.log_scale = nnx.Param(jnp.float32(-5.0))

    def start_from(self, predictor: Float64[np.ndarray, " taps"], scale: float) -> None:
        """Sets the learned predictor and the scale of its error (full scale 1) before training."""
        self.predictor[...] = jnp.asarray(predictor, jnp.float32)
        self.log_scale[...] = jnp.float32(np.log(scale))

    # What it reads of the codes.

    @property
    def lookback(self) -> int:
        """Samples before a target that `condition` reads."""
        return max(self.taps, self.bank.lookback)

    def condition(self, codes: UInt8[Array, "B T"], first: int, position: int = 0) -> Conditioning:
        """Predictions and features of the samples from `first` on, [B, T - first].

        `position` is that of sample `first` in its window, from which blocks are counted.
        Missing history is silence.
        """
        if not self.bank:
            return (self._learned(codes[:, first - self.taps : -1]),), ()
        offset = position % self.bank.block_samples
        prediction, features = self.bank.predict(codes, first, offset)
        return (self._add_learned(prediction, codes[:, first - self.taps : -1]),), (features,)

    def _learned(self, codes: UInt8[Array, "B T"]) -> Prediction:
        """The learned predictor's prediction of what follows every stretch of `taps` samples."""
        waveform, _ = self.bank.decode(codes)
        mean = correlate(waveform, self.predictor[...])
        scale = jnp.broadcast_to(jnp.exp(self.log_scale[...]), mean.shape)
        return Prediction(mean, scale, None)

    def _add_learned(self, prediction: Prediction, codes: UInt8[Array, "B T"]) -> Prediction:
        """The bank's prediction, with the learned predictor as one more."""
        learned = self._learned(codes).mean
        difference = jnp.clip((learned - prediction.mean) / prediction.scale, -LIMIT, LIMIT)
        assert prediction.differences is not None
        differences = jnp.concatenate([prediction.differences, difference[..., None]], -1)
        return Prediction(prediction.mean, prediction.scale, differences)

    def readout_inputs(
        self, x: Float[Array, "*shape D"], prediction: Prediction, *features: Any
    ) -> Float[Array, "*shape E"]:
        """The normed state with the bank's features behind it, as the readout reads them."""
        del prediction
        return jnp.concatenate([x, *(f.astype(x.dtype) for f in features)], -1)

    def _mixture(
        self, hidden: Array, prediction: Prediction, *features: Any
    ) -> tuple[Array, Array, Array]:
        """Log-weights, means and log-scales of the components, [..., K]."""
        raw = self.linear(hidden).astype(jnp.float32)
        raw = raw.reshape(*raw.shape[:-1], self.components, self.outputs)
        scale = prediction.scale[..., None]
        offsets = raw[..., 1]
        if prediction.differences is not None:
            offsets = offsets + (raw[..., 3:] * prediction.differences[..., None, :]).sum(-1)
        means = prediction.mean[..., None] + offsets * scale
        # e^-14 is a hundredth of the narrowest mu-law bin; e^2 covers full scale.
        log_scales = jnp.clip(raw[..., 2] + jnp.log(scale), -14.0, 2.0)
        return jax.nn.log_softmax(raw[..., 0]), means, log_scales

    # Generation, one sample at a time.

    @property
    def _recent(self) -> int:
        """Samples that `step` and `condition_next` read."""
        return max(self.taps, self.bank.step_lookback)

    def init_state(self, rows: int) -> MixtureState:
        """A state of `rows` streams to be primed."""
        codes = jnp.full((rows, 2 * self._recent), quantisers.SILENCE, jnp.uint8)
        return MixtureState(codes, self.bank.init_state(rows) if self.bank else None)

    def prime(
        self, history: UInt8[Array, "B T"], end: Int32[Array, ""], position: Int32[Array, ""]
    ) -> MixtureState:
        """The state before the sample at `end - 1` of `history`, which is number `position - 1`."""
        missing = self.lookback + self.bank.block_samples
        history = jnp.pad(history, ((0, 0), (missing, 0)), constant_values=quantisers.SILENCE)
        end = end + missing
        codes = jax.lax.dynamic_slice_in_dim(history, end - self._recent, self._recent, 1)
        bank = self.bank.prime(history, end, position) if self.bank else None
        return MixtureState(ring.from_newest(codes, position), bank)

    def step(
        self, state: MixtureState, code: UInt8[Array, " B"], position: Int32[Array, ""]
    ) -> MixtureState:
        """Observes `code`, the sample before `position`."""
        codes, bank = ring.put(state.codes, position - 1, code), state.bank
        if bank is not None:
            recent = ring.newest(codes, position - 1, self.bank.step_lookback)
            bank = self.bank.step(bank, recent, position)
        return MixtureState(codes, bank)

    def condition_next(self, state: MixtureState, position: Int32[Array, ""]) -> Conditioning:
        """`condition` of the one sample at `position`, [B], after the step."""
        recent = ring.newest(state.codes, position - 1, self._recent)
        newest = recent[:, recent.shape[1] - self.taps :]
        if state.bank is None:
            trained, fixed = (self._learned(newest),), ()
        else:
            prediction, features = self.bank.describe_next(state.bank, recent, position)
            trained, fixed = (self._add_learned(prediction, newest),), (features,)
        return jax.tree.map(lambda x: x[:, 0], (trained, fixed))


def _log_bin_mass(low, high, index, means, log_scales):
    """log(F(high) - F(low)) of a logistic, where the outermost bins are open.

    With a = (low - mean) / scale and b = (high - mean) / scale, the difference of the two
    sigmoids is sigmoid(b) sigmoid(-a) (1 - e^(a - b)): a sum of logarithms that are all safe.
    """
    inverse = jnp.exp(-log_scales)
    upper = jnp.where(index == 255, 0.0, jax.nn.log_sigmoid((high - means) * inverse))
    lower = jnp.where(index == 0, 0.0, jax.nn.log_sigmoid((means - low) * inverse))
    closed = (index > 0) & (index < 255)
    width = jnp.where(closed, (high - low) * inverse, 1.0)
    return upper + lower + jnp.where(closed, jnp.log(-jnp.expm1(-width)), 0.0)


def correlate(x: Float32[Array, "B T"], taps: Float32[Array, " K"]) -> Float32[Array, "B n"]:
    """y[t] = sum_k taps[k] x[t+k], as products of blocks of K outputs with a Toeplitz matrix.

    In full precision: what is predicted is a small difference of large products.
    """
    k, outputs = taps.shape[0], x.shape[1] - taps.shape[0] + 1
    blocks = -(-outputs // k)
    padded = jnp.pad(x, ((0, 0), (0, (blocks + 1) * k - x.shape[1])))
    halves = padded.reshape(x.shape[0], blocks + 1, k)
    lag = jnp.arange(2 * k)[:, None] - jnp.arange(k)[None, :]
    toeplitz = jnp.where((lag >= 0) & (lag < k), taps[jnp.clip(lag, 0, k - 1)], 0.0)
    pairs = jnp.concatenate([halves[:, :-1], halves[:, 1:]], -1)
    y = jnp.matmul(pairs, toeplitz, precision="highest")
    return y.reshape(x.shape[0], -1)[:, :outputs]
