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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from patchwave_jax.config import PatchWaveConfig
from patchwave_jax.data import quantisers
from patchwave_jax.models.chunking import map_over_chunks, mean_over_chunks, recomputed
from patchwave_jax.models.context_parallel import Shards
from patchwave_jax.models.layers import Key, split
from patchwave_jax.models.patchwave.encoder import Encoder
from patchwave_jax.models.patchwave.heads import LogisticMixture, Softmax
from patchwave_jax.models.patchwave.transformer import Block, Folded, positions
from patchwave_jax.models.predictors.bank import Prediction, Predictors, noise_of, waveform_of


class Encoded(NamedTuple):
    """What the encoder says of the patches that end just before some samples."""

    tokens: Float[Array, "*shape D"]
    skip: Float[Array, "*shape D"] | None  # with `skip_connections`
    prediction: Prediction | None  # with the logistic mixture


class PatchWave(nnx.Module):
    """The whole model. `causal` is the attention's mask: True for the dense objective."""

    def __init__(self, config: PatchWaveConfig, *, causal: bool, quantiser: str, rngs: nnx.Rngs):
        self.config, self.causal, self.quantiser = config, causal, quantiser
        self.predictors = Predictors.of(config)
        dtype = jnp.dtype(config.compute_dtype)
        self.encoder = Encoder(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        told = config.width + self.predictors.num_features
        self.readout = nnx.Linear(told, config.readout_width, dtype=dtype, rngs=rngs)
        if config.head == "softmax":
            self.head = Softmax(config.readout_width, dtype=dtype, rngs=rngs)
        else:
            self.head = LogisticMixture(
                config.readout_width,
                components=config.mixture_components,
                taps=config.predictor_taps,
                adaptive=len(config.adaptive_taps),
                quantiser=quantiser,
                dtype=dtype,
                rngs=rngs,
            )
        self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))
        self.head_dropout = nnx.Dropout(config.head_dropout)

    # Encoding.

    def encode_window(self, codes: UInt8[Array, "B T"], key: Key = None, age: int = 0) -> Encoded:
        """The patch form: `shape` is [B, N]; skips and predictions are the newest patch's."""
        config, (batch, samples) = self.config, codes.shape
        patches = codes.reshape(batch, samples // config.patch_samples, config.patch_samples)
        # Over rows: a convolution's batch is then rows times patches, and a mesh can split it.
        keys = None if key is None else jax.random.split(key, batch)
        encode = jax.vmap(
            lambda row, key: self.encoder(row, 0, 1, key), (0, None if keys is None else 0)
        )
        tokens, skip = encode(patches, keys)
        prediction = self._predict(jnp.pad(codes, ((0, 0), (0, 1))), samples - age)
        newest = jax.tree.map(lambda x: x[:, -1], prediction)
        return Encoded(tokens[:, :, 0], None if skip is None else skip[:, -1, 0], newest)

    def _predict(self, codes: UInt8[Array, "B T"], first: int) -> Prediction | None:
        """The mixture's linear predictions of the samples from `first` on, where a block begins."""
        if not isinstance(self.head, LogisticMixture):
            return None
        adaptive, predictors = None, self.predictors
        if predictors:
            missing = max(0, predictors.lookback - first)
            known = jnp.pad(codes, ((0, 0), (missing, 0)), constant_values=quantisers.SILENCE)
            waveform = waveform_of(known, self.quantiser)
            begin = missing + first - predictors.error_history
            age = np.arange(codes.shape[1] - first) % predictors.block_samples
            adaptive = predictors.describe(
                predictors.predict(waveform, noise_of(known, self.quantiser), begin),
                waveform[:, begin:],
                jnp.asarray(age, jnp.float32),
                quantisers.get(self.quantiser).edges,
            )
        return self.head.predict(codes[:, first - self.head.taps : -1], adaptive)

    def encode_segment(
        self,
        codes: UInt8[Array, "B T"],
        hop: int = 1,
        chunk_patches: int = 0,
        key: Key = None,
        history: int = 0,
    ) -> Encoded:
        """The dense form: `codes` are (N + 1) P samples, `shape` is [B, N, P / hop].

        Entry [b, n, p] is of the patch that ends before sample `(n + 1) P + p hop`.
        `chunk_patches` > 0 (a divisor of N) encodes that many patches at a time and recomputes
        them in the backward pass: less memory for long segments. In front of the segment may be
        `history` samples for the predictors, which otherwise see silence there.
        """
        size = self.config.patch_samples
        prediction = self._predict(codes, history + size)
        codes = codes[:, history:]
        patches = codes.shape[1] // size - 1
        chunk = chunk_patches or patches
        if patches % chunk:
            raise ValueError(f"chunk_patches {chunk} does not divide the {patches} patches")
        prediction = jax.tree.map(
            lambda x: x[:, ::hop].reshape(x.shape[0], patches, size // hop, *x.shape[2:]),
            prediction,
        )
        if chunk == patches:
            return Encoded(*self._encode_stretch(codes, hop, key), prediction)
        # Not a loop on the device: XLA's CPU backend runs the gradient of a convolution in one
        # twenty times slower.
        starts = range(0, patches * size, chunk * size)
        stretches = [codes[:, start : start + (chunk + 1) * size] for start in starts]
        pieces = recomputed(
            lambda codes, key: self._encode_stretch(codes, hop, key),
            list(zip(stretches, split(key, len(stretches)), strict=True)),
        )
        tokens, skip = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *pieces)
        return Encoded(tokens, skip, prediction)

    def _encode_share(
        self, shards: Shards, segment: Array, hop: int, chunk_patches: int, key: Key
    ) -> Encoded:
        """`encode_segment` of all patches at this device's phases."""
        history = max(0, self.predictors.lookback - self.config.patch_samples)
        stretch = shards.own_stretch(segment, self.config.patch_samples, history)
        encoded, features = self.encode_segment(stretch, hop, chunk_patches, key, history), None
        if (prediction := encoded.prediction) is not None:  # whose features need no gradient
            features = prediction.features
            encoded = encoded._replace(prediction=prediction._replace(features=None))
        encoded, features = shards.exchange(encoded, features)
        if encoded.prediction is not None:
            prediction = encoded.prediction._replace(features=features)
            encoded = encoded._replace(prediction=prediction)
        return encoded

    def _encode_stretch(self, codes: Array, hop: int, key: Key) -> tuple[Array, Array | None]:
        size = self.config.patch_samples
        batch, patches = codes.shape[0], codes.shape[1] // size - 1
        count = patches * size // hop
        end = codes.shape[1] - hop  # patches end before the targets, the last `hop` from the end
        return jax.tree.map(
            lambda x: x.reshape(batch, patches, size // hop, *x.shape[2:]),
            self.encoder(codes[:, :end], hop, count, key),
        )

    # Transformer and readout.

    def folded(self) -> list[Folded]:
        """Every block's folded attention: made once where `transform` runs in a loop."""
        return [block.attention.folded() for block in self.blocks]

    def transform(
        self, tokens: Float[Array, "M N D"], key: Key = None, folded: list[Folded] | None = None
    ) -> Float[Array, "M N D"]:
        """The Transformer, over the tokens with their sinusoidal positions."""
        folded = self.folded() if folded is None else folded
        keys = split(key, len(self.blocks) + 1)
        x = tokens + jnp.asarray(positions(tokens.shape[1], self.config.width), tokens.dtype)
        x = self.token_dropout(x, deterministic=key is None, rngs=keys[-1])
        for block, weights, block_key in zip(self.blocks, folded, keys, strict=False):
            x = block(x, self.causal, block_key, weights)
        return x

    def newest_states(
        self,
        tokens: Float[Array, "M N D"],
        newest: int,
        key: Key = None,
        folded: list[Folded] | None = None,
    ) -> Float[Array, "M n D"]:
        """What the newest `n` tokens become, each with only itself and older ones in view.

        A causal model computes them all at once. A bidirectional one reads each from a window
        of `N` tokens of its own that ends there, filled up with tokens of silence in front.
        """
        if self.causal:
            return self.transform(tokens, key, folded)[:, -newest:]
        count = tokens.shape[1]
        silence = jnp.full((1, self.config.patch_samples), quantisers.SILENCE, jnp.uint8)
        silent = jnp.broadcast_to(self.encoder(silence, 0, 1)[0], tokens.shape)
        padded = jnp.concatenate([silent[:, 1:], tokens], 1)

        def read(start):
            window = lax.dynamic_slice_in_dim(padded, start, count, 1)
            return self.transform(window, key, folded)[:, -1]

        return jnp.moveaxis(lax.map(read, jnp.arange(count - newest, count)), 0, 1)

    def hidden(
        self,
        states: Float[Array, "*shape D"],
        skip: Array | None,
        prediction: Prediction | None,
        key: Key = None,
    ) -> Float[Array, "*shape F"]:
        """The readout before the head, with the full-rate skip path added to the states."""
        x = self.norm(states if skip is None else states + skip).astype(states.dtype)
        if prediction is not None and prediction.features is not None:
            x = jnp.concatenate([x, prediction.features.astype(x.dtype)], -1)
        x = jax.nn.relu(self.readout(x))
        return self.head_dropout(x, deterministic=key is None, rngs=key)

    # The two forms, whole.

    def next_sample_logits(
        self, window: UInt8[Array, "B T"], age: int = 0
    ) -> Float32[Array, "B 256"]:
        """The patch form: logits of the sample after each window of whole patches.

        `age` is that sample's place in its block, where there are adaptive predictors.
        """
        return self.head.logits(*self._read_window(window, None, age))

    def next_sample_log_prob(
        self, codes: UInt8[Array, "B T+1"], key: Key = None
    ) -> Float32[Array, " B"]:
        """Log-probability, in nats, of each row's last sample given the `T` before it."""
        return self.head.log_prob(*self._read_window(codes[:, :-1], key), codes[:, -1])

    def _read_window(
        self, window: Array, key: Key, age: int = 0
    ) -> tuple[Array, Prediction | None]:
        keys = split(key, 3)
        encoded = self.encode_window(window, keys[0], age)
        states = self.transform(encoded.tokens, keys[1])
        hidden = self.hidden(states[:, -1], encoded.skip, encoded.prediction, keys[2])
        return hidden, encoded.prediction

    def dense_logits(self, segment: UInt8[Array, "B T"], hop: int = 1) -> Float32[Array, "B n 256"]:
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
        shards: Shards | None = None,
    ) -> Float32[Array, "B n"]:
        """Log-probabilities, in nats, of a segment's samples P, P + hop, ...

        `newest` patches of targets are computed (None: all N), always the segment's last.
        `phase_chunk` > 0 (a divisor of P / hop) runs the Transformer and the head over that many
        phases at a time, `chunk_patches` > 0 (a divisor of N) the encoder over that many patches:
        less memory for long segments, the same result. With `shards`, a device has the targets
        of its own phases only, and both chunks must divide its own share.
        """
        log_probs = self._dense(
            segment,
            self.head.log_prob,
            hop=hop,
            newest=newest,
            phase_chunk=phase_chunk,
            chunk_patches=chunk_patches,
            shards=shards,
        )
        return log_probs.reshape(segment.shape[0], -1)

    def dense_nats(
        self,
        segment: UInt8[Array, "B T"],
        *,
        hop: int = 1,
        phase_chunk: int = 0,
        chunk_patches: int = 0,
        key: Key = None,
        shards: Shards | None = None,
    ) -> tuple[Float32[Array, ""], Float32[Array, " B"]]:
        """The loss: mean NLL, in nats, of a segment's samples P, P + hop, ..., and each row's.

        As `dense_log_prob`, but made to be differentiated, in its first result: nothing of the
        Transformer and the head is kept for the backward pass, nor computed twice.
        """
        keys = split(key, 2)
        pieces, predict = self._predictor(segment, hop, None, chunk_patches, keys[0], shards)
        tokens, (skip, prediction, codes) = pieces
        features = None  # of the codes alone, so that no gradient is asked for
        if prediction is not None:
            features, prediction = prediction.features, prediction._replace(features=None)

        def nats(piece: Any, features: Array | None, index: Array) -> Array:
            tokens, (skip, prediction, codes) = piece
            if prediction is not None:
                prediction = prediction._replace(features=features)
            chunk_key = None if keys[1] is None else jax.random.fold_in(keys[1], index)
            piece = tokens, (skip, prediction, codes)
            return -predict(piece, self.head.log_prob, chunk_key).mean((1, 2))

        pieces, chunk = (tokens, (skip, prediction, codes)), phase_chunk or tokens.shape[2]
        return mean_over_chunks(nats, pieces, features, axis=2, size=chunk)

    def _dense(
        self,
        segment: Array,
        head: Callable[[Array, Prediction | None, Array], Array],
        *,
        hop: int,
        newest: int | None = None,
        phase_chunk: int = 0,
        chunk_patches: int = 0,
        shards: Shards | None = None,
    ) -> Array:
        """`head` of every target, [B, n, P / hop, ...], from chunks of phases."""
        pieces, predict = self._predictor(segment, hop, newest, chunk_patches, None, shards)
        chunk = phase_chunk or pieces[0].shape[2]
        return map_over_chunks(lambda piece: predict(piece, head), pieces, axis=2, size=chunk)

    def _predictor(
        self,
        segment: Array,
        hop: int,
        newest: int | None,
        chunk_patches: int,
        key: Key,
        shards: Shards | None,
    ) -> tuple[Any, Callable[..., Array]]:
        """What the Transformer and the head read of a segment, and a function that runs them.

        The arrays of the first are [B, N or n, P / hop, ...], with `shards` of this device's
        phases. The function takes any of them: phases don't mix.
        """
        size, (batch, samples) = self.config.patch_samples, segment.shape
        patches = samples // size - 1
        newest = newest or patches
        targets = segment[:, size::hop].reshape(batch, patches, size // hop)
        if shards is None:
            encoded = self.encode_segment(segment, hop, chunk_patches, key)
        else:
            encoded = self._encode_share(shards, segment, hop, chunk_patches, key)
            targets = shards.own_phases(targets)
        folded = self.folded()
        counted = (encoded.skip, encoded.prediction, targets)
        pieces = (encoded.tokens, jax.tree.map(lambda x: x[:, -newest:], counted))

        def predict(piece: Any, head: Callable[..., Array], key: Key = None) -> Array:
            tokens, (skip, prediction, codes) = piece
            keys, (_, _, count, width) = split(key, 2), tokens.shape
            sequences = jnp.swapaxes(tokens, 1, 2).reshape(-1, patches, width)
            states = self.newest_states(sequences, newest, keys[0], folded)
            states = jnp.swapaxes(states.reshape(batch, count, newest, width), 1, 2)
            return head(self.hidden(states, skip, prediction, keys[1]), prediction, codes)

        return pieces, predict
