"""The model one sample at a time: what is remembered of a stream, and the step from it.

This is the dense form once more, with nothing computed twice. Per sample and stream:

- the encoder computes one output per layer, from the inputs of each layer that are remembered;
- a causal Transformer computes one token, which attends to the normed inputs of each block,
  cached for all earlier tokens of its phase (attention is folded: they are keys and values);
- a bidirectional one computes the tokens of one phase anew, from their cached encodings.

Where a sample is counted by `past`, it is the number of samples of the window before it: target
`past` is of phase `past % P`, and the token before it is number `past // P` of that phase.

Dimensions as in `patchwave_jax.models.patchwave.model`; `R` samples that a layer remembers, `C`
samples a chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.models.patchwave.encoder import convolve
from patchwave_jax.models.patchwave.heads import LogisticMixture
from patchwave_jax.models.patchwave.model import PatchWave
from patchwave_jax.models.patchwave.transformer import attend, positions
from patchwave_jax.models.predictors.bank import Predictors
from patchwave_jax.models.predictors.streaming import AdaptiveStream
from patchwave_jax.training.step import graphdef_and_params

PRIME_BYTES = 2.5e8  # about what priming holds at once, besides the state

Folded = list[tuple[Array, Array, Array, Array]]  # the attention of each block


class State(NamedTuple):
    """What is remembered of `B` streams before their next sample."""

    codes: UInt8[Array, "B R"]  # the newest samples
    layers: list[Float[Array, "B R F"]]  # inputs of the encoder's layers after the first
    caches: list[Float[Array, "P B N D"]]  # of each block; bidirectional: one, of the encodings
    adaptive: Any  # an `Adaptive`, where there are such predictors


class Incremental:
    """The step of one configuration's model, and what prepares it."""

    def __init__(self, config: Config):
        self.causal, self.patches = config.objective == "dense", config.patches
        self.config = config.patch_model
        self._graphdef, self.abstract_params = graphdef_and_params(config)
        strides, filters = self.config.strides, self.config.filters
        # Of the convolutions and, last, of the linear layer.
        self._kernels = [self.config.kernel_size] * len(filters) + [self.config.final_frames]
        self._dilations = [math.prod(strides[:i]) for i in range(len(strides) + 1)]
        self._reaches = [(k - 1) * d for k, d in zip(self._kernels, self._dilations, strict=True)]
        predictors, self._adaptive = Predictors.of(self.config), None
        if predictors:
            self._adaptive = AdaptiveStream(predictors, config.data.quantiser)
        self._newest = max(self.config.kernel_size, self.config.predictor_taps, predictors.lookback)

    def merge(self, params: Any) -> PatchWave:
        return nnx.merge(self._graphdef, params)

    def fold(self, params: Any) -> Folded:
        """The attention's folded weights, so that they are computed once.

        The output matrix is laid out [H, D, D], as a step reads it without moving it.
        """
        folded = [block.attention.folded() for block in self.merge(params).blocks]
        return [(a, b, mix.transpose(1, 2, 0), d) for a, b, mix, d in folded]

    def empty(self, rows: int) -> State:
        """A state of `rows` streams to be primed."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        cache = (config.patch_samples, rows, self.patches, config.width)
        return State(
            jnp.full((rows, self._newest), quantisers.SILENCE, jnp.uint8),
            [
                jnp.zeros((rows, reach, filters), dtype)
                for reach, filters in zip(self._reaches[1:], config.filters, strict=True)
            ],
            [jnp.zeros(cache, dtype) for _ in range(config.num_layers if self.causal else 1)],
            self._adaptive and self._adaptive.empty(rows),
        )

    # Priming: the state from codes, with the dense form.

    def prime(
        self, params: Any, folded: Folded, state: State, segment: UInt8[Array, "B T"], past: Array
    ) -> State:
        """The state before target `past` of a window.

        `segment` is the patch before the window and as many of its patches as `past` samples
        touch; what lies behind them is not looked at. `state` is overwritten.
        """
        model, config = self.merge(params), self.config
        size, patches = config.patch_samples, segment.shape[1] // config.patch_samples - 1
        missing = max(0, self._newest + config.adaptive_block_samples - size)
        padding = ((0, 0), (missing, 0))
        history = jnp.pad(segment, padding, constant_values=quantisers.SILENCE)
        now = past + size + missing
        codes = lax.dynamic_slice_in_dim(history, now - self._newest, self._newest, 1)
        # The newest sample is the next step's to encode.
        field = config.receptive_field
        before = lax.dynamic_slice_in_dim(segment, past + size - field, field - 1, 1)
        x, layers = model.encoder.inputs(before), []
        for conv, dilation, reach in zip(
            model.encoder.convs, self._dilations, self._reaches[1:], strict=False
        ):
            bias = conv.bias[...].astype(x.dtype)
            x = jax.nn.relu(convolve(x, conv.kernel[...], 1, dilation) + bias)
            layers.append(x[:, x.shape[1] - reach :])
        caches = state.caches
        if caches and patches:
            caches = [self._prime_encodings(model, caches[0], segment), *caches[1:]]
        if caches and patches and self.causal:
            caches = self._prime_blocks(model, folded, caches, patches)
        adaptive = self._adaptive and self._adaptive.prime(history, now, past)
        return State(codes, layers, caches, adaptive)

    def _prime_encodings(self, model: PatchWave, cache: Array, segment: Array) -> Array:
        size, (rows, samples) = self.config.patch_samples, segment.shape
        patches = samples // size - 1
        patch_bytes = rows * size * 3 * sum(self.config.filters) * cache.dtype.itemsize
        chunk = max(1, min(patches, int(PRIME_BYTES / patch_bytes)))

        def encode(i, cache):
            first = jnp.minimum(i * chunk, patches - chunk)
            piece = lax.dynamic_slice_in_dim(segment, first * size, (chunk + 1) * size, 1)
            tokens = jnp.transpose(model.encode_segment(piece).tokens, (2, 0, 1, 3))
            return lax.dynamic_update_slice_in_dim(cache, tokens, first, 2)

        return lax.fori_loop(0, -(-patches // chunk), encode, cache)

    def _prime_blocks(
        self, model: PatchWave, folded: Folded, caches: list[Array], patches: int
    ) -> list[Array]:
        """The caches of all blocks from the encodings, which are in the first."""
        config, (size, rows, _, width) = self.config, caches[0].shape
        each = config.num_heads * 2 * (width + patches) + 8 * width + config.mlp_width
        most = PRIME_BYTES / (rows * patches * each * caches[0].dtype.itemsize)
        chunk = max(d for d in range(1, size + 1) if size % d == 0 and d <= max(1, most))
        mask = np.tril(np.ones((patches, patches), bool))
        shape = (chunk, rows, patches, width)

        def fill(i, caches):
            at = (i * chunk, 0, 0, 0)
            x = lax.dynamic_slice(caches[0], at, shape).reshape(-1, patches, width)
            x = x + jnp.asarray(positions(patches, width), x.dtype)
            filled = []
            for block, weights, cache in zip(model.blocks, folded, caches, strict=True):
                keys = block.attention_norm(x).astype(x.dtype)
                filled.append(lax.dynamic_update_slice(cache, keys.reshape(shape), at))
                x = block.feed_forward(x + attend(_as_attend(weights), keys, keys, mask))
            return filled

        return lax.fori_loop(0, size // chunk, fill, caches)

    def slide(self, state: State, patches: int) -> State:
        """A bidirectional model's state when its window begins `patches` patches later."""
        return state._replace(caches=[jnp.roll(x, -patches, 2) for x in state.caches])

    # One step.

    def extend(self, state: State, chunk: int) -> State:
        """With room for `chunk` more samples, in the layout in which `step` reads and writes.

        A layer of dilation d reads every d-th of its inputs: they are put side by side,
        [B, d, K - 1 + C / d, F], so that the step copies them in one piece.
        """
        layers = []
        for x, dilation in zip(state.layers, self._dilations[1:], strict=True):
            room = -(-chunk // dilation) * dilation
            x = jnp.pad(x, ((0, 0), (0, room), (0, 0)))
            x = x.reshape(x.shape[0], -1, dilation, x.shape[2])
            layers.append(jnp.swapaxes(x, 1, 2))
        return state._replace(
            codes=jnp.pad(state.codes, ((0, 0), (0, chunk))),
            layers=layers,
            adaptive=self._adaptive and self._adaptive.extend(state.adaptive, chunk),
        )

    def shorten(self, extended: State, count: Array) -> State:
        """The state after `count` steps from an extended one."""
        layers = []
        for x, reach in zip(extended.layers, self._reaches[1:], strict=True):
            x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], -1, x.shape[3])
            layers.append(lax.dynamic_slice_in_dim(x, count, reach, 1))
        return extended._replace(
            codes=lax.dynamic_slice_in_dim(extended.codes, count, self._newest, 1),
            layers=layers,
            adaptive=self._adaptive and self._adaptive.shorten(extended.adaptive, count),
        )

    def step(
        self, model: PatchWave, folded: Folded, state: State, i: Array, past: Array, shown: int
    ) -> tuple[State, Callable[[], tuple[Array, Any]]]:
        """Takes in the newest sample, `past - 1` of the window; `i` were added since `extend`.

        `shown` tokens of a phase are looked at; the newest must be among them.

        Returns:
          The state, and a function that gives what the head reads of target `past`: the hidden
          vector and the prediction.
        """
        recent = lax.dynamic_slice_in_dim(state.codes, i, self._newest, 1)
        token, skip, layers = self._encode(model, recent, state.layers, i)
        number, phase = past // self.config.patch_samples, past % self.config.patch_samples
        if self.causal:
            place = number, phase, shown
            states, caches = self._causal(model, folded, token, state.caches, *place)
            read_states = lambda: states  # noqa: E731
        else:
            caches = [_put_token(state.caches[0], token, number, phase)]
            tokens = lax.dynamic_index_in_dim(caches[0], phase, 0, False)
            read_states = functools.partial(self._bidirectional, model, folded, tokens, number)

        adaptive: Any = self._adaptive and self._adaptive.step(state.adaptive, recent, i, past)

        def read() -> tuple[Array, Any]:
            prediction = None
            if isinstance(model.head, LogisticMixture):
                described = self._adaptive and self._adaptive.describe(adaptive, recent, i, past)
                newest = recent[:, self._newest - model.head.taps :]
                prediction = jax.tree.map(lambda x: x[:, 0], model.head.predict(newest, described))
            return model.hidden(read_states(), skip, prediction), prediction

        return State(state.codes, layers, caches, adaptive), read

    def _encode(
        self, model: PatchWave, recent: Array, layers: list[Array], i: Array
    ) -> tuple[Float[Array, "B D"], Array | None, list[Array]]:
        """The encoding of the patch that ends with the newest sample, and its skips."""
        encoder, skip, kept = model.encoder, None, []
        taps = encoder.inputs(recent[:, self._newest - self.config.kernel_size :])
        for number, conv in enumerate(encoder.convs, 1):
            x = jax.nn.relu(_product(taps, conv.kernel[...]) + conv.bias[...].astype(taps.dtype))
            if self.config.skip_connections:
                skip = encoder.skips[number - 1](x) + (0 if skip is None else skip)
            dilation, earlier = self._dilations[number], self._kernels[number] - 1
            row, phase = i // dilation, i % dilation
            inputs = lax.dynamic_update_slice(
                layers[number - 1], x[:, None, None], (0, phase, earlier + row, 0)
            )
            shape = (x.shape[0], 1, earlier + 1, x.shape[1])
            taps = lax.dynamic_slice(inputs, (0, phase, row, 0), shape)
            kept.append(inputs)
        token = _product(taps, encoder.linear.kernel[...])
        token = token + encoder.linear.bias[...]  # pyright: ignore
        return token.astype(taps.dtype), skip, kept

    def _causal(
        self,
        model: PatchWave,
        folded: Folded,
        token: Float[Array, "B D"],
        caches: list[Array],
        number: Array,
        phase: Array,
        shown: int,
    ) -> tuple[Float[Array, "B D"], list[Array]]:
        table = jnp.asarray(positions(self.patches, self.config.width), token.dtype)
        x, kept = (token + table[number])[:, None], []
        seen = jnp.arange(shown) <= number
        size = (1, token.shape[0], shown, self.config.width)
        for block, weights, cache in zip(model.blocks, folded, caches, strict=True):
            query = block.attention_norm(x).astype(x.dtype)
            cache = _put_token(cache, query[:, 0], number, phase)
            keys = lax.dynamic_slice(cache, (phase, 0, 0, 0), size)[0]
            x = block.feed_forward(x + _attend_one(weights, query[:, 0], keys, seen)[:, None])
            kept.append(cache)
        return x[:, 0], kept

    def _bidirectional(
        self, model: PatchWave, folded: Folded, tokens: Float[Array, "B N D"], number: Array
    ) -> Float[Array, "B D"]:
        """The newest token's state, from the window of `N` tokens that ends with it.

        As in `PatchWave.newest_states`, what is missing in front are tokens of silence.
        """
        rows, count, width = tokens.shape
        silence = jnp.full((1, self.config.patch_samples), quantisers.SILENCE, jnp.uint8)
        silent = jnp.broadcast_to(model.encoder(silence, 0, 1)[0], (rows, count - 1, width))
        window = lax.dynamic_slice_in_dim(jnp.concatenate([silent, tokens], 1), number, count, 1)
        x = window + jnp.asarray(positions(count, width), tokens.dtype)
        for block, weights in zip(model.blocks, folded, strict=True):
            last = block is model.blocks[-1]
            keys = block.attention_norm(x).astype(x.dtype)
            x, queries = (x[:, -1:], keys[:, -1:]) if last else (x, keys)
            x = block.feed_forward(x + attend(_as_attend(weights), queries, keys, None))
        return x[:, -1]


def _put_token(cache: Array, token: Float[Array, "B D"], number: Array, phase: Array) -> Array:
    return lax.dynamic_update_slice(cache, token[None, :, None], (phase, 0, number, 0))


def _as_attend(weights: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    """Weights of `Incremental.fold` as `attend` takes them."""
    score, score_bias, mix, bias = weights
    return score, score_bias, mix.transpose(2, 0, 1), bias


def _attend_one(
    folded: tuple[Array, Array, Array, Array],
    query: Float[Array, "B D"],
    keys: Float[Array, "B N D"],
    seen: Array,
) -> Float[Array, "B D"]:
    """`attend` for one query a stream, with products and sums laid out as CPUs are fast at."""
    score, score_bias, mix, bias = folded
    (rows, width), heads = query.shape, score_bias.shape[0]
    queries = query @ score.reshape(width, -1) + score_bias.reshape(-1)
    scores = jnp.einsum("bke,bhe->bkh", keys, queries.reshape(rows, heads, width))
    scores = jnp.where(seen, jnp.swapaxes(scores, 1, 2).astype(jnp.float32), -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.einsum("bhk,bke->bhe", weights.astype(query.dtype), keys)
    mixed = (mixed / total).astype(query.dtype)
    return mixed.reshape(rows, -1) @ mix.reshape(-1, width) + bias


def _product(taps: Float[Array, "B *taps F"], kernel: Array) -> Float[Array, "B D"]:
    """The newest output of a convolution whose inputs are `taps`."""
    flat = taps.reshape(taps.shape[0], -1)
    return flat @ kernel.reshape(flat.shape[1], -1).astype(flat.dtype)
