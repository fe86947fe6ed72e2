"""The waveform behind the codes: a Kalman filter against the quantiser's noise.

A code only tells in which bin a sample lies, and mu-law's bins are 250 times as wide at full
scale as around zero. What a linear predictor of high order reads there is noise, and it pays for it
with every tap. But a sample is also predicted by those before it: an autoregressive model, fitted
to the newest `window` samples before every block, gives a mean and a variance for each, and the
code gives the bin's centre and a twelfth of its squared width. Each counts by its precision. The
sample before is revised along with it, and nothing older.

The filter begins anew for each block, a block and a half before it, so that all are filtered at
once. Sums are elementwise, in a fixed order: what comes out has the same bits whatever is
filtered beside it, since least squares on it would magnify any difference.

Dimensions: `S` signals, `K` taps, `B` batch, `T` samples, `n` blocks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from patchwave_jax.models.predictors.least_squares import fit, map_blocks


class KalmanState(NamedTuple):
    """What is believed of signals' samples after those that were observed."""

    taps: Float32[Array, "K S"]  # of the autoregression, the newest sample's first
    innovation: Float32[Array, " S"]  # its variance
    past: Float32[Array, "K S"]  # the samples' means, the newest first
    variance: Float32[Array, " S"]  # of the newest
    covariance: Float32[Array, " S"]  # of the newest two
    older: Float32[Array, " S"]  # the variance of the one before

    def observe(self, value: Float32[Array, " S"], noise: Float32[Array, " S"]) -> "KalmanState":
        """After the next sample, whose code says `value` with the variance `noise`."""
        mean, (first, second) = _sum(_product(self.taps, self.past)), self.taps[:2]
        newest = _product(first, self.variance) + _product(second, self.covariance)
        before = _product(first, self.covariance) + _product(second, self.older)
        spread = _product(first, newest) + _product(second, before) + self.innovation
        gain = 1 / (spread + noise)
        error = gain * (value - mean)
        revised = jnp.stack(
            [_product(spread, error) + mean, _product(newest, error) + self.past[0]]
        )
        return self._replace(
            past=jnp.concatenate([revised, self.past[1:-1]]),
            variance=spread * noise * gain,
            covariance=newest * noise * gain,
            older=self.variance - _product(newest, newest * gain),
        )


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The filter of one configuration."""

    taps: int  # K, at least 2
    window: int  # samples it is fitted to
    block_samples: int

    @property
    def warm_up_samples(self) -> int:
        """Samples before its block in which a filter forgets how it began."""
        return self.block_samples * 3 // 2

    @property
    def lookback(self) -> int:
        """Samples before a block that its filter reads."""
        return max(self.window, self.taps + self.warm_up_samples)

    def begin(self, waveform: Float32[Array, "S T"], noise: Float32[Array, "S T"]) -> KalmanState:
        """The belief of a block about to begin, from at least `lookback` before it."""
        fitted = fit(waveform[:, waveform.shape[1] - self.window :], self.taps)
        count = self.taps + self.warm_up_samples
        return self._warm_up(*fitted, waveform.T[-count:], noise.T[-count:])

    def denoise(
        self, waveform: Float32[Array, "B T"], noise: Float32[Array, "B T"], first: int
    ) -> tuple[Float32[Array, "B T-first"], Float32[Array, "B T-first"]]:
        """What is believed of the sample before each, from `first` on, in whole blocks.

        Returns:
          Its mean given all before the one after it, and given that one, too.
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
        belief = self._warm_up(
            fitted.reshape(-1, self.taps),
            innovation.reshape(-1),
            values[:earlier],
            noises[:earlier],
        )

        def observe(belief: KalmanState, sample: tuple[Array, Array]) -> tuple[KalmanState, Any]:
            after = belief.observe(*sample)
            return after, (belief.past[0], after.past[1])

        _, means = lax.scan(observe, belief, (values[earlier:], noises[earlier:]))
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
        """The belief after `values`, of which the first `K` are taken as they are."""
        known, older = noise[self.taps - 1], noise[self.taps - 2]
        past, nothing = values[: self.taps][::-1], jnp.zeros_like(known)
        belief = KalmanState(fitted.T, innovation, past, known, nothing, older)

        def observe(belief: KalmanState, sample: tuple[Array, Array]) -> tuple[KalmanState, None]:
            return belief.observe(*sample), None

        return lax.scan(observe, belief, (values[self.taps :], noise[self.taps :]))[0]


def _product(a: Float32[Array, "*S"], b: Float32[Array, "*S"]) -> Float32[Array, "*S"]:
    """Rounded, to one bit less than it has, before anything is added to it.

    Compilers fuse a product with a sum in some programs and not in others.
    """
    return lax.reduce_precision(a * b, exponent_bits=8, mantissa_bits=22)


def _sum(x: Float32[Array, "K S"]) -> Float32[Array, " S"]:
    """Over the first axis, halves by halves."""
    while x.shape[0] > 1:
        half = -(-x.shape[0] // 2)
        x = x[:half] + jnp.pad(x[half:], ((0, 2 * half - x.shape[0]), (0, 0)))
    return x[0]
