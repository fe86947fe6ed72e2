"""One segment over several devices: sharded in time for the encoder, by phase after it.

The codes are bytes, so every device holds the whole segment. It slices its own stretch of time,
with one patch of halo in front (and the history that the head reads), and encodes its N/C patches
at all phases. One all-to-all turns them into all N patches at P/C phases. Phases never mix after
that, so the Transformer, the head and the loss do not communicate.

Dimensions as in `patchwave_jax.models.patchwave.model`; `C` devices share a segment.
"""

import dataclasses
import itertools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8

from patchwave_jax.data import quantisers

Tree = TypeVar("Tree")
AXIS = "context"  # of the mesh
TIME, PHASE = 1, 2  # axes of [B, N, P, ...]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How devices share a segment, within `jax.shard_map` over the mesh axis `context`."""

    count: int  # C

    def own_stretch(
        self, codes: UInt8[Array, "B T"], size: int, history: int
    ) -> UInt8[Array, "B S"]:
        """This device's N/C patches of `size` and the one before, after `history` samples."""
        samples = (codes.shape[1] // size - 1) // self.count * size
        known = jnp.pad(codes, ((0, 0), (history, 0)), constant_values=quantisers.SILENCE)
        start = lax.axis_index(AXIS) * samples
        return lax.dynamic_slice_in_dim(known, start, history + size + samples, 1)

    def own_phases(self, tree: Tree) -> Tree:
        """This device's phases [B, N, P/C, ...] of replicated arrays [B, N, P, ...]."""

        def own(x: Array) -> Array:
            phases = x.shape[PHASE] // self.count
            return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * phases, phases, PHASE)

        return jax.tree.map(own, tree)

    def exchange(self, moving: Tree, fixed: Any) -> tuple[Tree, Any]:
        """Arrays [B, N/C, P, ...] as [B, N, P/C, ...]; gradients flow to `moving` only."""
        return _to_phases(moving, fixed)


@jax.custom_vjp
def _to_phases(moving: Any, fixed: Any) -> Any:
    return _all_to_all((moving, fixed), PHASE, TIME)


_to_phases.defvjp(
    lambda moving, fixed: (_to_phases(moving, fixed), None),
    lambda _, gradients: (_all_to_all(gradients[0], TIME, PHASE), None),
)


def _all_to_all(tree: Any, split_axis: int, concat_axis: int) -> Any:
    """One all-to-all of all arrays of a tree, as words of their narrowest type."""
    leaves, structure = jax.tree.flatten(tree)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in leaves)}")
    words = [lax.bitcast_convert_type(x, word).reshape(*x.shape[:3], -1) for x in leaves]
    moved = lax.all_to_all(jnp.concatenate(words, -1), AXIS, split_axis, concat_axis, tiled=True)
    ends = list(itertools.accumulate(x.shape[-1] for x in words))
    out = []
    for x, piece in zip(leaves, jnp.split(moved, ends[:-1], -1), strict=True):
        wide = x.dtype.itemsize // word.itemsize
        shape = (*piece.shape[:3], *x.shape[3:], *([wide] if wide > 1 else []))
        out.append(lax.bitcast_convert_type(piece.reshape(shape), x.dtype))
    return jax.tree.unflatten(structure, out)
