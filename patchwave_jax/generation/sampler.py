"""Generation on the device: streams of samples from any model, in compiled chunks.

The windows are those of `patchwave_jax.evaluation.protocol`: the context grows to a whole window,
then the window slides by `stride` units, so that whatever is generated can be scored. Where it
slides, a model gives its state in the next window, or the state is made again from the codes: by
the model's `prime`, or by stepping through the window's samples.

Dimensions: `B` streams, `R` rows (streams, and what fills up the devices), `C` samples of a chunk,
`G` given ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import protocol
from patchwave_jax.generation.sampling_params import SamplingParams
from patchwave_jax.models.base import Model
from patchwave_jax.runtime.mesh import replicated

CHUNK_SAMPLES = 800  # made by one call of the compiled loop


class Sampler:
    """Streams of samples from one model, all at the same position of their clips."""

    def __init__(
        self,
        config: Config,
        params: Any,
        mesh: Mesh,
        *,
        num: int,
        sampling: SamplingParams | None = None,
        stride_patches: int | None = None,
    ):
        """`num` streams over the mesh's data axis; `prime` comes next.

        Raises:
          UserError: if a sampling parameter or the stride is out of range.
        """
        self.config, self.num, self.sampling = config, num, sampling or SamplingParams()
        self.sampling.check()
        stride = protocol.default_stride(config) if stride_patches is None else stride_patches
        protocol.check_stride(stride, config)
        self.stride_patches, self.position = stride, 0
        self.lookback = config.context_samples + config.history  # codes that priming reads
        self._rows = -(-num // mesh.size) * mesh.size
        self._streams = np.arange(self._rows, dtype=np.uint32)
        self._window = 0  # start of the window that the state is of
        self._state: Any = None
        self.latents = np.empty(0)  # of the blocks of the newest run's samples, [R, n, Z]
        self._pieces: list[np.ndarray] = []  # the codes before `position`
        self._params = jax.device_put(params, replicated(mesh))
        self._graphdef, abstract_params = config.abstract_model()
        self._model: Model = nnx.merge(self._graphdef, abstract_params)  # of shapes only
        self._compile(mesh)
        self._prepared = self._prepare(self._params)

    def _compile(self, mesh: Mesh) -> None:
        rows, everywhere = PartitionSpec("data"), PartitionSpec()

        def init_state(params: Any, count: int) -> Any:
            return self._merge(params).init_state(count, self.config.context_samples)

        parts = split_rows(functools.partial(init_state, self._params))

        def sharded(function: Any, in_specs: Any, out_specs: Any, donated: int) -> Any:
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(mapped, donate_argnums=donated)

        where = jax.tree.map(lambda part: NamedSharding(mesh, part), parts)
        self._prepare = jax.jit(
            lambda params: self._merge(params).prepare(), out_shardings=replicated(mesh)
        )
        self._init_state = jax.jit(init_state, static_argnums=1, out_shardings=where)
        common = everywhere, everywhere, parts
        self._fill = sharded(self._fill_state, (*common, rows, everywhere, everywhere), parts, 2)
        samples = self.stride_patches * self.config.window_unit
        self._slide = sharded(lambda x: self._model.slide(x, samples), (parts,), parts, 0)
        arguments = (*common, *(rows,) * 3, *(everywhere,) * 4)
        self._loop = functools.cache(
            lambda visible: sharded(
                functools.partial(self._run, visible), arguments, (parts, rows, rows, rows), 2
            )
        )

    def _merge(self, params: Any) -> Model:
        return nnx.merge(self._graphdef, params)

    def window_start(self, position: int) -> int:
        """Where the window begins whose targets include the sample at `position`."""
        step = self.stride_patches * self.config.window_unit
        context = self.config.context_samples
        return 0 if position < context else (1 + (position - context) // step) * step

    def rewind(self, position: int, first: int) -> int:
        """Where to prime to be at `position` again, for a run that began at `first`.

        Priming there with the codes before it, and running with the codes after it, repeats the
        run's own computations from there on, so that the state is the same to the last bit.
        """
        start = self.window_start(position)
        if self._model.steps_from(position, start) is not None:
            return position
        if start == 0:
            return first
        unit = self.config.window_unit
        if self._model.slides:  # what is cached of the window, after as much as its cache reads
            return max(first, start - 2 * unit)
        return max(first, start + self.config.context_samples - self.stride_patches * unit)

    def prime(self, tail: UInt8[np.ndarray, "B T"], position: int) -> None:
        """Puts the streams before their samples at `position`; `tail` are the codes before it.

        The newest `lookback` of them matter; what lies before sample 0 is silence.
        """
        if tail.shape[0] != self.num or tail.shape[1] < min(position, self.lookback):
            raise ValueError(f"codes {tail.shape} of {self.num} streams before {position}")
        self.position = position
        self._prime(self._for_all_rows(tail))

    def _for_all_rows(self, codes: UInt8[np.ndarray, "B T"]) -> UInt8[np.ndarray, "R T"]:
        """With the first stream's codes for rows that only fill the devices."""
        return np.concatenate([codes, codes[:1].repeat(self._rows - self.num, 0)])

    def _prime(self, codes: UInt8[np.ndarray, "R T"]) -> None:
        """Makes the state at `position` from the `codes` before it."""
        end, start = self.position, self.window_start(self.position)
        silence = np.full((self._rows, 1), quantisers.SILENCE, np.uint8)
        self._window = start
        first = self._model.steps_from(end, start)
        if first is not None:
            known = codes[:, codes.shape[1] - (end - first) :]
            self._state, self.position = self._init_state(self._params, self._rows), first
            self._pieces = [silence]
            while self.position < end:
                self._advance(known[:, self.position - first :], CHUNK_SAMPLES)
            return
        size, history = self.config.window_unit, self.config.history
        inside = end % (self.config.model.latent_block or 1)  # a block, whose latents are drawn
        end, known = end - inside, codes[:, codes.shape[1] - inside :]
        codes = codes[:, : codes.shape[1] - inside]
        past = end - start
        count = min(past + history, end)
        length = history + -(-past // size) * size
        segment = np.full((self._rows, length), quantisers.SILENCE, np.uint8)
        before = codes[:, codes.shape[1] - count :]
        segment[:, past + history - count : past + history] = before
        self._pieces = [np.concatenate([silence, before], 1)]
        state = self._state
        state = self._init_state(self._params, self._rows) if state is None else state
        positions = map(np.int32, (end, start))
        self._state = self._fill(self._params, self._prepared, state, segment, *positions)
        self.position = end
        while known.shape[1]:
            known = known[:, self._advance(known, CHUNK_SAMPLES)[0].shape[1] :]

    def _fill_state(
        self, params: Any, prepared: Any, state: Any, segment: Array, position: Array, start: Array
    ) -> Any:
        return self._merge(params).prime(prepared, state, segment, position, start)

    def run(
        self, count: int = CHUNK_SAMPLES, given: UInt8[np.ndarray, "B G"] | None = None
    ) -> tuple[UInt8[np.ndarray, "B C"], Float32[np.ndarray, "B C"]]:
        """The next samples: `count`, or fewer at the end of a chunk or of the window's stride.

        With `given` these are the next samples: nothing is drawn, all log-probabilities are 0.

        Returns:
          Codes, and their log-probabilities in nats under the model itself (temperature 1).

        Raises:
          UserError: if the model's distribution is not finite.
        """
        if self._state is None:
            raise ValueError("call `prime` first")
        first = self.position
        given = None if given is None else self._for_all_rows(given)
        start = self.window_start(self.position)
        if start != self._window:
            if self._model.slides:
                self._state, self._window = self._slide(self._state), start
                self._pieces = self._pieces[-1:]
            else:
                self._prime(np.concatenate(self._pieces, 1)[:, -self.lookback :])
        codes, log_probs = self._advance(given, count)
        if not np.isfinite(log_probs).all():
            raise UserError(
                f"the model's log-probabilities are not finite from sample {first} on: "
                "its parameters are damaged; use another --step"
            )
        return codes[: self.num], log_probs[: self.num]

    def _advance(
        self, given: UInt8[np.ndarray, "R G"] | None, count: int
    ) -> tuple[UInt8[np.ndarray, "R C"], Float32[np.ndarray, "R C"]]:
        """At most `count` samples of all rows, which are `given` or drawn."""
        start = self._window
        visible, end = self._model.visible(self.position - start, self.config.context_samples)
        count = min(count, CHUNK_SAMPLES, start + end - self.position)
        forced = np.zeros((self._rows, CHUNK_SAMPLES), np.uint8)
        if given is not None:
            count = min(count, given.shape[1])
            forced[:, :count] = given[:, :count]
        numbers = (0 if given is None else count, count, self.position, start)
        self._state, codes, log_probs, latents = self._loop(visible)(
            self._params,
            self._prepared,
            self._state,
            self._streams,
            self._pieces[-1][:, -1],
            forced,
            *map(np.int32, numbers),
        )
        codes, log_probs = np.asarray(codes)[:, :count], np.asarray(log_probs)[:, :count]
        self.latents = np.asarray(latents)
        self._pieces.append(codes)
        self.position += count
        return codes, log_probs

    def _run(
        self,
        visible: int,
        params: Any,
        prepared: Any,
        state: Any,
        streams: Array,
        previous: UInt8[Array, " B"],
        given: UInt8[Array, "B C"],
        known: Array,
        count: Array,
        position: Array,
        start: Array,
    ) -> tuple[Any, UInt8[Array, "B C"], Float32[Array, "B C"], Int32[Array, "B n Z"]]:
        """`count` samples from `position` on, the first `known` of them given."""
        model, (rows, chunk) = self._merge(params), given.shape
        uniforms = self.sampling.uniforms(streams, position, chunk)
        latent_uniforms = self._latent_uniforms(streams, position, chunk)
        block = self.config.model.latent_block or chunk
        size = self.config.model.latent_size if self.config.model.latent_block else 0
        latents = jnp.zeros((rows, chunk // block + 2, size), jnp.int32)

        def sample(i: Array, carry: Any) -> Any:
            state, previous, codes, log_probs, latents = carry
            state, read = model.step(
                prepared,
                state,
                previous,
                position + i,
                start,
                visible,
                latent_uniforms(position + i),
            )

            def draw() -> tuple[Array, Array]:
                logits, log_prob = read()
                code = self.sampling.draw(logits, uniforms[i])
                return code, log_prob(code)

            code, log_prob = lax.cond(i < known, lambda: (given[:, i], jnp.zeros(rows)), draw)
            codes = lax.dynamic_update_slice(codes, code[:, None], (0, i))
            log_probs = lax.dynamic_update_slice(log_probs, log_prob[:, None], (0, i))
            if size:
                number = (position + i) // block - position // block
                own = model.latents(state)[:, None]
                latents = lax.dynamic_update_slice(latents, own, (0, number, 0))
            return state, code, codes, log_probs, latents

        begin = (state, previous, given, jnp.zeros((rows, chunk)), latents)
        state, _, codes, log_probs, latents = lax.fori_loop(0, count, sample, begin)
        return state, codes, log_probs, latents

    def _latent_uniforms(self, streams: Array, position: Array, chunk: int) -> Any:
        """What the latent variables of the block around a position are drawn from."""
        size, block = self.config.model.latent_size, self.config.model.latent_block
        if not block:
            return lambda _: None
        first = position // block
        uniforms = self.sampling.latent_uniforms(streams, first, chunk // block + 2, size)

        return lambda at: lax.dynamic_index_in_dim(uniforms, at // block - first, keepdims=False)

    def state_bytes(self) -> int:
        """Size of all streams' state."""
        shapes = jax.eval_shape(lambda: self._init_state(self._params, self._rows))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    def fill_dummy_state(self, position: int) -> None:
        """Puts the streams at `position` with arbitrary numbers for a state: to measure speed."""

        def fill(x: Array) -> Array:
            index = jnp.arange(x.shape[-1], dtype=jnp.float32)
            return jnp.broadcast_to(jnp.cos(index), x.shape).astype(x.dtype)

        self.position, self._window = position, self.window_start(position)
        self._pieces = [np.zeros((self._rows, self.lookback), np.uint8)]
        if self._state is None:
            state = self._init_state(self._params, self._rows)
            where = jax.tree.map(lambda x: x.sharding, state)
            filled = jax.jit(lambda x: jax.tree.map(fill, x), donate_argnums=0, out_shardings=where)
            self._state = filled(state)


def split_rows(init_state: Any) -> Any:
    """How devices share the state that `init_state` makes of so many rows: along their axis."""

    def part(two: Any, three: Any) -> PartitionSpec:
        axis = [a != b for a, b in zip(two.shape, three.shape, strict=True)].index(True)
        return PartitionSpec(*(None,) * axis, "data")

    shapes = [jax.eval_shape(functools.partial(init_state, count=n)) for n in (2, 3)]
    return jax.tree.map(part, *shapes)
