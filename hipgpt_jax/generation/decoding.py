"""The decode step, and the window it rolls: pure functions from state to state.

A state is a batch of rows that never affect one another. A row's slots and positions are counted
from its own first token, so its arithmetic is the same in any company.
"""

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import facts, sampling
from hipgpt_jax.model import cache as kv

if TYPE_CHECKING:
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
def draw(rows: Rows, state: State, logits_BV: jax.Array, search: sampling.Search | None = None) -> State:
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
    rows: Rows,
    state: State,
    cache: tuple[kv.Cache, ...],
    search: sampling.Search | None = None,
) -> tuple[State, kv.Cache]:
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


def _seen(state: State) -> State:
    """Adds the newest token to those seen."""
    is_newest_BV = jnp.arange(state.seen_BV.shape[1])[None] == state.token_B[:, None]
    return state._replace(seen_BV=state.seen_BV | is_newest_BV)


def step(
    model: "transformer.Transformer",
    params: Any,
    rows: Rows,
    state: State,
    before: tuple[kv.Cache, ...],
    last: kv.Cache,
) -> tuple[State, kv.Cache]:
    """``advance``, and its keys and values appended to ``last``: the part, behind those ``before``, of all rows' slots.

    The new ``last`` lies where the old one lay if XLA is told that it may: see ``programs.in_place``.
    """
    start = sum(part.slots for part in before)
    next_state, new = advance(model, params, rows, state, (*before, last))
    return next_state, kv.append(last, new, state.length_B - start)


def decode_step(
    model: "transformer.Transformer",
    params: Any,
    rows: Rows,
    state: State,
    cache: tuple[kv.Cache, ...],
    search: sampling.Search | None = None,
    live_B: jax.Array | None = None,
) -> tuple[State, tuple[kv.Cache, ...]]:
    """One token, whole: ``advance``, and its keys and values appended to the parts of the cache.

    Args:
        model: As of ``advance``, like the arguments that follow.
        params: Likewise.
        rows: Likewise.
        state: Likewise.
        cache: Likewise.
        search: Likewise.
        live_B: Whether a row takes the step; all do by default. The others are left as they are.
    """
    next_state, new = advance(model, params, rows, state, cache, search)
    next_state, new = jax.lax.optimization_barrier((next_state, new))  # written when all is read, so where it lies
    slot_B = state.length_B
    if live_B is not None:
        slot_B, next_state = jnp.where(live_B, slot_B, -1), where(live_B, next_state, state)
    starts = itertools.accumulate((part.slots for part in cache), initial=0)
    parts = (kv.append(part, new, slot_B - start) for part, start in zip(cache, starts, strict=False))
    return next_state, tuple(parts)


def steps(
    model: "transformer.Transformer",
    params: Any,
    rows: Rows,
    state: State,
    cache: tuple[kv.Cache, ...],
    left_B: jax.Array,
    *,
    search: sampling.Search,
    count: int,
) -> tuple[State, tuple[kv.Cache, ...], Told]:
    """Takes ``count`` steps, of which a row takes the first ``left``.

    Returns:
        The state and the cache after them, and what is told of each step's tokens, arrays ``[T, B, ...]``.
    """

    def step(carry: tuple[State, tuple[kv.Cache, ...]], index: jax.Array) -> Any:
        state, cache = carry[0], kv.pinned(carry[1])
        state, cache = decode_step(model, params, rows, state, cache, search, index < left_B)
        return (state, kv.pinned(cache)), Told.of(state)

    (state, cache), told = jax.lax.scan(step, (state, cache), jnp.arange(count, dtype=jnp.int32))
    return state, cache, told


def roll(
    model: "transformer.Transformer",
    params: Any,
    rows: Rows,
    state: State,
    *,
    stride: int,
    sizes: tuple[int, ...],
    stacked: bool = False,
    search: sampling.Search | None = None,
) -> tuple[State, tuple[kv.Cache, ...]]:
    """Takes the newest token into a context that is full, reads that anew and draws the token after it.

    Returns:
        The new state, and the parts of the cache that hold the context.
    """
    state = slide(state, stride=stride)
    length = state.context_BS.shape[1] - stride + 1
    context_BT = state.context_BS[:, :length]
    logits_BV, cache = read(model, params, context_BT, state.length_B, sizes=sizes, stacked=stacked)
    return draw(rows, state, logits_BV, search), cache


def slide(state: State, *, stride: int) -> State:
    """Drops the ``stride`` oldest tokens of a full context and takes in the newest.

    Learned positions have all shifted, so every cached key is stale: the context is to be read anew.
    """
    W = state.context_BS.shape[1]
    context_BS = jnp.concatenate([state.context_BS[:, stride:], state.token_B[:, None]], axis=1)
    return _seen(state)._replace(
        context_BS=jnp.pad(context_BS, ((0, 0), (0, stride - 1))),
        length_B=jnp.full_like(state.length_B, W - stride + 1),
    )


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
