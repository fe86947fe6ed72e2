"""A context of 1,000,000 samples (500 patches of 2000), on YouTube-Mix.

The paper's recipe, as `ctx128k.py` has it in full, and ours with a target at every sample:

    python -m patchwave_jax.train --config=configs/ctx1m.py --workdir=DIR
    python -m patchwave_jax.train --config=configs/ctx1m.py:dense --workdir=DIR
"""

from patchwave_jax import recipes


def get_config(arg: str = ""):
    return recipes.get_config(1_000_000, arg)
