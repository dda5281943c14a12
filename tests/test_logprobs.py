"""Tests of token statistics against a slow reference, and that measuring them changes no token."""

import dataclasses
from typing import Any

import fakes
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import requests, sampling, scheduler

SIZES = (2, 7, 16, 17, 18, 128, 129, 130, 300)
choose = jax.jit(sampling.sample)


def sampled_token(logits_V: np.ndarray, seen_V: np.ndarray, settings: config.SamplingConfig, uniform: float) -> int:
    row = sampling.sampling_params([settings])
    return int(choose(logits_V[None], seen_V[None], row, np.asarray([uniform], np.float32)).token_B[0])


def measured(
    logits_V: np.ndarray, seen_V: np.ndarray, settings: config.SamplingConfig, uniform: float
) -> tuple[float, float]:
    row = sampling.sampling_params([settings])
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
def test_margin_bounds_the_change_of_the_uniform_number(
    V: int, seed: int, uniform: float, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    """A uniform number within the margin gives the same token.

    One just past it gives another, unless the margin is 1 or bounded by the nucleus.
    """
    rng = np.random.RandomState(seed)
    logits_V, seen_V = rng.normal(0, 2, V).astype(np.float32), rng.rand(V) < 0.3
    settings = config.SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    token = sampled_token(logits_V, seen_V, settings, uniform)
    margin, _ = measured(logits_V, seen_V, settings, uniform)
    assert 0 <= margin <= 1
    for inside in (-0.98, -0.5, 0.5, 0.98):
        moved = uniform + inside * margin
        if 0 <= moved <= 1 - 2**-24 and margin > 1e-5:
            assert sampled_token(logits_V, seen_V, settings, moved) == token
    if top_p == 1 and margin < 1 and uniform + margin < 1 - 1e-5:
        beyond = [uniform + sign * (1.02 * margin + 1e-5) for sign in (-1, 1)]
        assert any(sampled_token(logits_V, seen_V, settings, min(max(u, 0), 1 - 2**-24)) != token for u in beyond)


@pytest.mark.parametrize(
    ("top_p", "uniform", "token", "margin"),
    [
        (0.7999, 0.56, 0, 1e-4),  # a third candidate would bring the first boundary from 0.625 to 0.5
        (0.7, 0.56, 0, 0.625 - 0.56),
        (0.8001, 0.6, 1, 1e-4),  # without the third candidate the first boundary would be 0.625
        (0.8001, 0.9, 2, 1e-4),  # without the third candidate it could not be sampled
        (0.8001, 0.3, 0, 0.5 - 0.3),  # the first token is sampled with or without the third candidate
    ],
)
def test_margin_accounts_for_the_end_of_the_nucleus(top_p: float, uniform: float, token: int, margin: float) -> None:
    """Probabilities 0.5, 0.3 and 0.2: a ``top_p`` up to 0.8 keeps two candidates, a larger one three."""
    logits_V, seen_V = np.log(np.asarray([0.5, 0.3, 0.2], np.float32)), np.zeros(3, bool)
    settings = config.SamplingConfig(top_p=top_p, top_k=0, repetition_penalty=1.0)
    assert sampled_token(logits_V, seen_V, settings, uniform) == token
    assert measured(logits_V, seen_V, settings, uniform)[0] == pytest.approx(margin, rel=0.02)


@pytest.mark.parametrize("V", SIZES)
def test_margin_matches_its_definition(V: int) -> None:
    """In float64, over nuclei of every length; skips cases in which rounding may change the nucleus."""
    rng = np.random.RandomState(V)
    for turn in range(40):
        top_k, top_p = (0, 3, 128)[turn % 3], float(np.float32(rng.uniform(0.05, 0.999)))
        logits_V, uniform = rng.normal(0, 2, V).astype(np.float32), rng.randint(2**24) * 2**-24
        settings = config.SamplingConfig(top_k=top_k, top_p=top_p, repetition_penalty=1.0)
        probs = np.sort(np.exp(logits_V.astype(np.float64) - logits_V.max()))[::-1][: top_k or None]
        ends = probs.cumsum() / probs.sum()
        kept = 1 + int(np.searchsorted(ends, top_p))

        def rank_of(kept: int, ends: np.ndarray = ends, uniform: float = uniform) -> int:
            return int(np.searchsorted(ends[:kept] / ends[kept - 1], uniform, side="right"))

        rank = rank_of(kept)
        inner = ends[: kept - 1] / ends[kept - 1]  # the boundaries that can be crossed
        distances = [1.0, *np.abs(inner[max(rank - 1, 0) : rank + 1] - uniform)]
        for other, end in ((kept - 1, kept - 1), (kept + 1, kept)):
            if 1 <= other <= len(ends) and rank_of(other) != rank:
                distances.append(abs(top_p - ends[end - 1]))
        if min(np.abs(ends[:-1] - top_p).min(initial=1), np.abs(inner - uniform).min(initial=1)) > 1e-5:
            assert measured(logits_V, np.zeros(V, bool), settings, uniform)[0] == pytest.approx(
                min(distances), abs=3e-6
            )


@pytest.mark.parametrize("V", SIZES)
def test_gap_is_the_distance_to_the_nearer_neighbour(V: int) -> None:
    rng = np.random.RandomState(V)
    logits_V, seen_V = rng.normal(0, 2, V).astype(np.float32), rng.rand(V) < 0.5
    penalized_V = np.where(seen_V, np.where(logits_V > 0, logits_V / 1.3, logits_V * 1.3), logits_V)
    for uniform in np.linspace(0, 0.999, 7):
        for top_k in (0, 2, 128):
            settings = config.SamplingConfig(top_k=top_k, top_p=1.0, repetition_penalty=1.3)
            token = sampled_token(logits_V, seen_V, settings, uniform)
            others = np.delete(penalized_V, token)
            gap = measured(logits_V, seen_V, settings, uniform)[1]
            assert gap == pytest.approx(np.abs(others - penalized_V[token]).min(), rel=1e-4, abs=1e-6)


def test_margin_at_temperature_0_is_the_gap_of_the_best_two() -> None:
    logits_V, seen_V = np.asarray([1.0, 4.0, 3.5, -2.0], np.float32), np.asarray([False, True, False, False])
    settings = config.SamplingConfig(temperature=0.0, repetition_penalty=1.1)
    assert measured(logits_V, seen_V, settings, 0.9) == (pytest.approx(4 / 1.1 - 3.5, rel=1e-5),) * 2


SHAPES: list[Any] = [
    {},
    pytest.param({"width": 3}, marks=pytest.mark.slow),
    pytest.param({"width": 3, "window": 11, "window_stride": 4}, marks=pytest.mark.slow),
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
