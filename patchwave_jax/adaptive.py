"""Linear predictors of the waveform that are fitted anew, block after block, to the past itself.

Piano is nearly predictable from its own last half second, and closed-form least squares finds out
faster than gradient descent in a network could. So the mixture head may be given several linear
predictors of different orders and memories. Each is fitted before every block of `block_samples`
samples to the newest `window` samples (tapered autocorrelation, Schur's recursion) and predicts
the samples of the block. The network is told what each predicts and how wrong each was lately, in
units of a tracked error scale, and learns whom to trust. Nothing here has parameters: predictions
are a function of the codes, of the past only, and of where the blocks begin.

A block begins at every `block_samples`-th sample of a patch, so the two forms of the model agree
once the patch form is told how far into its block the target is (its `age`). That holds for targets
whose window is as long as what the predictors reach for. For shorter ones the dense form's see all
of the segment before a target: up to a patch less one sample more than `sliding.contexts` says.

Dimensions as in `patchwave_jax.model`; `K` taps, `J` predictors, `C` features.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt8
from scipy.fft import next_fast_len

from patchwave_jax import quantisers
from patchwave_jax.config import ModelConfig

RIDGE = 2e-7  # of the window's energy, for each tap
FLOOR = 1e-9  # energy added for each sample, about the rounding noise of the finest mu-law bins
FALL_SAMPLES = 32  # of the newest, where the window falls to zero
BLOCKS_AT_ONCE = 512  # bounds memory, changes no result
CPU_TAPS_AT_ONCE = 16_384  # as many as a CPU's caches hold
LAGS = 16  # newest errors of each predictor that the network is told
ERROR_SPANS = (8, 32, 128)  # samples that its mean squared error is told over
LIMIT = 8.0  # of features that are in units of the error scale


class Prediction(NamedTuple):
    """What the mixture is built around, for each target; in the waveform, full scale 1."""

    mean: Float32[Array, "*shape"]
    scale: Float32[Array, "*shape"]  # of the error to be expected
    others: Float32[Array, "*shape J"] | None  # each prediction's, less `mean`, over `scale`
    features: Float32[Array, "*shape C"] | None  # for the readout


@dataclasses.dataclass(frozen=True)
class Predictors:
    """A set of predictors; without taps there are none."""

    taps: tuple[int, ...]
    windows: tuple[int, ...]  # samples each is fitted to
    block_samples: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Predictors":
        """Those that a model is configured with."""
        return cls(config.adaptive_taps, config.adaptive_windows, config.adaptive_block_samples)

    def __bool__(self) -> bool:
        return bool(self.taps)

    @property
    def num_features(self) -> int:
        """C."""
        return len(self.taps) * (LAGS + len(ERROR_SPANS) + 1) + 4 if self else 0

    @property
    def memory_samples(self) -> int:
        """Samples before a target whose predictions its features are made of: whole blocks."""
        if not self:
            return 0
        return -(-max(ERROR_SPANS) // self.block_samples) * self.block_samples

    @property
    def reach_samples(self) -> int:
        """Samples before the first of a block that matter for the predictions in it."""
        return self.memory_samples + max(self.windows, default=0)

    def coefficients(self, waveform: Float32[Array, "B T"]) -> list[Float32[Array, "B K"]]:
        """Of each predictor, fitted to the newest samples; the newest sample's tap first."""
        return [
            _fit(waveform[:, waveform.shape[1] - window :], taps)
            for taps, window in zip(self.taps, self.windows, strict=True)
        ]

    def apply(
        self, coefficients: list[Float32[Array, "B K"]], newest: list[Float32[Array, "B K"]]
    ) -> Float32[Array, "B J"]:
        """Each predictor's prediction of what follows its `newest` samples."""
        pairs = zip(coefficients, newest, strict=True)
        return jnp.stack([(past[:, ::-1] * fitted).sum(1) for fitted, past in pairs], -1)

    def predict(self, waveform: Float32[Array, "B T"], first: int) -> Float32[Array, "B T-first J"]:
        """Predictions of the samples from `first` on, where a block begins.

        Before it there must be at least as many samples as the longest window.
        """
        block = self.block_samples
        count = waveform.shape[1] - first
        blocks = -(-count // block)
        padded = jnp.pad(waveform, ((0, 0), (0, blocks * block - count)))
        starts = first + block * jnp.arange(blocks)
        predicted = []
        for taps, window in zip(self.taps, self.windows, strict=True):

            def of_block(start: Array, taps: int = taps, window: int = window) -> Array:
                fitted = _fit(lax.dynamic_slice_in_dim(padded, start - window, window, 1), taps)
                piece = lax.dynamic_slice_in_dim(padded, start - taps, taps + block, 1)

                def add(k: Array, total: Array) -> Array:
                    past = lax.dynamic_slice_in_dim(piece, taps - 1 - k, block, 1)
                    return total + lax.dynamic_slice_in_dim(fitted, k, 1, 1) * past

                return lax.fori_loop(0, taps, add, jnp.zeros_like(piece[:, :block]), unroll=16)

            rows = max(1, CPU_TAPS_AT_ONCE // (taps * waveform.shape[0]))
            made = lax.platform_dependent(
                starts,
                cpu=functools.partial(lax.map, of_block, batch_size=rows),
                default=functools.partial(lax.map, of_block, batch_size=BLOCKS_AT_ONCE),
            )  # [n, B, block]
            predicted.append(jnp.moveaxis(made, 1, 0).reshape(padded.shape[0], -1)[:, :count])
        return jnp.stack(predicted, -1)

    def describe(
        self,
        predicted: Float32[Array, "B m+n J"],
        waveform: Float32[Array, "B m+n"],
        age: Float32[Array, " n"],
        edges: Float32[np.ndarray, "257"],
    ) -> Prediction:
        """What the head is told of the newest `n` samples, from the errors made until then.

        `predicted` and `waveform` also have the `memory_samples`, m, before them; the last sample
        of `waveform` is not looked at. `age` is a target's place in its block.
        """
        m = self.memory_samples
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
        width = jnp.diff(edges)[jnp.searchsorted(edges[1:-1], mean)]
        scale = jnp.sqrt(means[ERROR_SPANS[1]].min(-1) + jnp.square(width) / 12 + 1e-12)

        unit = scale[..., None]
        lags = [errors[:, m - lag : m - lag + count] / unit for lag in range(1, LAGS + 1)]
        others = jnp.clip((predicted - mean[..., None]) / unit, -LIMIT, LIMIT)
        about = [
            jnp.log(scale) + 5.0,
            jnp.log(width / scale),
            jnp.broadcast_to(age / self.block_samples - 0.5, mean.shape),
            LIMIT * mean,
        ]
        features = [
            jnp.clip(jnp.concatenate(lags, -1), -LIMIT, LIMIT),
            *(0.5 * jnp.log(x / jnp.square(unit) + 1e-6) for x in means.values()),
            others,
            jnp.stack(about, -1),
        ]
        return Prediction(mean, scale, others, jnp.concatenate(features, -1))


def waveform_of(codes: UInt8[Array, "*shape"], quantiser: str) -> Float32[Array, "*shape"]:
    """The waveform at the centres of the codes' bins, full scale 1."""
    return jnp.asarray(quantisers.get(quantiser).centres)[codes.astype(jnp.int32)]


def _fit(newest: Float32[Array, "B W"], taps: int) -> Float32[Array, "B K"]:
    """Least-squares linear prediction of what follows `newest`."""
    samples = newest.shape[1]
    size = next_fast_len(samples + taps, real=True)
    spectrum = jnp.fft.rfft(newest * _taper(samples), size)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    correlation = jnp.fft.irfft(power, size)[:, : taps + 1]
    energy = correlation[:, 0] * (1 + RIDGE * taps) + FLOOR * samples
    return _solve(correlation.at[:, 0].set(energy))


def _solve(correlation: Float32[Array, "B K1"]) -> Float32[Array, "B K"]:
    """Solves the normal equations of linear prediction by Schur's recursion.

    Levinson's takes each order's reflection coefficient from an inner product of the error filter
    with the correlation. Here the products of both filters with the correlation at all later lags
    are carried along instead (Le Roux and Gueguen 1977). The two arrays hold the filters' taps up
    to the order so far, and these products behind it: both are raised to the next order by the same
    sum. No sum runs over the taps, so a row's result does not depend, to the last
    bit, on how many rows are solved together.
    """
    lags, index = correlation.shape[1], np.arange(correlation.shape[1])
    products = correlation / correlation[:, :1]  # column 0: of order 0, the only tap, which is 1
    error = jnp.ones_like(products[:, :1])

    def raise_order(order, state):
        forward, backward, error = state
        reflection = -lax.dynamic_slice_in_dim(forward, order, 1, 1) / error
        forward = jnp.where(index == order, 0.0, forward)  # from here on the new order's tap
        shifted = jnp.pad(backward[:, :-1], ((0, 0), (1, 0)))
        return (
            forward + reflection * shifted,
            shifted + reflection * forward,
            error * (1 - jnp.square(reflection)),
        )

    forward, _, _ = lax.fori_loop(1, lags, raise_order, (products, products, error), unroll=2)
    return -forward[:, 1:]


def _taper(samples: int) -> Float32[np.ndarray, " T"]:
    """A slow rise and a quick fall: an asymmetric window, as backward-adaptive codecs have it."""
    rise = np.sin(np.pi / 2 * (np.arange(samples - FALL_SAMPLES) + 0.5) / (samples - FALL_SAMPLES))
    fall = np.cos(np.pi / 2 * (np.arange(FALL_SAMPLES) + 0.5) / FALL_SAMPLES)
    return np.concatenate([rise**2, fall]).astype(np.float32)
