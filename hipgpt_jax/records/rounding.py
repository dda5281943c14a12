"""Bounds on a draw whose logits are known up to a rounding error.

Another machine, batch size or version computes the same logits up to some tolerance. Rounding explains a recorded token
if and only if logits within the tolerance of the recomputed ones lead to it. The same holds for the statistics recorded
with the token. Everything here is float64 NumPy; ``sampling`` defines the draw.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import topk

# Shares of the probability are sums of float32 numbers, and scores of the draw are float32 numbers: they err by a few
# units of 6e-8, or of 1e-6, whatever the logits are.
_SLACK = 1e-5
_LARGEST = 3.4028235e38  # the largest float32 as records hold it: with the fewest digits that identify it


class Interval(NamedTuple):
    """The smallest and the largest value that a number can have."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Returns whether a number is in the interval, ends included."""
        return self.low <= value <= self.high


class Draw:
    """One draw with every logit known up to ``tolerance``.

    Weights are monotone in the logits, and logits vary independently. So a share ``a / (a + b)`` is smallest if all
    logits of ``a`` are at their lowest and all of ``b`` at their highest. Whether a candidate is kept is uncertain if
    the bounds of its rank, or of the share before it, enclose the limit.
    """

    def __init__(
        self,
        logits_V: np.ndarray,
        bias_V: np.ndarray,
        counts_V: np.ndarray,
        settings: config.SamplingConfig,
        noise_V: np.ndarray,
        tolerance: float,
    ) -> None:
        """Computes the bounds of all candidates.

        Args:
            logits_V: Recomputed logits.
            bias_V: Bias of each token; minus infinity if it is banned.
            counts_V: Occurrences of each token that are penalized.
            settings: Sampling settings.
            noise_V: Exponential noise of each token.
            tolerance: Largest error of a logit, at least 0.
        """
        self._logits_V = logits_V.astype(np.float64)
        self._is_finite = bool(np.isfinite(logits_V).all())
        self._tolerance = tolerance
        self._temperature = float(np.float32(min(settings.temperature, topk.LARGEST_TEMPERATURE)))
        self._is_greedy = self._temperature < topk.SMALLEST_TEMPERATURE
        self._divisor = 1.0 if self._is_greedy else self._temperature
        with np.errstate(all="ignore"):
            self._low_V, self._high_V = (
                _penalize(self._logits_V + error + bias_V, counts_V, settings) for error in (-tolerance, tolerance)
            )
            self._bound(settings, noise_V.astype(np.float64))

    def _bound(self, settings: config.SamplingConfig, noise_V: np.ndarray) -> None:
        """Bounds ranks, shares and scores, and whether each candidate is kept."""
        V, best = len(self._logits_V), self._high_V.max()
        low_V, high_V = (self._low_V - best) / self._divisor, (self._high_V - best) / self._divisor
        low_V, high_V = (np.where(np.isnan(x), -np.inf, x) for x in (low_V, high_V))
        self._scaled = low_V, high_V
        self._scores = (low_V, high_V) if self._is_greedy else (low_V - np.log(noise_V), high_V - np.log(noise_V))
        self._weights = tuple(np.sort(np.exp(x))[::-1] for x in self._scaled)
        self._sums = tuple(np.concatenate([[0.0], np.cumsum(weights)]) for weights in self._weights)
        num_allowed = max(1, int((self._low_V > -np.inf).sum()))
        top_k = 1 if self._is_greedy else min(settings.top_k or V, num_allowed)
        fewest_above_V = V - np.searchsorted(np.sort(low_V), high_V, side="right")
        most_above_V = np.maximum(V - np.searchsorted(np.sort(high_V), low_V, side="left") - 1, 0)
        self._may_keep_V, self._keeps_V = fewest_above_V < top_k, most_above_V < top_k
        fewest, most = top_k, top_k
        top_p = float(np.float32(settings.top_p))
        if top_p < 1:
            share_low, share_high = self._shares(top_k)
            self._may_keep_V &= share_low[np.minimum(fewest_above_V, top_k)] < top_p + _SLACK
            self._keeps_V &= share_high[np.minimum(most_above_V, top_k)] < top_p - _SLACK
            self._keeps_V |= most_above_V == 0
            fewest = max(1, int(np.argmax(share_high >= top_p - _SLACK)))
            reached = share_low >= top_p + _SLACK
            most = max(1, int(np.argmax(reached))) if reached.any() else top_k
        if settings.min_p > 0:
            limit = np.log(np.float64(np.float32(settings.min_p)))
            may_V, does_V = high_V - low_V.max() >= limit - _SLACK, low_V - high_V.max() >= limit + _SLACK
            self._may_keep_V &= may_V
            self._keeps_V &= does_V
            fewest, most = max(1, min(fewest, int(does_V.sum()))), min(most, int(may_V.sum()))
        self.kept = Interval(fewest, most)
        has_no_cut = not 0 < settings.top_k < V and top_p == 1 and settings.min_p == 0
        self._cut = _LARGEST if has_no_cut or self._is_greedy else 0.0

    def _shares(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns bounds of the shares of the 0, 1, 2, … most likely candidates among the ``number`` most likely."""
        low, high = (sums[: number + 1] for sums in self._sums)
        # The sums of the others, added up from the smallest: a difference of two sums would cancel.
        low_rest, high_rest = (
            np.concatenate([np.cumsum(weights[:number][::-1])[::-1], [0.0]]) for weights in self._weights
        )
        return _share(low, high_rest, 0), _share(high, low_rest, 1)

    @functools.cached_property
    def logprobs(self) -> np.ndarray:
        """Log-probabilities in nats of all tokens, in the model's own distribution."""
        shifted_V = self._logits_V - self._logits_V.max()
        return shifted_V - np.log(np.exp(shifted_V).sum())

    def explains(self, token: int) -> bool:
        """Returns whether logits within the tolerance lead to a token."""
        if not self._is_finite:
            return False
        surest = self._best(self._scores[0], self._low_V > -np.inf if self._is_greedy else self._keeps_V, token)
        may_keep = bool(self._may_keep_V[token]) and self._high_V[token] > -np.inf
        return may_keep and self._scores[1][token] >= surest - self._score_slack

    def statistics(self, token: int) -> dict[str, Interval]:
        """Returns the values that the statistics of a token can have, by their names in a record."""
        low_V, high_V = self._scaled
        low_sums, high_sums = self._sums
        fewest, most = int(self.kept.low), int(self.kept.high)
        share_low, share_high = self._shares(len(self._logits_V))
        with np.errstate(all="ignore"):
            lowest = low_V[token] - np.log(high_sums[most]) - _SLACK
            highest = high_V[token] - np.log(low_sums[fewest]) + _SLACK
        logprob = float(self.logprobs[token])
        return {
            "logprobs": Interval(logprob - self._tolerance, logprob + self._tolerance),
            "ranks": self._ranks(token),
            "sampled_logprobs": Interval(0.0, 0.0) if self._is_greedy else Interval(lowest, highest),
            "kept": self.kept,
            "kept_mass": Interval(float(share_low[fewest]) - _SLACK, float(share_high[most]) + _SLACK),
            "leads": self._leads(token),
            "cuts": Interval(self._cut, _LARGEST),
        }

    def _ranks(self, token: int) -> Interval:
        distance_V = self._logits_V - self._logits_V[token]
        low, high = (distance_V > 2 * self._tolerance).sum(), (distance_V >= -2 * self._tolerance).sum()
        return Interval(1 + float(low), float(high))

    def _leads(self, token: int) -> Interval:
        score_low_V, score_high_V = self._scores
        is_candidate_V = np.ones(len(score_low_V), bool)
        may_V, does_V = (is_candidate_V,) * 2 if self._is_greedy else (self._may_keep_V, self._keeps_V)
        low = (score_low_V[token] - self._best(score_high_V, may_V, token) - self._score_slack) * self._divisor
        high = (score_high_V[token] - self._best(score_low_V, does_V, token) + self._score_slack) * self._divisor
        return Interval(float(np.clip(low, 0, _LARGEST)), float(np.clip(high, 0, _LARGEST)))

    @property
    def _score_slack(self) -> float:
        return 0.0 if self._is_greedy else _SLACK

    def _best(self, score_V: np.ndarray, among_V: np.ndarray, token: int) -> float:
        """Returns the highest score of other candidates."""
        others_V = among_V & (np.arange(len(score_V)) != token)
        return float(score_V[others_V].max(initial=-np.inf))


def _penalize(logits_V: np.ndarray, counts_V: np.ndarray, settings: config.SamplingConfig) -> np.ndarray:
    repetition, frequency, presence = (
        float(np.float32(x))
        for x in (settings.repetition_penalty, settings.frequency_penalty, settings.presence_penalty)
    )
    penalized_V = np.where(logits_V > 0, logits_V / repetition, logits_V * repetition)
    return np.where(counts_V > 0, penalized_V - frequency * counts_V - presence, logits_V)


def _share(part: Any, rest: Any, of_nothing: float) -> Any:
    """Returns ``part`` of ``part + rest``, or ``of_nothing`` if both underflow to 0."""
    total = part + rest
    return np.where(total > 0, part / np.where(total > 0, total, 1), of_nothing)
