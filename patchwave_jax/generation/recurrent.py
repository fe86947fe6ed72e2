"""Generation of the baselines, sample by sample: `Sampler`'s counterpart, by the same names.

The windows are those of `patchwave_jax.evaluation.protocol`. Where the window slides, SampleRNN and
SaShiMi read its older half anew, one step for each sample; WaveNet's queues go on as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.generation.sampler import CHUNK_SAMPLES, Sampler, Streams, split_rows, sum_bytes
from patchwave_jax.generation.sampling_params import SamplingParams
from patchwave_jax.models.baseline import picked
from patchwave_jax.models.wavenet import WaveNetConfig
from patchwave_jax.runtime.mesh import replicated
from patchwave_jax.training.step import graphdef_and_params


def make_sampler(
    config: Config,
    params: Any,
    mesh: Mesh,
    *,
    num: int,
    knobs: SamplingParams | None = None,
    stride_patches: int | None = None,
) -> Streams:
    """`num` streams of whatever model `config` has; raises as `Sampler`."""
    kind = RecurrentSampler if config.is_baseline else Sampler
    return kind(config, params, mesh, num=num, knobs=knobs, stride_patches=stride_patches)


class RecurrentSampler(Streams):
    """Streams of one baseline."""

    def __init__(self, config: Config, params: Any, mesh: Mesh, **options: Any):
        """As `Streams`."""
        super().__init__(config, params, mesh, **options)
        self._codes = np.zeros((self._rows, 0), np.uint8)  # the newest before `position`
        self._begin = 0  # the first sample that the state has read
        self._graphdef, _ = graphdef_and_params(config)

        def network(params: Any) -> Any:
            return nnx.merge(self._graphdef, params).network

        self._network = network
        parts = split_rows(lambda n: network(self._params).empty(n))
        where = jax.tree.map(lambda part: NamedSharding(mesh, part), parts)
        self._empty = jax.jit(lambda p: network(p).empty(self._rows), out_shardings=where)
        prepare = jax.jit(lambda p: network(p).prepare(), out_shardings=replicated(mesh))
        self._prepared = prepare(self._params)
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        mapped = jax.shard_map(
            self._run,
            mesh=mesh,
            in_specs=(everywhere, everywhere, parts, *(rows,) * 3, *(everywhere,) * 4),
            out_specs=(parts, rows, rows),
            check_vma=False,
        )
        self._loop = jax.jit(mapped, donate_argnums=2)

    def rewind(self, position: int, first: int) -> int:
        # Priming steps through the window's samples as the run itself did.
        del first
        return position

    def _prime(self, codes: UInt8[np.ndarray, "R T"]) -> None:
        model, end = self.config.model, self.position
        self._window = self._begin = self.window_start(end)
        if isinstance(model, WaveNetConfig):
            self._begin = max(0, end - model.receptive_field)
        known = codes[:, codes.shape[1] - (end - self._begin) :]
        self._state, self.position = self._empty(self._params), self._begin
        self._codes = np.full((self._rows, 1), quantisers.SILENCE, np.uint8)
        while self.position < end:
            self._advance(known[:, self.position - self._begin :], CHUNK_SAMPLES)

    def state_bytes(self) -> int:
        return sum_bytes(jax.eval_shape(self._empty, self._params))

    def _next(
        self, count: int, given: UInt8[np.ndarray, "R C"] | None
    ) -> tuple[UInt8[np.ndarray, "R C"], Float32[np.ndarray, "R C"]]:
        start = self.window_start(self.position)
        if start != self._window and not isinstance(self.config.model, WaveNetConfig):
            self._prime(self._codes)
        window_end = start + self.config.context_samples
        count = min(count, CHUNK_SAMPLES, window_end - self.position)
        return self._advance(given, count)

    def _advance(self, given: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` samples of all rows, which are `given` or drawn."""
        forced = np.zeros((self._rows, CHUNK_SAMPLES), np.uint8)
        if given is not None:
            count = min(count, given.shape[1])
            forced[:, :count] = given[:, :count]
        index = self.position - self._begin
        numbers = (0 if given is None else count, count, index, self.position)
        self._state, codes, log_probs = self._loop(
            self._params,
            self._prepared,
            self._state,
            self._streams,
            self._codes[:, -1],
            forced,
            *map(np.int32, numbers),
        )
        codes, log_probs = np.asarray(codes)[:, :count], np.asarray(log_probs)[:, :count]
        self._codes = np.concatenate([self._codes, codes], 1)[:, -self.reach :]
        self.position += count
        return codes, log_probs

    def _run(
        self,
        params: Any,
        prepared: Any,
        state: Any,
        streams: Array,
        previous: UInt8[Array, " B"],
        given: UInt8[Array, "B C"],
        known: Array,
        count: Array,
        index: Array,
        position: Array,
    ) -> tuple[Any, UInt8[Array, "B C"], Float32[Array, "B C"]]:
        """`count` samples, the first `known` of them given, from sample `index` of the state's."""
        network, (rows, chunk) = self._network(params), given.shape
        uniforms = self.knobs.uniforms(streams, position, chunk)

        def sample(i: Array, carry: Any) -> Any:
            state, previous, codes, log_probs = carry
            state, logits = network.step(prepared, state, previous, index + i)

            def draw() -> tuple[Array, Array]:
                code = self.knobs.draw(logits, uniforms[i])
                return code, picked(logits[:, None], code[:, None])[:, 0]

            code, log_prob = lax.cond(i < known, lambda: (given[:, i], jnp.zeros(rows)), draw)
            codes = lax.dynamic_update_slice(codes, code[:, None], (0, i))
            log_probs = lax.dynamic_update_slice(log_probs, log_prob[:, None], (0, i))
            return state, code, codes, log_probs

        begin = (state, previous, given, jnp.zeros((rows, chunk)))
        state, _, codes, log_probs = lax.fori_loop(0, count, sample, begin)
        return state, codes, log_probs
