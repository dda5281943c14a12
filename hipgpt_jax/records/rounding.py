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

# Shares of the probability are sums of float32 numbers, which err by a few units of 6e-8 whatever the logits are.
_SLACK = 1e-5


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
    logits of ``a`` are at their lowest and all of ``b`` at their highest. The order of two candidates is uncertain if
    their intervals overlap, and so is the end of the nucleus if the bounds of its share enclose ``top_p``.
    """

    def __init__(
        self,
        logits_V: np.ndarray,
        seen_V: np.ndarray,
        settings: config.SamplingConfig,
        uniform: float,
        tolerance: float,
    ) -> None:
        """Computes the bounds of all candidates.

        Args:
            logits_V: Recomputed logits.
            seen_V: Whether each token is in the prompt or the output so far.
            settings: Sampling settings.
            uniform: Uniform number of the token, in [0, 1).
            tolerance: Largest error of a logit, at least 0.
        """
        self._logits_V = logits_V.astype(np.float64)
        self._is_finite = bool(np.isfinite(logits_V).all())
        self._tolerance, self._uniform = tolerance, uniform
        with np.errstate(all="ignore"):  # what overflows in float32 here overflows in the draw, too
            self._temperature = float(np.float32(settings.temperature))
            penalty = float(np.float32(settings.repetition_penalty))
            self._low_V, self._high_V = (
                _penalize(self._logits_V + error, seen_V, penalty) for error in (-tolerance, tolerance)
            )
            self._is_greedy = self._temperature < topk.SMALLEST_TEMPERATURE
            if not self._is_greedy:
                self._bound_nucleus(settings)

    def _bound_nucleus(self, settings: config.SamplingConfig) -> None:
        """Bounds the weights, the share of the ``n`` most likely candidates, and the number of candidates kept."""
        V, best = len(self._logits_V), self._high_V.max()
        self._low_weight_V = np.exp((self._low_V - best) / self._temperature)
        self._high_weight_V = np.exp((self._high_V - best) / self._temperature)
        self._top_k = min(settings.top_k or V, V)
        # Sorted weights are bounded by the sorted bounds.
        low, high = (_sums(weight_V)[: self._top_k + 1] for weight_V in (self._low_weight_V, self._high_weight_V))
        self._share_low = _share(low, high[-1] - high, 0)
        self._share_high = _share(high, low[-1] - low, 1)
        self._top_p = float(np.float32(settings.top_p))
        self._fewest_kept = self._most_kept = self._top_k
        if self._top_p < 1:
            self._fewest_kept = max(1, int(np.argmax(self._share_high >= self._top_p - _SLACK)))
            reached = self._share_low >= self._top_p + _SLACK
            self._most_kept = max(1, int(np.argmax(reached))) if reached.any() else self._top_k

    @functools.cached_property
    def logprobs(self) -> np.ndarray:
        """Log-probabilities in nats of all tokens, at temperature 1."""
        shifted_V = self._logits_V - self._logits_V.max()
        return shifted_V - np.log(np.exp(shifted_V).sum())

    def ranks(self, token: int) -> Interval:
        """Returns the ranks that a token can have, 1 for the most likely."""
        distance_V = self._logits_V - self._logits_V[token]
        low, high = (distance_V > 2 * self._tolerance).sum(), (distance_V >= -2 * self._tolerance).sum()
        return Interval(1 + float(low), float(high))

    def gaps(self, token: int) -> Interval:
        """Returns the gaps that a token can have: distances to the nearest other logit after the penalty."""
        others_V = np.arange(len(self._logits_V)) != token
        low_V, high_V = self._low_V[others_V], self._high_V[others_V]
        low, high = self._low_V[token], self._high_V[token]
        no_other = float(np.finfo(np.float32).max)  # gap in a vocabulary of one
        nearest = np.maximum(low_V - high, low - high_V).min(initial=no_other)
        return Interval(max(0.0, nearest), np.maximum(high_V - low, high - low_V).min(initial=no_other))

    def margins(self, token: int) -> Interval | None:
        """Returns the margins that a token can be drawn with; None if rounding cannot lead to the token."""
        if not self._is_finite:
            return None
        if self._is_greedy:
            return self.gaps(token) if self._high_V[token] >= self._low_V.max() else None
        place = _Place(self._low_V, self._high_V, self._low_weight_V, self._high_weight_V, token)
        intervals = [
            self._margin(place, kept)
            for kept in range(max(self._fewest_kept, place.fewest_above + 1), self._most_kept + 1)
            if place.start(kept).low - _SLACK <= self._uniform <= place.end(kept).high + _SLACK
        ]
        if not intervals:
            return None
        return Interval(min(one.low for one in intervals) - _SLACK, max(one.high for one in intervals) + _SLACK)

    def _margin(self, place: "_Place", kept: int) -> Interval:
        """Returns the margins of a draw from ``kept`` candidates, as ``logprobs.margin`` defines them."""
        u, lows, highs = self._uniform, [1.0], [1.0]
        if place.most_above > 0:
            lows.append(u - place.start(kept).high)
        if place.fewest_above > 0:
            highs.append(u - place.start(kept).low)
        if place.fewest_above < kept - 1:
            lows.append(place.end(kept).low - u)
        if place.most_above < kept - 1:
            highs.append(place.end(kept).high - u)
        if self._top_p < 1:
            # The nucleus could end one candidate earlier or later.
            for end, other in ((kept - 1, kept - 1), (kept, kept + 1)):
                if 0 < end < self._top_k:
                    below, above = self._top_p - self._share_high[end], self._share_low[end] - self._top_p
                    if place.may_miss(u, other):
                        lows.append(max(0.0, below, above))
                    if place.must_miss(u, other):
                        highs.append(max(-below, -above))
        return Interval(max(0.0, min(lows)), max(0.0, min(highs)))


class _Place:
    """Bounds on a token's rank among the candidates and on its interval of uniform numbers.

    Attributes:
        fewest_above: Number of candidates that are certainly above the token.
        most_above: Number of candidates that are possibly above it.
    """

    def __init__(
        self, low_V: np.ndarray, high_V: np.ndarray, low_weight_V: np.ndarray, high_weight_V: np.ndarray, token: int
    ) -> None:
        above_V = low_V > high_V[token]
        maybe_above_V = high_V >= low_V[token]
        maybe_above_V[token] = False
        self.fewest_above, self.most_above = int(above_V.sum()), int(maybe_above_V.sum())
        others_V = np.arange(len(low_V)) != token
        self._own = Interval(float(low_weight_V[token]), float(high_weight_V[token]))
        self._above_low = float(low_weight_V[above_V].sum())
        self._above_high = _sums(high_weight_V[maybe_above_V])
        self._below_low = _sums(low_weight_V[others_V & ~maybe_above_V])
        self._below_high = _sums(high_weight_V[others_V & ~above_V])

    def start(self, kept: int) -> Interval:
        """Returns the start of the token's interval in a draw from ``kept`` candidates including the token."""
        above_high, below_low, below_high = self._weights(kept)
        return Interval(
            _share(self._above_low, self._own.high + below_high, 0), _share(above_high, self._own.low + below_low, 1)
        )

    def end(self, kept: int) -> Interval:
        """Returns the end of the token's interval, likewise."""
        above_high, below_low, below_high = self._weights(kept)
        return Interval(
            _share(self._above_low + self._own.low, below_high, 0), _share(above_high + self._own.high, below_low, 1)
        )

    def may_miss(self, uniform: float, kept: int) -> bool:
        """Returns whether a draw from ``kept`` candidates can give another token."""
        if self.most_above >= kept:
            return True
        return uniform < self.start(kept).high + _SLACK or uniform >= self.end(kept).low - _SLACK

    def must_miss(self, uniform: float, kept: int) -> bool:
        """Returns whether a draw from ``kept`` candidates certainly gives another token."""
        if self.fewest_above >= kept:
            return True
        return uniform < self.start(kept).low - _SLACK or uniform >= self.end(kept).high + _SLACK

    def _weights(self, kept: int) -> tuple[float, float, float]:
        """Returns the largest weight above the token, and the smallest and the largest kept weight below it."""
        return (
            self._above_high[min(self.most_above, kept - 1)],
            self._below_low[max(0, kept - 1 - self.most_above)],
            self._below_high[kept - 1 - self.fewest_above],
        )


def _penalize(logits_V: np.ndarray, seen_V: np.ndarray, penalty: float) -> np.ndarray:
    penalized_V = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return np.where(seen_V, penalized_V, logits_V)


def _sums(weights: np.ndarray) -> np.ndarray:
    """Returns the sums of the 0, 1, 2, … largest weights."""
    return np.concatenate([[0.0], np.cumsum(np.sort(weights)[::-1])])


def _share(part: Any, rest: Any, of_nothing: float) -> Any:
    """Returns ``part`` of ``part + rest``, or ``of_nothing`` if both underflow to 0."""
    total = part + rest
    return np.where(total > 0, part / np.where(total > 0, total, 1), of_nothing)
