"""One optimizer step: a pure function of the training state and the batch."""

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
from hipgpt_jax.model import mesh, transformer

_INIT_STREAM, _DROPOUT_STREAM = 0, 1


class TrainState(NamedTuple):
    """Training state.

    Attributes:
        step: Number of steps taken, an int32 scalar.
        params: Parameters of the model, float32.
        opt_state: State of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Scalars of one step: mean loss in nats per token, accuracy, and the norm of the gradient before clipping."""

    loss: jax.Array
    accuracy: jax.Array
    gradient_norm: jax.Array


TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


@contextlib.contextmanager
def fixed_random_bits() -> Iterator[None]:
    """Fixes the settings of JAX and Flax that change the bits of a key, so that only the seed determines them."""
    with jax.threefry_partitionable(True), flax.config.temp_flip_flag("fix_rng_separator", False):
        yield


def init_state(model: transformer.Transformer, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Returns the state before the first step."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.fold_in(key, _INIT_STREAM), tokens_BT, dropout=0.0)["params"]
    return _first_state(optimizer, params)


def _first_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def param_shapes(model: config.ModelConfig) -> Any:
    """Returns the shapes of a model's parameters, without allocating them."""
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init_params = functools.partial(transformer.Transformer(model).init, dropout=0.0)
    return jax.eval_shape(init_params, numerics.key_of(0), tokens_BT)["params"]


def init_sharded(
    layout: mesh.Layout, model: transformer.Transformer, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state before the first step; each device allocates only its own shards."""
    make_state = functools.partial(init_state, model, optimizer)
    shardings = layout.shardings_for(jax.eval_shape(make_state, key))
    return jax.jit(make_state, out_shardings=shardings)(key)


def start_from(layout: mesh.Layout, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """Returns the state before the first step with given parameters, NumPy arrays on the host."""

    def make_state(params: Any) -> TrainState:
        # Copied, because on a CPU the arrays may share the host's memory, and the first step donates its state.
        return _first_state(optimizer, jax.tree.map(jnp.copy, params))

    shardings = layout.shardings_for(jax.eval_shape(make_state, params))
    return jax.jit(make_state, out_shardings=shardings)(layout.shard(params))


def make_train_step(
    model: transformer.Transformer,
    optimizer: optax.GradientTransformation,
    train: training_config.TrainConfig,
    key: jax.Array,
    layout: mesh.Layout,
) -> TrainStep:
    """Returns the jitted step, a function of a state, which it donates, and token ids ``[B, T + 1]``.

    Args:
        model: The model.
        optimizer: As ``optimizer.make`` builds it.
        train: Its ``dropout`` and ``grad_accum`` are used.
        key: Key of the run.
        layout: Sharding of the state.
    """
    dropout_key = jax.random.fold_in(key, _DROPOUT_STREAM)

    def loss_fn(params: Any, tokens: jax.Array, step_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean loss and accuracy, divided by ``grad_accum`` so that the parts of a batch add up to its means."""
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
        logits_BTV = model.bind({"params": params}, rngs={"dropout": step_key})(inputs_BT, dropout=train.dropout)
        scores = loss.score_tokens(logits_BTV, targets_BT)
        nll, correct = jnp.sum(scores.nll_BT), jnp.sum(scores.is_top_BT)
        return nll / train.grad_accum / targets_BT.size, correct / train.grad_accum / targets_BT.size

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(params: Any, tokens: jax.Array, step_key: jax.Array) -> Any:
        """Sums ``grad_fn`` over the parts of a batch, one after the other to save memory."""

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            index, tokens_BT = part
            found = grad_fn(params, tokens_BT, jax.random.fold_in(step_key, index))
            return jax.tree.map(jnp.add, total, found), None

        # Each part takes every grad_accum-th row, so that every device contributes its own rows to every part;
        # consecutive rows would all lie on one device.
        parts = tokens.reshape(-1, train.grad_accum, tokens.shape[1]).swapaxes(0, 1)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, parts[0], step_key))
        return jax.lax.scan(add, zeros, (jnp.arange(train.grad_accum), parts))[0]

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        # The dropout key depends on the number of the step alone, so that a resumed run draws the same masks.
        step_key = jax.random.fold_in(dropout_key, state.step)
        compute = grad_fn if train.grad_accum == 1 else accumulate
        (mean_loss, accuracy), gradients = compute(state.params, tokens, step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(mean_loss, accuracy, optax.tree.norm(gradients))
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = layout.shardings_for(jax.eval_shape(functools.partial(init_state, model, optimizer), key))
    # The state is donated: without that, two copies of parameters and moments would be in memory during the update.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
