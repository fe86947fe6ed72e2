"""A model's log-probabilities of windows, by one jitted program per shape of window."""

import collections
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int32, UInt8

from patchwave_jax.checkpoint import Checkpoints, abstract
from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.evaluation.protocol import Scored, Window, contexts, segment
from patchwave_jax.models.context_parallel import AXIS
from patchwave_jax.runtime import distributed
from patchwave_jax.runtime.memory import choose_execution
from patchwave_jax.runtime.mesh import by_rows, context_shards, make_mesh, one_device, replicated

BATCH_SAMPLES = 64_000  # of windows that a device scores at once, or one window if it is longer


class Evaluator:
    """A model's jitted log-probabilities of windows, for one configuration and mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        each = max(1, BATCH_SAMPLES // config.context_samples, config.model.min_rows)
        self.rows = mesh.shape["data"] * each
        shards = context_shards(config, mesh)
        execution = choose_execution(config, each, one_device(mesh), shards)
        self._sharing = shards.count if shards else 1
        self._chunk = execution.encode_chunk_patches or config.window_units
        graphdef, self.abstract_params = config.abstract_model(execution)

        def own_log_probs(
            params: Any, segments: jax.Array, last_n: int, latents: jax.Array | None = None
        ) -> jax.Array:
            model = nnx.merge(graphdef, params)
            return model.log_probs(segments, last_n * config.window_unit, latents)

        def log_probs(
            params: Any, segments: jax.Array, last_n: int, latents: jax.Array | None = None
        ) -> jax.Array:
            if shards is None:
                return own_log_probs(params, segments, last_n, latents)
            shared = jax.shard_map(
                lambda params, segments: own_log_probs(params, segments, last_n),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("data")),
                out_specs=PartitionSpec("data", AXIS),
                check_vma=False,
            )
            out = shared(params, segments)  # device by device, patch by patch
            out = out.reshape(self.rows, shards.count, last_n, -1)
            return jnp.swapaxes(out, 1, 2).reshape(self.rows, -1)

        self._log_probs = jax.jit(
            log_probs,
            static_argnums=2,
            in_shardings=(replicated(mesh), by_rows(mesh), by_rows(mesh)),
            out_shardings=replicated(mesh),
        )

    def score(
        self,
        params: Any,
        codes_of_clip: Any,
        windows: Iterable[Window],
        latents: Int32[np.ndarray, "clips blocks Z"] | None = None,
    ) -> Iterator[Scored]:
        """Log-probabilities of each window; `codes_of_clip(i)` gives the codes of clip i.

        `latents` are those of each clip's blocks, if they are not to be inferred. Windows of one
        shape come back in their order, those of different shapes interleaved.
        """

        def segments() -> Iterator[tuple[Window, UInt8[np.ndarray, " T"]]]:
            clip, codes = -1, np.empty(0, np.uint8)
            for window in windows:
                if window.clip != clip:
                    clip, codes = window.clip, codes_of_clip(window.clip)
                yield window, segment(window, codes, self.config)

        return self.score_segments(params, segments(), latents)

    def score_segments(
        self,
        params: Any,
        segments: Iterable[tuple[Window, UInt8[np.ndarray, " T"]]],
        latents: Int32[np.ndarray, "clips blocks Z"] | None = None,
    ) -> Iterator[Scored]:
        """As `score`, of windows that come with their codes."""
        waiting: dict[tuple[int, int], list[tuple[Window, UInt8[np.ndarray, " T"]]]]
        waiting = collections.defaultdict(list)
        for window, codes in segments:
            shape = self._shape(window)
            group = waiting[shape]
            group.append((window, codes))
            if len(group) == self.rows:
                yield from self._run(params, shape, group, latents)
                group.clear()
        for shape, group in waiting.items():
            if group:
                yield from self._run(params, shape, group, latents)

    def _shape(self, window: Window) -> tuple[int, int]:
        """`(units, last_n)` of the program that computes a window.

        The windows of short clips, and pieces of a clip's first window, have all lengths. They
        share a few programs, which read more units than they need: silence behind the window,
        which a causal model's targets do not see.
        """
        if window.units == self.config.window_units:
            return window.units, window.last_n
        unit, most = self._sharing, self._sharing * self._chunk  # units that are encoded at once
        if window.units > most:
            unit, most = most, self.config.window_units
        units = min(most, unit << (-(-window.units // unit) - 1).bit_length())
        return units, units

    def _run(
        self,
        params: Any,
        shape: tuple[int, int],
        group: list[tuple[Window, np.ndarray]],
        latents: np.ndarray | None,
    ) -> Iterator[Scored]:
        (units, last_n), config = shape, self.config
        length = config.history + units * config.window_unit
        batch = np.full((self.rows, length), quantisers.SILENCE, np.uint8)
        for row, (_, codes) in zip(batch, group, strict=False):
            row[: codes.size] = codes
        own = distributed.own_rows(self.mesh, self.rows)
        placed = distributed.place_rows(self.mesh, batch[own], self.rows)
        given = None if latents is None else self._latents_of(group, shape, latents)
        log_probs = np.asarray(self._log_probs(params, placed, last_n, given))
        for (window, _), row in zip(group, log_probs, strict=False):
            skipped = (window.units - window.last_n - units + last_n) * config.window_unit
            row = row[skipped : skipped + window.end - window.first]
            yield Scored(window, row, contexts(window, config))

    def _latents_of(
        self, group: list[tuple[Window, np.ndarray]], shape: tuple[int, int], latents: np.ndarray
    ) -> Int32[np.ndarray, "rows blocks Z"]:
        """The latent variables of all targets of the program that computes a group of windows."""
        (units, last_n), unit = shape, self.config.window_unit
        block = self.config.model.latent_block
        given = np.zeros((self.rows, last_n * unit // block, latents.shape[2]), np.int32)
        for row, (window, _) in zip(given, group, strict=False):
            start = window.first + (window.last_n - window.units + units - last_n) * unit
            own = latents[window.clip, start // block :][: len(row)]
            row[: len(own)] = own
        return given


def load(
    workdir: str | os.PathLike[str], step: int | None = None, mesh: Mesh | None = None
) -> tuple[Evaluator, Any, int]:
    """The evaluator and parameters of a run's best (or given) checkpoint, and its step.

    `mesh` is all devices unless given.
    """
    mesh = mesh or make_mesh()
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.choose(step)
        evaluator = Evaluator(checkpoints.record(step).config, mesh)
        shapes = abstract(evaluator.abstract_params, replicated(mesh))
        return evaluator, checkpoints.restore_params(step, shapes), step
