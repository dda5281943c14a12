"""The optimizer and its schedule."""

import jax
import jax.numpy as jnp
import optax

from hipgpt_jax import training_config

_BETA1 = 0.9


def learning_rate(train: training_config.TrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a half cosine to the final rate.

    The first step takes ``1 / warmup_steps`` of the peak, step ``warmup_steps`` all of it, and step
    ``steps`` the final rate. A run no longer than its warm-up ends inside it.

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    """
    peak = train.learning_rate
    warmup = optax.linear_schedule(0.0, peak, max(1, train.warmup_steps))
    decay_steps = max(1, train.steps - train.warmup_steps)
    decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=train.final_learning_rate / peak)
    joined = optax.join_schedules([warmup, decay], [train.warmup_steps])
    return lambda count: joined(count + 1)


def make(train: training_config.TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm; only matrices decay.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.adamw(
            learning_rate(train),
            b1=_BETA1,
            b2=train.beta2,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: jnp.ndim(x) >= 2, params),
        ),
    )
