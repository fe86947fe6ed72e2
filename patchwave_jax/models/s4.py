"""S4 (Gu, Goel & Re, 2022): a linear state space model of each channel, run in two exact forms.

The model is x' = A x + B u, y = C x + D u, with A = Lambda - P P* (the Hurwitz form of Goel et
al. 2022, stable for any P) over complex states that come in conjugate pairs, of which one half
is stored: an inner product over all states is 2 Re of the sum over the stored ones. Discretised
by the bilinear rule with step dt,

    dA = (I - dt/2 A)^-1 (I + dt/2 A)      dB = (I - dt/2 A)^-1 dt B      K[l] = C dA^l dB

- the **convolution** y = K * u + D u, for training: K from its values at the roots of unity;
- the **recurrence** x = dA x + dB u, y = C x + D u, for generation: O(N) work a sample.

A, B and P are shared by all channels; C, D and dt are each channel's own. Complex parameters
are stored as their real and imaginary parts. All of it is computed in the parameters' dtype.

Dimensions: `B` batch, `T` samples, `D` channels, `N` states, `n` = N/2 of them stored,
`L` samples of the kernel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Complex, Float

from patchwave_jax.models import fft

MIN_STEP, MAX_STEP = 1e-3, 1e-1  # dt at the start, log-uniform
CHUNK_TERMS = 2**18  # terms of the Cauchy sums that are in memory at once


class Recurrence(NamedTuple):
    """What a step needs, made from the parameters once.

    With R = (I - dt/2 Lambda)^-1, dA = (I - dt/2 A)^-1 (I + dt/2 A) is applied factor by factor.
    """

    forward: Complex[Array, "D n"]  # I + dt/2 Lambda
    resolvent: Complex[Array, "D n"]  # R
    P: Complex[Array, " n"]
    half_step: Float[Array, "D 1"]  # dt/2
    woodbury: Float[Array, "D 1"]  # dt/2 / (1 + dt/2 P* R P)
    input: Complex[Array, "D n"]  # dt B
    C: Complex[Array, "D n"]
    D: Float[Array, " D"]


class S4(nnx.Module):
    """One S4 layer: `channels` state space models of `state_size` states."""

    def __init__(self, channels: int, state_size: int, *, rngs: nnx.Rngs):
        Lambda, P, B = hippo_legs(state_size)
        uniform = jax.random.uniform(rngs.params(), (channels,))
        log_least, log_most = math.log(MIN_STEP), math.log(MAX_STEP)
        self.log_dt = nnx.Param(log_least + (log_most - log_least) * uniform)
        self.log_decay = nnx.Param(jnp.asarray(np.log(-np.real(Lambda)), jnp.float32))
        self.frequency = nnx.Param(jnp.asarray(np.imag(Lambda), jnp.float32))
        self.P, self.B = nnx.Param(_parts(P)), nnx.Param(_parts(B))
        C = jax.random.normal(rngs.params(), (channels, state_size // 2, 2)) / math.sqrt(2)
        self.C = nnx.Param(C)
        self.D = nnx.Param(jax.random.normal(rngs.params(), (channels,)))

    @property
    def dt(self) -> Float[Array, " D"]:
        return jnp.exp(self.log_dt[...])

    @property
    def Lambda(self) -> Complex[Array, " n"]:  # noqa: N802
        return lax.complex(-jnp.exp(self.log_decay[...]), self.frequency[...])

    def __call__(self, u: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The convolution, with a kernel as long as the input."""
        kernel = checkpoint_name(self.kernel(u.shape[1]), "kernel")
        u = u.astype(kernel.dtype)
        return causal_convolution(u, kernel) + self.D[...] * u

    # The convolution's kernel.

    def kernel(self, length: int) -> Float[Array, "D L"]:
        """K[l] = C dA^l dB for l < `length`."""
        return self.kernel_of(self.truncated(length), length)

    def truncated(self, length: int) -> Complex[Array, "D n"]:
        """C~ = C (I - dA^L): a generating function with it stops after L samples.

        A power by repeated squaring. It is of real matrices: over the real and imaginary parts
        of the stored states, with p = (Re P, Im P), A is [[Re, -Im], [Im, Re]] of Lambda less
        2 p p^T, and by Woodbury dA = 2 (I - dt/2 A)^-1 - I is of that form too. Its 2-norm is
        at most 1, so rounding errors don't grow.
        """
        recurrence = self.recurrence()
        R, P = recurrence.resolvent, recurrence.P
        inverse = jnp.concatenate(
            [
                jnp.concatenate([_diagonal(R.real), -_diagonal(R.imag)], -1),
                jnp.concatenate([_diagonal(R.imag), _diagonal(R.real)], -1),
            ],
            -2,
        )
        column, row = R * P, R * P.conj()
        column = jnp.concatenate([column.real, column.imag], -1) * recurrence.woodbury
        row = 2 * jnp.concatenate([row.real, -row.imag], -1)
        inverse = inverse - column[:, :, None] * row[:, None, :]
        power = 2 * inverse - jnp.eye(inverse.shape[-1], dtype=inverse.dtype)

        C = _complex(self.C[...])
        last = jnp.concatenate([C.real, -C.imag], -1)[:, None, :]
        remaining = length
        while remaining:
            if remaining % 2:
                last = jnp.matmul(last, power, precision="highest")
            remaining //= 2
            if remaining:
                power = jnp.matmul(power, power, precision="highest")
        real, imag = jnp.split(last[:, 0], 2, -1)
        return C - lax.complex(real, -imag)

    def kernel_of(self, truncated: Complex[Array, "D n"], length: int) -> Float[Array, "D L"]:
        """The kernel of `length` samples from C~: its generating function, transformed back.

        The generating function K^(w) = sum_l K[l] w^l at w = e^{-2i h}, h = pi k / L, is the
        kernel's discrete Fourier transform, and there it is

            K^(w) = 2/(1+w) C~ (z - A)^-1 B,    z = 2/dt (1-w)/(1+w) = 2i/dt tan h
                  = 2/(1+w) [k(C~,B) - k(C~,P) k(P*,B) / (1 + k(P*,P))]    (Woodbury)
            k(a,b) = sum over all states of a b / (z - lambda)             (a Cauchy kernel)

        2/(1+w) = e^{ih}/cos h and z have a pole at h = pi/2. The sums r = k / cos h have none:

            r(a,b) = sum a b / (i s - lambda c),    s = 2/dt sin h,  c = cos h
            K^(w)  = e^{ih} [r(C~,B) - c r(C~,P) r(P*,B) / (1 + c r(P*,P))]

        A conjugate pair's two terms have real coefficients over a common denominator:

            v / (is - lc) + v* / (is - l*c) = 2 (i s Re v - c Re(v l*)) / ((is - lc)(is - l*c)).
        """
        Lambda, P, B = self.Lambda, _complex(self.P[...]), _complex(self.B[...])
        dt, C, shape = self.dt, truncated, truncated.shape
        v = jnp.stack([C * B, C * P, *(jnp.broadcast_to(P.conj() * x, shape) for x in (B, P))], -1)
        v = jnp.concatenate([v.real, (v * Lambda.conj()[:, None]).real], -1)
        count = length // 2 + 1
        size = min(count, max(1, CHUNK_TERMS // C.size))

        @jax.checkpoint
        def chunk(index: Array) -> Complex[Array, "D F"]:
            h = (index * size + jnp.arange(size)).astype(dt.dtype) * (math.pi / length)
            c, s = jnp.cos(h), 2 * jnp.sin(h) / dt[:, None]
            cosine, sine = c[:, None], s[:, :, None]
            real, imag = (
                jnp.matmul(part, v, precision="highest")
                for part in pair_inverse(cosine, sine, Lambda.real, Lambda.imag)
            )
            sums = lax.complex(real, imag)
            r = 2 * (1j * sine * sums[..., :4] - cosine * sums[..., 4:])
            rank_one = c * r[..., 1] * r[..., 2] / (1 + c * r[..., 3])
            return jnp.exp(1j * h) * (r[..., 0] - rank_one)

        transform = lax.map(chunk, jnp.arange(-(-count // size)))
        transform = jnp.moveaxis(transform, 0, 1).reshape(shape[0], -1)[:, :count]
        return fft.irfft(transform, length)

    # The recurrence.

    def recurrence(self) -> Recurrence:
        """The discretised model, for `step`."""
        dt, Lambda, P = self.dt[:, None], self.Lambda, _complex(self.P[...])
        resolvent = 1 / (1 - dt / 2 * Lambda)
        return Recurrence(
            forward=1 + dt / 2 * Lambda,
            resolvent=resolvent,
            P=P,
            half_step=dt / 2,
            woodbury=dt / 2 / (1 + dt / 2 * _inner(P.conj(), resolvent * P)),
            input=dt * _complex(self.B[...]),
            C=_complex(self.C[...]),
            D=self.D[...],
        )


def step(
    recurrence: Recurrence, x: Complex[Array, "B D n"], u: Float[Array, "B D"]
) -> tuple[Complex[Array, "B D n"], Float[Array, "B D"]]:
    """One sample of the recurrence: the new state and the output. The first state is zero."""
    forward, R, P, half_step, woodbury, input, C, D = recurrence
    u = u.astype(D.dtype)
    x = forward * x - half_step * P * _inner(P.conj(), x) + input * u[..., None]
    x = R * x
    x = x - R * P * woodbury * _inner(P.conj(), x)
    return x, _inner(C, x)[..., 0] + D * u


@jax.custom_jvp
def pair_inverse(c: Array, s: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Real and imaginary part of 1 / ((is - lc)(is - l*c)) with l = a + ib, in real arithmetic.

    c^2 |l|^2 - s^2 is computed as a product, exact near the resonance. Its derivative is written
    down because most of a training step on a CPU is this, and what autodiff makes of it slower.
    """
    real, imag = (c * a) ** 2 + (c * b - s) * (c * b + s), -2 * s * c * a
    scale = 1 / (real**2 + imag**2)
    return real * scale, -imag * scale


@pair_inverse.defjvp
def _pair_inverse_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]):
    (c, s, a, b), (_, ds, da, db) = primals, tangents  # c depends on no parameter
    x, y = pair_inverse(*primals)
    real, imag = 2 * c * c * (a * da + b * db) - 2 * (s * ds), -2 * c * (s * da + a * ds)
    u, v = x * x - y * y, 2 * x * y  # d(1/z) = -(1/z)^2 dz
    return (x, y), (v * imag - u * real, -(u * imag + v * real))


def causal_convolution(
    u: Float[Array, "B T D"], kernel: Float[Array, "D T"]
) -> Float[Array, "B T D"]:
    """y[t] = sum_l kernel[l] u[t - l], by Fourier transforms of twice the length."""
    return jnp.swapaxes(fft.convolution(jnp.swapaxes(u, 1, 2), kernel), 1, 2)


def hippo_legs(state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda, P and B of HiPPO-LegS, each [n]: of every conjugate pair the upper one.

    With p_k = sqrt(k + 1/2), A + p p^T is -1/2 on the diagonal and skew-symmetric off it, so a
    unitary V diagonalises it: Lambda = V* (A + p p^T) V, P = V* p, and B = V* sqrt(2) p. (The
    public code of S4 also clips the imaginary part of B to [-2, 2]; the papers don't.)
    """
    k = np.arange(state_size)
    p = np.sqrt(k + 0.5)
    skew = np.outer(p, p) * np.sign(k[None, :] - k[:, None])
    frequency, V = np.linalg.eigh(-1j * skew)
    upper = frequency > 0
    P = V[:, upper].conj().T @ p
    return -0.5 + 1j * frequency[upper], P, math.sqrt(2) * P


def _inner(a: Array, b: Array) -> Array:
    """The inner product over all states, from the stored ones; the axis stays."""
    return 2 * (a * b).real.sum(-1, keepdims=True)


def _diagonal(x: Array) -> Array:
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def _complex(parts: Float[Array, "*shape 2"]) -> Complex[Array, "*shape"]:
    return lax.complex(parts[..., 0], parts[..., 1])


def _parts(x: np.ndarray) -> Float[Array, "*shape 2"]:
    return jnp.asarray(np.stack([np.real(x), np.imag(x)], -1), jnp.float32)
