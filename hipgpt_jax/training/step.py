"""One optimizer step, a pure function of the state and the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hipgpt_jax import config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import transformer

_INIT_STREAM, _DROPOUT_STREAM = 0, 1


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Attributes:
        step: Steps taken, an int32 scalar.
        params: The model's parameters.
        opt_state: The optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Mean loss in nats a token, share of right predictions, and the gradient's norm before the clip."""

    loss: jax.Array
    accuracy: jax.Array
    gradient_norm: jax.Array


TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


def init(model: transformer.Transformer, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Returns the state before the first step."""
    tokens_BT = jnp.zeros((1, model.config.max_seq_len), jnp.int32)
    params = model.init(jax.random.fold_in(key, _INIT_STREAM), tokens_BT, dropout=0.0)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make(
    model: transformer.Transformer,
    optimizer: optax.GradientTransformation,
    train: config.TrainConfig,
    key: jax.Array,
) -> TrainStep:
    """Returns the jitted step; it takes over the state's memory.

    The dropout key of a step is ``fold_in`` of the step's number, so a resumed run draws the same.

    Args:
        model: The model.
        optimizer: As ``optimizer.make`` builds it.
        train: The dropout rate is read from it.
        key: The run's key.

    Returns:
        A function of a state and ids ``[B, T + 1]``.
    """
    dropout_key = jax.random.fold_in(key, _DROPOUT_STREAM)

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]

        def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            rngs = {"dropout": jax.random.fold_in(dropout_key, state.step)}
            logits_BTV = model.bind({"params": params}, rngs=rngs)(inputs_BT, dropout=train.dropout)
            sums = loss.sum_tokens(logits_BTV, targets_BT)
            return sums.nll / targets_BT.size, sums.correct / targets_BT.size

        (value, accuracy), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(value, accuracy, optax.tree.norm(gradients))
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
