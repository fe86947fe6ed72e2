"""Generation on the device: streams of samples in compiled chunks, whatever their context.

The windows are those of `patchwave_jax.sliding`: the context grows to `N` patches, then slides by
`stride_patches`, so that whatever is generated can be scored. When the window slides, positions
change: a causal model is primed again from its codes, a bidirectional one's encodings move up.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from patchwave_jax import quantisers, sliding
from patchwave_jax.config import Config
from patchwave_jax.errors import UserError
from patchwave_jax.incremental import Folded, Incremental, State
from patchwave_jax.mesh import replicated

CHUNK_SAMPLES = 800  # made by one call of the compiled loop
SHOWN_TOKENS = 128  # a growing window is compiled anew for every so many tokens


@dataclasses.dataclass(frozen=True)
class Knobs:
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
        """Numbers in [0, 1) for `count` samples from sample `first`, each from its own key."""

        def of_sample(stream: Array, sample: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), stream), sample)
            return jax.random.uniform(key)

        of_streams = jax.vmap(of_sample, (0, None))
        return jax.vmap(of_streams, (None, 0))(streams, first + jnp.arange(count))

    def draw(
        self, logits: Float32[Array, "B 256"], uniform: Float32[Array, " B"]
    ) -> UInt8[Array, " B"]:
        """A code of each row: the first whose cumulative probability is above `uniform`.

        Temperature comes first, then top-k, then top-p of what that leaves. Codes just as likely
        as the last one kept are kept too.
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
        # Rounding could leave none above; never draw what has no mass.
        code = _first(above & (mass > 0))
        return jnp.where(code < quantisers.NUM_CODES, code, likeliest).astype(jnp.uint8)


def _first(chosen: Array) -> Array:
    """Index of the first true element of each row, 256 if there is none."""
    index = jnp.arange(quantisers.NUM_CODES, dtype=jnp.int32)
    return jnp.where(chosen, index, quantisers.NUM_CODES).min(-1)


class Sampler:
    """Streams of samples from one model, all at the same position of their clips."""

    def __init__(
        self,
        config: Config,
        params: Any,
        mesh: Mesh,
        *,
        num: int,
        knobs: Knobs | None = None,
        stride_patches: int | None = None,
    ):
        """`num` streams over the mesh's data axis; `prime` comes next.

        Raises:
          UserError: if a knob or the stride is out of range.
        """
        self.config, self.num, self.knobs = config, num, knobs or Knobs()
        self.knobs.check()
        stride = sliding.default_stride(config) if stride_patches is None else stride_patches
        if not 1 <= stride <= config.patches:
            raise UserError(
                f"--stride_patches must be from 1 to the context's {config.patches}, got {stride}"
            )
        self.stride_patches, self.position = stride, 0
        self.reach = config.context_samples + config.patch_samples  # what priming looks at
        self._rows = -(-num // mesh.size) * mesh.size
        self._streams = np.arange(self._rows, dtype=np.uint32)
        self._pieces: list[np.ndarray] = []  # the codes before `position`
        self._window = 0  # where the window begins that the state is laid out for
        self._state: State | None = None
        self._model = Incremental(config)
        self._compile(mesh)
        self._params = jax.device_put(params, replicated(mesh))
        self._folded = self._fold(self._params)

    def _compile(self, mesh: Mesh) -> None:
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        parts: Any = State(rows, rows, PartitionSpec(None, "data"), rows, rows)  # pyright: ignore
        model, common = self._model, (everywhere, everywhere, parts)

        def sharded(function: Any, in_specs: Any, out_specs: Any, donated: int) -> Any:
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(mapped, donate_argnums=donated)

        where = jax.tree.map(lambda part: NamedSharding(mesh, part), parts)
        self._fold = jax.jit(model.fold, out_shardings=replicated(mesh))
        self._empty = jax.jit(lambda: model.empty(self._rows), out_shardings=where)
        self._fill = sharded(model.prime, (*common, rows, everywhere), parts, 2)
        self._slide = sharded(lambda x: model.slide(x, self.stride_patches), (parts,), parts, 0)
        arguments = (*common, rows, rows, *(everywhere,) * 4)
        self._loop = functools.cache(
            lambda shown: sharded(
                functools.partial(self._run, shown), arguments, (parts, rows, rows), 2
            )
        )

    def window_start(self, position: int) -> int:
        """Where the window begins whose targets include the sample at `position`."""
        step, context = self._slide_samples, self.config.context_samples
        return 0 if position < context else (1 + (position - context) // step) * step

    @property
    def _slide_samples(self) -> int:
        return self.stride_patches * self.config.patch_samples

    def rewind(self, position: int, first: int) -> int:
        """Where a run that began at `first` is to be taken up so as to be at `position` again.

        Priming there with the codes before it, and running with the codes after it, repeats the
        run's own computations from there on, so that the state is the same to the last bit.
        """
        start = self.window_start(position)
        if start == 0:
            return first
        if self._model.causal:  # where the window slid
            return max(first, start + self.config.context_samples - self._slide_samples)
        # The window's encodings come again, after as many samples as the encoder remembers.
        return max(first, start - 2 * self.config.patch_samples)

    def prime(self, tail: UInt8[np.ndarray, "B T"], position: int) -> None:
        """Puts the streams before their samples at `position`; `tail` are the codes before it.

        The newest `reach` of them matter; what lies before sample 0 is silence.
        """
        if tail.shape[0] != self.num or tail.shape[1] < min(position, self.reach):
            raise ValueError(f"codes {tail.shape} of {self.num} streams before {position}")
        self._pieces = [np.concatenate([tail, tail[:1].repeat(self._rows - self.num, 0)])]
        self.position = position
        self._prime()

    def _prime(self) -> None:
        self._window, size = self.window_start(self.position), self.config.patch_samples
        past = self.position - self._window
        known = min(past + size, self.position)
        segment = np.full((self._rows, (-(-past // size) + 1) * size), quantisers.SILENCE, np.uint8)
        history = np.concatenate(self._pieces, 1)
        history = history[:, history.shape[1] - known :]
        segment[:, past + size - known : past + size] = history
        self._pieces = [history]
        state = self._empty() if self._state is None else self._state
        self._state = self._fill(self._params, self._folded, state, segment, np.int32(past))

    def pretend(self, position: int) -> None:
        """Puts the streams there with numbers for codes and caches: to measure, not to listen."""

        def numbers(state: State) -> State:
            def fill(x: Array) -> Array:
                index = jnp.arange(x.shape[-1], dtype=jnp.float32)
                return jnp.broadcast_to(jnp.cos(index), x.shape).astype(x.dtype)

            return jax.tree.map(fill, state)

        self.position, self._window = position, self.window_start(position)
        if self._state is None:
            state = self._empty()
            where = jax.tree.map(lambda x: x.sharding, state)
            self._state = jax.jit(numbers, donate_argnums=0, out_shardings=where)(state)

    def state_bytes(self) -> int:
        """Size of all streams' state."""
        shapes = jax.eval_shape(lambda: self._model.empty(self._rows))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    def run(
        self, count: int = CHUNK_SAMPLES, given: UInt8[np.ndarray, "B C"] | None = None
    ) -> tuple[UInt8[np.ndarray, "B C"], Float32[np.ndarray, "B C"]]:
        """The next samples: `count`, or fewer at the end of a chunk or of the window's stride.

        With `given` these are the next samples: nothing is drawn, all log-probabilities are 0.

        Returns:
          Codes, and their log-probabilities in nats under the model itself (temperature 1).

        Raises:
          UserError: if the model gives something that is no probability.
        """
        if self._state is None:
            raise ValueError("prime comes first")
        start = self.window_start(self.position)
        if start != self._window and self._model.causal:
            self._prime()
        elif start != self._window:
            self._window, self._state = start, self._slide(self._state)
        past = self.position - start
        size, patches = self.config.patch_samples, self.config.patches
        shown = min(patches, (past // size // SHOWN_TOKENS + 1) * SHOWN_TOKENS)
        shown = shown if self._model.causal else patches
        count = min(count, CHUNK_SAMPLES, shown * size - past)
        forced = np.zeros((self._rows, CHUNK_SAMPLES), np.uint8)
        if given is not None:
            count = min(count, given.shape[1])
            forced[: self.num, :count] = given[:, :count]
        numbers = (0 if given is None else count, count, past, self.position)
        state = self._params, self._folded, self._state, self._streams
        self._state, codes, log_probs = self._loop(shown)(*state, forced, *map(np.int32, numbers))
        codes, log_probs = np.asarray(codes)[:, :count], np.asarray(log_probs)[:, :count]
        if not np.isfinite(log_probs).all():
            raise UserError(
                f"the model's log-probabilities are not numbers from sample {self.position} on: "
                "its parameters are damaged; use another --step"
            )
        if self._model.causal:  # for the next slide
            self._pieces.append(codes)
        self.position += count
        return codes[: self.num], log_probs[: self.num]

    def _run(
        self,
        shown: int,
        params: Any,
        folded: Folded,
        state: State,
        streams: Array,
        given: UInt8[Array, "B C"],
        known: Array,
        count: Array,
        past: Array,
        position: Array,
    ) -> tuple[State, UInt8[Array, "B C"], Float32[Array, "B C"]]:
        """`count` samples, the first `known` of them given, from target `past` of the window."""
        model = self._model.merge(params)
        (rows, chunk), first = given.shape, state.codes.shape[1]
        uniforms = self.knobs.uniforms(streams, position, chunk)

        def sample(i, carry):
            state, read = self._model.step(model, folded, carry[0], i, past + i, shown)

            def draw():
                hidden, prediction = read()
                code = self.knobs.draw(model.head.drawing_logits(hidden, prediction), uniforms[i])
                return code, model.head.log_prob(hidden, prediction, code)

            code, log_prob = lax.cond(i < known, lambda: (given[:, i], jnp.zeros(rows)), draw)
            codes = lax.dynamic_update_slice(state.codes, code[:, None], (0, first + i))
            log_probs = lax.dynamic_update_slice(carry[1], log_prob[:, None], (0, i))
            return state._replace(codes=codes), log_probs

        begin = (self._model.extend(state, chunk), jnp.zeros((rows, chunk)))
        end, log_probs = lax.fori_loop(0, count, sample, begin)
        return self._model.shorten(end, count), end.codes[:, first:], log_probs
