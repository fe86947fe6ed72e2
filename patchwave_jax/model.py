"""The patch model of "A Language Model With Million Context Length For Raw Audio" (Verma, 2022).

A convolutional encoder turns each patch of `P` samples into one token, a small Transformer
relates the tokens, and the newest token predicts the sample that follows. One set of weights
runs in two exact forms:

- the **patch form**, the paper's: cut one window into patches, encode each, predict one sample;
- the **dense form**: a strided convolution evaluated at every offset is a dilated convolution,
  so one pass over a segment encodes the patch that ends before *every* sample. The tokens whose
  ends differ by multiples of `P` are one sequence; there are `P` such sequences (phases), and
  phases are a batch axis. A segment of `(N + 1) P` samples has a target at each of its newest
  `N P` samples, the first of them with one patch of context and the last with `N`.

Dimensions: `B` batch, `T` samples, `P` samples per patch, `N` patches, `D` width, `H` heads,
`K` head size, `F` hidden, `V` 256 codes, `M` sequences (batch times phases).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from patchwave_jax import quantisers
from patchwave_jax.config import ModelConfig
from patchwave_jax.heads import LogisticMixture, Softmax

Key = Array | None  # a dropout key; None is deterministic


class Encoded(NamedTuple):
    """What the encoder says of the patches that end just before some samples."""

    tokens: Float[Array, "*shape D"]
    skip: Float[Array, "*shape D"] | None  # with `skip_connections`
    prediction: Float32[Array, "*shape"] | None  # with the logistic mixture


class Encoder(nnx.Module):
    """Strided convolutions and one linear layer: a patch's samples to a vector."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        features = config.embedding_width if config.input == "embedding" else 1
        if config.input == "embedding":
            self.embed = nnx.Embed(quantisers.NUM_CODES, features, dtype=dtype, rngs=rngs)
        he = nnx.initializers.he_normal()
        convs, skips = [], []
        for filters in config.filters:
            convs.append(
                nnx.Conv(
                    features, filters, config.kernel_size, kernel_init=he, dtype=dtype, rngs=rngs
                )
            )
            skips.append(nnx.Linear(filters, config.width, use_bias=False, dtype=dtype, rngs=rngs))
            features = filters
        self.convs = nnx.List(convs)
        if config.skip_connections:
            self.skips = nnx.List(skips)
        self.linear = nnx.Linear(
            config.final_frames * features, config.width, dtype=dtype, rngs=rngs
        )
        self.dropout = nnx.Dropout(config.conv_dropout)

    def inputs(self, codes: UInt8[Array, "B T"]) -> Float[Array, "B T C"]:
        """Codes as the companded waveform in [-1, 1), or embedded."""
        if self.config.input == "embedding":
            return self.embed(codes.astype(jnp.int32))
        scaled = (codes.astype(jnp.float32) - quantisers.SILENCE) / quantisers.SILENCE
        return scaled[..., None].astype(self.config.compute_dtype)

    def __call__(
        self, codes: UInt8[Array, "B T"], hop: int, count: int, key: Key = None
    ) -> tuple[Float[Array, "B n D"], Float[Array, "B n D"] | None]:
        """Encodes the `count` patches that end `hop` samples apart, the last at the last sample.

        `hop = 0` encodes one patch with its strides (the patch form). Otherwise layer l, whose
        cumulative stride is S, needs its features on a grid of gcd(S, hop) samples only.
        """
        config = self.config
        need = config.receptive_field + max(count - 1, 0) * hop
        x, skip, grid = self.inputs(codes[:, codes.shape[1] - need :]), None, 1
        keys = _split(key, len(self.convs))
        for i, conv in enumerate(self.convs):
            before, after = math.prod(config.strides[:i]), math.prod(config.strides[: i + 1])
            if hop:
                finer = math.gcd(after, hop)
                stride, dilation = finer // grid, before // grid
                grid = finer
            else:
                stride, dilation = config.strides[i], 1
            bias = conv.bias[...].astype(x.dtype)
            x = jax.nn.relu(convolve(x, conv.kernel[...], stride, dilation) + bias)
            x = self.dropout(x, deterministic=key is None, rngs=keys[i])
            if config.skip_connections:
                step = hop // grid if hop else 1
                newest = x[:, x.shape[1] - 1 - (count - 1) * step :: step]
                skip = self.skips[i](newest) + (0 if skip is None else skip)
        kernel = self.linear.kernel[...].reshape(config.final_frames, -1, config.width)
        dilation = math.prod(config.strides) // grid if hop else 1
        tokens = convolve(x, kernel, max(hop // grid, 1), dilation) + self.linear.bias[...]
        return tokens.astype(x.dtype), skip


def convolve(x, kernel, stride: int, dilation: int):
    """A convolution without padding: [B, T, C] with [k, C, F]."""
    kernel = kernel.astype(x.dtype)
    if stride > 1 and dilation == 1:
        # The same sums over blocks of `stride` samples: a stride's backward pass is slow on CPUs.
        taps, channels, filters = kernel.shape
        outputs, blocks = (x.shape[1] - taps) // stride + 1, -(-taps // stride)
        length = (outputs + blocks - 1) * stride
        x = jnp.pad(x, ((0, 0), (0, max(0, length - x.shape[1])), (0, 0)))[:, :length]
        x = x.reshape(x.shape[0], -1, stride * channels)
        kernel = jnp.pad(kernel, ((0, blocks * stride - taps), (0, 0), (0, 0)))
        kernel, stride = kernel.reshape(blocks, stride * channels, filters), 1
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        "VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


class Attention(nnx.Module):
    """Multi-head attention whose products per head are folded into two D x D matrices.

    q.k = (Wq x + bq).(Wk y + bk) = (x Wq' Wk + bq' Wk) y + what is the same for every y and
    cancels in the softmax; and Wo Wv likewise, where the value bias passes as a constant. Exact,
    half the work of the plain form when K = D, and the keys and values are the tokens themselves.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.num_heads * config.head_size
        self.query = nnx.Linear(config.width, inner, rngs=rngs)
        self.key = nnx.Linear(config.width, inner, rngs=rngs)
        self.value = nnx.Linear(config.width, inner, rngs=rngs)
        self.output = nnx.Linear(inner, config.width, rngs=rngs)

    def folded(self) -> tuple[Array, Array, Array, Array]:
        """`(A [D, H, D], a [H, D], C [H, D, D], c [D])`: scores (x A + a) y, output (mix C) + c."""
        width, heads = self.config.width, (self.config.num_heads, self.config.head_size)
        dtype = jnp.dtype(self.config.compute_dtype)
        query = self.query.kernel[...].reshape(width, *heads)
        key = self.key.kernel[...].reshape(width, *heads)
        value = self.value.kernel[...].reshape(width, *heads)
        output = self.output.kernel[...].reshape(*heads, width)
        scale = 1 / math.sqrt(self.config.head_size)
        score = jnp.einsum("dhk,ehk->dhe", query, key) * scale
        score_bias = jnp.einsum("hk,ehk->he", self.query.bias[...].reshape(heads), key) * scale
        mix = jnp.einsum("dhk,hke->hde", value, output)
        bias = self.value.bias[...] @ self.output.kernel[...] + self.output.bias[...]
        return score.astype(dtype), score_bias.astype(dtype), mix.astype(dtype), bias.astype(dtype)

    def __call__(
        self, x: Float[Array, "M N D"], mask: np.ndarray | Array | None
    ) -> Float[Array, "M N D"]:
        """Attends within each sequence; `mask` [N, N] is true where a query may look."""
        return attend(self.folded(), x, x, mask)


def attend(
    folded: tuple[Array, Array, Array, Array],
    x: Float[Array, "M n D"],
    keys: Float[Array, "M N D"],
    mask: np.ndarray | Array | None,
) -> Float[Array, "M n D"]:
    """Folded attention of `x` to `keys`; `mask` [n, N] is true where a query may look."""
    score, score_bias, mix, bias = folded
    queries = jnp.einsum("mnd,dhe->mnhe", x, score) + score_bias
    scores = jnp.einsum("mnhe,mke->mnhk", queries, keys).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(x.dtype)
    mixed = jnp.einsum("mnhk,mkd->mnhd", weights, keys)
    return jnp.einsum("mnhd,hde->mne", mixed, mix) + bias


class Block(nnx.Module):
    """A pre-norm Transformer block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.attention_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)
        self.mlp_dropout = nnx.Dropout(config.mlp_dropout)
        self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))

    def __call__(
        self, x: Float[Array, "M N D"], mask: np.ndarray | Array | None, key: Key = None
    ) -> Float[Array, "M N D"]:
        hidden_key, out_key, token_key = _split(key, 3)
        x = x + self.attention(self.attention_norm(x).astype(x.dtype), mask)
        x = self.feed_forward(x, hidden_key, out_key)
        return self.token_dropout(x, deterministic=key is None, rngs=token_key)

    def feed_forward(
        self, x: Float[Array, "M N D"], hidden_key: Key = None, out_key: Key = None
    ) -> Float[Array, "M N D"]:
        """The second half of the block, of each token by itself."""
        plain = hidden_key is None
        hidden = jax.nn.relu(self.up(self.mlp_norm(x).astype(x.dtype)))
        hidden = self.mlp_dropout(hidden, deterministic=plain, rngs=hidden_key)
        return x + self.mlp_dropout(self.down(hidden), deterministic=plain, rngs=out_key)


class PatchWave(nnx.Module):
    """The whole model. `causal` is the attention's mask: True for the dense objective."""

    def __init__(self, config: ModelConfig, *, causal: bool, quantiser: str, rngs: nnx.Rngs):
        self.config, self.causal = config, causal
        dtype = jnp.dtype(config.compute_dtype)
        self.encoder = Encoder(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.readout = nnx.Linear(config.width, config.readout_width, dtype=dtype, rngs=rngs)
        if config.head == "softmax":
            self.head = Softmax(config.readout_width, dtype=dtype, rngs=rngs)
        else:
            self.head = LogisticMixture(
                config.readout_width,
                components=config.mixture_components,
                taps=config.predictor_taps,
                quantiser=quantiser,
                dtype=dtype,
                rngs=rngs,
            )
        self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))
        self.head_dropout = nnx.Dropout(config.head_dropout)

    # Encoding.

    def encode_window(self, codes: UInt8[Array, "B T"], key: Key = None) -> Encoded:
        """The patch form: `shape` is [B, N]; skips and predictions are the newest patch's."""
        config, (batch, samples) = self.config, codes.shape
        patches = codes.reshape(batch, samples // config.patch_samples, config.patch_samples)
        keys = None if key is None else jax.random.split(key, patches.shape[1])
        encode = jax.vmap(
            lambda patch, key: self.encoder(patch, 0, 1, key),
            in_axes=(1, None if keys is None else 0),
            out_axes=1,
        )
        tokens, skip = encode(patches, keys)
        prediction = None
        if isinstance(self.head, LogisticMixture):
            prediction = self.head.predict(codes[:, samples - self.head.taps :])[:, 0]
        return Encoded(tokens[:, :, 0], None if skip is None else skip[:, -1, 0], prediction)

    def encode_segment(
        self, codes: UInt8[Array, "B T"], hop: int = 1, chunk_patches: int = 0, key: Key = None
    ) -> Encoded:
        """The dense form: `codes` are (N + 1) P samples, `shape` is [B, N, P / hop].

        Entry [b, n, p] is of the patch that ends before sample `(n + 1) P + p hop`.
        `chunk_patches` > 0 (a divisor of N) encodes that many patches at a time and recomputes
        them in the backward pass: less memory for long segments.
        """
        size = self.config.patch_samples
        patches = codes.shape[1] // size - 1
        chunk = chunk_patches or patches
        if patches % chunk:
            raise ValueError(f"chunk_patches {chunk} does not divide the {patches} patches")
        if chunk == patches:
            return self._encode_stretch(codes, hop, key)
        # Not a loop on the device: XLA's CPU backend runs the gradient of a convolution in one
        # twenty times slower.
        starts = range(0, patches * size, chunk * size)
        keys = _split(key, len(starts))
        encode = jax.checkpoint(self._encode_stretch, static_argnums=1)
        pieces = [
            encode(codes[:, start : start + (chunk + 1) * size], hop, piece_key)
            for start, piece_key in zip(starts, keys, strict=True)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *pieces)

    def _encode_stretch(self, codes: Array, hop: int, key: Key) -> Encoded:
        size = self.config.patch_samples
        batch, patches = codes.shape[0], codes.shape[1] // size - 1
        count = patches * size // hop
        end = codes.shape[1] - hop  # patches end before the targets, the last `hop` from the end
        tokens, skip = self.encoder(codes[:, :end], hop, count, key)
        prediction = None
        if isinstance(self.head, LogisticMixture):
            first = size - self.head.taps
            prediction = self.head.predict(codes[:, first:end])[:, ::hop]
        return jax.tree.map(
            lambda x: x.reshape(batch, patches, size // hop, *x.shape[2:]),
            Encoded(tokens, skip, prediction),
        )

    # Transformer and readout.

    def transform(self, tokens: Float[Array, "M N D"], key: Key = None) -> Float[Array, "M N D"]:
        """The Transformer, over the tokens with their sinusoidal positions."""
        count = tokens.shape[1]
        mask = np.tril(np.ones((count, count), bool)) if self.causal else None
        keys = _split(key, len(self.blocks) + 1)
        x = tokens + jnp.asarray(positions(count, self.config.width), tokens.dtype)
        x = self.token_dropout(x, deterministic=key is None, rngs=keys[-1])
        for block, block_key in zip(self.blocks, keys, strict=False):
            x = block(x, mask, block_key)
        return x

    def newest_states(
        self, tokens: Float[Array, "M N D"], newest: int, key: Key = None
    ) -> Float[Array, "M n D"]:
        """What the newest `n` tokens become, each with only itself and older ones in view.

        A causal model computes them all at once. A bidirectional one reads each from a window
        of `N` tokens of its own that ends there, filled up with tokens of silence in front.
        """
        if self.causal:
            return self.transform(tokens, key)[:, -newest:]
        count = tokens.shape[1]
        silence = jnp.full((1, self.config.patch_samples), quantisers.SILENCE, jnp.uint8)
        silent = jnp.broadcast_to(self.encoder(silence, 0, 1)[0], tokens.shape)
        padded = jnp.concatenate([silent[:, 1:], tokens], 1)

        def read(start):
            window = lax.dynamic_slice_in_dim(padded, start, count, 1)
            return self.transform(window, key)[:, -1]

        return jnp.moveaxis(lax.map(read, jnp.arange(count - newest, count)), 0, 1)

    def hidden(
        self, states: Float[Array, "*shape D"], skip: Array | None, key: Key = None
    ) -> Float[Array, "*shape F"]:
        """The readout before the head, with the full-rate skip path added to the states."""
        x = states if skip is None else states + skip
        x = jax.nn.relu(self.readout(self.norm(x).astype(states.dtype)))
        return self.head_dropout(x, deterministic=key is None, rngs=key)

    # The two forms, whole.

    def next_sample_logits(self, window: UInt8[Array, "B T"]) -> Float32[Array, "B 256"]:
        """The patch form: logits of the sample after each window of whole patches."""
        return self.head.logits(*self._read_window(window, None))

    def next_sample_log_prob(
        self, codes: UInt8[Array, "B T+1"], key: Key = None
    ) -> Float32[Array, " B"]:
        """Log-probability, in nats, of each row's last sample given the `T` before it."""
        return self.head.log_prob(*self._read_window(codes[:, :-1], key), codes[:, -1])

    def _read_window(self, window: Array, key: Key) -> tuple[Array, Array | None]:
        keys = _split(key, 3)
        encoded = self.encode_window(window, keys[0])
        states = self.transform(encoded.tokens, keys[1])
        return self.hidden(states[:, -1], encoded.skip, keys[2]), encoded.prediction

    def dense_logits(
        self, segment: UInt8[Array, "B T"], hop: int = 1
    ) -> Float32[Array, "B n 256"]:
        """The dense form: logits of the samples P, P + hop, ... of a segment of (N + 1) P."""

        def head(hidden, prediction, _):
            return self.head.logits(hidden, prediction)

        logits = self._dense(segment, head, hop=hop)
        return logits.reshape(segment.shape[0], -1, quantisers.NUM_CODES)

    def dense_log_prob(
        self,
        segment: UInt8[Array, "B T"],
        *,
        hop: int = 1,
        newest: int | None = None,
        phase_chunk: int = 0,
        chunk_patches: int = 0,
        key: Key = None,
    ) -> Float32[Array, "B n"]:
        """Log-probabilities, in nats, of a segment's samples P, P + hop, ...

        `newest` patches of targets are computed (None: all N), always the segment's last.
        `phase_chunk` > 0 (a divisor of P / hop) runs the Transformer and the head over that many
        phases at a time and recomputes them in the backward pass; `chunk_patches` > 0 (a divisor
        of N) does the same for the encoder: less memory for long segments, the same result.
        """
        log_probs = self._dense(
            segment,
            self.head.log_prob,
            hop=hop,
            newest=newest,
            phase_chunk=phase_chunk,
            chunk_patches=chunk_patches,
            key=key,
        )
        return log_probs.reshape(segment.shape[0], -1)

    def _dense(
        self,
        segment: Array,
        head: Callable[[Array, Array | None, Array], Array],
        *,
        hop: int,
        newest: int | None = None,
        phase_chunk: int = 0,
        chunk_patches: int = 0,
        key: Key = None,
    ) -> Array:
        """`head` of every target, [B, n, P / hop, ...], from chunks of phases."""
        size, (batch, samples) = self.config.patch_samples, segment.shape
        patches, phases = samples // size - 1, size // hop
        newest = newest or patches
        keys = _split(key, 2)
        encoded = self.encode_segment(segment, hop, chunk_patches, keys[0])
        targets = segment[:, size::hop].reshape(batch, patches, phases)
        counted = (encoded.skip, encoded.prediction, targets)
        tree = (encoded.tokens, jax.tree.map(lambda x: x[:, -newest:], counted))

        def predict(piece):
            (tokens, (skip, prediction, codes)), key = piece
            keys, (_, _, count, width) = _split(key, 2), tokens.shape
            sequences = jnp.swapaxes(tokens, 1, 2).reshape(-1, patches, width)
            states = self.newest_states(sequences, newest, keys[0])
            states = jnp.swapaxes(states.reshape(batch, count, newest, width), 1, 2)
            return head(self.hidden(states, skip, keys[1]), prediction, codes)

        chunk = phase_chunk or phases
        if chunk == phases:
            return predict((tree, keys[1]))
        if phases % chunk:
            raise ValueError(f"phase_chunk {chunk} does not divide the {phases} phases")
        pieces = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0), tree
        )
        keys = None if key is None else jax.random.split(keys[1], phases // chunk)
        out = jnp.moveaxis(lax.map(jax.checkpoint(predict), (pieces, keys)), 0, 2)
        return out.reshape(batch, newest, phases, *out.shape[4:])

    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(nnx.state(self, nnx.Param)))


def _split(key: Key, count: int) -> Sequence[Key]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def positions(count: int, width: int) -> Float32[np.ndarray, "N D"]:
    """Sinusoidal positions: sines in the first half of the channels, cosines in the second."""
    rates = np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2))
    angles = np.arange(count)[:, None] * rates[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
