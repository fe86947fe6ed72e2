"""A small model on the embedded piano, in minutes on a laptop.

python -m patchwave_jax.train --config=configs/demo.py

On two CPU cores: 3.4 minutes, 1.657 bits per sample on validation (mulaw, context up to 32,000).
"""

from patchwave_jax import recipes
from patchwave_jax.config import DataConfig
from patchwave_jax.config_dict import to_config_dict


def get_config(arg: str = ""):
    del arg
    return to_config_dict(recipes.small(DataConfig(dataset="piano_demo"), num_steps=120, evals=3))
