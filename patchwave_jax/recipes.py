"""Recipes shared by configurations: the paper's, ours, ours for small machines, baselines'."""

import dataclasses
from typing import Any

import ml_collections

from patchwave_jax.config import Config, DataConfig, RunConfig, TrainConfig
from patchwave_jax.config_dict import to_config_dict
from patchwave_jax.errors import UserError
from patchwave_jax.models.base import ModelConfig
from patchwave_jax.models.patchwave.config import PatchWaveConfig

NO_DROPOUT: Any = dict.fromkeys(
    ("conv_dropout", "mlp_dropout", "head_dropout", "token_dropout"), 0.0
)
ADAPTIVE: Any = {  # short windows for onsets, long ones for held notes
    "adaptive_taps": (24, 192, 512, 1024),
    "adaptive_windows": (1024, 4096, 12_288, 24_576),
    "adaptive_block_samples": 100,
    "denoiser_taps": 256,
    "denoiser_window": 5_120,
}


def get_config(context_samples: int, arg: str) -> ml_collections.ConfigDict:
    """The paper's recipe for an empty `arg`, ours for `dense`.

    Raises:
      UserError: for any other `arg`.
    """
    recipes = {"": paper, "dense": dense}
    if arg not in recipes:
        raise UserError(f"--config=FILE.py:{arg} is unknown; use FILE.py or FILE.py:dense")
    return to_config_dict(recipes[arg](context_samples))


def paper(context_samples: int) -> Config:
    """Verma 2022, as `configs/ctx128k.py` has it in full: the defaults of every field."""
    return Config(context_samples=context_samples)


def dense(context_samples: int) -> Config:
    """The same network with a target at every sample, a full-rate path and a mixture head.

    A step has about a million targets, whatever the context.
    """
    model = PatchWaveConfig(
        input="embedding",
        skip_connections=True,
        head="logistic_mixture",
        **ADAPTIVE,
        **NO_DROPOUT,
    )
    train = TrainConfig(
        batch_size=max(1, 1_024_000 // context_samples),
        micro_batch_size=1,
        num_steps=20_000,
        learning_rate=1e-3,
        warmup_steps=500,
        schedule="cosine",
        decay_steps=20_000,
        final_learning_rate=1e-5,
        clip_norm=1.0,
        patience_evals=0,
    )
    return Config(
        objective="dense",
        context_samples=context_samples,
        model=model,
        data=dataclasses.replace(Config().data, distinct_positions=0),
        train=train,
        run=RunConfig(eval_every_steps=500, save_every_steps=500),
    )


def baseline(model: ModelConfig, learning_rate: float, **train: Any) -> Config:
    """A baseline's published setting: clips of 131,072, Adam, one window a step but for `train`."""
    return Config(
        objective="dense",
        context_samples=131_072,
        model=model,
        data=DataConfig(distinct_positions=0),
        train=TrainConfig(
            learning_rate=learning_rate,
            final_learning_rate=learning_rate / 5,
            patience_evals=20,
            **{"batch_size": 1, "micro_batch_size": 1, **train},
        ),
    )


def small(data: DataConfig, num_steps: int, evals: int) -> Config:
    """Ours for a few cores: patches of 500, 0.4M parameters, 32,000 targets a step.

    `evals` validations are spread evenly over `num_steps`.
    """
    return Config(
        objective="dense",
        context_samples=32_000,
        model=PatchWaveConfig(
            patch_samples=500,
            strides=(2, 2, 2, 2),
            filters=(64, 64, 64, 32),
            width=64,
            num_layers=2,
            num_heads=4,
            head_size=64,
            mlp_width=128,
            readout_width=256,
            input="embedding",
            skip_connections=True,
            head="logistic_mixture",
            **ADAPTIVE,
            **NO_DROPOUT,
        ),
        data=dataclasses.replace(data, distinct_positions=0),
        train=TrainConfig(
            batch_size=1,
            micro_batch_size=0,
            num_steps=num_steps,
            learning_rate=4e-3,
            warmup_steps=min(50, num_steps // 4),
            schedule="cosine",
            decay_steps=num_steps,
            final_learning_rate=4e-5,
            clip_norm=1.0,
            patience_evals=0,
        ),
        run=RunConfig(
            eval_every_steps=num_steps // evals,
            save_every_steps=num_steps // evals,
            eval_targets=500_000,
            sample_every_steps=num_steps,
        ),
    )
