"""The optimizer: Adam, and how its learning rate goes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from patchwave_jax.config import Config


def make_schedule(config: Config, spent: Array | float | None = None) -> optax.Schedule:
    """The learning rate after so many steps.

    `spent` is the share of `train.max_minutes` that is used, None without a limit. The decay is
    then as far as the steps or the time have come, whichever is further.
    """
    train = config.train
    if train.schedule == "cosine":
        end = max(train.decay_steps, train.warmup_steps + 1)
        cosine = optax.warmup_cosine_decay_schedule(
            0.0 if train.warmup_steps else train.learning_rate,
            train.learning_rate,
            train.warmup_steps,
            end,
            train.final_learning_rate,
        )
        if spent is None:
            return cosine
        # The minimum: the warm-up counts steps only, however much time it takes.
        return lambda step: jnp.minimum(cosine(step), cosine(jnp.maximum(step, spent * end)))
    drop = optax.piecewise_constant_schedule(
        train.learning_rate, {train.decay_steps: train.final_learning_rate / train.learning_rate}
    )
    if not train.warmup_steps:
        return drop
    return lambda step: drop(step) * jnp.minimum(1.0, (step + 1) / train.warmup_steps)


def make_optimizer(
    config: Config, spent: Array | float | None = None
) -> optax.GradientTransformation:
    """Adam, with decoupled weight decay of matrices and clipping where the recipe has them.

    Its state does not depend on `spent`, which is as for `make_schedule` and may be traced.
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
            make_schedule(config, spent),
            b2=train.beta2,
            weight_decay=train.weight_decay,
            mask=decayed,
        ),
        *scaled,
    )
