"""One optimizer step, a pure function of the state and the batch."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from hipgpt_jax import config, numerics, training_config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import transformer
from hipgpt_jax.training import mesh

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


@contextlib.contextmanager
def fixed_random_bits() -> Iterator[None]:
    """Fixes the settings of JAX and Flax that decide which bits a key gives, so that only the seed decides them."""
    with jax.threefry_partitionable(True), flax.config.temp_flip_flag("fix_rng_separator", False):
        yield


def init_state(model: transformer.Transformer, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Returns the state before the first step."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.fold_in(key, _INIT_STREAM), tokens_BT, dropout=0.0)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def param_shapes(model: config.ModelConfig) -> Any:
    """Returns the shapes of a model's parameters, without making them."""
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init_params = functools.partial(transformer.Transformer(model).init, dropout=0.0)
    return jax.eval_shape(init_params, numerics.key_of(0), tokens_BT)["params"]


def init_sharded(
    layout: mesh.Layout, model: transformer.Transformer, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state before the first step, made where it lies: no device ever holds more than its part."""
    make_state = functools.partial(init_state, model, optimizer)
    shardings = layout.shardings_for(jax.eval_shape(make_state, key))
    return jax.jit(make_state, out_shardings=shardings)(key)


def make_train_step(
    model: transformer.Transformer,
    optimizer: optax.GradientTransformation,
    train: training_config.TrainConfig,
    key: jax.Array,
    layout: mesh.Layout,
) -> TrainStep:
    """Returns the jitted step; it takes over the state's memory.

    The dropout key of a step is ``fold_in`` of the step's number, so a resumed run draws the same; that
    of a part of a batch is ``fold_in`` of the part's number too.

    Args:
        model: The model.
        optimizer: As ``optimizer.make`` builds it.
        train: The dropout rate and the parts of a batch are read from it.
        key: The run's key.
        layout: Where the state lies.

    Returns:
        A function of a state and ids ``[B, T + 1]``.
    """
    dropout_key = jax.random.fold_in(key, _DROPOUT_STREAM)

    def part_sums(params: Any, tokens: jax.Array, part_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
        bound = model.bind({"params": params}, rngs={"dropout": part_key})
        scores = loss.score_tokens(bound(inputs_BT, dropout=train.dropout), targets_BT)
        nll, correct = jnp.sum(scores.nll_BT), jnp.sum(scores.is_top_BT)
        return nll / train.grad_accum / targets_BT.size, correct / train.grad_accum / targets_BT.size

    gradients_of = jax.value_and_grad(part_sums, has_aux=True)

    def accumulate(params: Any, tokens: jax.Array, step_key: jax.Array) -> Any:
        """Adds up the parts of a batch; each has every ``grad_accum``-th row, so that a device keeps its own."""

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            number, tokens_BT = part
            found = gradients_of(params, tokens_BT, jax.random.fold_in(step_key, number))
            return jax.tree.map(jnp.add, total, found), None

        parts = tokens.reshape(-1, train.grad_accum, tokens.shape[1]).swapaxes(0, 1)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients_of, params, parts[0], step_key)
        )
        return jax.lax.scan(add, zeros, (jnp.arange(train.grad_accum), parts))[0]

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(dropout_key, state.step)
        gather = gradients_of if train.grad_accum == 1 else accumulate
        (value, accuracy), gradients = gather(state.params, tokens, step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(value, accuracy, optax.tree.norm(gradients))
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = layout.shardings_for(jax.eval_shape(functools.partial(init_state, model, optimizer), key))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
