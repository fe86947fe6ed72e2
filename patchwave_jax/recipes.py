"""The two recipes that the configurations share: the paper's, and ours for the dense objective."""

import dataclasses

import ml_collections

from patchwave_jax.config import Config, ModelConfig, RunConfig, TrainConfig, to_config_dict
from patchwave_jax.errors import UserError


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
    """Verma 2022: one target a window, bidirectional attention, Adam, three kinds of dropout.

    These are the defaults of `patchwave_jax.config`.
    """
    return Config(context_samples=context_samples)


def dense(context_samples: int) -> Config:
    """The same network with a target at every sample, a full-rate path and a mixture head.

    A step has about a million targets, whatever the context.
    """
    model = dataclasses.replace(
        ModelConfig(),
        input="embedding",
        skip_connections=True,
        head="logistic_mixture",
        conv_dropout=0.0,
        mlp_dropout=0.0,
        head_dropout=0.0,
        token_dropout=0.0,
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
