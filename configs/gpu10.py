"""Ten minutes of one GPU: the recipe of `ctx128k.py:dense`, ended by the clock.

    python -m patchwave_jax.train --config=configs/gpu10.py --workdir=DIR \\
        --config.data.data_dir=DIR

The learning rate has reached its end when the minutes are over, however many steps they were. The
data are a folder of your own recordings (`python -m patchwave_jax.data.build`), a little louder or
softer, higher or lower in every window.
"""

import dataclasses

from patchwave_jax import recipes
from patchwave_jax.config import DataConfig, RunConfig
from patchwave_jax.config_dict import to_config_dict


def get_config(arg: str = ""):
    del arg
    config = recipes.dense(128_000)
    train = dataclasses.replace(
        config.train,
        max_minutes=10.0,
        batch_size=4,
        micro_batch_size=4,
        learning_rate=2e-3,
        final_learning_rate=2e-5,
        warmup_steps=100,
    )
    data = DataConfig(
        dataset="audio_folder", distinct_positions=0, gain_db=6.0, pitch_semitones=1.0
    )
    run = RunConfig(
        log_every_steps=20,
        eval_every_steps=250,
        save_every_steps=250,
        eval_targets=200_000,
        sample_every_steps=0,
    )
    return to_config_dict(dataclasses.replace(config, train=train, data=data, run=run))
