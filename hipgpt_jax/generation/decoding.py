"""The decode step, and the window it rolls: pure functions from state to state.

A state is a batch of rows that never affect one another. A row's slots and positions are counted
from its own first token, so its arithmetic is the same in any company.
"""

import functools
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from hipgpt_jax.generation import candidates, carry, facts, sampling
from hipgpt_jax.model import cache as kv

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer


def read(
    model: "transformer.Transformer",
    params: Any,
    context_BT: jax.Array,
    length_B: jax.Array,
    *,
    sizes: tuple[int, ...],
    stacked: bool = False,
) -> tuple[jax.Array, tuple[kv.Cache, ...]]:
    """Reads contexts from their start.

    Args:
        model: The model.
        params: Its parameters.
        context_BT: Ids, padded behind each row's length to one ``T``. Changing that compiles again.
        length_B: Tokens of each context, at least 1.
        sizes: Slots of each part of the cache.
        stacked: Whether all layers of it are one array.

    Returns:
        Logits ``[B, V]`` of the next token, and those parts of the cache that hold one of ``T`` tokens.
    """
    logits_BV, new = model.bind({"params": params}).prefill(context_BT, length_B)
    return logits_BV, kv.split(kv.stack(new) if stacked else new, kv.holding(sizes, context_BT.shape[1]))


def fill(
    model: "transformer.Transformer", params: Any, context_BT: jax.Array, *, sizes: tuple[int, ...], stacked: bool
) -> tuple[kv.Cache, ...]:
    """Returns the cache that ``read`` does; what the last block and the head make of it is not computed."""
    length_B = jnp.ones(len(context_BT), jnp.int32)
    return read(model, params, context_BT, length_B, sizes=sizes, stacked=stacked)[1]


@functools.partial(jax.jit, static_argnames="search")
def draw(
    rows: carry.Rows, state: carry.State, logits_BV: jax.Array, search: candidates.Search | None = None
) -> carry.State:
    """Draws the next token of each row from its logits; -1 where its numbers are not finite."""
    key_B = jax.random.wrap_key_data(rows.key_B2, impl="threefry2x32")
    uniform_B = jax.vmap(sampling.uniform)(key_B, state.index_B)
    choice = sampling.choose(logits_BV, state.seen_BV, rows.settings, uniform_B, search)
    numbers_B4 = facts.numbers(logits_BV, choice)
    token_B = jnp.where(jnp.isfinite(numbers_B4[:, 0]), choice.token_B, -1)
    return state._replace(index_B=state.index_B + 1, token_B=token_B, numbers_B4=numbers_B4, logits_BV=logits_BV)


def advance(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    cache: tuple[kv.Cache, ...],
    search: candidates.Search | None = None,
) -> tuple[carry.State, kv.Cache]:
    """Takes the newest token into a context that is not full and draws the one after it.

    Args:
        model: The model.
        params: Its parameters.
        rows: Keys and settings.
        state: Its newest token is taken in.
        cache: The parts that hold a token of any row, or its next slot. Another number of them compiles again.
        search: How candidates are found; as on a CPU, by default.

    Returns:
        The new state, and the token's own keys and values, to be appended at the old state's length.
        They are not appended here: unless XLA is told otherwise, a program that reads a cache and writes it
        copies it, which made a token of GPT-2 take 80 to 109 ms instead of 42.
    """
    logits_BV, new = model.bind({"params": params}).decode(state.token_B, cache, state.length_B)
    put = jax.vmap(lambda context_S, token, slot: context_S.at[slot].set(token))
    context_BS = put(state.context_BS, state.token_B, state.length_B)
    state = _seen(state)._replace(context_BS=context_BS, length_B=state.length_B + 1)
    return draw(rows, state, logits_BV, search), new


def _seen(state: carry.State) -> carry.State:
    """Adds the newest token to those seen."""
    is_newest_BV = jnp.arange(state.seen_BV.shape[1])[None] == state.token_B[:, None]
    return state._replace(seen_BV=state.seen_BV | is_newest_BV)


def lone_steps(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    before: tuple[kv.Cache, ...],
    last: kv.Cache,
    left: jax.Array,
    end: jax.Array,
    *,
    count: int,
) -> tuple[carry.State, kv.Cache, carry.Told]:
    """Takes a lone row on by ``left`` steps, ``advance`` and its keys and values appended, or up to its end.

    The new ``last`` lies where the old one lay if XLA is told that it may: see ``programs.in_place``.

    Args:
        model: The model.
        params: Its parameters.
        rows: Key and settings.
        state: Its newest token is taken in, unless that is the end.
        before: The parts of the cache that are full.
        last: The part behind them, where the steps' tokens stand.
        left: Steps, at most ``count`` of them.
        end: The token that ends the row; it goes no further than that, nor beyond a token -1.
        count: Steps told of. Another number compiles again.

    Returns:
        The state and the last part after them, and what is told of each step's token, arrays ``[T, 1, ...]``, which
        mean nothing from the end on.
    """
    start = sum(part.slots for part in before)

    def goes_on(carried: tuple[jax.Array, carry.State, kv.Cache, carry.Told]) -> jax.Array:
        index, state, _, _ = carried
        token = state.token_B[0]
        has_ended = (state.index_B[0] > 0) & ((token == end) | (token < 0))
        return (index < left) & ~has_ended

    def step(carried: tuple[jax.Array, carry.State, kv.Cache, carry.Told]) -> Any:
        index, state, last, told = carried
        next_state, new = advance(model, params, rows, state, (*before, last))
        last = kv.append(last, new, state.length_B - start)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return index + 1, next_state, last, jax.tree.map(put, told, carry.Told.of(next_state))

    none_told = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), carry.Told.of(state))
    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, last, none_told))[1:]


def decode_step(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    cache: tuple[kv.Cache, ...],
    search: candidates.Search | None = None,
    live_B: jax.Array | None = None,
) -> tuple[carry.State, tuple[kv.Cache, ...]]:
    """One token, whole: ``advance``, and its keys and values appended to the parts of the cache.

    Arguments are those of ``advance``, and ``live_B``: whether a row takes the step, as all do by default. The others
    are left as they are.
    """
    next_state, new = advance(model, params, rows, state, cache, search)
    next_state, new = jax.lax.optimization_barrier((next_state, new))  # written when all is read, so where it lies
    slot_B = state.length_B
    if live_B is not None:
        slot_B, next_state = jnp.where(live_B, slot_B, -1), carry.where(live_B, next_state, state)
    starts = itertools.accumulate((part.slots for part in cache), initial=0)
    parts = (kv.append(part, new, slot_B - start) for part, start in zip(cache, starts, strict=False))
    return next_state, tuple(parts)


def steps(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    cache: tuple[kv.Cache, ...],
    left_B: jax.Array,
    *,
    search: candidates.Search,
    count: int,
) -> tuple[carry.State, tuple[kv.Cache, ...], carry.Told]:
    """Takes ``count`` steps, ``decode_step``, of which a row takes the first ``left``.

    Returns:
        The state and the cache after them, and what is told of each step's tokens, arrays ``[T, B, ...]``.
    """

    def step(carried: tuple[carry.State, tuple[kv.Cache, ...]], index: jax.Array) -> Any:
        state, cache = carried[0], kv.pinned(carried[1])
        state, cache = decode_step(model, params, rows, state, cache, search, index < left_B)
        return (state, kv.pinned(cache)), carry.Told.of(state)

    (state, cache), told = jax.lax.scan(step, (state, cache), jnp.arange(count, dtype=jnp.int32))
    return state, cache, told


def roll(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    *,
    stride: int,
    sizes: tuple[int, ...],
    stacked: bool = False,
    search: candidates.Search | None = None,
) -> tuple[carry.State, tuple[kv.Cache, ...]]:
    """Takes the newest token into a context that is full, reads that anew and draws the token after it.

    Returns:
        The new state, and the parts of the cache that hold the context.
    """
    state = slide(state, stride=stride)
    length = state.context_BS.shape[1] - stride + 1
    context_BT = state.context_BS[:, :length]
    logits_BV, cache = read(model, params, context_BT, state.length_B, sizes=sizes, stacked=stacked)
    return draw(rows, state, logits_BV, search), cache


def slide(state: carry.State, *, stride: int) -> carry.State:
    """Drops the ``stride`` oldest tokens of a full context and takes in the newest.

    Learned positions have all shifted, so every cached key is stale: the context is to be read anew.
    """
    W = state.context_BS.shape[1]
    context_BS = jnp.concatenate([state.context_BS[:, stride:], state.token_B[:, None]], axis=1)
    return _seen(state)._replace(
        context_BS=jnp.pad(context_BS, ((0, 0), (0, stride - 1))),
        length_B=jnp.full_like(state.length_B, W - stride + 1),
    )
