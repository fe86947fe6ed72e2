"""What the encoder and the Transformer share: dropout keys and parameters' values."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array

Key = Array | None  # a dropout key; None is deterministic


def split(key: Key, count: int) -> Sequence[Key]:
    """`count` keys from one, or as many times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def value(parameter: nnx.Param | None) -> Array:
    """The array of a parameter that is there."""
    assert parameter is not None
    return parameter[...]
