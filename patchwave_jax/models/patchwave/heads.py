"""Two heads over the same 256 codes, so that their NLL compare: softmax and logistic mixture.

A head turns the readout's hidden vector into log-probabilities of codes, always in float32.
Dimension letters are those of `patchwave_jax.models.patchwave.model`; `K` counts mixture
components.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models.predictors.bank import LIMIT, Prediction, waveform_of

LOG_FLOOR = -32 * math.log(2)  # of a code's probability in the mixture, in nats


class Softmax(nnx.Module):
    """A linear layer and a softmax over the 256 codes (the paper's head)."""

    def __init__(self, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = nnx.Linear(hidden, quantisers.NUM_CODES, dtype=dtype, rngs=rngs)

    def logits(
        self, hidden: Float[Array, "*shape F"], prediction: Prediction | None
    ) -> Float32[Array, "*shape 256"]:
        """Unnormalised log-probabilities of all codes."""
        return self.linear(hidden).astype(jnp.float32)

    def log_prob(
        self,
        hidden: Float[Array, "*shape F"],
        prediction: Prediction | None,
        codes: UInt8[Array, "*shape"],
    ) -> Float32[Array, "*shape"]:
        """Log-probability of `codes`, in nats."""
        logits = self.logits(hidden, prediction)
        chosen = jnp.take_along_axis(logits, codes[..., None].astype(jnp.int32), -1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, -1)

    def drawing_logits(
        self, hidden: Float[Array, "*shape F"], prediction: Prediction | None
    ) -> Float32[Array, "*shape 256"]:
        """The same, as a code is drawn from them."""
        return self.logits(hidden, prediction)


class LogisticMixture(nnx.Module):
    """A mixture of discretised logistics around a learned linear prediction of the waveform.

    The probability of a code is the mass that the mixture puts on its bin (PixelCNN++, Parallel
    WaveNet); the outermost bins reach to infinity, so the 256 masses sum to 1. A component's
    mean is a linear prediction plus an offset, in units of the prediction error's scale, so that
    training starts from linear prediction and learns the rest. The prediction is a learned one
    from the last `taps` samples, or that of several `adaptive` predictors, which a component may
    also lean towards one by one.

    Every code has 2^-32 besides, so that no sample can cost more than 32 bits: the tails of narrow
    logistics alone would charge for a click without bound. It is less than float32's rounding
    of what sums to 1, and in 17 minutes of 16 kHz audio is drawn once.
    """

    def __init__(
        self,
        hidden: int,
        *,
        components: int,
        taps: int,
        adaptive: int,
        quantiser: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.components, self.taps, self.quantiser = components, taps, quantiser
        # Of a component: weight, offset, scale, and how much it follows each predictor.
        self.outputs = 3 + (adaptive + 1 if adaptive else 0)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        self.linear = nnx.Linear(
            hidden, self.outputs * components, kernel_init=small, dtype=dtype, rngs=rngs
        )
        spread = np.zeros((components, self.outputs), np.float32)
        spread[:, 2] = np.linspace(-2, 1, components)
        assert self.linear.bias is not None
        self.linear.bias[...] = jnp.asarray(spread.reshape(-1))
        self.predictor = nnx.Param(jnp.zeros(taps).at[-1].set(1.0))  # oldest sample first
        self.log_scale = nnx.Param(jnp.float32(-5.0))

    def start_from(self, predictor: Float32[np.ndarray, " taps"], scale: float) -> None:
        """Sets the linear predictor and the scale of its error (full scale 1) before training."""
        self.predictor[...] = jnp.asarray(predictor, jnp.float32)
        self.log_scale[...] = jnp.float32(np.log(scale))

    def predict(self, codes: UInt8[Array, "B T"], adaptive: Prediction | None = None) -> Prediction:
        """The prediction of the sample after every stretch of `taps` samples."""
        learned = _correlate(waveform_of(codes, self.quantiser), self.predictor[...])
        if adaptive is None:
            scale = jnp.broadcast_to(jnp.exp(self.log_scale[...]), learned.shape)
            return Prediction(learned, scale, None, None)
        other = jnp.clip((learned - adaptive.mean) / adaptive.scale, -LIMIT, LIMIT)
        assert adaptive.others is not None
        return adaptive._replace(others=jnp.concatenate([adaptive.others, other[..., None]], -1))

    def log_prob(
        self,
        hidden: Float[Array, "*shape F"],
        prediction: Prediction | None,
        codes: UInt8[Array, "*shape"],
    ) -> Float32[Array, "*shape"]:
        """Log-probability of `codes`, in nats."""
        edges = jnp.asarray(quantisers.get(self.quantiser).edges)
        index = codes.astype(jnp.int32)
        weights, means, log_scales = self._mixture(hidden, prediction)
        low, high = edges[index][..., None], edges[index + 1][..., None]
        mass = _log_bin_mass(low, high, index[..., None], means, log_scales)
        return jnp.logaddexp(jax.nn.logsumexp(weights + mass, -1), LOG_FLOOR)

    def logits(
        self, hidden: Float[Array, "*shape F"], prediction: Prediction | None
    ) -> Float32[Array, "*shape 256"]:
        """Log-probabilities of all codes (they are normalised)."""
        edges = jnp.asarray(quantisers.get(self.quantiser).edges)
        index = jnp.arange(quantisers.NUM_CODES)[:, None]
        weights, means, log_scales = (x[..., None, :] for x in self._mixture(hidden, prediction))
        mass = _log_bin_mass(edges[:-1, None], edges[1:, None], index, means, log_scales)
        return jnp.logaddexp(jax.nn.logsumexp(weights + mass, -1), LOG_FLOOR)

    def drawing_logits(
        self, hidden: Float[Array, "*shape F"], prediction: Prediction | None
    ) -> Float32[Array, "*shape 256"]:
        """The same from masses, not their logarithms: many times as fast on CPUs."""
        edges = quantisers.get(self.quantiser).edges.copy()
        edges[[0, -1]] = -np.inf, np.inf
        weights, means, log_scales = (x[..., None] for x in self._mixture(hidden, prediction))
        inverse = jnp.exp(-log_scales)
        at = (edges - means) * inverse
        width = (edges[1:] - edges[:-1]) * inverse
        mass = jax.nn.sigmoid(at[..., 1:]) * jax.nn.sigmoid(-at[..., :-1]) * -jnp.expm1(-width)
        return jnp.log((jnp.exp(weights) * mass).sum(-2) + math.exp(LOG_FLOOR))

    def _mixture(self, hidden: Array, prediction: Prediction | None):
        assert prediction is not None
        raw = self.linear(hidden).astype(jnp.float32)
        raw = raw.reshape(*raw.shape[:-1], self.components, self.outputs)
        scale = prediction.scale[..., None]
        offsets = raw[..., 1]
        if prediction.others is not None:
            offsets = offsets + (raw[..., 3:] * prediction.others[..., None, :]).sum(-1)
        means = prediction.mean[..., None] + offsets * scale
        # e^-14 is a hundredth of the narrowest mu-law bin; e^2 covers full scale.
        log_scales = jnp.clip(raw[..., 2] + jnp.log(scale), -14.0, 2.0)
        return jax.nn.log_softmax(raw[..., 0]), means, log_scales


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


def _correlate(x: Float32[Array, "B T"], taps: Float32[Array, " K"]) -> Float32[Array, "B T-K+1"]:
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
