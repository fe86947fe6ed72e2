"""Linear predictors of the waveform that are fitted anew, block after block, to the past itself.

Piano is nearly predictable from its own last half second, and closed-form least squares finds out
faster than gradient descent in a network could. So the mixture head may be given several linear
predictors of different orders and memories. Each is fitted before every block of `block_samples`
samples to the newest `window` samples (tapered autocorrelation, Schur's recursion) and predicts the
samples of the block. The network is told what each predicts and how wrong each was lately, in units
of a tracked error scale, and learns whom to trust. What they are fitted to and read may be freed of
the quantiser's noise first (`patchwave_jax.models.predictors.kalman`). Nothing here has parameters:
predictions are a function of the codes, of the past only, and of where the blocks begin.

A block begins at every `block_samples`-th sample of a patch, so the two forms of the model agree
once the patch form is told how far into its block the target is (its `age`). That holds for targets
whose window is as long as what the predictors reach for. For shorter ones the dense form's see all
of the segment before a target: up to a patch less one sample more than `sliding.contexts` says.

Dimensions as in `patchwave_jax.models.patchwave.model`; `K` taps, `J` predictors, `C` features.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.config import PatchWaveConfig
from patchwave_jax.data import quantisers
from patchwave_jax.models.predictors.kalman import Denoiser
from patchwave_jax.models.predictors.least_squares import fit, map_blocks

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
    denoiser: Denoiser | None = None  # None: they read the codes as they are

    @classmethod
    def of(cls, config: PatchWaveConfig) -> "Predictors":
        """Those that a model is configured with."""
        taps, block, denoiser = config.denoiser_taps, config.adaptive_block_samples, None
        if taps:
            denoiser = Denoiser(taps, config.denoiser_window, block)
        return cls(config.adaptive_taps, config.adaptive_windows, block, denoiser)

    def __bool__(self) -> bool:
        return bool(self.taps)

    @property
    def num_features(self) -> int:
        """C."""
        return len(self.taps) * (LAGS + len(ERROR_SPANS) + 1) + 4 if self else 0

    @property
    def error_history(self) -> int:
        """Samples before a target whose predictions its features are made of: whole blocks."""
        if not self:
            return 0
        return -(-max(ERROR_SPANS) // self.block_samples) * self.block_samples

    @property
    def fit_window(self) -> int:
        """Samples before a block that the predictors read: whole blocks."""
        return -(-max(self.windows, default=0) // self.block_samples) * self.block_samples

    @property
    def lookback(self) -> int:
        """Samples before the first of a block that matter for the predictions in it."""
        behind = self.denoiser.lookback if self.denoiser else 0
        return self.error_history + self.fit_window + behind

    def coefficients(self, waveform: Float32[Array, "B T"]) -> list[Float32[Array, "B K"]]:
        """Of each predictor, fitted to the newest samples; the newest sample's tap first."""
        return [
            fit(waveform[:, waveform.shape[1] - window :], taps)[0]
            for taps, window in zip(self.taps, self.windows, strict=True)
        ]

    def apply(
        self, coefficients: list[Float32[Array, "B K"]], newest: list[Float32[Array, "B K"]]
    ) -> Float32[Array, "B J"]:
        """Each predictor's prediction of what follows its `newest` samples."""
        pairs = zip(coefficients, newest, strict=True)
        return jnp.stack([(past[:, ::-1] * fitted).sum(1) for fitted, past in pairs], -1)

    def denoise(
        self, waveform: Float32[Array, "B T"], noise: Float32[Array, "B T"], first: int
    ) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
        """The samples as the predictors read them, from `first` on, where a block begins.

        Returns:
          Of the sample before each: what is believed when the next is predicted, and from then on.
        """
        if not self.denoiser:
            before = jnp.pad(waveform[:, :-1], ((0, 0), (1, 0)))
            return before, before
        given = jnp.pad(waveform[:, : first - 1], ((0, 0), (1, 0)))
        newest, kept = self.denoiser.denoise(waveform, noise, first)
        return jnp.concatenate([given, newest], 1), jnp.concatenate([given, kept], 1)

    def predict(
        self, waveform: Float32[Array, "B T"], noise: Float32[Array, "B T"], first: int
    ) -> Float32[Array, "B T-first J"]:
        """Predictions of the samples from `first` on, where a block begins.

        Before it there must be `lookback`, less `error_history`.
        """
        block, count = self.block_samples, waveform.shape[1] - first
        blocks = -(-count // block)
        padding = ((0, 0), (0, blocks * block - count))
        newest, kept = self.denoise(
            jnp.pad(waveform, padding), jnp.pad(noise, padding), first - self.fit_window
        )
        starts = first + block * jnp.arange(blocks)
        predicted = []
        for taps, window in zip(self.taps, self.windows, strict=True):

            def of_block(start: Array, taps: int = taps, window: int = window) -> Array:
                # Of the samples before one, the newest is not yet what will be kept of it.
                before = lax.dynamic_slice_in_dim(kept, start - window + 1, window, 1)
                fitted, _ = fit(before.at[:, -1].set(newest[:, start]), taps)
                piece = lax.dynamic_slice_in_dim(kept, start - taps + 1, taps + block - 2, 1)

                def add(k: Array, total: Array) -> Array:
                    past = lax.dynamic_slice_in_dim(piece, taps - 1 - k, block, 1)
                    return total + lax.dynamic_slice_in_dim(fitted, k, 1, 1) * past

                total = fitted[:, :1] * lax.dynamic_slice_in_dim(newest, start, block, 1)
                return lax.fori_loop(1, taps, add, total, unroll=16)

            made = map_blocks(of_block, starts, taps * waveform.shape[0])  # [n, B, block]
            predicted.append(jnp.moveaxis(made, 1, 0).reshape(waveform.shape[0], -1)[:, :count])
        return jnp.stack(predicted, -1)

    def describe(
        self,
        predicted: Float32[Array, "B m+n J"],
        waveform: Float32[Array, "B m+n"],
        age: Float32[Array, " n"],
        edges: Float32[np.ndarray, "257"],
    ) -> Prediction:
        """What the head is told of the newest `n` samples, from the errors made until then.

        `predicted` and `waveform` also have the `error_history`, m, before them; the last sample
        of `waveform` is not looked at. `age` is a target's place in its block.
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


def noise_of(codes: UInt8[Array, "*shape"], quantiser: str) -> Float32[Array, "*shape"]:
    """The variance of samples within their codes' bins, full scale 1."""
    widths = np.diff(quantisers.get(quantiser).edges)
    return jnp.asarray(np.square(widths) / 12)[codes.astype(jnp.int32)]
