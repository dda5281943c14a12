"""Tests of the pure state transitions: a jitted decode step, the sliding window, and prefill."""

import functools
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax.generation import decoding, requests
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import transformer

MODEL = fakes.MODEL
MODULE = transformer.Transformer(MODEL, full_precision=True)
WINDOW = 11
LAYOUT = kv.Layout((4, 4, 3))


def initial(requested: list[requests.Request]) -> decoding.DecodeState:
    """Returns a state of one slot per request, before the prompts are prefilled."""
    slots = [decoding.initial_state(one, WINDOW, MODEL.vocab_size) for one in requested]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *slots)


Step = tuple[decoding.DecodeState, decoding.StepOutput]


def step_by_step(requested: list[requests.Request], num_steps: int) -> list[Step]:
    """Decodes by a plain Python loop over the jitted single step; returns the state before each step and its output."""
    params, state = fakes.random_params(MODEL), initial(requested)
    blocks = jax.jit(functools.partial(decoding.prefill_cache, MODULE, layout=LAYOUT))(params, state.context_BS[:, :8])
    rest = kv.empty(LAYOUT.shapes(MODEL, len(requested), "float32", first=len(blocks)))
    limit_B = jnp.asarray([one.generation.num_tokens for one in requested])
    state = state._replace(cache=kv.Cache((), (*blocks, *rest)), limit_B=limit_B)
    step, steps = jax.jit(functools.partial(decoding.decode_step, MODULE)), []
    for _ in range(num_steps):
        before, (state, output) = state, step(params, state)
        steps.append((before, output))
    return steps


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 0, "top_p": 1.0}])
def test_a_python_loop_over_the_jitted_step_equals_the_engine(settings: dict[str, Any]) -> None:
    """Up to the full window, where the engine slides it: tokens, statistics, contexts and counts."""
    requested = [fakes.request(fakes.prompt(n), num_tokens=WINDOW - n + 1, seed=n, **settings) for n in (1, 4, 8)]
    steps = step_by_step(requested, WINDOW)
    outputs = list(fakes.make_scheduler(batch_size=3).run(requested, measure=True))
    for row, request in enumerate(requested):
        own = [output for output in outputs if output.index == row]
        assert len(own) == request.generation.num_tokens
        ids = list(request.prompt_ids)
        for (state, output), expected in zip(steps, own, strict=False):
            n = len(ids) - 1
            assert state.length_B[row] == n
            np.testing.assert_array_equal(state.context_BS[row], ids[:-1] + [0] * (WINDOW - n))
            # The newest sampled token is counted in the next step.
            counted = (*request.prompt_ids, *ids[len(request.prompt_ids) : -1])
            np.testing.assert_array_equal(state.counts_BV[row], np.bincount(counted, minlength=MODEL.vocab_size))
            assert output.token_B[row] == expected.token
            assert expected.stats is not None
            for name, column_B in output.stats._asdict().items():
                assert column_B[row] == getattr(expected.stats, name.removesuffix("_B")), name
            ids.append(int(output.token_B[row]))
        for state, _ in steps[len(own) :]:  # a slot that has reached its limit is left unchanged
            assert state.num_sampled_B[row] == request.generation.num_tokens


def test_a_slot_ends_with_its_end_token_and_is_left_unchanged() -> None:
    """The tokens are those without an end token, and none follows it; the other slot continues."""
    requested = [fakes.request(fakes.prompt(n), num_tokens=7, seed=5) for n in (2, 3)]
    tokens_TB = np.stack([output.token_B for _, output in step_by_step(requested, 6)])
    ending = [fakes.request(fakes.prompt(2), num_tokens=7, seed=5, eos_id=int(tokens_TB[2, 0])), requested[1]]
    assert tokens_TB[2, 0] not in tokens_TB[:2, 0]
    steps = step_by_step(ending, 6)
    assert [int(state.num_sampled_B[0]) for state, _ in steps] == [0, 1, 2, 3, 3, 3]
    for state, _ in steps[4:]:
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), state, steps[3][0])
    assert [output.token_B[1] for _, output in steps] == tokens_TB[:, 1].tolist()


@pytest.mark.parametrize("stride", [1, 2, 3, WINDOW - 1, WINDOW])
def test_slide_follows_the_documented_window_rule(stride: int) -> None:
    """With ``n`` tokens the window starts at 0 up to ``W``, then at ``N ceil((n - W) / N)``."""
    slide = jax.jit(decoding.slide_window, static_argnames="stride")
    text_BT = np.random.RandomState(0).randint(1, MODEL.vocab_size, (2, 60)).astype(np.int32)
    state = initial([fakes.request(tuple(row[:WINDOW].tolist())) for row in text_BT])
    state = state._replace(context_BS=jnp.asarray(text_BT[:, :WINDOW]), length_B=jnp.full(2, WINDOW))
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


def test_a_full_slot_gives_no_nan() -> None:
    """A full slot is still computed with its batch. A NaN there would trip ``jax_debug_nans``."""
    params = fakes.random_params(MODEL)
    cache = kv.empty(kv.Layout((MODEL.max_seq_len,)).shapes(MODEL, 2, "float32"))
    decode = jax.jit(lambda *arguments: MODULE.bind({"params": params}).decode(*arguments))
    for x in jax.tree.leaves(decode(jnp.asarray([5, 7]), cache, jnp.asarray([MODEL.max_seq_len, 3]))):
        assert np.isfinite(x).all()


def test_where_selects_whole_slots() -> None:
    new = initial([fakes.request(fakes.prompt(n)) for n in (2, 3, 4)])
    old = initial([fakes.request(fakes.prompt(n)) for n in (5, 6, 7)])
    got = decoding.where(jnp.asarray([False, True, False]), new, old)
    for now, a, b in zip(*map(jax.tree.leaves, (got, new, old)), strict=True):
        np.testing.assert_array_equal(now, np.stack([b[0], a[1], b[2]]))


def test_prefill_is_independent_of_the_padded_length() -> None:
    """Every bucket gives the same token and, up to rounding, the same statistics and cache contents."""
    params = fakes.random_params(MODEL)
    requested = [fakes.request((*fakes.prompt(n), 7), seed=n, sample=n) for n in (1, 3, 5)]
    state = initial(requested)
    prefill = jax.jit(functools.partial(decoding.prefill, MODULE, layout=LAYOUT))
    tight_BV, tight_blocks = prefill(params, state.context_BS[:, :5], state.length_B)
    loose_BV, loose_blocks = prefill(params, state.context_BS, state.length_B)
    np.testing.assert_allclose(tight_BV, loose_BV, rtol=1e-5, atol=1e-5)
    (tight, one), (loose, other) = (decoding.sample_next(state, logits_BV) for logits_BV in (tight_BV, loose_BV))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.stats, other.stats)
    jax.tree.map(np.testing.assert_array_equal, tight, loose)
    assert [len(blocks) for blocks in (tight_blocks, loose_blocks)] == [2, 3]
    for block, first in enumerate((0, 4)):
        real_BS = first + np.arange(LAYOUT.block_sizes[block])[None] < np.asarray([1, 3, 5])[:, None]
        for a_BNSH, b_BNSH in zip(
            jax.tree.leaves(tight_blocks[block]), jax.tree.leaves(loose_blocks[block]), strict=True
        ):
            a_BNSH, b_BNSH = (np.where(real_BS[:, None, :, None], x, 0) for x in (a_BNSH, b_BNSH))
            np.testing.assert_allclose(a_BNSH, b_BNSH, rtol=1e-5, atol=1e-5)


# --- settings that depend on the tokens sampled so far


def generated(request: requests.Request, **shape: Any) -> list[int]:
    return fakes.tokens_of(fakes.make_scheduler(**shape), [request])[0]


def test_an_early_end_token_is_banned() -> None:
    """A sample with ``min_tokens`` has the tokens of one without an end token, up to the first it would have ended."""
    plain = generated(fakes.request(num_tokens=30, temperature=2.0))
    eos_id = plain[2]
    assert generated(fakes.request(num_tokens=30, temperature=2.0, eos_id=eos_id)) == plain[:3]
    for min_tokens in (3, 7, 30):
        late = generated(fakes.request(num_tokens=30, temperature=2.0, eos_id=eos_id, min_tokens=min_tokens))
        assert eos_id not in late[:min_tokens]
        assert len(late) >= min_tokens
        assert late[:2] == plain[:2]
    # With ``min_tokens`` of 2 the third token may be the end.
    assert generated(fakes.request(num_tokens=30, temperature=2.0, eos_id=eos_id, min_tokens=2)) == plain[:3]


@pytest.mark.parametrize("scope", ["all", "output"])
def test_penalties_count_the_tokens_of_their_scope(scope: str) -> None:
    """A bias that outweighs all logits, taken off a token once it has occurred, shows which occurrences count."""
    settings: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "penalty_scope": scope}
    bias = {5: 3e5, 6: 2e5, 7: 1e5}
    prompt = (5, 5, 6)
    once = generated(fakes.request(prompt, num_tokens=4, presence_penalty=1e6, logit_bias=bias, **settings))
    assert once[: 3 if scope == "output" else 1] == ([5, 6, 7] if scope == "output" else [7])
    # Each occurrence takes off 1e5: 5 has 3e5 - 2e5 after the prompt, 6 has 2e5 - 1e5.
    each = generated(fakes.request(prompt, num_tokens=4, frequency_penalty=0.99e5, logit_bias=bias, **settings))
    assert each == ([5, 5, 6, 5] if scope == "output" else [5, 6, 7, 5])


def test_penalties_count_tokens_outside_the_window() -> None:
    settings: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 1e6}
    prompt = (9, *range(20, 20 + WINDOW + 5))
    tokens = generated(fakes.request(prompt, num_tokens=2, logit_bias={9: 3e5, 10: 2e5, 11: 1e5}, **settings))
    assert tokens == [10, 11]


@pytest.mark.parametrize("shape", [{}, pytest.param({"batch_size": 3, "window_stride": 4}, marks=pytest.mark.slow)])
def test_no_n_gram_of_the_window_is_repeated(shape: dict[str, Any]) -> None:
    """While the window slides, an n-gram that has left it is allowed again."""
    stride = shape.get("window_stride", 1)
    prompt, settings = (1, 2, 3), {"temperature": 0.0, "repetition_penalty": 1.0, "allow": (1, 2, 3, 4)}
    repeating = generated(fakes.request(prompt, num_tokens=40, **settings), **shape)
    repeated = banned = 0
    for ngram in (1, 2, 3):
        text = [*prompt, *generated(fakes.request(prompt, num_tokens=40, no_repeat_ngram=ngram, **settings), **shape)]
        assert text != [*prompt, *repeating]
        for n in range(len(prompt), len(text)):
            window = text[max(0, -((WINDOW - n) // stride) * stride) : n]
            grams = [window[i : i + ngram] for i in range(len(window) - ngram + 1)]
            allowed = [one for one in (1, 2, 3, 4) if [*window[len(window) - ngram + 1 :], one] not in grams]
            assert text[n] in (allowed or (1, 2, 3, 4))
            banned += len(allowed) < 4
            repeated += [*text[n - ngram + 1 : n + 1]] in [text[i : i + ngram] for i in range(n - ngram + 1)]
    assert banned > 60
    assert repeated > 10, "n-grams that had left the window"


def test_states_at_any_token_are_those_of_decoding() -> None:
    """Keys, settings, contexts, counts and indices, from which a text's tokens are drawn again."""
    own = [
        fakes.request(fakes.prompt(4), num_tokens=7, seed=3, sample=2, frequency_penalty=0.5),
        fakes.request(fakes.prompt(4), num_tokens=7, seed=3, sample=2, penalty_scope="output", eos_id=7, min_tokens=5),
    ]
    steps, sample_next = step_by_step(own, 7), jax.jit(decoding.sample_next)
    for row, request in enumerate(own):
        ids = [int(output.token_B[row]) for _, output in steps]
        states = decoding.states_at(request, ids, [0] * 7, 0, W=WINDOW, V=MODEL.vocab_size)
        for index, (_, output) in enumerate(steps):
            one = jax.tree.map(lambda x, index=index: x[index : index + 1], states)
            again, drawn = sample_next(one, output.logits_BV[row : row + 1])
            assert drawn.token_B[0] == ids[index]
            for name, column_B in drawn.stats._asdict().items():
                np.testing.assert_allclose(column_B[0], getattr(output.stats, name)[row], rtol=1e-5, err_msg=name)
            after = steps[index + 1][0] if index < 6 else None
            if after is not None:
                for name in ("counts_BV", "num_sampled_B", "token_B", "length_B"):
                    now, then = (np.asarray(getattr(state, name)) for state in (again, after))
                    np.testing.assert_array_equal(now[0], then[row], err_msg=name)
