"""The Transformer: folded attention, its blocks, and positions.

The same `Block` runs whole sequences and, with a `cache`, one token at a time.

Dimensions as in `patchwave_jax.models.patchwave.model`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from patchwave_jax.models.layers import Key, split, value
from patchwave_jax.models.patchwave.config import PatchWaveConfig

QUERY_BLOCK, MAX_QUERY_BLOCKS = 64, 8  # tokens (or a multiple), and how many a program has
Folded = tuple[Array, Array, Array, Array]  # as `Attention.folded` returns them


class Cache(NamedTuple):
    """What one attention has read in all phases of `B` streams, and where to go on.

    Attention is folded, so the tokens it reads are keys and values at once.
    """

    tokens: Float[Array, "P B N D"]
    phase: Int32[Array, ""] | int  # the first that is written
    number: Int32[Array, ""] | int  # the first token of a phase that is written
    visible: int | None  # tokens of a phase that the newest may attend to; None: fills whole phases

    def put(self, x: Float[Array, "M n D"]) -> "Cache":
        """With the tokens of phases `phase`, `phase + 1`, ... of all streams."""
        x = x.reshape(-1, self.tokens.shape[1], *x.shape[1:])
        tokens = lax.dynamic_update_slice(self.tokens, x, (self.phase, 0, self.number, 0))
        return self._replace(tokens=tokens)

    def visible_tokens(self) -> Float[Array, "B N D"]:
        """The first `visible` tokens of the phase."""
        assert self.visible is not None
        shape = (1, self.tokens.shape[1], self.visible, self.tokens.shape[3])
        return lax.dynamic_slice(self.tokens, (self.phase, 0, 0, 0), shape)[0]


class Attention(nnx.Module):
    """Multi-head attention whose products per head are folded into two D x D matrices.

    q.k = (Wq x + bq).(Wk y + bk) = (x Wq' Wk + bq' Wk) y + what is the same for every y and
    cancels in the softmax; and Wo Wv likewise, where the value bias passes as a constant. Exact,
    half the work of the plain form when K = D, and the keys and values are the tokens themselves.
    """

    def __init__(self, config: PatchWaveConfig, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.num_heads * config.head_size
        self.query = nnx.Linear(config.width, inner, rngs=rngs)
        self.key = nnx.Linear(config.width, inner, rngs=rngs)
        self.value = nnx.Linear(config.width, inner, rngs=rngs)
        self.output = nnx.Linear(inner, config.width, rngs=rngs)

    def folded(self) -> Folded:
        """`(A [D, H, D], a [H, D], C [D, H, D], c [D])`: scores (x A + a) y, out (mix C') + c."""
        width, heads = self.config.width, (self.config.num_heads, self.config.head_size)
        dtype = jnp.dtype(self.config.compute_dtype)
        query = value(self.query.kernel).reshape(width, *heads)
        key = value(self.key.kernel).reshape(width, *heads)
        values = value(self.value.kernel).reshape(width, *heads)
        output = value(self.output.kernel).reshape(*heads, width)
        scale = 1 / math.sqrt(self.config.head_size)
        score = jnp.einsum("dhk,ehk->dhe", query, key) * scale
        score_bias = jnp.einsum("hk,ehk->he", value(self.query.bias).reshape(heads), key) * scale
        mix = jnp.einsum("dhk,hke->ehd", values, output)
        bias = value(self.value.bias) @ value(self.output.kernel) + value(self.output.bias)
        return score.astype(dtype), score_bias.astype(dtype), mix.astype(dtype), bias.astype(dtype)

    def __call__(
        self,
        x: Float[Array, "M N D"],
        causal: bool,
        folded: Folded | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "M N D"], Cache | None]:
        """Attends within each sequence, to all tokens or (`causal`) to itself and older ones.

        `folded` are this attention's folded matrices, where a loop has them made outside it. With
        a `cache`, `x` is stored there; if its `visible` is set, `x` is one token of each stream,
        which attends to those in the cache.
        """
        folded = folded or self.folded()
        cache = cache and cache.put(x)
        if cache is not None and cache.visible is not None:
            seen = jnp.arange(cache.visible) <= cache.number
            attended = attend_newest(folded, x[:, 0], cache.visible_tokens(), seen)[:, None]
        else:
            attended = attend_to_older(folded, x) if causal else attend(folded, x, x, None)
        return attended, cache


def attend(
    folded: Folded,
    x: Float[Array, "M n D"],
    keys: Float[Array, "M N D"],
    mask: np.ndarray | Array | None,
) -> Float[Array, "M n D"]:
    """Folded attention of `x` to `keys`; `mask` [n, N] is true where a query may look.

    Tokens and heads are the rows of one product.
    """
    score, score_bias, mix, bias = folded
    sequences, count, width = x.shape
    queries = x.reshape(-1, width) @ score.reshape(width, -1) + score_bias.reshape(-1)
    queries = queries.reshape(sequences, -1, width)
    scores = jnp.einsum("mrd,mkd->mrk", queries, keys).astype(jnp.float32)
    if mask is not None:
        heads = queries.shape[1] // count
        scores = jnp.where(jnp.repeat(jnp.asarray(mask), heads, 0), scores, -jnp.inf)
    mixed = jnp.einsum("mrk,mkd->mrd", jax.nn.softmax(scores).astype(keys.dtype), keys)
    # In this orientation the gradient of `mix` is a product twice as fast on CPUs.
    out = jnp.einsum("rf,ef->re", mixed.reshape(-1, mix[0].size), mix.reshape(width, -1))
    return (out + bias).reshape(x.shape)


def attend_to_older(folded: Folded, x: Float[Array, "M N D"]) -> Float[Array, "M N D"]:
    """Folded attention of each token to itself and older ones.

    Blocks of queries see only the keys that at least one of them may look at: of the scores that
    a mask would throw away, nearly half of all, few are computed.
    """
    count, attended = x.shape[1], []
    block = min(QUERY_BLOCK * -(-count // (QUERY_BLOCK * MAX_QUERY_BLOCKS)), -(-count // 2))
    for first in range(0, count, block):
        end = min(first + block, count)
        mask = np.arange(end)[None, :] <= np.arange(first, end)[:, None]
        attended.append(attend(folded, x[:, first:end], x[:, :end], mask))
    return jnp.concatenate(attended, 1)


def attend_newest(
    folded: Folded,
    query: Float[Array, "M D"],
    keys: Float[Array, "M N D"],
    seen: Bool[Array, " N"],
) -> Float[Array, "M D"]:
    """`attend` for one query of each sequence, with products in the order that CPUs are fast at."""
    score, score_bias, mix, bias = folded
    (rows, width), heads = query.shape, score_bias.shape[0]
    queries = query @ score.reshape(width, -1) + score_bias.reshape(-1)
    scores = jnp.einsum("bke,bhe->bkh", keys, queries.reshape(rows, heads, width))
    scores = jnp.where(seen, jnp.swapaxes(scores, 1, 2).astype(jnp.float32), -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.einsum("bhk,bke->bhe", weights.astype(query.dtype), keys)
    mixed = (mixed / total).astype(query.dtype)
    return jnp.einsum("rf,ef->re", mixed.reshape(rows, -1), mix.reshape(width, -1)) + bias


class Block(nnx.Module):
    """A pre-norm Transformer block."""

    def __init__(self, config: PatchWaveConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.attention_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)
        self.mlp_dropout = nnx.Dropout(config.mlp_dropout)
        self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))

    def __call__(
        self,
        x: Float[Array, "M N D"],
        causal: bool,
        key: Key = None,
        folded: Folded | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "M N D"], Cache | None]:
        """The block's output; `folded` and `cache` are its attention's (see `Attention`)."""
        hidden_key, out_key, token_key = split(key, 3)
        plain = key is None
        normed = self.attention_norm(x).astype(x.dtype)
        attended, cache = self.attention(normed, causal, folded, cache)
        x = x + attended
        hidden = jax.nn.relu(self.up(self.mlp_norm(x).astype(x.dtype)))
        hidden = self.mlp_dropout(hidden, deterministic=plain, rngs=hidden_key)
        x = x + self.mlp_dropout(self.down(hidden), deterministic=plain, rngs=out_key)
        return self.token_dropout(x, deterministic=plain, rngs=token_key), cache


def positions(count: int, width: int) -> Float32[np.ndarray, "N D"]:
    """Sinusoidal positions: sines in the first half of the channels, cosines in the second."""
    rates = np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2))
    angles = np.arange(count)[:, None] * rates[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
