"""The optimizer: Adam, and how its learning rate goes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from patchwave_jax.config import Config
from patchwave_jax.models.sashimi import S4_LEARNING_RATE, SaShiMiConfig, s4_parameters


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

    S4's own parameters have their own learning rate, in step with all others', and no decay.
    """
    train, own = config.train, []

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda x, s4: x.ndim > 1 and not s4, params, s4_parameters(params))

    if isinstance(config.model, SaShiMiConfig):
        slower = optax.scale(S4_LEARNING_RATE / train.learning_rate)
        own = [optax.masked(slower, s4_parameters)]
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        optax.adamw(
            make_schedule(config),
            b2=train.beta2,
            weight_decay=train.weight_decay,
            mask=decayed,
        ),
        *own,
    )
