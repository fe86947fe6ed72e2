"""Products of spectra: by the library's Fourier transforms, and on a TPU by matrix products.

XLA's TPU compiler did not finish SaShiMi's transforms of 262,144 samples, and was slow with those
of the adaptive predictors (docs/scaling.md). A transform of n = a b samples is one of a samples, a
factor, and one of b (Cooley & Tukey, 1965):

    X[k + a l] = sum_j e^{-2 pi i jl/b} e^{-2 pi i jk/n} sum_h e^{-2 pi i hk/a} x[b h + j]

With a and b near the square root of n these are products with small matrices, which TPUs are good
at. Frequencies above n/2 are left out, as l stops at b/2; frequency k + a l is at [l, k] until the
inverse transform. Real and imaginary parts are an axis of size 2.
"""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

# On a TPU a float32 product takes six passes in bfloat16, a "high" one three, JAX's default one.
# Three suffice for convolutions, but not for fitting predictors (tests/models/test_fft.py).
_sum = jnp.einsum


def convolution(x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """sum_l kernel[l] x[t - l] for each t, along the last axis, for equal lengths."""
    samples = x.shape[-1]
    n = 2 * samples

    def by_products(x: Array, kernel: Array) -> Array:
        return _samples(_times(_spectrum(x, n), _spectrum(kernel, n)), n)

    def by_library(x: Array, kernel: Array) -> Array:
        return jnp.fft.irfft(jnp.fft.rfft(x, n) * jnp.fft.rfft(kernel, n), n)

    return lax.platform_dependent(x, kernel, tpu=by_products, default=by_library)[..., :samples]


def autocorrelation(x: Float[Array, "... T"], n: int, lags: int) -> Float[Array, "... lags"]:
    """sum_t x[t] x[t + l] along the last axis for l = 0, 1, ..., by a transform of `n` samples.

    `n` is at least T + lags - 1.
    """

    def by_products(x: Array) -> Array:
        power = jnp.square(_spectrum(x, n, "highest")).sum(-3, keepdims=True)
        return _samples(jnp.concatenate([power, jnp.zeros_like(power)], -3), n, "highest")

    def by_library(x: Array) -> Array:
        spectrum = jnp.fft.rfft(x, n)
        return jnp.fft.irfft(jnp.square(spectrum.real) + jnp.square(spectrum.imag), n)

    return lax.platform_dependent(x, tpu=by_products, default=by_library)[..., :lags]


def irfft(x: Complex[Array, "..."], n: int) -> Float[Array, "..."]:
    """`jnp.fft.irfft` along the last axis: the `n` samples of frequencies 0 to n // 2."""

    def by_products(x: Array) -> Array:
        a, b = _factors(n)
        parts = _padded(jnp.stack([x.real, x.imag], -2), a * (b // 2 + 1))
        return _samples(parts.reshape(*parts.shape[:-1], -1, a), n)

    return lax.platform_dependent(x, tpu=by_products, default=partial(jnp.fft.irfft, n=n))


def _spectrum(
    x: Float[Array, "... T"], n: int, precision: str = "high"
) -> Float[Array, "... 2 l k"]:
    """The spectrum of `x` with zeros behind it up to `n` samples, by the equation above."""
    a, b = _factors(n)
    rows = -(-x.shape[-1] // b)  # of which something is not zero
    x = _padded(x, rows * b).reshape(*x.shape[:-1], rows, b)
    y = _sum("hqk,...hj->...qkj", _rotation(rows, a, a, x.dtype)[0], x, precision=precision)
    y = _times(y, _roots(a, b, n, x.dtype))
    return _sum("pjql,...pkj->...qlk", _rotation(b, b // 2 + 1, b, x.dtype), y, precision=precision)


def _samples(
    x: Float[Array, "... 2 l k"], n: int, precision: str = "high"
) -> Float[Array, "... n"]:
    """The samples of a spectrum: the inverse, by the same matrices transposed.

    A frequency and its mirror image are one term.
    """
    a, b = _factors(n)
    frequency = np.arange(a * (b // 2 + 1)).reshape(-1, a)
    terms = np.where(2 * frequency % n == 0, 1, 2) * (frequency <= n // 2) / n
    x = x * terms.astype(x.dtype)
    y = _sum("pjql,...qlk->...pkj", _rotation(b, b // 2 + 1, b, x.dtype), x, precision=precision)
    y = _times(y, _roots(a, b, n, x.dtype, sign=1))
    z = _sum("hqk,...qkj->...hj", _rotation(a, a, a, x.dtype)[0], y, precision=precision)
    return z.reshape(*z.shape[:-2], n)


def _factors(n: int) -> tuple[int, int]:
    """a <= b with a b = n, as near to each other as they can be."""
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def _roots(
    rows: int, columns: int, n: int, dtype: np.dtype, sign: int = -1
) -> Float[Array, "2 rows columns"]:
    """e^{sign 2 pi i jk/n} for row j and column k."""
    turns = jnp.arange(rows)[:, None] * jnp.arange(columns) % n
    angle = turns.astype(dtype) * (2 * math.pi / n)
    return jnp.stack([jnp.cos(angle), sign * jnp.sin(angle)])


def _rotation(rows: int, columns: int, n: int, dtype: np.dtype) -> Float[Array, "2 rows 2 columns"]:
    """The product with `_roots`, as a matrix: from part and row to part and column."""
    real, imag = _roots(rows, columns, n, dtype)
    return jnp.stack([jnp.stack([real, imag], 1), jnp.stack([-imag, real], 1)])


def _times(x: Float[Array, "... 2 l k"], y: Float[Array, "... 2 l k"]) -> Float[Array, "... 2 l k"]:
    (a, b), (c, d) = jnp.moveaxis(x, -3, 0), jnp.moveaxis(y, -3, 0)
    return jnp.stack([a * c - b * d, a * d + b * c], -3)


def _padded(x: Array, length: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
