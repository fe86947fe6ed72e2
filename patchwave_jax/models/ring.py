"""Ring buffers that keep the newest values of a stream, for generation sample by sample.

Every value is stored twice, a buffer's length apart, so that the newest values are always one
contiguous slice, oldest first. The value of time `t` is at `t % R` and `R + t % R`.

Dimensions: `B` streams, `R` values kept.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def from_newest(values: Array, position: Array) -> Array:
    """A buffer [B, 2R, ...] of the values [B, R, ...] of the times up to `position - 1`."""
    rolled = jnp.roll(values, position % values.shape[1], 1)
    return jnp.concatenate([rolled, rolled], 1)


def put(buffer: Array, time: Array, value: Array) -> Array:
    """Stores the value [B, ...] of one time."""
    size = buffer.shape[1] // 2
    for place in (time % size, time % size + size):
        buffer = lax.dynamic_update_slice_in_dim(buffer, value[:, None], place, 1)
    return buffer


def newest(buffer: Array, time: Array, count: int) -> Array:
    """The values [B, count, ...] of the times up to and including `time`; `count` <= R."""
    size = buffer.shape[1] // 2
    return lax.dynamic_slice_in_dim(buffer, time % size + size + 1 - count, count, 1)
