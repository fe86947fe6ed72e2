"""Autoregressive models of recent samples by closed-form least squares, block by block.

Dimensions: `B` batch, `W` samples of a window, `K` taps, `n` blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Float64
from scipy.fft import next_fast_len

from patchwave_jax.models import fft

RIDGE = 2e-7  # of the window's energy, for each tap
FLOOR = 1e-9  # energy added for each sample, about the rounding noise of the finest mu-law bins
FALL_SAMPLES = 32  # of the newest, where the window falls to zero
BLOCKS_AT_ONCE = 256  # what a v5e's vector memory holds; changes no result
CPU_TAPS_AT_ONCE = 16_384  # what a CPU's caches hold
GPU_TAPS_AT_ONCE = 2**24  # in few turns, each of which is thousands of launches; takes 7 GB


def fit(
    newest: Float32[Array, "B W"], taps: int
) -> tuple[Float32[Array, "B K"], Float32[Array, " B"]]:
    """Least-squares linear prediction of the next sample, from the tapered autocorrelation.

    Returns:
      The coefficients, newest sample's first, and the variance of the prediction error.
    """
    samples, window = newest.shape[1], taper(newest.shape[1]).astype(np.float32)
    size: Any = next_fast_len(samples + taps, real=True)  # its stub says None
    correlation = fft.autocorrelation(newest * window, size, taps + 1)
    energy = correlation[:, 0] * (1 + RIDGE * taps) + FLOOR * samples
    fitted, error = _solve(correlation.at[:, 0].set(energy))
    return fitted, error * energy / np.square(window).sum()


def _solve(
    correlation: Float32[Array, "B K1"],
) -> tuple[Float32[Array, "B K"], Float32[Array, " B"]]:
    """Solves the normal equations of linear prediction by Schur's recursion.

    Levinson's recursion takes each order's reflection coefficient from an inner product of the
    error filter and the correlation. Schur's keeps the products of both filters with the
    correlation at all later lags instead (Le Roux and Gueguen 1977). The two arrays hold the
    filters' taps up to the current order and these products behind them; one update raises both to
    the next order. Nothing is summed over taps, so the bits of a row's result do not depend on how
    many rows are solved together.

    Returns:
      The coefficients, and the error's energy over the samples' energy.
    """
    lags, index = correlation.shape[1], np.arange(correlation.shape[1])
    products = correlation / correlation[:, :1]  # column 0: order 0, whose only tap is 1
    error = jnp.ones_like(products[:, :1])

    def raise_order(order, state):
        forward, backward, error = state
        reflection = -lax.dynamic_slice_in_dim(forward, order, 1, 1) / error
        forward = jnp.where(index == order, 0.0, forward)  # now the new order's tap
        shifted = jnp.pad(backward[:, :-1], ((0, 0), (1, 0)))
        return (
            forward + reflection * shifted,
            shifted + reflection * forward,
            error * (1 - jnp.square(reflection)),
        )

    state = products, products, error
    forward, _, error = lax.fori_loop(1, lags, raise_order, state, unroll=2)
    return -forward[:, 1:], error[:, 0]


def taper(samples: int) -> Float64[np.ndarray, " W"]:
    """A slow rise and a quick fall: the asymmetric window of backward-adaptive codecs."""
    rise = np.sin(np.pi / 2 * (np.arange(samples - FALL_SAMPLES) + 0.5) / (samples - FALL_SAMPLES))
    fall = np.cos(np.pi / 2 * (np.arange(FALL_SAMPLES) + 0.5) / FALL_SAMPLES)
    return np.concatenate([rise**2, fall])


def map_blocks(of_block: Callable[[Array], Any], starts: Array, taps: int) -> Any:
    """`of_block` of each block's start, a few blocks at a time; each has `taps` in all."""
    count = starts.size

    def at_once(most: int, starts: Array) -> Any:
        turns = -(-count // most)
        rows = -(-count // turns)  # the same in each turn, or the last would be another program
        padded = jnp.pad(starts, (0, turns * rows - count), mode="edge")
        made = lax.map(of_block, padded, batch_size=rows)
        return jax.tree.map(lambda x: x[:count], made)

    return lax.platform_dependent(
        starts,
        cpu=functools.partial(at_once, max(1, CPU_TAPS_AT_ONCE // taps)),
        cuda=functools.partial(at_once, max(1, GPU_TAPS_AT_ONCE // taps)),
        default=functools.partial(at_once, BLOCKS_AT_ONCE),
    )
