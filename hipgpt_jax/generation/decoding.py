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

_Carried = tuple[jax.Array, carry.State, tuple[kv.Cache, ...], carry.Told]  # from step to step


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


def decode_step(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    cache: tuple[kv.Cache, ...],
    *,
    before: tuple[kv.Cache, ...] = (),
    search: candidates.Search | None = None,
    live_B: jax.Array | None = None,
) -> tuple[carry.State, tuple[kv.Cache, ...]]:
    """Takes the newest token into a context that is not full and draws the one after it.

    Args:
        model: The model.
        params: Its parameters.
        rows: Keys and settings.
        state: Its newest token is taken in.
        cache: Parts of the cache, up to those that hold a token of any row or its next slot. Another number of them
            compiles again.
        before: The parts in front of these, in which no row's next slot stands.
        search: How candidates are found; as on a CPU, by default.
        live_B: Whether a row takes the step, as all do by default. The others are left as they are.

    Returns:
        The new state, and ``cache`` with the token's own keys and values. They lie where the old ones lay if XLA is
        told that they may: see ``programs.in_place``.
    """
    past = (*before, *cache)
    logits_BV, new = model.bind({"params": params}).decode(state.token_B, past, state.length_B)
    put = jax.vmap(lambda context_S, token, slot: context_S.at[slot].set(token))
    context_BS = put(state.context_BS, state.token_B, state.length_B)
    next_state = _seen(state)._replace(context_BS=context_BS, length_B=state.length_B + 1)
    next_state = draw(rows, next_state, logits_BV, search)
    next_state, new = jax.lax.optimization_barrier((next_state, new))  # written when all is read, so where it lies
    slot_B = state.length_B
    if live_B is not None:
        slot_B, next_state = jnp.where(live_B, slot_B, -1), carry.where(live_B, next_state, state)
    starts = itertools.accumulate((part.slots for part in past), initial=0)
    own = list(zip(past, starts, strict=False))[len(before) :]
    return next_state, tuple(kv.append(part, new, slot_B - start) for part, start in own)


def _seen(state: carry.State) -> carry.State:
    """Adds the newest token to those seen."""
    is_newest_BV = jnp.arange(state.seen_BV.shape[1])[None] == state.token_B[:, None]
    return state._replace(seen_BV=state.seen_BV | is_newest_BV)


def steps(
    model: "transformer.Transformer",
    params: Any,
    rows: carry.Rows,
    state: carry.State,
    before: tuple[kv.Cache, ...],
    cache: tuple[kv.Cache, ...],
    left_B: jax.Array,
    end_B: jax.Array,
    *,
    search: candidates.Search,
    count: int,
    stops_early: bool,
) -> tuple[carry.State, tuple[kv.Cache, ...], carry.Told]:
    """Takes steps, ``decode_step``, until no row goes on, and at most ``count`` of them.

    Arguments beside these are those of ``decode_step``.

    Args:
        left_B: Steps of each row, at most ``count``.
        end_B: The token that ends each row, which goes no further than that, nor beyond a token -1.
        count: Steps told of. Another number compiles again.
        stops_early: Whether the loop ends as soon as no row goes on. A GPU's host would wait to see that at each step,
            so there all ``count`` are taken.

    Returns:
        The state and ``cache`` after them, and what is told of each step's tokens, arrays ``[T, B, ...]``. After a
        row's last step they mean nothing.
    """

    def live(index: jax.Array, state: carry.State) -> jax.Array:
        has_ended_B = (state.index_B > 0) & ((state.token_B == end_B) | (state.token_B < 0))
        return (index < left_B) & ~has_ended_B

    def goes_on(carried: _Carried) -> jax.Array:
        index, state, _, _ = carried
        return jnp.any(live(index, state)) if stops_early else index < count

    def step(carried: _Carried) -> _Carried:
        index, state, cache, told = carried
        cache, live_B = kv.pinned(cache), live(index, state)
        state, cache = decode_step(model, params, rows, state, cache, before=before, search=search, live_B=live_B)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return index + 1, state, kv.pinned(cache), jax.tree.map(put, told, carry.Told.of(state))

    none_told = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), carry.Told.of(state))
    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, cache, none_told))[1:]


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
