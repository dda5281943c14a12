"""Bounds on a draw contain the draws from logits that are moved within the tolerance."""

from typing import Any

import definition
import jax
import numpy as np
import pytest
import test_sampling

from hipgpt_jax import config
from hipgpt_jax.generation import sampling
from hipgpt_jax.records import rounding

ROWS = 48
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    {"temperature": 0.02, "top_k": 7, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 0, "top_p": 0.97, "repetition_penalty": 2.0},
    {"temperature": 100.0, "top_k": 12, "top_p": 1.0},
    {"temperature": 1e-6, "top_k": 3, "top_p": 0.01},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.2, "ban": (1,), "logit_bias": {0: 1.5}},
    {"top_k": 4, "top_p": 0.8, "min_p": 0.1, "frequency_penalty": 0.4, "presence_penalty": -0.2},
]
TEXTS = [str(settings) for settings in SETTINGS]


class Rows:
    """Random logits with near ties, counts, and keys, for some settings; and the draws from other logits."""

    def __init__(self, V: int, settings: dict[str, Any], tolerance: float) -> None:
        rng = np.random.RandomState(V)
        self.settings, self.tolerance = config.SamplingConfig(**settings), tolerance
        self.params = sampling.sampling_params([self.settings] * ROWS, V)
        self.logits_BV = rng.normal(0, 2, (ROWS, V)).astype(np.float32)
        near_ties = self.logits_BV[:, 1::3].shape[1]
        noise = rng.normal(0, tolerance, (ROWS, near_ties))
        self.logits_BV[:, 1::3] = self.logits_BV[:, ::3][:, :near_ties] + noise
        self.counts_BV = rng.poisson(0.5, (ROWS, V)).astype(np.int32)
        self.keys_B2 = test_sampling.keys_of(ROWS, first=V)
        self.directions_BV = rng.choice([-1, 1, 0.5], (ROWS, V))

    def choose(self, logits_BV: np.ndarray) -> sampling.Choice:
        index_B = np.zeros(ROWS, np.int32)
        choice = test_sampling.sample(logits_BV.astype(np.float32), self.counts_BV, self.params, self.keys_B2, index_B)
        return jax.tree.map(np.asarray, choice)

    def draw(self, row: int, tolerance: float) -> rounding.Draw:
        noise_V = definition.noise(definition.words(self.keys_B2[row], 0, np.arange(self.logits_BV.shape[1])))
        return rounding.Draw(
            self.logits_BV[row],
            np.asarray(self.params.bias_BV)[row],
            self.counts_BV[row],
            self.settings,
            noise_V,
            tolerance,
        )


def statistics(logits_V: np.ndarray, choice: sampling.Choice, row: int) -> dict[str, Any]:
    """Returns the statistics of a draw, by their names in a record."""
    token, logits_V = int(choice.token_B[row]), logits_V.astype(np.float64)
    return {
        "logprobs": logits_V[token] - np.logaddexp.reduce(logits_V),
        "ranks": 1 + (logits_V > logits_V[token]).sum(),
        "sampled_logprobs": choice.sampled_logprob_B[row],
        "kept": choice.kept_B[row],
        "kept_mass": choice.kept_mass_B[row],
        "leads": choice.lead_B[row],
        "cuts": choice.cut_B[row],
    }


@pytest.mark.parametrize("tolerance", [2e-4, 1e-1])
@pytest.mark.parametrize("settings", SETTINGS, ids=TEXTS)
def test_draws_from_moved_logits_are_explained_with_their_statistics(
    settings: dict[str, Any], tolerance: float
) -> None:
    """Every logit is moved by the whole tolerance or half of it. Recorded leads are those of the moved logits."""
    forked = 0
    for V in (7, 300):
        rows = Rows(V, settings, tolerance)
        moved_BV = (rows.logits_BV + tolerance * rows.directions_BV).astype(np.float32)
        found = rows.choose(moved_BV)
        forked += (found.token_B != rows.choose(rows.logits_BV).token_B).sum()
        for row, token in enumerate(found.token_B):
            draw = rows.draw(row, 1.001 * tolerance + 2e-6)  # the moved logits, and what follows, are float32
            assert draw.explains(token), (V, row)
            intervals = draw.statistics(token)
            # A log-probability moves by twice as much as the logits at most.
            logprob = float(draw.logprobs[token])
            intervals["logprobs"] = rounding.Interval(logprob - 2.01 * tolerance, logprob + 2.01 * tolerance)
            for name, value in statistics(moved_BV[row], found, row).items():
                assert intervals[name].contains(float(str(value))), (V, row, name, value, intervals[name])
    assert forked > 0 or tolerance < 0.1 or settings.get("temperature") == 100.0, "else this is no test"


@pytest.mark.parametrize("settings", SETTINGS, ids=TEXTS)
def test_exact_logits_explain_one_token_and_its_statistics(settings: dict[str, Any]) -> None:
    others = 0
    for V in (7, 300):
        rows = Rows(V, settings, 0.1)
        found = rows.choose(rows.logits_BV)
        for row in range(ROWS // 4):
            draw, token = rows.draw(row, 0.0), int(found.token_B[row])
            assert draw.explains(token)
            others += sum(draw.explains(other) for other in range(V)) - 1
            divisor = max(1.0, definition.temperature(rows.settings))
            for name, interval in draw.statistics(token).items():
                if name != "cuts":
                    assert interval.high - interval.low < 1e-4 * divisor or interval.low == interval.high, name
    assert others < 2


@pytest.mark.parametrize("settings", SETTINGS, ids=TEXTS)
def test_a_token_is_explained_only_if_lead_or_cut_are_within_the_tolerance(settings: dict[str, Any]) -> None:
    tolerance, others, alone = 2e-4, 0, 0
    for V in (7, 300):
        rows = Rows(V, settings, tolerance)
        found = rows.choose(rows.logits_BV)
        for row in range(ROWS // 4):
            draw = rows.draw(row, tolerance)
            explained = [token for token in range(V) if draw.explains(token)]
            assert found.token_B[row] in explained
            others += len(explained) - 1
            # A penalty of 2 doubles the error of negative logits; twice the tolerance is the distance of two logits.
            limit = 2 * tolerance * rows.settings.repetition_penalty * 1.01
            limit += 2e-5 * max(1.0, definition.temperature(rows.settings)) * 100
            if min(found.lead_B[row], found.cut_B[row]) > limit:
                assert explained == [found.token_B[row]]
                alone += 1
    assert alone > 3 or not 1e-3 < rows.settings.temperature < 10
    assert others < 20


def test_a_near_tie_of_scores_explains_only_the_neighbour() -> None:
    """Scores are the log-probabilities here: those of 1 and 2 are 1e-4 apart."""
    logits_V = np.log([0.2, 0.3, 0.3, 0.1]) - np.array([0, 0, 1e-4, 0])
    one, zero_V = definition.neutral(), np.zeros(4)

    def explained(
        tolerance: float, settings: config.SamplingConfig = one, logits_V: np.ndarray = logits_V
    ) -> list[int]:
        draw = rounding.Draw(logits_V, zero_V, zero_V, settings, np.ones(4), tolerance)
        return [token for token in range(4) if draw.explains(token)]

    assert explained(1e-5) == [1]
    assert explained(2e-4) == [1, 2]
    assert explained(0.21) == [0, 1, 2]
    assert explained(2e-4, definition.neutral(ban=(1,)) if False else definition.neutral(top_k=1)) == [1, 2]
    assert explained(2e-4, logits_V=np.full(4, np.nan)) == []


def test_banned_tokens_are_never_explained() -> None:
    bias_V = np.array([0, -np.inf, 0, 0])
    for settings in (definition.neutral(), definition.neutral(temperature=0.0), config.SamplingConfig(min_p=0.1)):
        draw = rounding.Draw(np.zeros(4), bias_V, np.zeros(4), settings, np.ones(4), 0.3)
        assert not draw.explains(1)
        assert draw.explains(0)
        assert draw.statistics(0)["kept"].high <= 3
