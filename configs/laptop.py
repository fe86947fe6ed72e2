"""The small model of `demo.py`, trained for longer: on YouTube-Mix or your own folder.

python -m patchwave_jax.train --config=configs/laptop.py --workdir=DIR \\
    --config.data.dataset=audio_folder --config.data.data_dir=DIR

On PianoMix, on two CPU cores: 11.2 minutes, 2.138 bits per sample on validation (mulaw, context up
to 32,000; docs/results.md).
"""

from patchwave_jax import recipes
from patchwave_jax.config import DataConfig
from patchwave_jax.config_dict import to_config_dict


def get_config(arg: str = ""):
    del arg
    return to_config_dict(recipes.small(DataConfig(), num_steps=500, evals=10))
