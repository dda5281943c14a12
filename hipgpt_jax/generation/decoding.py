"""The decode step, and the window it rolls: pure functions from state to state.

A state is a batch of rows that never affect one another. A row's slots and positions are counted
from its own first token, so its arithmetic is the same in any company.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hipgpt_jax.generation import sampling
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import transformer


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
        token_B: The newest of them; it is not in the context yet.
        length_B: Tokens in the context.
        context_BS: The ids that the model has read, from slot 0; nothing stands at ``length`` and after.
        seen_BV: Whether a token stands in the prompt or the output.
        logits_BV: What the newest token was drawn from; no step reads it.
    """

    index_B: jax.Array
    token_B: jax.Array
    length_B: jax.Array
    context_BS: jax.Array
    seen_BV: jax.Array
    logits_BV: jax.Array


def read_window(
    model: transformer.Transformer, params: Any, rows: Rows, state: State, *, length: int, sizes: tuple[int, ...]
) -> tuple[State, tuple[kv.Cache, ...]]:
    """Reads the context from its start and draws the token after it.

    Args:
        model: The model.
        params: Its parameters.
        rows: Keys and settings.
        state: Its context counts, its newest token does not.
        length: Slots read, at least every row's length. Changing it compiles again.
        sizes: Slots of each part of the cache.

    Returns:
        The state with the token drawn, and the parts of the cache of the context.
    """
    logits_BV, new = model.bind({"params": params}).prefill(state.context_BS[:, :length], state.length_B)
    return _draw(rows, state, logits_BV), kv.split(new, sizes)


def advance(
    model: transformer.Transformer, params: Any, rows: Rows, state: State, cache: tuple[kv.Cache, ...]
) -> tuple[State, kv.Cache]:
    """Takes the newest token into a context that is not full and draws the one after it.

    Args:
        model: The model.
        params: Its parameters.
        rows: Keys and settings.
        state: Its newest token is taken in.
        cache: The parts that hold a token of any row. Another number of them compiles again.

    Returns:
        The new state, and the token's own keys and values, to be appended at the old state's length.
        They are not appended here: a program that reads a cache and writes it copies it, which
        made a token of GPT-2 take 80 to 109 ms instead of 42.
    """
    logits_BV, new = model.bind({"params": params}).decode(state.token_B, cache, state.length_B)
    put = jax.vmap(lambda context_S, token, slot: context_S.at[slot].set(token))
    state = state._replace(context_BS=put(state.context_BS, state.token_B, state.length_B), length_B=state.length_B + 1)
    return _draw(rows, state, logits_BV), new


def decode_step(
    model: transformer.Transformer, params: Any, rows: Rows, state: State, cache: tuple[kv.Cache, ...]
) -> tuple[State, tuple[kv.Cache, ...]]:
    """One token, whole: ``advance`` over all parts of the cache, and its keys and values appended."""
    next_state, new = advance(model, params, rows, state, cache)
    starts = itertools.accumulate((part.keys[0].shape[2] for part in cache), initial=0)
    slots = (state.length_B - start for start in starts)
    return next_state, tuple(kv.append(part, new, slot_B) for part, slot_B in zip(cache, slots, strict=False))


def slide(state: State, *, stride: int) -> State:
    """Drops the ``stride`` oldest tokens of a full context and takes in the newest.

    Learned positions have all shifted, so every cached key is stale: ``read_window`` comes next.
    """
    W = state.context_BS.shape[1]
    context_BS = jnp.concatenate([state.context_BS[:, stride:], state.token_B[:, None]], axis=1)
    return state._replace(
        context_BS=jnp.pad(context_BS, ((0, 0), (0, stride - 1))),
        length_B=jnp.full_like(state.length_B, W - stride + 1),
    )


def where(rows_B: jax.Array, chosen: State, other: State) -> State:
    """Takes the rows where ``rows_B`` is true from ``chosen`` and the rest from ``other``."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(rows_B, tuple(range(1, a.ndim))), a, b)

    return jax.tree.map(select, chosen, other)


def uniform(rows: Rows, state: State) -> jax.Array:
    """Returns the uniform numbers ``[B]`` of the tokens that the state draws next."""
    key_B = jax.random.wrap_key_data(rows.key_B2, impl="threefry2x32")
    return jax.vmap(sampling.uniform)(key_B, state.index_B)


def _draw(rows: Rows, state: State, logits_BV: jax.Array) -> State:
    token_B = sampling.choose(logits_BV, state.seen_BV, rows.settings, uniform(rows, state))
    seen_BV = state.seen_BV | (jnp.arange(state.seen_BV.shape[1])[None] == token_B[:, None])
    return state._replace(index_B=state.index_B + 1, token_B=token_B, seen_BV=seen_BV, logits_BV=logits_BV)
