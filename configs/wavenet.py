"""WaveNet as SaShiMi's authors compare with it: 4.24M parameters, a receptive field of 4,093.

    python -m patchwave_jax.train --config=configs/wavenet.py --workdir=DIR

Published (Goel et al. 2022, code): windows of 131,072 samples one at a time, silence before each;
AdamW without weight decay at 0.001, times 0.2 whenever the validation loss was flat for a while.
`train` has no such plateaus: here the rate drops once, after `decay_steps`, and the run ends when
20 validations brought nothing. With less than 8 GB for activations, shorten the windows:
--config.context_samples=16384 --config.train.batch_size=8 --config.train.micro_batch_size=1.
"""

from patchwave_jax import recipes
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.models.wavenet import WaveNetConfig


def get_config(arg: str = ""):
    del arg
    return to_config_dict(recipes.baseline(WaveNetConfig(), learning_rate=1e-3))
