"""A Kalman filter against the quantiser's noise: the waveform estimated from its codes.

A code says in which bin a sample lies, and mu-law's bins are 250 times as wide at full scale as
around zero. To a linear predictor of high order the position within the bin is noise, which enters
with every tap. But a sample is also predicted by those before it: an autoregressive model, fitted
to the newest `window` samples before every block, gives a mean and a variance for each sample, and
the code gives the bin's centre and a twelfth of its squared width. Both are weighted by their
precision. Each observation also revises the sample before it, and nothing older.

The filter restarts for each block, a block and a half before it, so that all blocks are filtered
in parallel. Sums are elementwise and in a fixed order, and products are rounded before
they are added: whatever is filtered beside a block, its result differs by one rounding at most. The
least squares that follows would amplify more.

Dimensions: `S` signals, `K` taps, `B` batch, `T` samples, `n` blocks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from patchwave_jax.models.predictors.least_squares import fit, map_blocks


class KalmanState(NamedTuple):
    """Estimates of the newest samples of each signal, given all that was observed."""

    taps: Float32[Array, "K S"]  # of the autoregressive model, newest sample's first
    innovation: Float32[Array, " S"]  # the model's noise variance
    means: Float32[Array, "K S"]  # of the samples, newest first
    variance: Float32[Array, " S"]  # of the newest sample
    covariance: Float32[Array, " S"]  # of the newest two samples
    older_variance: Float32[Array, " S"]  # of the sample before the newest

    def observe(self, value: Float32[Array, " S"], noise: Float32[Array, " S"]) -> "KalmanState":
        """The state after the next sample; its bin has the centre `value` and variance `noise`."""
        mean, (first, second) = _sum(_product(self.taps, self.means)), self.taps[:2]
        newest = _product(first, self.variance) + _product(second, self.covariance)
        before = _product(first, self.covariance) + _product(second, self.older_variance)
        spread = _product(first, newest) + _product(second, before) + self.innovation
        gain = 1 / (spread + noise)
        error = gain * (value - mean)
        revised = jnp.stack(
            [_product(spread, error) + mean, _product(newest, error) + self.means[0]]
        )
        return self._replace(
            means=jnp.concatenate([revised, self.means[1:-1]]),
            variance=spread * noise * gain,
            covariance=newest * noise * gain,
            older_variance=self.variance - _product(newest, newest * gain),
        )


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The filter with one set of sizes."""

    taps: int  # K, at least 2
    window: int  # samples that the model is fitted to
    block_samples: int

    @property
    def warm_up_samples(self) -> int:
        """Samples before its block during which the filter forgets its initial state."""
        return self.block_samples * 3 // 2

    @property
    def lookback(self) -> int:
        """Samples before a block that its estimates depend on."""
        return max(self.window, self.taps + self.warm_up_samples)

    def begin(self, waveform: Float32[Array, "S T"], noise: Float32[Array, "S T"]) -> KalmanState:
        """The state before a block, from at least `lookback` samples before it."""
        fitted = fit(waveform[:, waveform.shape[1] - self.window :], self.taps)
        count = self.taps + self.warm_up_samples
        return self._warm_up(*fitted, waveform.T[-count:], noise.T[-count:])

    def denoise(
        self, waveform: Float32[Array, "B T"], noise: Float32[Array, "B T"], first: int
    ) -> tuple[Float32[Array, "B T-{first}"], Float32[Array, "B T-{first}"]]:
        """Estimates of the sample before each index from `first` on, in whole blocks.

        Returns:
          Its mean given the samples up to it, and given one more.
        """
        (rows, samples), block = waveform.shape, self.block_samples
        blocks = (samples - first) // block
        starts = first + block * jnp.arange(blocks)

        def fit_block(start: Array) -> tuple[Array, Array]:
            newest = lax.dynamic_slice_in_dim(waveform, start - self.window, self.window, 1)
            return fit(newest, self.taps)

        fitted, innovation = map_blocks(fit_block, starts, self.taps * rows)
        earlier = self.taps + self.warm_up_samples
        index = starts[:, None] + jnp.arange(-earlier, block)

        def by_time(x: Float32[Array, "B T"]) -> Float32[Array, "t S"]:
            return jnp.transpose(x[:, index], (2, 1, 0)).reshape(earlier + block, -1)

        values, noises = by_time(waveform), by_time(noise)
        state = self._warm_up(
            fitted.reshape(-1, self.taps),
            innovation.reshape(-1),
            values[:earlier],
            noises[:earlier],
        )

        def observe(state: KalmanState, sample: tuple[Array, Array]) -> tuple[KalmanState, Any]:
            after = state.observe(*sample)
            return after, (state.means[0], after.means[1])

        _, means = lax.scan(observe, state, (values[earlier:], noises[earlier:]))
        before, after = (
            jnp.transpose(x.reshape(block, blocks, rows), (2, 1, 0)).reshape(rows, -1)
            for x in means
        )
        return before, after

    def _warm_up(
        self,
        fitted: Float32[Array, "S K"],
        innovation: Float32[Array, " S"],
        values: Float32[Array, "T S"],
        noise: Float32[Array, "T S"],
    ) -> KalmanState:
        """The state after `values`, the first `K` of which are taken as exact."""
        known, older = noise[self.taps - 1], noise[self.taps - 2]
        means, zero = values[: self.taps][::-1], jnp.zeros_like(known)
        state = KalmanState(fitted.T, innovation, means, known, zero, older)

        def observe(state: KalmanState, sample: tuple[Array, Array]) -> tuple[KalmanState, None]:
            return state.observe(*sample), None

        return lax.scan(observe, state, (values[self.taps :], noise[self.taps :]))[0]


def _product(a: Float32[Array, "*S"], b: Float32[Array, "*S"]) -> Float32[Array, "*S"]:
    """A product rounded to 22 bits: the same whether or not XLA fuses it with a sum."""
    return lax.reduce_precision(a * b, exponent_bits=8, mantissa_bits=22)


def _sum(x: Float32[Array, "K S"]) -> Float32[Array, " S"]:
    """Sum over the first axis, by halving, in a fixed order."""
    while x.shape[0] > 1:
        half = -(-x.shape[0] // 2)
        x = x[:half] + jnp.pad(x[half:], ((0, 2 * half - x.shape[0]), (0, 0)))
    return x[0]
