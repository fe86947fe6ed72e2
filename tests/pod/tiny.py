"""A training of a few seconds for several processes. Imports nothing that starts JAX."""

from patchwave_jax.config import Config, DataConfig, RunConfig, TrainConfig
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.recipes import NO_DROPOUT


def get_config(arg: str = ""):
    """PatchWave, or SampleRNN, which carries a state from step to step."""
    samplernn = SampleRNNConfig(
        frame_sizes=(4, 2, 2), width=16, embedding_width=8, segment_samples=32
    )
    ours = PatchWaveConfig(
        patch_samples=64,
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
        **NO_DROPOUT,
    )
    return to_config_dict(
        Config(
            objective="dense",
            context_samples=512,
            model={"": ours, "samplernn": samplernn}[arg],
            data=DataConfig(dataset="audio_folder", distinct_positions=1_000),
            train=TrainConfig(batch_size=16, micro_batch_size=1, num_steps=8, learning_rate=1e-3),
            run=RunConfig(
                log_every_steps=1, eval_every_steps=4, eval_targets=2_000, save_every_steps=4
            ),
        )
    )
