"""A training of a few seconds that saves often, to be killed."""

from patchwave_jax.config import Config, DataConfig, RunConfig, TrainConfig
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.models.patchwave.config import PatchWaveConfig


def get_config(arg: str = ""):
    del arg
    return to_config_dict(
        Config(
            objective="dense",
            context_samples=240,
            model=PatchWaveConfig(  # with dropout
                patch_samples=60,
                kernel_size=5,
                filters=(8, 8),
                strides=(2, 3),
                width=16,
                num_layers=1,
                num_heads=2,
                head_size=16,
                mlp_width=32,
                readout_width=32,
                head="logistic_mixture",
                mixture_components=3,
                predictor_taps=16,
            ),
            data=DataConfig(dataset="audio_folder", distinct_positions=1_000),
            train=TrainConfig(batch_size=8, micro_batch_size=0, num_steps=40, learning_rate=1e-3),
            run=RunConfig(
                log_every_steps=1, eval_every_steps=20, eval_targets=2_000, save_every_steps=3
            ),
        )
    )
