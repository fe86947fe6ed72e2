"""The optimizer: Adam, and how its learning rate goes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from patchwave_jax.config import Config


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate after so many steps."""
    train = config.train
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if train.warmup_steps else train.learning_rate,
            train.learning_rate,
            train.warmup_steps,
            max(train.decay_steps, train.warmup_steps + 1),
            train.final_learning_rate,
        )
    drop = optax.piecewise_constant_schedule(
        train.learning_rate, {train.decay_steps: train.final_learning_rate / train.learning_rate}
    )
    if not train.warmup_steps:
        return drop
    return lambda step: drop(step) * jnp.minimum(1.0, (step + 1) / train.warmup_steps)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, with decoupled weight decay of matrices and clipping where the recipe has them.

    Parameters with a learning rate of their own (`ModelConfig.own_learning_rate`) have no decay,
    and the same schedule.
    """
    train, own = config.train, config.model.own_learning_rate()

    def decayed(params: Any) -> Any:
        matrices = jax.tree.map(lambda x: x.ndim > 1, params)
        if own is None:
            return matrices
        return jax.tree.map(lambda matrix, own: matrix and not own, matrices, own[1](params))

    scaled = []
    if own is not None:
        rate, mask = own
        scaled = [optax.masked(optax.scale(rate / train.learning_rate), mask)]
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        optax.adamw(
            make_schedule(config),
            b2=train.beta2,
            weight_decay=train.weight_decay,
            mask=decayed,
        ),
        *scaled,
    )
