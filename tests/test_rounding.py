"""Bounds on a draw contain the draws from logits that are moved within the tolerance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import logprobs, sampling
from hipgpt_jax.records import rounding

ROWS = 32
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    {"temperature": 0.02, "top_k": 7, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 0, "top_p": 0.97, "repetition_penalty": 2.0},
    {"temperature": 100.0, "top_k": 12, "top_p": 1.0},
    {"temperature": 1e-6, "top_k": 3, "top_p": 0.01},
]


class Drawn(NamedTuple):
    """Tokens, and the log-probability, rank, margin and gap of each."""

    token_B: np.ndarray
    numbers_B4: np.ndarray


@jax.jit
def _choose(logits_BV: Any, seen_BV: Any, row: sampling.SamplingParams, uniform_B: Any) -> tuple[Any, Any]:
    choice = sampling.sample(logits_BV, seen_BV, row, uniform_B)
    return choice.token_B, jnp.stack([x.astype(jnp.float32) for x in logprobs.token_stats(logits_BV, *choice)], axis=1)


def choose(logits_BV: np.ndarray, seen_BV: np.ndarray, row: config.SamplingConfig, uniform_B: np.ndarray) -> Drawn:
    rows = sampling.sampling_params([row] * ROWS)
    token_B, numbers_B4 = _choose(logits_BV.astype(np.float32), seen_BV, rows, uniform_B.astype(np.float32))
    return Drawn(np.asarray(token_B), np.asarray(numbers_B4, np.float64))


def some_rows(V: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.RandomState(seed)
    logits_BV = rng.normal(0, 2, (ROWS, V)).astype(np.float32).astype(np.float64)
    return logits_BV, rng.randint(0, 2, (ROWS, V)).astype(bool), rng.randint(0, 2**24, ROWS) * 2.0**-24


@pytest.mark.parametrize("tolerance", [2e-4, 1e-1])
@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_from_moved_logits_are_explained_with_their_statistics(
    settings: dict[str, Any], tolerance: float
) -> None:
    """The logits have near ties, and half of the uniform numbers are moved next to the boundary of a token's part."""
    row, forked = config.SamplingConfig(**settings), 0
    for seed, V in enumerate((1, 2, 20, 150)):
        rng = np.random.RandomState(seed)
        logits_BV, seen_BV, uniform_B = some_rows(V, seed)
        near_ties = logits_BV[:, 1::3].shape[1]
        logits_BV[:, 1::3] = logits_BV[:, ::3][:, :near_ties] + rng.normal(0, tolerance, (ROWS, near_ties))
        own = choose(logits_BV, seen_BV, row, uniform_B)
        moved_B = np.clip(uniform_B - own.numbers_B4[:, 2] * rng.choice([0, 1], ROWS), 0, 1 - 2**-24)
        uniform_B = np.round(moved_B * 2**24) * 2.0**-24
        moved_BV = logits_BV + tolerance * rng.choice([-1, 1, 0.5], (ROWS, V))
        found = choose(moved_BV, seen_BV, row, uniform_B)
        forked += (found.token_B != choose(logits_BV, seen_BV, row, uniform_B).token_B).sum()
        for index, (token, numbers_4) in enumerate(zip(*found, strict=True)):
            draw = rounding.Draw(logits_BV[index], seen_BV[index], row, uniform_B[index], 1.001 * tolerance)
            margins, gaps = draw.margins(token), draw.gaps(token)
            assert margins is not None, (V, index)
            assert margins.contains(numbers_4[2]), (V, index)
            assert gaps.low - 1e-5 <= numbers_4[3] <= gaps.high * 1.000001 + 1e-5
            assert draw.ranks(token).contains(numbers_4[1])
            assert abs(draw.logprobs[token] - numbers_4[0]) < 2 * tolerance + 1e-5
    assert forked > 3, "rounding must change tokens for this to be a test"


@pytest.mark.parametrize("settings", SETTINGS)
def test_exact_logits_explain_one_token_and_its_statistics(settings: dict[str, Any]) -> None:
    row, open_places = config.SamplingConfig(**settings), 0
    for V in (2, 150):
        logits_BV, seen_BV, uniform_B = some_rows(V, V)
        found = choose(logits_BV, seen_BV, row, uniform_B)
        for index in range(ROWS // 4):
            draw = rounding.Draw(logits_BV[index], seen_BV[index], row, uniform_B[index], 0.0)
            margins = {token: one for token in range(V) if (one := draw.margins(token)) is not None}
            own = margins[found.token_B[index]]
            assert own.low - 1e-6 <= found.numbers_B4[index, 2] <= own.high + 1e-6
            assert draw.ranks(found.token_B[index]) == (found.numbers_B4[index, 1],) * 2
            open_places += len(margins) > 1 or own.high - own.low > 2.1e-5
    assert open_places < 3


@pytest.mark.parametrize("settings", SETTINGS)
def test_only_neighbours_across_a_near_boundary_are_explained(settings: dict[str, Any]) -> None:
    row, others = config.SamplingConfig(**settings), 0
    tolerance = 2e-4
    for V in (2, 150):
        logits_BV, seen_BV, uniform_B = some_rows(V, V)
        found = choose(logits_BV, seen_BV, row, uniform_B)
        for index in range(ROWS // 4):
            draw = rounding.Draw(logits_BV[index], seen_BV[index], row, uniform_B[index], tolerance)
            reached = sum(draw.margins(token) is not None for token in range(V))
            others += reached - 1
            scale = row.repetition_penalty / min(1, row.temperature or 1)
            if found.numbers_B4[index, 2] > 4 * tolerance * scale and found.numbers_B4[index, 3] > 4 * tolerance * 2:
                assert reached == 1
    assert others < 20


def test_a_small_margin_explains_only_the_neighbour() -> None:
    logits_V, seen_V = np.log([0.5, 0.25, 0.15, 0.1]), np.zeros(4, bool)
    row = config.SamplingConfig(top_k=0, top_p=1.0, repetition_penalty=1.0)
    draw = rounding.Draw(logits_V, seen_V, row, 0.75 - 5e-5, 2e-4)
    assert [draw.margins(token) is not None for token in range(4)] == [False, True, True, False]
    margins = draw.margins(2)
    assert margins is not None
    assert margins.low < 1e-5 < margins.high < 3e-4
    far = rounding.Draw(logits_V, seen_V, row, 0.6, 2e-4)
    assert [far.margins(token) is not None for token in range(4)] == [False, True, False, False]
    not_finite = rounding.Draw(np.full(4, np.nan), seen_V, row, 0.6, 2e-4)
    assert [not_finite.margins(token) for token in range(4)] == [None] * 4
