"""Imported before the package, it has functions check the types and shapes in their signatures."""

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
jaxtyping.Array = jax.Array | np.ndarray  # as JAX's own functions take them
jaxtyping.install_import_hook(
    [f"patchwave_jax.{name}" for name in ("models", "training", "evaluation", "generation")],
    f"{__name__}.check",
)
