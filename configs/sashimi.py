"""SaShiMi with 8 layers, or as many as the argument says: `:6` is the paper's 3.13M.

    python -m patchwave_jax.train --config=configs/sashimi.py --workdir=DIR
    python -m patchwave_jax.train --config=configs/sashimi.py:6 --workdir=DIR

Published (Goel et al. 2022, code): windows of 131,072 samples one at a time; AdamW without weight
decay at 0.004, at 0.001 for S4's dt, A and B, times 0.2 whenever the validation loss was flat for
20 epochs. Here the rates drop once, after `decay_steps`, and the run ends when 20 validations
brought nothing. Add --config.data.quantiser=sashimi for the published codes, and
--config.model.glu=True for today's public configuration.
"""

from patchwave_jax import recipes
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.errors import UserError
from patchwave_jax.models.sashimi import SaShiMiConfig


def get_config(arg: str = ""):
    if arg and not arg.isdecimal():
        raise UserError(f"--config=sashimi.py:{arg}: {arg!r} is not a number of layers")
    model = SaShiMiConfig(num_layers=int(arg or 8))
    return to_config_dict(recipes.baseline(model, learning_rate=4e-3))
