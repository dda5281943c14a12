"""Prefill, the decode step and the rolling window: pure functions of a model, its parameters and a state.

A state is a batch of slots that never affect one another. A slot's positions are counted from its own first token, so
its arithmetic is the same whatever the other slots hold.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import logprobs, requests, sampling, topk
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import parameters

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer

_Tree = TypeVar("_Tree")
NO_CACHE = kv.Cache((), ())


class DecodeState(NamedTuple):
    """State of a batch of slots: parameters of each slot, its rolling context buffer, and the KV cache.

    Attributes:
        key_B2: Threefry keys of the samples, uint32 ``[B, 2]``.
        params: Sampling settings.
        eos_B: The id that ends each slot's sample, -1 for none.
        min_tokens_B: Number of tokens before which the end token is banned.
        limit_B: Maximum of ``num_sampled``; a slot that reaches it pauses.
        num_sampled_B: Tokens sampled so far, including the newest.
        token_B: The newest token, sampled or the last of the prompt, which is not in the context yet; -1 after logits
            that are not finite.
        length_B: Tokens in the context.
        context_BS: The context: ids by position, zeros at and beyond ``length``.
        counts_BV: Occurrences of each token that the penalties count. The newest sampled token is counted in the next
            step.
        cache: Keys and values of the context.
    """

    key_B2: jax.Array
    params: sampling.SamplingParams
    eos_B: jax.Array
    min_tokens_B: jax.Array
    limit_B: jax.Array
    num_sampled_B: jax.Array
    token_B: jax.Array
    length_B: jax.Array
    context_BS: jax.Array
    counts_BV: jax.Array
    cache: kv.Cache


class StepOutput(NamedTuple):
    """Output of a step, arrays ``[B, ...]``, or of several steps, ``[T, B, ...]``; undefined for paused slots.

    Attributes:
        token_B: The sampled tokens; -1 if a slot's logits are not finite.
        stats: Their statistics.
        logits_BV: The logits that they were sampled from.
    """

    token_B: jax.Array
    stats: logprobs.TokenStats
    logits_BV: jax.Array


_Carried = tuple[jax.Array, DecodeState, StepOutput]  # step, state, outputs


def blank_state(B: int, W: int, V: int) -> DecodeState:
    """Returns unused slots as NumPy arrays, without a cache."""
    zero_B = sampling.host_array([0] * B, np.int32)
    return DecodeState(
        key_B2=sampling.host_array(np.zeros((B, 2), np.uint32), np.uint32),
        params=sampling.sampling_params([config.SamplingConfig()] * B, V),
        eos_B=zero_B,
        min_tokens_B=zero_B,
        limit_B=zero_B,
        num_sampled_B=zero_B,
        token_B=zero_B,
        length_B=zero_B,
        context_BS=sampling.host_array(np.zeros((B, W), np.int32), np.int32),
        counts_BV=sampling.host_array(np.zeros((B, V), np.int32), np.int32),
        cache=NO_CACHE,
    )


def initial_state(request: requests.Request, W: int, V: int) -> DecodeState:
    """Returns the initial state of a sample's slot, without its cache; see ``requests.Request.context``.

    Args:
        request: The sample.
        W: Window.
        V: Size of the vocabulary.
    """
    *context, token = request.prompt_ids[-W:]
    key_2 = sampling.sample_key(request.generation.seed, request.prompt_ids, request.sample)
    counted = request.prompt_ids if request.sampling.penalty_scope == "all" else ()
    return blank_state(1, W, V)._replace(
        key_B2=sampling.host_array(key_2[None], np.uint32),
        params=sampling.sampling_params([request.sampling], V),
        eos_B=sampling.host_array([request.generation.eos_id], np.int32),
        min_tokens_B=sampling.host_array([min(request.generation.min_tokens, 2**31 - 1)], np.int32),
        token_B=sampling.host_array([token], np.int32),
        length_B=sampling.host_array([len(context)], np.int32),
        context_BS=sampling.host_array([[*context, *[0] * (W - len(context))]], np.int32),
        counts_BV=sampling.host_array(np.bincount(np.array(counted, int), minlength=V)[None], np.int32),
    )


def states_at(
    request: requests.Request, ids: Sequence[int], starts: Sequence[int], first: int, *, W: int, V: int
) -> DecodeState:
    """Returns the states, without a cache, in which ``sample_next`` samples consecutive tokens of a text.

    Args:
        request: The prompt, its settings, its seed and the index of its sample.
        ids: The ids that follow the prompt.
        starts: Index in the text of the oldest token in the window, for each token to be sampled.
        first: Index in ``ids`` of the first of those tokens.
        W: Window.
        V: Size of the vocabulary.
    """
    text, length, B = (*request.prompt_ids, *ids), len(request.prompt_ids) + first, len(starts)
    state = jax.tree.map(lambda x: np.repeat(x, B, axis=0), initial_state(request, W, V))
    counts_BV, context_BS = np.array(state.counts_BV), np.zeros((B, W), np.int32)
    for row, start in enumerate(starts):
        context_BS[row, : length + row - start] = text[start : length + row]
        counts_BV[row] += np.bincount(np.array(ids[: first + row], int), minlength=V).astype(np.int32)
    return state._replace(
        num_sampled_B=sampling.host_array(range(first, first + B), np.int32),
        token_B=sampling.host_array([-1] * B, np.int32),  # all tokens are counted already
        length_B=sampling.host_array([length + row - start for row, start in enumerate(starts)], np.int32),
        context_BS=sampling.host_array(context_BS, np.int32),
        counts_BV=sampling.host_array(counts_BV, np.int32),
    )


def prefill(
    model: "transformer.Transformer",
    params: parameters.Params,
    context_BT: jax.Array,
    length_B: jax.Array,
    layout: kv.Layout,
) -> tuple[jax.Array, tuple[kv.Block, ...]]:
    """Computes the KV cache of contexts, and the logits of the token after each.

    Args:
        model: The model.
        params: Its parameters.
        context_BT: Ids, padded behind each row's length to a common ``T``. Changing ``T`` recompiles.
        length_B: Tokens of each context, at least 1.
        layout: Division of the cache into blocks.

    Returns:
        Logits ``[B, V]``, and the blocks that hold any of the first ``T`` positions.
    """
    logits_BV, block = model.bind({"params": params}).prefill(context_BT, length_B)
    return logits_BV, layout.split(block)


def prefill_cache(
    model: "transformer.Transformer", params: parameters.Params, context_BT: jax.Array, layout: kv.Layout
) -> tuple[kv.Block, ...]:
    """Returns the KV cache of contexts alone; XLA drops the last block's feed-forward layer and the head."""
    return prefill(model, params, context_BT, jnp.ones(len(context_BT), jnp.int32), layout)[1]


def decode_step(
    model: "transformer.Transformer", params: parameters.Params, state: DecodeState, plan: topk.Plan | None = None
) -> tuple[DecodeState, StepOutput]:
    """Appends the newest token of every active slot to its context, which must not be full, and samples the next.

    Args:
        model: The model.
        params: Its parameters.
        state: Slots; those that are not active are left unchanged. Another number of cache blocks recompiles.
        plan: Numbers of candidates; a CPU's by default. Changing it recompiles.
    """
    logits_BV, token = model.bind({"params": params}).decode(state.token_B, state.cache.blocks, state.length_B)
    append = jax.vmap(lambda context_S, token, position: context_S.at[position].set(token))
    context_BS = append(state.context_BS, state.token_B, state.length_B)
    new = state._replace(context_BS=context_BS, length_B=state.length_B + 1, cache=NO_CACHE)
    new, output = sample_next(new, logits_BV, plan)
    # All reads of the cache come before its update, so that XLA can write the new token in place.
    (new, output), token = jax.lax.optimization_barrier(((new, output), token))
    active_B = is_active(state)
    new = where(active_B, new, state._replace(cache=NO_CACHE))
    cache = kv.append(state.cache, token, jnp.where(active_B, state.length_B, -1))
    return new._replace(cache=cache), output


def is_active(state: DecodeState) -> jax.Array:
    """Returns the slots that take a step: below their limit, and not ended by their end token or by NaN."""
    has_ended_B = (state.num_sampled_B > 0) & ((state.token_B == state.eos_B) | (state.token_B < 0))
    return (state.num_sampled_B < state.limit_B) & ~has_ended_B


def sample_next(
    state: DecodeState, logits_BV: jax.Array, plan: topk.Plan | None = None
) -> tuple[DecodeState, StepOutput]:
    """Counts the newest token of each slot, and samples the next from its logits."""
    id_1V = jnp.arange(logits_BV.shape[1])[None]
    # The last token of the prompt is counted with the prompt.
    is_newest_BV = (id_1V == state.token_B[:, None]) & (state.num_sampled_B > 0)[:, None]
    counts_BV = state.counts_BV + is_newest_BV.astype(jnp.int32)
    allowed_BV = restrict(state, logits_BV, plan)
    choice = sampling.sample(allowed_BV, counts_BV, state.params, state.key_B2, state.num_sampled_B, plan)
    stats = logprobs.token_stats(logits_BV, choice)
    token_B = jnp.where(jnp.isfinite(stats.logprob_B), choice.token_B, -1)
    state = state._replace(num_sampled_B=state.num_sampled_B + 1, token_B=token_B, counts_BV=counts_BV)
    return state, StepOutput(token_B, stats, logits_BV)


def restrict(state: DecodeState, logits_BV: jax.Array, plan: topk.Plan | None) -> jax.Array:
    """Applies the caller's rule, adds the bias of each token, and bans an early end token and repeated n-grams."""
    if plan is not None and plan.rule is not None:
        logits_BV = jax.vmap(plan.rule)(logits_BV, state.context_BS, state.length_B).astype(jnp.float32)
    is_end_BV = jnp.arange(logits_BV.shape[1])[None] == state.eos_B[:, None]
    is_early_B = state.num_sampled_B < state.min_tokens_B
    logits_BV = jnp.where(is_end_BV & is_early_B[:, None], -jnp.inf, logits_BV + state.params.bias_BV)
    return sampling.ban_repeats(logits_BV, state.context_BS, state.length_B, state.params, plan)


def decode_steps(
    model: "transformer.Transformer",
    params: parameters.Params,
    state: DecodeState,
    plan: topk.Plan | None,
    num_steps: int,
    *,
    stops_early: bool,
) -> tuple[DecodeState, StepOutput]:
    """Takes at most ``num_steps`` steps, until no slot is active.

    Args:
        model: The model.
        params: Its parameters.
        state: Slots; none may fill its context before its last step.
        plan: Numbers of candidates.
        num_steps: Steps of the output. Changing it recompiles.
        stops_early: Whether the loop ends as soon as no slot is active, or always takes all steps.

    Returns:
        The state, and the outputs of all steps, arrays ``[T, B, ...]``.
    """
    frozen = state.cache.frozen

    def goes_on(carried: _Carried) -> jax.Array:
        step, state, _ = carried
        return (step < num_steps) & jnp.any(is_active(state)) if stops_early else step < num_steps

    def body(carried: _Carried) -> _Carried:
        step, state, outputs = carried
        writable = kv.with_fixed_layout(state.cache.writable)
        state, output = decode_step(model, params, state._replace(cache=kv.Cache(frozen, writable)), plan)
        state = state._replace(cache=kv.Cache((), kv.with_fixed_layout(state.cache.writable)))
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=0)
        return step + 1, state, jax.tree.map(update, outputs, output)

    # Frozen blocks are not carried through the loop, since XLA may copy what is carried.
    start = state._replace(cache=kv.Cache((), state.cache.writable))
    outputs = _blank_output(num_steps, *state.counts_BV.shape)
    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), start, outputs))[1:]


def _blank_output(T: int, B: int, V: int) -> StepOutput:
    """Returns the outputs of ``T`` steps, all zeros."""
    zero_TB, none_TB = jnp.zeros((T, B), jnp.float32), jnp.zeros((T, B), jnp.int32)
    stats = logprobs.TokenStats(zero_TB, none_TB, zero_TB, none_TB, zero_TB, zero_TB, zero_TB)
    return StepOutput(none_TB, stats, jnp.zeros((T, B, V), jnp.float32))


def slide_window(state: DecodeState, stride: int) -> DecodeState:
    """Drops the ``stride`` oldest tokens of full contexts and appends the newest token.

    All learned positions shift, so every cached key is stale and the context has to be prefilled again.
    """
    W = state.context_BS.shape[1]
    context_BS = jnp.concatenate([state.context_BS[:, stride:], state.token_B[:, None]], axis=1)
    return state._replace(
        context_BS=jnp.pad(context_BS, ((0, 0), (0, stride - 1))),
        length_B=jnp.full_like(state.length_B, W - stride + 1),
    )


def slide_step(
    model: "transformer.Transformer",
    params: parameters.Params,
    state: DecodeState,
    stride: int,
    layout: kv.Layout,
    plan: topk.Plan | None = None,
) -> tuple[DecodeState, StepOutput]:
    """Slides the windows of all slots, prefills them again and samples the next token.

    The result is meaningless for slots whose window is not full.

    Args:
        model: The model.
        params: Its parameters.
        state: Slots; their cache is not read.
        stride: Tokens dropped from each context.
        layout: Division of the cache into blocks.
        plan: Numbers of candidates; a CPU's by default.

    Returns:
        The state, whose cache has the blocks that hold the context, and the output.
    """
    state = slide_window(state, stride)
    context_BT = state.context_BS[:, : state.context_BS.shape[1] - stride + 1]
    logits_BV, blocks = prefill(model, params, context_BT, state.length_B, layout)
    return sample_next(state._replace(cache=kv.Cache((), blocks)), logits_BV, plan)


def take_slot(tree: _Tree, slot: jax.Array) -> _Tree:
    """Returns one slot of every array, as arrays ``[1, ...]``."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), tree)


def put_slot(tree: _Tree, slot: jax.Array, one: _Tree) -> _Tree:
    """Returns ``tree`` with a slot replaced by ``one``, arrays ``[1, ...]``."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0), tree, one)


def where(slots_B: jax.Array, new: DecodeState, old: DecodeState) -> DecodeState:
    """Returns the slots of ``new`` where ``slots_B`` is true, and of ``old`` elsewhere."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        # Fields that a step leaves alone are the same object in both: JAX then keeps them out of the loop's body.
        return a if a is b else jnp.where(jnp.expand_dims(slots_B, tuple(range(1, a.ndim))), a, b)

    return jax.tree.map(select, new, old)
