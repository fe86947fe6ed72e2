"""A context of 128_000 samples (64 patches of 2000), on YouTube-Mix.

The paper's recipe, and ours with a target at every sample:

    python -m patchwave_jax.train --config=configs/ctx128k.py --workdir=DIR
    python -m patchwave_jax.train --config=configs/ctx128k.py:dense --workdir=DIR
"""

from patchwave_jax import recipes


def get_config(arg: str = ""):
    return recipes.get_config(128_000, arg)
