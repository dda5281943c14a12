"""Tests of token statistics: the draw's against the float64 definition, the others against a full forward pass."""

import dataclasses
from typing import Any

import definition
import fakes
import hypothesis
import jax
import numpy as np
import pytest
import test_sampling
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import requests, scheduler


@st.composite
def draws(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, config.SamplingConfig, int]:
    """Draws logits without exact ties, counts, settings and a seed; several cuts often meet."""
    V = draw(st.sampled_from(test_sampling.SIZES))
    rng = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    logits_V = rng.normal(0, draw(st.sampled_from([0.1, 1.0, 3.0])), V).astype(np.float32)
    counts_V = rng.poisson(0.3, V)
    ban = tuple(range(0, V, 3)) if draw(st.booleans()) else ()
    settings = config.SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0, 100.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 3, 5, 16, 17, 129, 299])),
        top_p=draw(st.just(1.0) | st.floats(0.05, 0.99)),
        min_p=draw(st.just(0.0) | st.floats(0.001, 0.9)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        ban=ban,
    )
    return logits_V, counts_V, settings, draw(st.integers(0, 2**32 - 1))


@hypothesis.given(draws())
@fakes.examples(75)
def test_statistics_of_a_draw_match_their_definitions(
    case: tuple[np.ndarray, np.ndarray, config.SamplingConfig, int],
) -> None:
    """The cut by bisection over the worst moves of the logits; draws that rounding may change are left out."""
    logits_V, counts_V, settings, seed = case
    found = test_sampling.choose(logits_V, settings, seed, counts_V)
    adjusted_V, expected = test_sampling.expected_of(logits_V, counts_V, settings, seed)
    divisor = definition.temperature(settings) or 1.0
    rounding = 1e-5 * max(divisor, 1)
    cut = definition.cut(adjusted_V, settings, expected.token)
    hypothesis.assume(expected.lead > rounding and cut > rounding)
    assert int(found.token_B[0]) == expected.token
    assert int(found.kept_B[0]) == expected.kept
    assert found.sampled_logprob_B[0] == pytest.approx(expected.sampled_logprob, abs=2e-5)
    assert found.kept_mass_B[0] == pytest.approx(expected.kept_mass, abs=1e-5)
    assert found.lead_B[0] == pytest.approx(expected.lead, rel=1e-5, abs=rounding)
    own, following = adjusted_V[expected.token], definition.first_cut(adjusted_V, settings)
    overtaken = definition.LARGEST if following is None else own - adjusted_V[following]
    # The recorded number may be smaller if further candidates must overtake the token, too.
    lowest, found_cut = min(cut, overtaken) if settings.top_k or settings.top_p < 1 else cut, float(found.cut_B[0])
    if settings.top_p < 1:
        # Shares are float32 numbers: an error of 1e-7 moves log-odds by 1e-7 / (p * (1 - p)), and 17 is the largest.
        lowest, cut, found_cut = (min(x, 13 * divisor) for x in (lowest, cut, found_cut))
        rounding += 5e-7 * divisor * np.exp(lowest / divisor) / (settings.top_p * (1 - settings.top_p))
    assert lowest - rounding <= found_cut * (1 + 1e-5)
    assert found_cut <= cut * (1 + 1e-5) + rounding


@hypothesis.given(draws(), st.integers(0, 2**31))
@fakes.examples(75)
def test_moves_of_less_than_half_the_cut_do_not_change_the_token_by_the_cuts(
    case: tuple[np.ndarray, np.ndarray, config.SamplingConfig, int], moves: int
) -> None:
    """The token stays kept, and no other becomes a candidate; random moves, and the worst."""
    logits_V, counts_V, settings, seed = case
    found = test_sampling.choose(logits_V, settings, seed, counts_V)
    adjusted_V = definition.adjusted(logits_V, counts_V, settings)
    token, cut = int(found.token_B[0]), min(float(found.cut_B[0]), 1e4)
    divisor, before = definition.temperature(settings) or 1.0, definition.kept(adjusted_V, settings)
    hypothesis.assume(cut > 1e-3 * max(divisor, 1) and token in before and definition.temperature(settings) > 0)
    rng, reach = np.random.RandomState(moves % 2**31), 0.98 * cut
    away_V = np.where(np.isin(np.arange(len(logits_V)), before), -1, 1)
    for direction_V in (rng.choice([-1, 1], len(logits_V)), rng.uniform(-1, 1, len(logits_V)), away_V, -away_V):
        after = definition.kept(adjusted_V + reach / 2 * direction_V, settings)
        assert token in after
        assert set(after) <= set(before)


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        # For the first of 0.5, 0.3, 0.15 and 0.05.
        ({"top_k": 2}, np.log(0.3 / 0.15)),  # the third overtakes the second
        ({"top_p": 0.85}, np.log(0.15 / 0.05)),  # the fourth overtakes the third
        ({"top_p": 0.7}, np.log(0.8 / 0.2) - np.log(0.7 / 0.3)),  # the first two have less than 0.7: the third is kept
        ({"top_p": 0.96}, np.log(0.96 / 0.04)),  # the other three overtake the first and have 0.96
        ({"min_p": 0.31}, np.log(0.31 / 0.3)),  # the third is kept
        ({"min_p": 0.29}, np.log(0.29 / 0.1)),  # the third is cut without effect; the fourth is kept
        ({"min_p": 0.099}, np.log(5 / 3 / 0.099)),  # the second overtakes the first, which is cut
        ({}, np.inf),
        ({"top_k": 4}, np.inf),
        ({"temperature": 0.0}, np.inf),
    ],
)
def test_cut_of_simple_cases(settings: dict[str, Any], cut: float) -> None:
    logits_V = np.log([0.5, 0.3, 0.15, 0.05, *[1e-30] * 3])
    one = definition.neutral(**settings, ban=(4, 5, 6))
    seed = next(s for s in range(100) if test_sampling.choose(logits_V, one, s).token_B[0] == 0)
    found = float(test_sampling.choose(logits_V, one, seed).cut_B[0])
    assert found == pytest.approx(min(cut, definition.LARGEST), rel=1e-5)


def test_lead_at_temperature_0_is_the_difference_of_the_largest_logits() -> None:
    logits_V, counts_V = np.array([1.0, 4.0, 3.5, -2.0, 0, 0, 0]), np.array([0, 1, 0, 0, 0, 0, 0])
    found = test_sampling.choose(logits_V, config.SamplingConfig(temperature=0.0, repetition_penalty=1.1), 0, counts_V)
    assert found.lead_B[0] == pytest.approx(4 / 1.1 - 3.5, rel=1e-5)
    alone = test_sampling.choose(logits_V, config.SamplingConfig(temperature=0.0, allow=(3,)))
    assert alone.lead_B[0] == np.float32(definition.LARGEST)


SHAPES: list[Any] = [
    {},
    pytest.param({"batch_size": 3}, marks=pytest.mark.slow),
    pytest.param({"batch_size": 3, "window": 11, "window_stride": 4}, marks=pytest.mark.slow),
]


def with_alternatives(request: requests.Request) -> requests.Request:
    return dataclasses.replace(request, generation=dataclasses.replace(request.generation, top_logprobs=3))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_measuring_does_not_change_tokens(shape: dict[str, Any]) -> None:
    source = fakes.make_scheduler(**shape)
    settings: list[tuple[int, dict[str, Any]]] = [
        (2, {}),
        (13, {"temperature": 0.0}),
        (9, {"top_k": 0, "top_p": 1.0}),
        (4, {"eos_id": 126}),
    ]
    requested = [fakes.request(fakes.prompt(n), num_tokens=25, seed=n, **others) for n, others in settings]
    plain = list(source.run(requested))
    measured_ = list(source.run(map(with_alternatives, requested), measure=True))
    assert [(e.index, e.token, e.finish_reason) for e in measured_] == [
        (e.index, e.token, e.finish_reason) for e in plain
    ]
    assert all((event.stats is None) == (event.token is None) for event in measured_)
    with fakes.compilations() as compiled:
        other = fakes.request(fakes.prompt(3), num_tokens=20, top_k=7, temperature=0.3)
        list(source.run([with_alternatives(other)], measure=True))
    assert compiled == []


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_match_a_full_forward_pass(shape: dict[str, Any]) -> None:
    """Log-probability, rank and alternatives, against float64 over the logits of a full forward pass."""
    from hipgpt_jax.model import transformer

    source = fakes.make_scheduler(**shape)
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
        assert event.stats is not None
        first = max(0, -((11 - len(context)) // stride) * stride)
        window = context[first:]
        logits = np.asarray(forward(np.asarray([window + [0] * (11 - len(window))], np.int32)))[0, len(window) - 1]
        logprobs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
        order = np.argsort(-logprobs, kind="stable")
        logprob, rank = event.stats.logprob, event.stats.rank
        assert logprob == pytest.approx(logprobs[event.token], abs=1e-4)
        assert abs(logprobs[order[rank - 1]] - logprobs[event.token]) < 1e-4
        top_id, top_logprob = event.stats.top_logprobs(config.MAX_ALTERNATIVES)
        assert len(top_id) == config.MAX_ALTERNATIVES
        np.testing.assert_allclose(top_logprob, logprobs[order[:20]], atol=1e-4)
        np.testing.assert_allclose(logprobs[top_id], logprobs[order[:20]], atol=1e-4)
        assert rank > len(top_id) or top_id[rank - 1] == event.token
        context.append(event.token)


@pytest.mark.parametrize("measure", [False, True])
def test_non_finite_logits_end_a_sequence_with_an_error(measure: bool) -> None:
    params = fakes.random_params(fakes.MODEL)
    params["wte"]["embedding"][7] = np.nan
    broken = scheduler.Scheduler(fakes.MODEL, params, config.DecodingConfig(window=11))
    (output,) = broken.run([fakes.request()], measure=measure)
    assert (output.token, output.stats, output.finish_reason) == (None, None, "error")
