"""The pure functions from state to state: what a step keeps, how a window slides, and that a scan is a loop."""

from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax.generation import carry, decoding, sampling
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import transformer

MODEL = fakes.MODEL
MODULE = transformer.Transformer(MODEL)
WINDOW = 11
SIZES = (4, 4, 3)


def start(requests: list[Any]) -> tuple[carry.Rows, carry.State]:
    """The state of requests before their prompts are read, built apart from the sampler's."""
    B, V = len(requests), MODEL.vocab_size
    context_BS, seen_BV = np.zeros((B, WINDOW), np.int32), np.zeros((B, V), bool)
    for row, request in enumerate(requests):
        context_BS[row, : len(request.prompt_ids)] = request.prompt_ids
        seen_BV[row, list(request.prompt_ids)] = True
    keys = [sampling.sample_key(sampling.key_words(r.generation.seed, r.prompt_ids, r.sample)) for r in requests]
    rows = carry.Rows(
        key_B2=jnp.stack([jax.random.key_data(key) for key in keys]),
        settings=sampling.settings([one.sampling for one in requests]),
    )
    _, blank = carry.blank(B, WINDOW, V)
    return rows, blank._replace(
        length_B=jnp.asarray([len(one.prompt_ids) for one in requests]),
        context_BS=jnp.asarray(context_BS),
        seen_BV=jnp.asarray(seen_BV),
    )


@jax.jit
def scanned(params: dict[str, Any], rows: carry.Rows, state: carry.State) -> carry.State:
    """The states after each of 11 tokens, from prompts of at most 8."""
    logits_BV, cache = decoding.read(MODULE, params, state.context_BS[:, :8], state.length_B, sizes=SIZES)
    state = decoding.draw(rows, state, logits_BV)
    cache = (*cache, *kv.empty(MODEL, len(state.length_B), SIZES[len(cache) :], "float32"))

    def step(carry: Any, _: None) -> tuple[Any, carry.State]:
        return decoding.decode_step(MODULE, params, rows, *carry), carry[0]

    return jax.lax.scan(step, (state, cache), length=WINDOW)[1]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 0, "top_p": 1.0}])
def test_scan_over_the_step_is_the_sampler(settings: dict[str, Any]) -> None:
    """Up to the full window, where the sampler's loop rolls and a row of the scan ends."""
    requests = [fakes.request(fakes.prompt(n), num_tokens=WINDOW - n + 1, seed=n, **settings) for n in (1, 4, 8)]
    rows, state = start(requests)
    states = scanned(fakes.random_params(MODEL), rows, state)
    token_TB = np.asarray(states.token_B)
    for row, tokens in enumerate(fakes.tokens_of(fakes.make_sampler(width=3), requests)):
        assert token_TB[: len(tokens), row].tolist() == tokens
        n = len(requests[row].prompt_ids)
        np.testing.assert_array_equal(states.index_B[:, row], np.arange(1, WINDOW + 1))
        np.testing.assert_array_equal(states.length_B[:, row], np.arange(n, n + WINDOW))
        for t in range(len(tokens)):
            context = [*requests[row].prompt_ids, *tokens[:t]]
            np.testing.assert_array_equal(states.context_BS[t, row], context + [0] * (WINDOW - len(context)))
            np.testing.assert_array_equal(np.flatnonzero(states.seen_BV[t, row]), sorted(set(context)))


@pytest.mark.parametrize("stride", [1, 2, 3, WINDOW - 1, WINDOW])
def test_slide_keeps_the_window_that_the_design_states(stride: int) -> None:
    """With ``n`` tokens the window starts at 0 up to ``W``, then at ``N ceil((n - W) / N)``."""
    slide = jax.jit(decoding.slide, static_argnames="stride")
    text_BT = np.random.RandomState(0).randint(1, MODEL.vocab_size, (2, 60)).astype(np.int32)
    _, state = start([fakes.request(tuple(row[:WINDOW].tolist())) for row in text_BT])
    length = WINDOW
    for n in range(WINDOW + 1, 60):
        state = state._replace(token_B=jnp.asarray(text_BT[:, n - 1]))
        if length == WINDOW:
            state = slide(state, stride=stride)
            length = WINDOW - stride + 1
        else:
            context_BS = np.array(state.context_BS)
            context_BS[:, length] = state.token_B
            length += 1
            state = state._replace(context_BS=context_BS, length_B=np.full(2, length, np.int32))
        first = -((WINDOW - n) // stride) * stride
        assert state.length_B.tolist() == [n - first] * 2
        np.testing.assert_array_equal(state.context_BS[:, :length], text_BT[:, first:n])
        np.testing.assert_array_equal(state.context_BS[:, length:], 0)


def test_a_full_row_has_no_position_left_and_yet_no_nan() -> None:
    """It is computed beside one that is not full, for nothing: a user's own check for NaN finds none."""
    params, cache = fakes.random_params(MODEL), kv.empty(MODEL, 2, (MODEL.max_seq_len,), "float32")
    decode = jax.jit(lambda *arguments: MODULE.bind({"params": params}).decode(*arguments))
    for x in jax.tree.leaves(decode(jnp.asarray([5, 7]), cache, jnp.asarray([MODEL.max_seq_len, 3]))):
        assert np.isfinite(x).all()


def test_where_takes_whole_rows() -> None:
    _, chosen = start([fakes.request(fakes.prompt(n)) for n in (2, 3, 4)])
    _, other = start([fakes.request(fakes.prompt(n)) for n in (5, 6, 7)])
    got = carry.where(jnp.asarray([False, True, False]), chosen, other)
    for now, a, b in zip(got, chosen, other, strict=True):
        np.testing.assert_array_equal(now, np.stack([b[0], a[1], b[2]]))


def test_prompt_may_be_read_in_any_length_that_holds_it() -> None:
    """Every bucket gives the same token, the same state and, to rounding, the same cache, in no more parts."""
    params = fakes.random_params(MODEL)
    requests = [fakes.request(fakes.prompt(n), seed=n, sample=n) for n in (1, 3, 5)]
    rows, state = start(requests)
    read = jax.jit(lambda tokens, length: decoding.read(MODULE, params, tokens, length, sizes=SIZES))
    tight_BV, tight_cache = read(state.context_BS[:, :5], state.length_B)
    loose_BV, loose_cache = read(state.context_BS, state.length_B)
    np.testing.assert_allclose(tight_BV, loose_BV, rtol=1e-5, atol=1e-5)
    tight, loose = (decoding.draw(rows, state, logits_BV) for logits_BV in (tight_BV, loose_BV))
    np.testing.assert_allclose(tight.numbers_B4, loose.numbers_B4, rtol=1e-4, atol=1e-5)
    tight, loose = (one._replace(logits_BV=0, numbers_B4=0) for one in (tight, loose))
    jax.tree.map(np.testing.assert_array_equal, tight, loose)
    assert [len(cache) for cache in (tight_cache, loose_cache)] == [2, 3]
    for part, first in enumerate((0, 4)):
        real_BS = first + np.arange(SIZES[part])[None] < np.asarray([1, 3, 5])[:, None]
        for a_BNSH, b_BNSH in zip(jax.tree.leaves(tight_cache[part]), jax.tree.leaves(loose_cache[part]), strict=True):
            a_BNSH, b_BNSH = (np.where(real_BS[:, None, :, None], x, 0) for x in (a_BNSH, b_BNSH))
            np.testing.assert_allclose(a_BNSH, b_BNSH, rtol=1e-5, atol=1e-5)
