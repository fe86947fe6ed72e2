"""MEGABYTE (Yu et al., "Predicting Million-byte Sequences with Multiscale Transformers", 2023).

A global Transformer reads one token per patch of samples, a local Transformer the samples of each
patch. Layers and sizes are those of a public PyTorch implementation (lucidrains/MEGABYTE-pytorch,
version 0.3.6) with its options for learned and for rotary positions, both off by default there:

- Global tokens: the embedded codes of a patch, concatenated; layer norm, linear layer, layer norm;
  plus a learned position. A learned start token comes first, so output n has read the patches
  before patch n. A linear layer turns it into one vector for each sample of patch n.
- Local tokens: a second embedding of a code, plus the learned position in its patch, plus the
  sample's vector from the global output. A learned start token comes first in each patch.
- A local output predicts the sample after its token, so the last token of a patch predicts the
  first sample of the next patch. The start token predicts the first sample of a clip.
- Blocks: attention with rotary positions and without biases, then an MLP with GELU, both residual.
  The input of both is token-shifted and then RMS-normalised. A last RMS norm follows the blocks.

In the paper the concatenated embeddings are the global tokens, tokens are not shifted, and the
first sample of a patch is predicted from the global output that has read the patch before it.
Unlike in the public code, biases start at zero, and the global Transformer does not read the last
patch of a window, after which nothing is predicted.

The defaults have 33,815,808 parameters and, like the other baselines, a context of 131,072 samples.
At that length attention to 4,096 patches is not yet the main cost: the local Transformer, linear in
the samples, takes about three times the FLOPs of the global one.

Dimensions: `B` batch, `T` samples, `P` samples per patch, `n` tokens, `S` tokens in a cache, `D`
width (`E` of the local Transformer), `H` heads, `K` head size.
"""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt8

from patchwave_jax.data.quantisers import NUM_CODES
from patchwave_jax.errors import UserError
from patchwave_jax.models.base import Baseline, Execution, ModelConfig
from patchwave_jax.models.layers import Key, split

ROTARY_BASE = 10_000
EPSILON = 1e-16  # added to the mean square; the public code bounds its root by 1e-8
Position = Int32[Array, ""] | int


@dataclasses.dataclass(frozen=True)
class MegabyteConfig(ModelConfig):
    """The defaults are the sizes of the public implementation's example, with patches for audio."""

    published_parameters: ClassVar[str] = "33.82M, of a public implementation"
    kind: str = "megabyte"
    patch_samples: int = 32
    max_patches: int = 4_096  # learned positions of the global Transformer: its longest context
    global_width: int = 512
    global_layers: int = 6
    global_heads: int = 8
    local_width: int = 256
    local_layers: int = 4
    local_heads: int = 8
    head_size: int = 64
    mlp_expand: int = 4  # hidden units of an MLP, in widths
    dropout: float = 0.0  # of attention weights and of hidden units
    compute_dtype: str = "float32"  # or 'bfloat16': linear layers and attention only

    def check(self, context_samples: int, causal: bool) -> None:
        super().check(context_samples, causal)
        for name in ("global_width", "local_width", "head_size"):
            if getattr(self, name) % 2:
                raise UserError(f"config.model.{name} must be even, got {getattr(self, name)}")
        if context_samples % (2 * self.patch_samples):
            raise UserError(
                f"config.context_samples {context_samples} is not a multiple of "
                f"{2 * self.patch_samples}, two patches of config.model.patch_samples"
            )
        if context_samples > self.max_patches * self.patch_samples:
            raise UserError(
                f"config.context_samples {context_samples} is longer than config.model.max_patches "
                f"{self.max_patches} patches of {self.patch_samples}; raise max_patches"
            )

    def build(
        self, *, quantiser: str, causal: bool, execution: Execution, rngs: nnx.Rngs
    ) -> "Megabyte":
        return Megabyte(self, rngs=rngs)


class Cache(NamedTuple):
    """What a block keeps of the tokens it has read."""

    keys: Float[Array, "B S H K"]
    values: Float[Array, "B S H K"]
    attention_shift: Float[Array, "B 1 D//2"]  # half of the last token of the attention's input
    mlp_shift: Float[Array, "B 1 D//2"]  # the same of the MLP's input


class Attention(nnx.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: MegabyteConfig, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = (heads, config.head_size)
        inner = heads * config.head_size
        linear = partial(_linear, dtype=config.compute_dtype, use_bias=False, rngs=rngs)
        self.query, self.key, self.value = (linear(width, inner) for _ in range(3))
        self.output = linear(inner, width)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "B n D"], key: Key, cache: Cache | None, position: Position
    ) -> tuple[Float[Array, "B n D"], tuple[Array, Array]]:
        """The output for tokens from `position` on; keys and values of these and those before."""
        positions = position + jnp.arange(x.shape[1])
        query, keys, values = (
            linear(x).reshape(*x.shape[:2], *self.heads)
            for linear in (self.query, self.key, self.value)
        )
        query, keys = rotate(query, positions), rotate(keys, positions)
        if cache is not None:
            keys = lax.dynamic_update_slice_in_dim(cache.keys, keys, position, 1)
            values = lax.dynamic_update_slice_in_dim(cache.values, values, position, 1)
        scores = jnp.einsum("bqhk,bshk->bhqs", query, keys, preferred_element_type=jnp.float32)
        visible = jnp.arange(keys.shape[1])[None, :] <= positions[:, None]
        scores = jnp.where(visible[None, None], scores / math.sqrt(self.heads[1]), -jnp.inf)
        weights = self.dropout(jax.nn.softmax(scores), deterministic=key is None, rngs=key)
        mixed = jnp.einsum("bhqs,bshk->bqhk", weights.astype(values.dtype), values)
        return self.output(mixed.reshape(*x.shape[:2], -1)), (keys, values)


class Block(nnx.Module):
    """Attention and an MLP, each of token-shifted, RMS-normalised input."""

    def __init__(self, config: MegabyteConfig, width: int, heads: int, *, rngs: nnx.Rngs):
        linear = partial(_linear, dtype=config.compute_dtype, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attention = Attention(config, width, heads, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.up = linear(width, config.mlp_expand * width)
        self.down = linear(config.mlp_expand * width, width)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "B n D"],
        key: Key = None,
        cache: Cache | None = None,
        position: Position = 0,
    ) -> tuple[Float[Array, "B n D"], Cache]:
        """The output for tokens from `position` on, and the cache of these and those before.

        `cache` holds the tokens before `position`; without it the sequences start with `x`.
        """
        attention_key, mlp_key = split(key, 2)
        first = jnp.zeros_like(x[:, :1, ::2])
        shifted, attention_shift = shift(x, first if cache is None else cache.attention_shift)
        attended, (keys, values) = self.attention(
            self.attention_norm(shifted), attention_key, cache, position
        )
        x = x + attended
        shifted, mlp_shift = shift(x, first if cache is None else cache.mlp_shift)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(shifted)), approximate=False)
        hidden = self.dropout(hidden, deterministic=key is None, rngs=mlp_key)
        return x + self.down(hidden), Cache(keys, values, attention_shift, mlp_shift)


class Transformer(nnx.Module):
    """Blocks and a final norm."""

    def __init__(
        self, config: MegabyteConfig, width: int, layers: int, heads: int, *, rngs: nnx.Rngs
    ):
        self.config, self.width, self.heads = config, width, heads
        self.blocks = nnx.List([Block(config, width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], key: Key = None) -> Float32[Array, "B S D"]:
        """The output for whole sequences. The backward pass recomputes each block."""
        graphdef, _ = nnx.split(self.blocks[0])
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(nnx.state, self.blocks))
        keys = None if key is None else jax.random.split(key, len(self.blocks))

        @jax.checkpoint
        def run(x: Array, layer: tuple[Any, Key]) -> tuple[Array, None]:
            params, block_key = layer
            return nnx.merge(graphdef, params)(x, block_key)[0], None

        return self.norm(lax.scan(run, x, (stacked, keys))[0])

    def empty(self, batch: int, tokens: int) -> list[Cache]:
        """Caches with room for `tokens` tokens of `batch` sequences."""
        kept = (batch, tokens, self.heads, self.config.head_size)
        half = (batch, 1, self.width // 2)
        dtype = jnp.dtype(self.config.compute_dtype)
        return [
            Cache(jnp.zeros(kept, dtype), jnp.zeros(kept, dtype), jnp.zeros(half), jnp.zeros(half))
            for _ in self.blocks
        ]

    def step(
        self, x: Float[Array, "B D"], caches: list[Cache], position: Position
    ) -> tuple[Float32[Array, "B D"], list[Cache]]:
        """The output of the token at `position`, which follows those in the caches."""
        x, stepped = x[:, None], []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, None, cache, position)
            stepped.append(cache)
        return self.norm(x)[:, 0], stepped


class State(NamedTuple):
    """State of `B` streams."""

    codes: UInt8[Array, "B P"]  # of the current patch
    context: Float[Array, "B P E"]  # what the global Transformer adds to its tokens
    global_caches: list[Cache]
    local_caches: list[Cache]


class Megabyte(Baseline):
    """The whole network."""

    def __init__(self, config: MegabyteConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch, width, local = config.patch_samples, config.global_width, config.local_width
        linear = partial(_linear, dtype=config.compute_dtype, rngs=rngs)
        embed = partial(nnx.Embed, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.global_start = nnx.Param(jax.random.normal(rngs.params(), (1, width)))
        self.global_embedding = embed(NUM_CODES, local)
        self.patch_norm = nnx.LayerNorm(patch * local, epsilon=1e-5, rngs=rngs)
        self.patch_linear = linear(patch * local, width)
        self.token_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.global_positions = embed(config.max_patches, width)
        self.global_transformer = Transformer(
            config, width, config.global_layers, config.global_heads, rngs=rngs
        )
        self.to_local = linear(width, patch * local)
        self.local_start = nnx.Param(jax.random.normal(rngs.params(), (1, local)))
        self.local_embedding = embed(NUM_CODES, local)
        self.local_positions = embed(patch, local)
        self.local_transformer = Transformer(
            config, local, config.local_layers, config.local_heads, rngs=rngs
        )
        self.head = _linear(local, NUM_CODES, dtype="float32", rngs=rngs)

    def window_logits(
        self, codes: UInt8[Array, "B T"], key: Key = None
    ) -> Float32[Array, "B T 256"]:
        """Logits of every sample given those before it in `codes`.

        Raises:
          ValueError: if `T` is not a multiple of `patch_samples`, or longer than `max_patches`.
        """
        config = self.config
        batch, samples = codes.shape
        if samples % config.patch_samples or samples > config.max_patches * config.patch_samples:
            raise ValueError(
                f"{samples} samples are not a multiple of config.model.patch_samples "
                f"{config.patch_samples}, or more than {config.max_patches} patches"
            )
        global_key, local_key = split(key, 2)
        patches = codes.reshape(batch, -1, config.patch_samples)
        count = patches.shape[1]
        tokens = self._global_tokens(patches[:, :-1], jnp.arange(count - 1))
        context = self.global_transformer(_after(self.global_start, tokens), global_key)
        context = self._context(context).reshape(batch * count, config.patch_samples, -1)

        patches = patches.reshape(batch * count, -1)
        tokens = self._local_tokens(patches, jnp.arange(config.patch_samples), context)
        y = self.local_transformer(_after(self.local_start, tokens), local_key)
        start, y = y[::count, :1], y[:, 1:].reshape(batch, samples, -1)
        return self.head(jnp.concatenate([start, y[:, :-1]], 1))

    def init_state(self, batch: int, context_samples: int) -> State:
        patch = self.config.patch_samples
        return State(
            codes=jnp.zeros((batch, patch), jnp.uint8),
            context=jnp.zeros((batch, patch, self.config.local_width)),
            global_caches=self.global_transformer.empty(batch, context_samples // patch),
            local_caches=self.local_transformer.empty(batch, 1 + patch),
        )

    def step_logits(
        self,
        prepared: Any,
        state: State,
        code: UInt8[Array, " B"],
        position: Int32[Array, ""],
        start: Int32[Array, ""],
    ) -> tuple[State, Float32[Array, "B 256"]]:
        """At the start of a window the local start token takes the place of `code`."""
        index = position - start
        patch, place = jnp.divmod(index - 1, self.config.patch_samples)
        begins = (index > 0) & (place == 0)
        state = lax.cond(begins, self._begin_patch, lambda state, _: state, state, patch)
        context = lax.dynamic_slice_in_dim(state.context, place, 1, 1)
        token = self._local_tokens(code[:, None], place[None], context)[:, 0]
        # `_begin_patch` overwrites at index 1 what index 0 leaves in the state.
        token = jnp.where(index == 0, self.local_start[...], token)
        local = jnp.where(index == 0, 0, 1 + place)
        y, local_caches = self.local_transformer.step(token, state.local_caches, local)
        codes = lax.dynamic_update_slice_in_dim(state.codes, code[:, None], place, 1)
        return state._replace(codes=codes, local_caches=local_caches), self.head(y)

    def _begin_patch(self, state: State, patch: Int32[Array, ""]) -> State:
        """The state after the start token of `patch` and all patches before it."""
        token = self._global_tokens(state.codes[:, None], (patch - 1)[None])[:, 0]
        token = jnp.where(patch == 0, self.global_start[...], token)
        y, global_caches = self.global_transformer.step(token, state.global_caches, patch)
        batch, places, _ = state.context.shape
        start = jnp.broadcast_to(self.local_start[...], (batch, self.config.local_width))
        empty = self.local_transformer.empty(batch, 1 + places)
        _, local_caches = self.local_transformer.step(start, empty, 0)
        return State(state.codes, self._context(y[:, None])[:, 0], global_caches, local_caches)

    def _global_tokens(
        self, patches: UInt8[Array, "B n P"], positions: Int32[Array, " n"]
    ) -> Float32[Array, "B n D"]:
        x = self.global_embedding(patches.astype(jnp.int32))
        x = self.patch_linear(self.patch_norm(x.reshape(*x.shape[:2], -1)))
        return self.token_norm(x.astype(jnp.float32)) + self.global_positions(positions)[None]

    def _context(self, y: Float32[Array, "B n D"]) -> Float32[Array, "B n P E"]:
        """What the global outputs add to the local tokens."""
        context = self.to_local(y).astype(jnp.float32)
        return context.reshape(*y.shape[:2], self.config.patch_samples, -1)

    def _local_tokens(
        self,
        codes: UInt8[Array, "B n"],
        places: Int32[Array, " n"],
        context: Float32[Array, "B n E"],
    ) -> Float32[Array, "B n E"]:
        x = self.local_embedding(codes.astype(jnp.int32))
        return x + self.local_positions(places)[None] + context


def shift(
    x: Float[Array, "B n D"], before: Float[Array, "B 1 D//2"]
) -> tuple[Float[Array, "B n D"], Float[Array, "B 1 D//2"]]:
    """Token shift (Peng et al. 2023): half of the channels come from the token before.

    `before` is that half of the token before `x`; returned second is that half of its last token.
    """
    kept, moved = jnp.split(x, 2, -1)
    moved = jnp.concatenate([before, moved], 1)
    return jnp.concatenate([kept, moved[:, :-1]], -1), moved[:, -1:]


def rotate(x: Float[Array, "B n H K"], positions: Int32[Array, " n"]) -> Float[Array, "B n H K"]:
    """Rotary positions (Su et al. 2021) of channel pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * ROTARY_BASE ** (-jnp.arange(half)[None, :] / half)
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _after(start: nnx.Param, tokens: Float[Array, "B n D"]) -> Float[Array, "B n+1 D"]:
    """A start token, then `tokens`."""
    first = jnp.broadcast_to(start[...][None], (len(tokens), 1, tokens.shape[-1]))
    return jnp.concatenate([first, tokens], 1)


def _linear(
    inputs: int, outputs: int, *, dtype: str, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer whose kernel starts as PyTorch's, uniform in +- 1/sqrt(inputs)."""
    uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nnx.Linear(
        inputs, outputs, use_bias=use_bias, kernel_init=uniform, dtype=jnp.dtype(dtype), rngs=rngs
    )
