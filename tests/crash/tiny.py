"""A training of a few seconds that saves often, to be killed."""

import dataclasses

from conftest import SMALL

from patchwave_jax.config import Config, DataConfig, RunConfig, TrainConfig
from patchwave_jax.config_dict import to_config_dict


def get_config(arg: str = ""):
    del arg
    return to_config_dict(
        Config(
            objective="dense",
            context_samples=240,
            model=dataclasses.replace(SMALL, head="logistic_mixture"),  # with dropout
            data=DataConfig(dataset="audio_folder", distinct_positions=1_000),
            train=TrainConfig(batch_size=8, micro_batch_size=0, num_steps=40, learning_rate=1e-3),
            run=RunConfig(
                log_every_steps=1, eval_every_steps=20, eval_targets=2_000, save_every_steps=3
            ),
        )
    )
