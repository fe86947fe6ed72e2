"""Linear predictors refitted before every block of samples to the recent past itself.

Piano is nearly predictable from its own last half second, and closed-form least squares finds the
coefficients faster than gradient descent in a network could. Each predictor is fitted before every
block to the newest `window` samples (tapered autocorrelation, Schur's recursion) and predicts the
samples of the block. The samples may be denoised first (`patchwave_jax.models.predictors.kalman`).
There are no parameters: predictions are a function of the codes before a sample and of where
blocks begin.

Dimensions as in `patchwave_jax.models.patchwave.model`; `K` taps, `J` predictors.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from patchwave_jax.models import ring
from patchwave_jax.models.predictors.kalman import Denoiser, KalmanState
from patchwave_jax.models.predictors.least_squares import fit, map_blocks


class AdaptiveState(NamedTuple):
    """State of `B` streams before their newest sample is observed."""

    coefficients: list[Float32[Array, "B K"]]  # of the predictors in this block
    denoised: Float32[Array, "B 2R"]  # ring of the samples as the predictors read them
    kalman: KalmanState | None  # of the denoiser, where there is one


@dataclasses.dataclass(frozen=True)
class AdaptivePredictors:
    """Several predictors of different orders and fit windows."""

    taps: tuple[int, ...]
    windows: tuple[int, ...]  # samples each is fitted to
    block_samples: int
    denoiser: Denoiser | None = None  # None: they read the decoded samples as they are

    @property
    def count(self) -> int:
        """J."""
        return len(self.taps)

    @property
    def fit_window(self) -> int:
        """Samples before a block that the predictors read: whole blocks."""
        return -(-max(self.windows) // self.block_samples) * self.block_samples

    @property
    def lookback(self) -> int:
        """Samples before the first of a block that its predictions depend on."""
        return self.fit_window + (self.denoiser.lookback if self.denoiser else 0)

    @property
    def step_lookback(self) -> int:
        """Samples that `step` reads: the newest ones."""
        return self.denoiser.lookback if self.denoiser else 1

    def predict(
        self, waveform: Float32[Array, "B T"], noise: Float32[Array, "B T"], first: int
    ) -> Float32[Array, "B n J"]:
        """Predictions of the samples from `first` on, where a block begins.

        `lookback` samples must precede it. `noise` is the variance of the samples' rounding.
        """
        block, count = self.block_samples, waveform.shape[1] - first
        blocks = -(-count // block)
        padding = ((0, 0), (0, blocks * block - count))
        newest, kept = self._denoise(
            jnp.pad(waveform, padding), jnp.pad(noise, padding), first - self.fit_window
        )
        starts = first + block * jnp.arange(blocks)
        predicted = []
        for taps, window in zip(self.taps, self.windows, strict=True):

            def of_block(start: Array, taps: int = taps, window: int = window) -> Array:
                # The newest sample before a block has not been revised by its successor yet.
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

    def coefficients(self, waveform: Float32[Array, "B T"]) -> list[Float32[Array, "B K"]]:
        """Coefficients of each predictor, fitted to the newest samples; newest sample's first."""
        return [
            fit(waveform[:, waveform.shape[1] - window :], taps)[0]
            for taps, window in zip(self.taps, self.windows, strict=True)
        ]

    def _denoise(
        self, waveform: Float32[Array, "B T"], noise: Float32[Array, "B T"], first: int
    ) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
        """The samples as the predictors read them, denoised from `first` on, where a block begins.

        Returns:
          Of the sample before each index: its estimate when the next sample is predicted, and its
          estimate from then on.
        """
        if not self.denoiser:
            before = jnp.pad(waveform[:, :-1], ((0, 0), (1, 0)))
            return before, before
        given = jnp.pad(waveform[:, : first - 1], ((0, 0), (1, 0)))
        newest, kept = self.denoiser.denoise(waveform, noise, first)
        return jnp.concatenate([given, newest], 1), jnp.concatenate([given, kept], 1)

    # Generation, one sample at a time.

    def init_state(self, rows: int) -> AdaptiveState:
        """A state of `rows` streams to be primed."""
        kalman = None
        if self.denoiser:
            filters, each = jnp.zeros((self.denoiser.taps, rows)), jnp.zeros(rows)
            kalman = KalmanState(filters, each, filters, each, each, each)
        coefficients = [jnp.zeros((rows, taps)) for taps in self.taps]
        return AdaptiveState(coefficients, jnp.zeros((rows, 2 * self.fit_window)), kalman)

    def prime(
        self,
        waveform: Float32[Array, "B T"],
        noise: Float32[Array, "B T"],
        begin: int,
        offset: Int32[Array, ""],
        position: Int32[Array, ""],
    ) -> AdaptiveState:
        """The state before the sample at `begin + offset`, which is number `position - 1`.

        `begin` is where its block begins; the block is in the arrays up to its end, and what
        follows the sample is not used. `lookback` samples must precede the block.
        """
        size = self.fit_window
        newest, kept = self._denoise(waveform, noise, begin - size)
        before = kept[:, begin - size + 1 : begin + 1].at[:, -1].set(newest[:, begin])
        kept = jnp.pad(kept, ((0, 0), (0, 1)))
        kalman = None
        if self.denoiser:

            def observe(i: Array, kalman: KalmanState) -> KalmanState:
                return kalman.observe(waveform[:, begin + i], noise[:, begin + i])

            kalman = self.denoiser.begin(waveform[:, :begin], noise[:, :begin])
            kalman = lax.fori_loop(0, offset, observe, kalman)
        newest = lax.dynamic_slice_in_dim(kept, begin + offset - size + 2, size, 1)
        return AdaptiveState(self.coefficients(before), ring.from_newest(newest, position), kalman)

    def step(
        self,
        state: AdaptiveState,
        waveform: Float32[Array, "B L"],
        noise: Float32[Array, "B L"],
        position: Int32[Array, ""],
    ) -> tuple[AdaptiveState, Float32[Array, "B J"]]:
        """Observes the newest sample and predicts sample `position`, which follows it.

        `waveform` holds the newest `step_lookback` samples. The predictors are fitted again where
        a block begins.
        """
        value, kalman, denoised = waveform[:, -1], state.kalman, state.denoised
        if kalman is not None:
            kalman = kalman.observe(value, noise[:, -1])
            value = kalman.means[0]
            denoised = ring.put(denoised, position - 2, kalman.means[1])

        def begin() -> tuple[list[Array], KalmanState | None, Array]:
            begun = self.denoiser and self.denoiser.begin(waveform, noise)
            newest = value if begun is None else begun.means[0]
            before = ring.newest(denoised, position - 1, self.fit_window).at[:, -1].set(newest)
            return self.coefficients(before), begun, newest

        begins = position % self.block_samples == 0
        coefficients, kalman, value = lax.cond(
            begins, begin, lambda: (state.coefficients, kalman, value)
        )
        denoised = ring.put(denoised, position - 1, value)
        longest = max(self.taps)
        past = ring.newest(denoised, position - 1, longest)
        predicted = [
            (past[:, longest - taps :][:, ::-1] * fitted).sum(1)
            for taps, fitted in zip(self.taps, coefficients, strict=True)
        ]
        return AdaptiveState(coefficients, denoised, kalman), jnp.stack(predicted, -1)
