"""What a decode step carries from token to token, beside the cache, and how rows of it are taken and replaced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import sampling


class Rows(NamedTuple):
    """What a row keeps from its first token to its last.

    Attributes:
        key_B2: Raw threefry keys, uint32 ``[B, 2]``, one for each sample.
        settings: Sampling settings.
    """

    key_B2: jax.Array
    settings: sampling.Settings


class State(NamedTuple):
    """What a step takes and gives, beside the cache.

    Attributes:
        index_B: Tokens drawn so far.
        token_B: The newest of them, which is not in the context yet; -1 where the model's numbers are not finite.
        numbers_B4: What is said of it, see ``facts.numbers``. No step reads them.
        length_B: Tokens in the context.
        context_BS: The ids that the model has read, from slot 0; nothing stands at ``length`` and after.
        seen_BV: Whether a token stands in the prompt or the output, but for the newest of that.
        logits_BV: What the newest token was drawn from; no step reads it.
    """

    index_B: jax.Array
    token_B: jax.Array
    numbers_B4: jax.Array
    length_B: jax.Array
    context_BS: jax.Array
    seen_BV: jax.Array
    logits_BV: jax.Array


class Told(NamedTuple):
    """What is fetched of the newest token of each row, or of several steps, with their number as first axis.

    Attributes:
        token_B: As in ``State``.
        numbers_B4: Likewise.
        logits_BV: Likewise.
    """

    token_B: jax.Array
    numbers_B4: jax.Array
    logits_BV: jax.Array

    @classmethod
    def of(cls, state: State) -> "Told":
        """Returns what is told of a state."""
        return cls(state.token_B, state.numbers_B4, state.logits_BV)


def blank(B: int, W: int, V: int, device: Any = None) -> tuple[Rows, State]:
    """Returns rows without a sample, on a device; their numbers mean nothing, and compile nothing."""

    def zeros(*shape: int, dtype: Any = np.int32) -> jax.Array:
        return jax.device_put(np.zeros(shape, dtype), device, may_alias=False)

    rows = Rows(zeros(B, 2, dtype=np.uint32), jax.device_put(sampling.settings([config.SamplingConfig()] * B), device))
    state = State(
        index_B=zeros(B),
        token_B=zeros(B),
        numbers_B4=zeros(B, 4, dtype=np.float32),
        length_B=zeros(B),
        context_BS=zeros(B, W),
        seen_BV=zeros(B, V, dtype=bool),
        logits_BV=zeros(B, V, dtype=np.float32),
    )
    return rows, state


def take(batch: Any, row: jax.Array | int) -> Any:
    """Returns one row of every array of ``batch``, as ``[1, ...]``."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), batch)


def put(batch: Any, row: jax.Array, one: Any) -> Any:
    """Returns ``batch`` with a row replaced by ``one``, arrays ``[1, ...]``."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 0), batch, one)


def where(rows_B: jax.Array, chosen: State, other: State) -> State:
    """Takes the rows where ``rows_B`` is true from ``chosen`` and the rest from ``other``."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(rows_B, tuple(range(1, a.ndim))), a, b)

    return jax.tree.map(select, chosen, other)
