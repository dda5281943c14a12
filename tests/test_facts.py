"""What a record says of a token: against a slow reference, and that saying it changes nothing."""

import dataclasses
from typing import Any

import fakes
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import events, sampling

SIZES = (2, 7, 16, 17, 18, 128, 129, 130, 300)
choose = jax.jit(sampling.choose)


def drawn(logits_V: np.ndarray, seen_V: np.ndarray, settings: config.SamplingConfig, uniform: float) -> int:
    row = sampling.settings([settings])
    return int(choose(logits_V[None], seen_V[None], row, np.asarray([uniform], np.float32)).token_B[0])


def measured(
    logits_V: np.ndarray, seen_V: np.ndarray, settings: config.SamplingConfig, uniform: float
) -> tuple[float, float]:
    row = sampling.settings([settings])
    found = choose(logits_V[None], seen_V[None], row, np.asarray([uniform], np.float32))
    return float(found.margin_B[0]), float(found.gap_B[0])


@pytest.mark.parametrize("V", SIZES)
@hypothesis.given(
    st.integers(0, 2**31),
    st.floats(0, 1 - 2**-24, width=32),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 128, 140]),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([1.0, 1.3]),
)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_margin_is_how_far_the_number_may_move(
    V: int, seed: int, uniform: float, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    """Within it no number gives another token; beyond it one does, unless it is 1 or a nucleus is what bounds it."""
    rng = np.random.RandomState(seed)
    logits_V, seen_V = rng.normal(0, 2, V).astype(np.float32), rng.rand(V) < 0.3
    settings = config.SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    token = drawn(logits_V, seen_V, settings, uniform)
    margin, _ = measured(logits_V, seen_V, settings, uniform)
    assert 0 <= margin <= 1
    for inside in (-0.98, -0.5, 0.5, 0.98):
        moved = uniform + inside * margin
        if 0 <= moved <= 1 - 2**-24 and margin > 1e-5:
            assert drawn(logits_V, seen_V, settings, moved) == token
    if top_p == 1 and margin < 1 and uniform + margin < 1 - 1e-5:
        beyond = [uniform + sign * (1.02 * margin + 1e-5) for sign in (-1, 1)]
        assert any(drawn(logits_V, seen_V, settings, min(max(u, 0), 1 - 2**-24)) != token for u in beyond)


def test_margin_knows_of_the_end_of_the_nucleus() -> None:
    """0.5 and 0.3 of the probability: top_p 0.7999 keeps two, 0.8001 three, which moves the boundary between them."""
    logits_V, seen_V = np.log(np.asarray([0.5, 0.3, 0.2], np.float32)), np.zeros(3, bool)
    near, far = (config.SamplingConfig(top_p=p, top_k=0, repetition_penalty=1.0) for p in (0.7999, 0.7))
    uniform = 0.56  # of two, the first ends at 0.625; of three, at 0.5
    assert drawn(logits_V, seen_V, near, uniform) == 0
    assert measured(logits_V, seen_V, near, uniform)[0] == pytest.approx(1e-4, rel=0.02)
    assert measured(logits_V, seen_V, far, uniform)[0] == pytest.approx(0.625 - 0.56, rel=1e-4)


@pytest.mark.parametrize("V", SIZES)
def test_gap_is_the_distance_to_the_nearer_neighbour(V: int) -> None:
    rng = np.random.RandomState(V)
    logits_V, seen_V = rng.normal(0, 2, V).astype(np.float32), rng.rand(V) < 0.5
    penalized_V = np.where(seen_V, np.where(logits_V > 0, logits_V / 1.3, logits_V * 1.3), logits_V)
    for uniform in np.linspace(0, 0.999, 7):
        for top_k in (0, 2, 128):
            settings = config.SamplingConfig(top_k=top_k, top_p=1.0, repetition_penalty=1.3)
            token = drawn(logits_V, seen_V, settings, uniform)
            others = np.delete(penalized_V, token)
            gap = measured(logits_V, seen_V, settings, uniform)[1]
            assert gap == pytest.approx(np.abs(others - penalized_V[token]).min(), rel=1e-4, abs=1e-6)


def test_at_temperature_0_the_margin_is_the_gap_of_the_best_two() -> None:
    logits_V, seen_V = np.asarray([1.0, 4.0, 3.5, -2.0], np.float32), np.asarray([False, True, False, False])
    settings = config.SamplingConfig(temperature=0.0, repetition_penalty=1.1)
    assert measured(logits_V, seen_V, settings, 0.9) == (pytest.approx(4 / 1.1 - 3.5, rel=1e-5),) * 2


SHAPES: list[dict[str, Any]] = [{}, {"width": 3}, {"width": 3, "window": 11, "window_stride": 4}]


@pytest.mark.parametrize("shape", SHAPES)
def test_measuring_changes_no_token(shape: dict[str, Any]) -> None:
    source = fakes.make_sampler(**shape)
    settings: list[tuple[int, dict[str, Any]]] = [
        (2, {}),
        (13, {"temperature": 0.0}),
        (9, {"top_k": 0, "top_p": 1.0}),
        (4, {"eos_id": 126}),
    ]
    wanted = [fakes.request(fakes.prompt(n), num_tokens=25, seed=n, **others) for n, others in settings]
    plain = list(source.run(wanted))
    facts = list(source.run(wanted, measure=True))
    assert [(e.index, e.token, e.finish_reason) for e in facts] == [(e.index, e.token, e.finish_reason) for e in plain]
    assert all((event.facts is None) == (event.token is None) for event in facts)
    with fakes.compilations() as compiled:
        list(source.run([fakes.request(fakes.prompt(3), num_tokens=20, top_k=7, temperature=0.3)], measure=True))
    assert compiled == []


@pytest.mark.parametrize("shape", SHAPES)
def test_facts_are_those_of_a_full_forward_pass(shape: dict[str, Any]) -> None:
    """Log-probability, rank and alternatives, against float64 over the model's own logits of the window."""
    from hipgpt_jax.model import transformer

    source = fakes.make_sampler(**shape)
    params = fakes.random_params(fakes.MODEL)
    forward = jax.jit(
        lambda tokens: transformer.Transformer(fakes.MODEL).apply({"params": params}, tokens, dropout=0.0)
    )
    one = fakes.request(fakes.prompt(5), num_tokens=18, repetition_penalty=1.5)
    one = dataclasses.replace(one, generation=dataclasses.replace(one.generation, top_logprobs=1))
    context = list(one.prompt_ids)
    stride = shape.get("window_stride", 1)
    for event in source.run([one], measure=True):
        assert event.token is not None
        assert event.facts is not None
        first = max(0, -((11 - len(context)) // stride) * stride)
        window = context[first:]
        logits = np.asarray(forward(np.asarray([window + [0] * (11 - len(window))], np.int32)))[0, len(window) - 1]
        logprobs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
        order = np.argsort(-logprobs, kind="stable")
        logprob, rank = event.facts.numbers_4[0], int(event.facts.numbers_4[1])
        assert logprob == pytest.approx(logprobs[event.token], abs=1e-4)
        assert abs(logprobs[order[rank - 1]] - logprobs[event.token]) < 1e-4
        top_id, top_logprob = event.facts.top
        assert len(top_id) == config.MAX_ALTERNATIVES
        np.testing.assert_allclose(top_logprob, logprobs[order[:20]], atol=1e-4)
        np.testing.assert_allclose(logprobs[top_id], logprobs[order[:20]], atol=1e-4)
        assert rank > len(top_id) or top_id[rank - 1] == event.token
        context.append(event.token)


@pytest.mark.parametrize("measure", [False, True])
def test_numbers_that_are_not_finite_end_a_sample_as_an_error(measure: bool) -> None:
    params = fakes.random_params(fakes.MODEL)
    params["wte"]["embedding"][7] = np.nan
    from hipgpt_jax.generation import sampler

    broken = sampler.Sampler(fakes.MODEL, params, config.DecodingConfig(window=11))
    happened = list(broken.run([fakes.request()], measure=measure))
    assert happened == [events.Event(index=0, finish_reason="error")]
