"""SampleRNN with three tiers as SaShiMi's authors compare with it: 35.03M parameters.

    python -m patchwave_jax.train --config=configs/samplernn.py --workdir=DIR

Published (Goel et al. 2022, code): 128 clips of 131,072 samples side by side, read in segments of
1,024; an update for each, its state carried into the next, its gradients not. So it is here: 128
steps walk through a batch, and the carried state is in the checkpoint. AdamW without weight decay
at 0.001, times 0.2 whenever the validation loss was flat for a while: here the rate drops once,
after `decay_steps`, and the run ends when 20 validations brought nothing. Published is a clip of
every gradient at 1, here of their norm.
"""

from patchwave_jax import recipes
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.models.samplernn import SampleRNNConfig


def get_config(arg: str = ""):
    del arg
    config = recipes.baseline(
        SampleRNNConfig(), learning_rate=1e-3, batch_size=128, micro_batch_size=0, clip_norm=1.0
    )
    return to_config_dict(config)
