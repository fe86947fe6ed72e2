"""How codes are drawn from a model's distribution: seed, temperature, top-k, top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How codes are drawn. The defaults draw from the model's own distribution."""

    seed: int = 0
    temperature: float = 1.0  # 0: always the likeliest code
    top_k: int = 0  # only the k likeliest codes; 0: all
    top_p: float = 1.0  # only the likeliest codes that together have this probability

    def check(self) -> None:
        """Raises `UserError` for a value out of range."""
        for name, ok, what in (
            ("seed", 0 <= self.seed < 2**31, "from 0 to 2**31 - 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", 0 <= self.top_k <= quantisers.NUM_CODES, "from 0 (all) to 256"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
        ):
            if not ok:
                raise UserError(f"--{name} must be {what}, got {getattr(self, name)}")

    def uniforms(self, streams: Array, first: Array, count: int) -> Float32[Array, "C B"]:
        """Uniform numbers for `count` samples from sample `first` on, each from its own key."""

        def of_sample(stream: Array, sample: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), stream), sample)
            return jax.random.uniform(key)

        of_streams = jax.vmap(of_sample, (0, None))
        return jax.vmap(of_streams, (None, 0))(streams, first + jnp.arange(count))

    def latent_uniforms(
        self, streams: Array, first: Array, count: int, size: int
    ) -> Float32[Array, "n B Z"]:
        """Uniform numbers for the latent variables of `count` blocks from block `first` on."""

        def of_block(stream: Array, block: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(self.seed), 2**31)
            key = jax.random.fold_in(jax.random.fold_in(key, stream), block)
            return jax.random.uniform(key, (size,))

        of_streams = jax.vmap(of_block, (0, None))
        return jax.vmap(of_streams, (None, 0))(streams, first + jnp.arange(count))

    def draw(
        self, logits: Float32[Array, "B 256"], uniform: Float32[Array, " B"]
    ) -> UInt8[Array, " B"]:
        """A code for each row: the first whose cumulative probability is above `uniform`.

        Temperature is applied first, then top-k, then top-p to what is left. Codes as likely as
        the last one kept are kept too.
        """
        logits = logits - logits.max(-1, keepdims=True)
        likeliest = _first(logits == 0)
        if self.temperature == 0:
            return likeliest.astype(jnp.uint8)
        logits = logits / self.temperature
        if self.top_k:
            rank = (logits[:, None, :] > logits[:, :, None]).sum(-1)
            logits = jnp.where(rank < self.top_k, logits, -jnp.inf)
        mass = jnp.exp(logits)
        if self.top_p < 1:
            likelier = logits[:, None, :] > logits[:, :, None]
            before = jnp.where(likelier, mass[:, None, :], 0).sum(-1)
            mass = jnp.where(before < self.top_p * mass.sum(-1, keepdims=True), mass, 0)
        # Cumulative sums within rows of 16 codes, and of whole rows.
        upper = np.triu(np.ones((16, 16), np.float32))
        within = mass.reshape(-1, 16, 16) @ upper
        rows = within[..., -1] @ (upper - np.eye(16, dtype=np.float32))
        cumulative = (within + rows[..., None]).reshape(mass.shape)
        above = cumulative > uniform[:, None] * cumulative[:, -1:]
        # Rounding could leave none above; never draw a code without mass.
        code = _first(above & (mass > 0))
        return jnp.where(code < quantisers.NUM_CODES, code, likeliest).astype(jnp.uint8)


def _first(chosen: Array) -> Array:
    """Index of the first true element of each row, 256 if there is none."""
    index = jnp.arange(quantisers.NUM_CODES, dtype=jnp.int32)
    return jnp.where(chosen, index, quantisers.NUM_CODES).min(-1)
