"""A context of 128,000 samples (64 patches of 2000), on YouTube-Mix.

The paper's recipe, and ours with a target at every sample (`patchwave_jax.recipes.dense`):

    python -m patchwave_jax.train --config=configs/ctx128k.py --workdir=DIR
    python -m patchwave_jax.train --config=configs/ctx128k.py:dense --workdir=DIR

Below is the paper's (Verma 2022), in full but for what does not change what is learned. Comments
name what the paper leaves open. `ctx512k.py` and `ctx1m.py` differ in the context alone.
"""

from patchwave_jax import recipes
from patchwave_jax.config import Config, DataConfig, TrainConfig
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.models.patchwave.config import PatchWaveConfig


def get_config(arg: str = ""):
    if arg:
        return recipes.get_config(128_000, arg)
    model = PatchWaveConfig(
        patch_samples=2000,
        kernel_size=7,
        filters=(256, 256, 128, 128, 32),
        strides=(2, 3, 2, 3, 2),  # "alternating between 2 and 3"
        width=128,
        num_layers=3,
        num_heads=8,
        head_size=128,  # open; only this gives the paper's 3.14M parameters
        mlp_width=256,
        readout_width=1024,
        input="waveform",
        skip_connections=False,
        head="softmax",
        conv_dropout=0.2,
        mlp_dropout=0.2,
        head_dropout=0.2,
        token_dropout=0.1,
    )
    return to_config_dict(
        Config(
            objective="last",  # one target per window, bidirectional attention
            context_samples=128_000,
            model=model,
            data=DataConfig(
                dataset="youtube_mix",
                quantiser="mulaw",  # open
                distinct_positions=10_000_000,
            ),
            train=TrainConfig(
                batch_size=40,
                learning_rate=1e-4,
                schedule="drop",
                decay_steps=250_000,
                final_learning_rate=5e-6,  # "0.5*1e-5"
                num_steps=1_000_000,  # a limit: it ends when the validation loss is flat
                patience_evals=10,
                max_minutes=0.0,  # no limit
            ),
        )
    )
