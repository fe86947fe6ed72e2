"""Generation on the device: streams of samples in compiled chunks, whatever their context.

The windows are those of `patchwave_jax.evaluation.protocol`: the context grows to `N` patches, then
slides by `stride_patches`, so that whatever is generated can be scored. When the window slides,
positions change: a causal model is primed again from its codes, a bidirectional one's encodings
move up.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import protocol
from patchwave_jax.generation.sampling_params import SamplingParams
from patchwave_jax.models.patchwave.incremental import Folded, Incremental, State
from patchwave_jax.runtime.mesh import replicated

CHUNK_SAMPLES = 800  # made by one call of the compiled loop
SHOWN_TOKENS = 128  # a growing window is compiled anew for every so many tokens


def split_rows(empty: Callable[[int], Any]) -> Any:
    """How devices share the state that `empty` makes of so many rows: along their axis."""

    def part(two: Any, three: Any) -> PartitionSpec:
        axis = [a != b for a, b in zip(two.shape, three.shape, strict=True)].index(True)
        return PartitionSpec(*(None,) * axis, "data")

    return jax.tree.map(part, *(jax.eval_shape(functools.partial(empty, n)) for n in (2, 3)))


class Streams(abc.ABC):
    """Streams of samples from one model, all at the same position of their clips."""

    def __init__(
        self,
        config: Config,
        params: Any,
        mesh: Mesh,
        *,
        num: int,
        knobs: SamplingParams | None = None,
        stride_patches: int | None = None,
    ):
        """`num` streams over the mesh's data axis; `prime` comes next.

        Raises:
          UserError: if a knob or the stride is out of range.
        """
        self.config, self.num, self.knobs = config, num, knobs or SamplingParams()
        self.knobs.check()
        stride = protocol.default_stride(config) if stride_patches is None else stride_patches
        protocol.plan([], config, stride)  # refuses a stride out of range
        self.stride_patches, self.position = stride, 0
        self.reach = config.context_samples  # what priming looks at
        self._rows = -(-num // mesh.size) * mesh.size
        self._streams = np.arange(self._rows, dtype=np.uint32)
        self._window = 0  # where the window begins that the state is laid out for
        self._state: Any = None
        self._params = jax.device_put(params, replicated(mesh))

    def window_start(self, position: int) -> int:
        """Where the window begins whose targets include the sample at `position`."""
        step, context = self._slide_samples, self.config.context_samples
        return 0 if position < context else (1 + (position - context) // step) * step

    @property
    def _slide_samples(self) -> int:
        return self.stride_patches * self.config.patch_samples

    @abc.abstractmethod
    def rewind(self, position: int, first: int) -> int:
        """Where a run that began at `first` is to be taken up so as to be at `position` again.

        Priming there with the codes before it, and running with the codes after it, repeats the
        run's own computations from there on, so that the state is the same to the last bit.
        """

    def prime(self, tail: UInt8[np.ndarray, "B T"], position: int) -> None:
        """Puts the streams before their samples at `position`; `tail` are the codes before it.

        The newest `reach` of them matter; what lies before sample 0 is silence.
        """
        if tail.shape[0] != self.num or tail.shape[1] < min(position, self.reach):
            raise ValueError(f"codes {tail.shape} of {self.num} streams before {position}")
        self.position = position
        self._prime(self._for_all_rows(tail))

    def _for_all_rows(self, codes: UInt8[np.ndarray, "B T"]) -> UInt8[np.ndarray, "R T"]:
        """With the first stream's repeated for rows that only fill the devices."""
        return np.concatenate([codes, codes[:1].repeat(self._rows - self.num, 0)])

    @abc.abstractmethod
    def _prime(self, codes: UInt8[np.ndarray, "R T"]) -> None:
        """Makes the state at `position` from the `codes` before it."""

    @abc.abstractmethod
    def state_bytes(self) -> int:
        """Size of all streams' state."""

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
        start = self.position
        given = None if given is None else self._for_all_rows(given)
        codes, log_probs = self._next(count, given)
        if not np.isfinite(log_probs).all():
            raise UserError(
                f"the model's log-probabilities are not numbers from sample {start} on: "
                "its parameters are damaged; use another --step"
            )
        return codes[: self.num], log_probs[: self.num]

    @abc.abstractmethod
    def _next(
        self, count: int, given: UInt8[np.ndarray, "R C"] | None
    ) -> tuple[UInt8[np.ndarray, "R C"], Float32[np.ndarray, "R C"]]:
        """What `run` gives, of all rows."""


def sum_bytes(shapes: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


class Sampler(Streams):
    """Streams of `PatchWave`."""

    def __init__(self, config: Config, params: Any, mesh: Mesh, **options: Any):
        """As `Streams`."""
        super().__init__(config, params, mesh, **options)
        self.reach += config.patch_samples
        self._pieces: list[np.ndarray] = []  # the codes before `position`
        self._model = Incremental(config)
        self._compile(mesh)
        self._folded = self._fold(self._params)

    def _compile(self, mesh: Mesh) -> None:
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        model, parts = self._model, split_rows(self._model.empty)
        common = everywhere, everywhere, parts

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

    def rewind(self, position: int, first: int) -> int:
        start = self.window_start(position)
        if start == 0:
            return first
        if self._model.causal:  # where the window slid
            return max(first, start + self.config.context_samples - self._slide_samples)
        # The window's encodings come again, after as many samples as the encoder remembers.
        return max(first, start - 2 * self.config.patch_samples)

    def _prime(self, codes: UInt8[np.ndarray, "R T"]) -> None:
        self._window, size = self.window_start(self.position), self.config.patch_samples
        past = self.position - self._window
        known = min(past + size, self.position)
        segment = np.full((self._rows, (-(-past // size) + 1) * size), quantisers.SILENCE, np.uint8)
        history = codes[:, codes.shape[1] - known :]
        segment[:, past + size - known : past + size] = history
        self._pieces = [history]
        state = self._empty() if self._state is None else self._state
        self._state = self._fill(self._params, self._folded, state, segment, np.int32(past))

    def fill_dummy_state(self, position: int) -> None:
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
        return sum_bytes(jax.eval_shape(lambda: self._model.empty(self._rows)))

    def _next(
        self, count: int, given: UInt8[np.ndarray, "R C"] | None
    ) -> tuple[UInt8[np.ndarray, "R C"], Float32[np.ndarray, "R C"]]:
        start = self.window_start(self.position)
        if start != self._window and self._model.causal:
            self._prime(np.concatenate(self._pieces, 1))
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
            forced[:, :count] = given[:, :count]
        numbers = (0 if given is None else count, count, past, self.position)
        state = self._params, self._folded, self._state, self._streams
        self._state, codes, log_probs = self._loop(shown)(*state, forced, *map(np.int32, numbers))
        codes, log_probs = np.asarray(codes)[:, :count], np.asarray(log_probs)[:, :count]
        if self._model.causal:  # for the next slide
            self._pieces.append(codes)
        self.position += count
        return codes, log_probs

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
