"""Records of runs; `patchwave_jax.expected` makes and reads them."""
