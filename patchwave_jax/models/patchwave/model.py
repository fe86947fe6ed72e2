"""The patch model of "A Language Model With Million Context Length For Raw Audio" (Verma, 2022).

A convolutional encoder turns each patch of `P` samples into one token, a small Transformer
relates the tokens, and the newest token predicts the sample that follows. One set of weights
runs in two exact forms:

- the **patch form**, the paper's: cut one window into patches, encode each, predict one sample;
- the **dense form**: a strided convolution evaluated at every offset is a dilated convolution,
  so one pass over a segment encodes the patch that ends before *every* sample. The tokens whose
  ends differ by multiples of `P` are one sequence; there are `P` such sequences (phases), and
  phases are a batch axis. A segment of `(N + 1) P` samples has a target at each of its last
  `N P` samples, the first of them with one patch of context and the last with `N`.

Generation is the dense form again, one sample at a time, with what was computed before cached.

Dimensions: `B` batch, `T` samples, `P` samples per patch, `N` patches, `D` width, `H` heads,
`K` head size, `F` hidden, `V` 256 codes, `M` sequences (batch times phases).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models.base import Execution, Model, Read
from patchwave_jax.models.chunking import map_over_chunks, mean_over_chunks, recomputed
from patchwave_jax.models.layers import Key, split
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.patchwave.contradiction import contradict
from patchwave_jax.models.patchwave.encoder import Encoder, EncoderState
from patchwave_jax.models.patchwave.heads import Conditioning, LogisticMixture, Softmax
from patchwave_jax.models.patchwave.plan import BANDS
from patchwave_jax.models.patchwave.planned_mixture import PlannedMixture
from patchwave_jax.models.patchwave.transformer import Block, Cache, Folded, positions

PRIME_BYTES = 2.5e8  # about what priming holds at once, besides the state
VISIBLE_TOKENS = 128  # a growing window is compiled again for every so many tokens


class Encoded(NamedTuple):
    """The encoder's outputs for the patches that end just before some samples."""

    tokens: Float[Array, "*shape D"]
    skip: Float[Array, "*shape D"] | None  # with `skip_connections`


class Pieces(NamedTuple):
    """Inputs of the Transformer and the head, of one segment: [B, N or n, P, ...], by phase."""

    tokens: Array
    skip: Array | None
    trained: tuple[Any, ...]  # the head's conditioning, with a gradient
    targets: UInt8[Array, "B n P"]


class State(NamedTuple):
    """State of `B` streams before their newest sample is read."""

    encoder: EncoderState
    head: Any
    caches: list[Float[Array, "P B N D"]]  # of each block; bidirectional: one, of the encodings


class PatchWave(Model):
    """The whole model. `causal` is the attention's mask: True for the dense objective."""

    def __init__(
        self,
        config: PatchWaveConfig,
        *,
        causal: bool,
        quantiser: str,
        rngs: nnx.Rngs,
        execution: Execution | None = None,
    ):
        self.config, self.causal, self.execution = config, causal, execution or Execution()
        dtype = jnp.dtype(config.compute_dtype)
        self.encoder = Encoder(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.readout = nnx.Linear(
            config.readout_inputs(quantiser), config.readout_width, dtype=dtype, rngs=rngs
        )
        kind = Softmax if config.head == "softmax" else LogisticMixture
        if config.plan_block_samples:
            kind = PlannedMixture
            self.levels = nnx.Linear(BANDS, config.width, dtype=dtype, rngs=rngs)
        self.head: Any = kind(config, quantiser, rngs=rngs)
        self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))
        self.head_dropout = nnx.Dropout(config.head_dropout)

    def start_from(self, taps: Any, scale: float) -> None:
        self.head.start_from(taps, scale)

    def loss(
        self, codes: UInt8[Array, "B T"], carry: Any, first: Array | bool, key: Key
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " B"], Any]]:
        if self.causal:
            nats, row_nats = self.dense_nats(codes, key)
            return nats, (row_nats, carry)
        row_nats = -self.next_sample_log_prob(codes, key)
        return row_nats.mean(), (row_nats, carry)

    # The parts that both forms share.

    def folded(self) -> list[Folded]:
        """Every block's folded attention: made once where `transform` runs in a loop."""
        return [block.attention.folded() for block in self.blocks]

    def transform(
        self,
        tokens: Float[Array, "M N D"],
        key: Key = None,
        folded: list[Folded] | None = None,
        caches: list[Cache] | None = None,
        place: tuple[Array, int] | None = None,
    ) -> tuple[Float[Array, "M N D"], list[Any]]:
        """The Transformer, over tokens with their sinusoidal positions.

        With `caches`, one for each block, what the blocks read is kept there. With `place`, the
        number of a token and an upper limit of it, that token alone goes on from the caches.
        """
        folded = self.folded() if folded is None else folded
        keys, width = split(key, len(self.blocks) + 1), self.config.width
        first, count = place or (0, tokens.shape[1])
        table = jnp.asarray(positions(count, width), tokens.dtype)
        table = lax.dynamic_slice_in_dim(table, first, tokens.shape[1])
        x = self.token_dropout(tokens + table, deterministic=key is None, rngs=keys[-1])
        kept = []
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x, cache = block(x, self.causal, keys[i], folded[i], cache)
            kept.append(cache)
        return x, kept

    def hidden(
        self,
        states: Float[Array, "*shape D"],
        skip: Array | None,
        conditioning: tuple[Any, ...],
        key: Key = None,
    ) -> Float[Array, "*shape F"]:
        """The readout before the head, with the full-rate skip path added to the states."""
        x = self.normed(states, skip)
        x = jax.nn.relu(self.readout(self.head.readout_inputs(x, *conditioning)))
        return self.head_dropout(x, deterministic=key is None, rngs=key)

    def normed(self, states: Float[Array, "*shape D"], skip: Array | None) -> Array:
        return self.norm(states if skip is None else states + skip).astype(states.dtype)

    def with_levels(self, tokens: Float[Array, "*shape D"], levels: Array) -> Array:
        """Tokens that know the levels of the bands where they end."""
        return tokens + self.levels((levels / 8 - 2).astype(tokens.dtype))

    # The patch form.

    def next_sample_logits(
        self,
        window: UInt8[Array, "B T"],
        position: int = 0,
        plan: Int32[Array, "B Z"] | None = None,
    ) -> Float32[Array, "B 256"]:
        """Logits of the sample after each window of whole patches.

        `position` is that sample's in its window of the dense form (see `LogisticMixture`), and
        `plan` that of its block, in a model that has one.
        """
        hidden, conditioning = self._read_window(window, None, position, plan)
        return self.head.logits(hidden, *conditioning)

    def next_sample_log_prob(
        self, codes: UInt8[Array, "B T"], key: Key = None
    ) -> Float32[Array, " B"]:
        """Log-probability, in nats, of each row's last sample given those before it."""
        hidden, conditioning = self._read_window(codes[:, :-1], key)
        return self.head.log_prob(hidden, codes[:, -1], *conditioning)

    def _read_window(
        self, window: Array, key: Key, position: int = 0, plan: Array | None = None
    ) -> tuple[Array, tuple[Any, ...]]:
        keys, (batch, samples) = split(key, 3), window.shape
        patches = window.reshape(batch, -1, self.config.patch_samples)
        # Over rows: a convolution's batch is then rows times patches, and a mesh can split it.
        row_keys = None if keys[0] is None else jax.random.split(keys[0], batch)
        encode = jax.vmap(self.encoder.patch, (0, None if row_keys is None else 0))
        tokens, skip = encode(patches, row_keys)
        following = jnp.pad(window, ((0, 0), (0, 1)))
        given = {"plan": plan} if self.head.plan else {}
        trained, fixed = self.head.condition(following, samples, position, **given)
        if self.head.plan:
            size = self.config.patch_samples
            tokens = self.with_levels(tokens, self.head.levels(window, size, position)[:, ::size])
        conditioning = jax.tree.map(lambda x: x[:, -1], (*trained, *fixed))
        states, _ = self.transform(tokens, keys[1])
        newest_skip = None if skip is None else skip[:, -1]
        return self.hidden(states[:, -1], newest_skip, conditioning, keys[2]), conditioning

    # The dense form.

    def dense_nats(
        self, segment: UInt8[Array, "B S"], key: Key = None
    ) -> tuple[Float32[Array, ""], Float32[Array, " B"]]:
        """Mean NLL, in nats, of a segment's samples from the second patch on, and each row's.

        Only the first result has a gradient, computed along with the value: nothing of the
        Transformer and the head is kept for the backward pass, nor computed twice.
        """
        keys, folded, excess, weight = split(key, 2), self.folded(), None, None
        if self.head.plan and key is not None:
            key = jax.random.fold_in(key, 2)
            waveform, excess, weight = contradict(self.head.bank.decode(segment)[0], key)
            segment = self.head.bank.encode(waveform)
        size = self.config.patch_samples
        excess, weight = jax.tree.map(lambda x: x[:, size:], (excess, weight))
        pieces, fixed = self._pieces(segment, keys[0], excess=excess)
        weight = self._by_phase(weight)

        def nats(pieces: Pieces, both: tuple[Any, Any], index: Array) -> Array:
            fixed, weight = both
            chunk_key = None if keys[1] is None else jax.random.fold_in(keys[1], index)
            log_probs = self._read(pieces, fixed, self.head.log_prob, folded, chunk_key)
            return -(log_probs if weight is None else log_probs * weight).mean((1, 2))

        chunk = self.execution.phase_chunk or pieces.tokens.shape[2]
        mean, row_nats = mean_over_chunks(nats, pieces, (fixed, weight), axis=2, size=chunk)
        if not self.head.plan:
            return mean, row_nats
        plan_nats = -self._plan_log_probs(pieces, fixed, folded).mean((1, 2))
        plan_nats /= self.head.plan.block_samples
        return mean + plan_nats.mean(), row_nats + lax.stop_gradient(plan_nats)

    def _plan_log_probs(
        self, pieces: Pieces, fixed: Any, folded: list[Folded]
    ) -> Float32[Array, "B n b"]:
        """Log-probabilities, in nats, of the plans of the `b` blocks of each patch."""
        every = self.head.plan.block_samples
        pieces, fixed = jax.tree.map(lambda x: x[:, :, ::every], (pieces, fixed))
        states = self._states(pieces, folded)
        x = self.normed(states, pieces.skip)
        return self.head.plan.log_prob(x, *pieces.trained, *fixed)

    def log_probs(
        self,
        segment: UInt8[Array, "B S"],
        last_n: int,
        latents: Int32[Array, "B blocks Z"] | None = None,
    ) -> Float32[Array, "B n"]:
        """Log-probabilities, in nats, of the `last_n` samples of a segment.

        With shards, these are whole patches, and a device has the targets of its own phases only,
        patch by patch.
        """
        size = self.config.patch_samples
        if not 0 < last_n <= segment.shape[1] - size:
            raise ValueError(f"last_n {last_n} is not in [1, {segment.shape[1] - size}]")
        if self.execution.shards is not None and last_n % size:
            raise ValueError(f"last_n {last_n} is not a multiple of the {size} samples of a patch")
        patches = -(-last_n // size)
        pieces, fixed = self._pieces(segment, None, patches)
        if latents is not None:
            plan = jnp.repeat(latents, self.head.plan.block_samples, 1)
            plan = plan.reshape(fixed[-1].plan.shape)
            fixed = (*fixed[:-1], fixed[-1]._replace(plan=plan))
        log_probs = self._dense(pieces, fixed, self.head.log_prob)
        if self.head.plan:
            plan = self._plan_log_probs(pieces, fixed, self.folded())
            log_probs = log_probs.at[:, :, :: self.head.plan.block_samples].add(plan)
        return log_probs.reshape(segment.shape[0], -1)[:, -last_n:]

    def logits(self, segment: UInt8[Array, "B S"], every: int = 1) -> Float32[Array, "B n 256"]:
        """Logits of the samples P, P + every, ... of a segment; `every` divides P."""

        def head(hidden: Array, _: Array, *conditioning: Any) -> Array:
            return self.head.logits(hidden, *conditioning)

        logits = self._dense(*self._pieces(segment, None), head, every=every)
        return logits.reshape(segment.shape[0], -1, quantisers.NUM_CODES)

    def _dense(
        self, pieces: Pieces, fixed: Any, head: Callable[..., Array], every: int = 1
    ) -> Array:
        """`head` of the targets, [B, n, P / every, ...], phases in chunks."""
        pieces, fixed = jax.tree.map(lambda x: x[:, :, ::every], (pieces, fixed))
        folded, chunk = self.folded(), self.execution.phase_chunk
        chunk = chunk if chunk and every == 1 else pieces.tokens.shape[2]

        def read(both: tuple[Pieces, Any]) -> Array:
            return self._read(both[0], both[1], head, folded)

        return map_over_chunks(read, (pieces, fixed), axis=2, size=chunk)

    def _by_phase(self, x: Any) -> Any:
        size = self.config.patch_samples
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size, *x.shape[2:]), x)

    def _pieces(
        self,
        segment: Array,
        key: Key,
        last_n: int | None = None,
        excess: Float32[Array, "B n Z"] | None = None,
    ) -> tuple[Pieces, Any]:
        """What `_read` needs of a segment, and what of it needs no gradient.

        With shards, of this device's phases only. All but tokens is cut to the last `last_n`
        patches.
        """
        size, shards = self.config.patch_samples, self.execution.shards
        batch, patches = segment.shape[0], segment.shape[1] // size - 1
        targets = segment[:, size:].reshape(batch, patches, size)
        if shards is None:
            encoded, (trained, fixed) = self._encode_segment(segment, key, excess=excess)
        else:  # encode a stretch of time at all phases, then exchange it for all time at own phases
            history = max(0, self.head.lookback - size)
            stretch = shards.own_stretch(segment, size, history)
            encoded, (trained, fixed) = self._encode_segment(stretch, key, history)
            (encoded, trained), fixed = shards.exchange((encoded, trained), fixed)
            targets = shards.own_phases(targets)
        skip, trained, fixed, targets = jax.tree.map(
            lambda x: x[:, -(last_n or patches) :], (encoded.skip, trained, fixed, targets)
        )
        return Pieces(encoded.tokens, skip, trained, targets), fixed

    def _encode_segment(
        self,
        codes: UInt8[Array, "B S"],
        key: Key,
        history: int = 0,
        excess: Float32[Array, "B n Z"] | None = None,
    ) -> tuple[Encoded, Conditioning]:
        """Tokens, skips and the head's conditioning [B, N, P, ...] of (N + 1) P samples.

        Entry [b, n, p] is of the patch that ends before sample `(n + 1) P + p`. In front of the
        segment may be `history` samples for the head, which otherwise sees silence there.
        """
        size = self.config.patch_samples
        more = {} if excess is None else {"excess": excess}
        trained, fixed = self.head.condition(codes, history + size, **more)
        codes = codes[:, history:]
        patches = codes.shape[1] // size - 1
        chunk = min(patches, self.execution.encode_chunk_patches or patches)
        if patches % chunk:
            raise ValueError(f"chunks of {chunk} patches do not divide the {patches} patches")

        def encode(codes: Array, key: Key) -> Encoded:
            # Patches end before the targets, so the last sample of the segment is not encoded.
            encoded = self.encoder.every_offset(codes[:, :-1], codes.shape[1] - size, key)
            return self._by_phase(Encoded(*encoded))

        if chunk == patches:
            encoded = encode(codes, key)
        else:
            # Not a loop on the device: XLA's CPU backend runs the gradient of a convolution in one
            # twenty times slower.
            starts = range(0, patches * size, chunk * size)
            stretches = [codes[:, start : start + (chunk + 1) * size] for start in starts]
            keys = split(key, len(stretches))
            pieces = recomputed(encode, list(zip(stretches, keys, strict=True)))
            encoded = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *pieces)
        trained, fixed = self._by_phase((trained, fixed))
        if self.head.plan:
            tokens = self.with_levels(encoded.tokens, fixed[-1].recent)
            encoded = encoded._replace(tokens=tokens)
        return encoded, (trained, fixed)

    def _read(
        self,
        pieces: Pieces,
        fixed: tuple[Any, ...],
        head: Callable[..., Array],
        folded: list[Folded],
        key: Key = None,
    ) -> Array:
        """`head` of hidden vectors, targets and conditioning, for any phases: they don't mix."""
        keys, conditioning = split(key, 2), (*pieces.trained, *fixed)
        states = self._states(pieces, folded, keys[0])
        hidden = self.hidden(states, pieces.skip, conditioning, keys[1])
        return head(hidden, pieces.targets, *conditioning)

    def _states(self, pieces: Pieces, folded: list[Folded], key: Key = None) -> Array:
        """The Transformer's states of the targets, [B, n, phases, D]."""
        batch, patches, phases, width = pieces.tokens.shape
        last_n = pieces.targets.shape[1]
        sequences = jnp.swapaxes(pieces.tokens, 1, 2).reshape(-1, patches, width)
        states = self._last_states(sequences, last_n, key, folded)
        return jnp.swapaxes(states.reshape(batch, phases, last_n, width), 1, 2)

    def _last_states(
        self, tokens: Float[Array, "M N D"], last_n: int, key: Key, folded: list[Folded]
    ) -> Float[Array, "M n D"]:
        """States of the `last_n` tokens, each with only itself and older ones in view.

        A causal model computes them all at once. A bidirectional one reads each from a window
        of `N` tokens of its own that ends there, filled up with tokens of silence in front.
        """
        if self.causal:
            return self.transform(tokens, key, folded)[0][:, -last_n:]
        count = tokens.shape[1]

        def read(number: Array) -> Array:
            window = self._window_of_tokens(tokens, number)
            return self.transform(window, key, folded)[0][:, -1]

        return jnp.moveaxis(lax.map(read, jnp.arange(count - last_n, count)), 0, 1)

    def _window_of_tokens(
        self, tokens: Float[Array, "M N D"], number: Array
    ) -> Float[Array, "M N D"]:
        """The `N` tokens up to token `number`, with tokens of silence where there are fewer."""
        silence = jnp.full((1, self.config.patch_samples), quantisers.SILENCE, jnp.uint8)
        silent = jnp.broadcast_to(self.encoder.patch(silence)[0][:, None], tokens.shape)
        padded = jnp.concatenate([silent[:, 1:], tokens], 1)
        return lax.dynamic_slice_in_dim(padded, number, tokens.shape[1], 1)

    # Generation: of the window that starts at `start`, the token before sample `position` is number
    # `(position - start) // P` of phase `position % P`.

    def latents(self, state: State) -> Int32[Array, "B Z"]:
        return state.head.plan

    def prepare(self) -> list[Folded]:
        return self.folded()

    @property
    def slides(self) -> bool:
        """Encodings move up in a bidirectional model; a causal one's caches depend on positions."""
        return not self.causal

    def init_state(self, batch: int, context_samples: int) -> State:
        config = self.config
        size = config.patch_samples
        shape = (size, batch, context_samples // size, config.width)
        count = config.num_layers if self.causal else 1
        caches = [jnp.zeros(shape, jnp.dtype(config.compute_dtype)) for _ in range(count)]
        return State(self.encoder.init_state(batch), self.head.init_state(batch), caches)

    def steps_from(self, position: int, start: int) -> None:
        return None

    def prime(
        self,
        prepared: list[Folded],
        state: State,
        segment: UInt8[Array, "B S"],
        position: Int32[Array, ""],
        start: Int32[Array, ""],
    ) -> State:
        size, field = self.config.patch_samples, self.config.receptive_field
        end = position - start + size  # of the known samples, in the segment
        padded = jnp.pad(segment, ((0, 0), (1, 0)), constant_values=quantisers.SILENCE)
        # The patch that ends at the newest known sample is encoded by the next step.
        before = lax.dynamic_slice_in_dim(padded, end - field, field, 1)
        encoder = self.encoder.prime(before, state.encoder, position)
        caches, patches = state.caches, segment.shape[1] // size - 1
        if caches and patches:
            caches = [self._prime_encodings(caches[0], segment), *caches[1:]]
        if caches and patches and self.causal:
            caches = self._prime_blocks(prepared, caches, patches)
        return State(encoder, self.head.prime(segment, end, position), caches)

    def _prime_encodings(self, cache: Array, segment: Array) -> Array:
        size, (rows, samples) = self.config.patch_samples, segment.shape
        patches = samples // size - 1
        patch_bytes = rows * size * 3 * sum(self.config.filters) * cache.dtype.itemsize
        chunk = max(1, min(patches, int(PRIME_BYTES / patch_bytes)))

        def encode(i: Array, cache: Array) -> Array:
            first = jnp.minimum(i * chunk, patches - chunk)
            piece = lax.dynamic_slice_in_dim(segment, first * size, (chunk + 1) * size, 1)
            tokens, _ = self.encoder.every_offset(piece[:, :-1], chunk * size)
            if self.head.plan:
                tokens = self.with_levels(tokens, self.head.levels(piece[:, :-1], size))
            tokens = tokens.reshape(rows, chunk, size, -1).transpose(2, 0, 1, 3)
            return lax.dynamic_update_slice_in_dim(cache, tokens, first, 2)

        return lax.fori_loop(0, -(-patches // chunk), encode, cache)

    def _prime_blocks(self, folded: list[Folded], caches: list[Array], patches: int) -> list[Array]:
        """The caches of all blocks from the encodings, which are in the first."""
        config, (size, rows, _, width) = self.config, caches[0].shape
        each = config.num_heads * 2 * (width + patches) + 8 * width + config.mlp_width
        most = PRIME_BYTES / (rows * patches * each * caches[0].dtype.itemsize)
        chunk = max(d for d in range(1, size + 1) if size % d == 0 and d <= max(1, most))

        def fill(i: Array, caches: list[Array]) -> list[Array]:
            shape = (chunk, rows, patches, width)
            tokens = lax.dynamic_slice(caches[0], (i * chunk, 0, 0, 0), shape)
            kept = [Cache(x, i * chunk, 0, None) for x in caches]
            _, kept = self.transform(tokens.reshape(-1, patches, width), None, folded, kept)
            return [cache.tokens for cache in kept]

        return lax.fori_loop(0, size // chunk, fill, caches)

    def slide(self, state: State, samples: int) -> State:
        patches = samples // self.config.patch_samples
        return state._replace(caches=[jnp.roll(x, -patches, 2) for x in state.caches])

    def visible(self, past: int, context_samples: int) -> tuple[int, int]:
        size = self.config.patch_samples
        tokens = context_samples // size
        if self.causal:
            tokens = min(tokens, (past // size // VISIBLE_TOKENS + 1) * VISIBLE_TOKENS)
        return tokens, tokens * size

    def step(
        self,
        prepared: list[Folded],
        state: State,
        code: UInt8[Array, " B"],
        position: Int32[Array, ""],
        start: Int32[Array, ""],
        visible: int,
        uniforms: Float32[Array, "B Z"] | None = None,
    ) -> tuple[State, Read]:
        size = self.config.patch_samples
        number, phase = (position - start) // size, position % size
        encoder, token, skip = self.encoder.step(state.encoder, code, position)
        head = self.head.step(state.head, code, position)
        if self.head.plan:
            token = self.with_levels(token, head.recent)
        tokens, phase_tokens = token[:, None], None
        if self.causal:
            caches = [Cache(x, phase, number, visible) for x in state.caches]
            tokens, caches = self.transform(tokens, None, prepared, caches, (number, visible))
        else:
            caches = [Cache(state.caches[0], phase, number, visible).put(tokens)]
            phase_tokens = caches[0].visible_tokens()
        begins = uniforms is not None and position % self.head.plan.block_samples == 0
        if uniforms is not None:
            x = self.normed(tokens[:, -1], skip)
            head = lax.cond(
                begins, lambda: self.head.begin(head, x, position, uniforms), lambda: head
            )

        def read() -> tuple[Array, Callable[[Array], Array]]:
            states = tokens
            if phase_tokens is not None:
                window = self._window_of_tokens(phase_tokens, number)
                states, _ = self.transform(window, None, prepared)
            trained, fixed = self.head.condition_next(head, position)
            hidden = self.hidden(states[:, -1], skip, (*trained, *fixed))

            def log_prob(code: Array) -> Array:
                found = self.head.log_prob(hidden, code, *trained, *fixed)
                return found + jnp.where(begins, head.plan_log_prob, 0) if self.head.plan else found

            return self.head.drawing_logits(hidden, *trained, *fixed), log_prob

        return State(encoder, head, [cache.tokens for cache in caches]), read
