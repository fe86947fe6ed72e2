"""MEGABYTE with a global and a local Transformer: 33.82M parameters, patches of 32.

    python -m patchwave_jax.train --config=configs/megabyte.py --workdir=DIR

The paper (Yu et al. 2023) models the bytes of audio files; its bits per byte do not compare with
ours. The sizes are those of a public implementation's example (`patchwave_jax.models.megabyte`),
the optimizer is that of its training script: Adam at 0.0002, gradients clipped to a norm of 0.5.
As for the other baselines, windows are 131,072 samples, one at a time, the rate drops once, after
`decay_steps`, and the run ends after 20 validations without improvement. A step needs 8 GB for
activations; with less, shorten the windows: --config.context_samples=16384
--config.train.batch_size=8 --config.train.micro_batch_size=1 needs 1.1 GB.
"""

from patchwave_jax import recipes
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.models.megabyte import MegabyteConfig


def get_config(arg: str = ""):
    del arg
    config = recipes.baseline(MegabyteConfig(), learning_rate=2e-4, clip_norm=0.5)
    return to_config_dict(config)
