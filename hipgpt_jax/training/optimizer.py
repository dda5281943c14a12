"""The optimizer and its learning-rate schedule."""

import jax
import jax.numpy as jnp
import optax

from hipgpt_jax import training_config

_BETA1 = 0.9


def learning_rate(train: training_config.TrainConfig) -> optax.Schedule:
    """Returns the schedule: linear warm-up to the peak, then a half cosine to the final rate.

    Step 1 uses ``peak / warmup_steps``, step ``warmup_steps`` the peak, and step ``steps`` the final rate. A run no
    longer than its warm-up ends inside it. Like every optax schedule it is a function of the steps already taken.

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017,
        https://arxiv.org/abs/1608.03983.
    """
    peak = train.learning_rate
    warmup = optax.linear_schedule(0.0, peak, max(1, train.warmup_steps))
    decay_steps = max(1, train.steps - train.warmup_steps)
    decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=train.final_learning_rate / peak)
    joined = optax.join_schedules([warmup, decay], [train.warmup_steps])
    # optax counts from 0, where the warm-up would waste the first step on a rate of 0.
    return lambda count: joined(count + 1)


def make(train: training_config.TrainConfig) -> optax.GradientTransformation:
    """Returns AdamW after clipping the global norm of the gradient.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, https://arxiv.org/abs/1711.05101.
    """
    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.adamw(
            learning_rate(train),
            b1=_BETA1,
            b2=train.beta2,
            weight_decay=train.weight_decay,
            # Only matrices decay: biases and LayerNorm scales have few parameters and no reason to be near 0.
            mask=lambda params: jax.tree.map(lambda x: jnp.ndim(x) >= 2, params),
        ),
    )
