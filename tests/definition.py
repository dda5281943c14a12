"""Test helper: the draw of a token by its definition, in slow float64 NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import sampling

LARGEST = float(np.finfo(np.float32).max)
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def neutral(**settings: Any) -> config.SamplingConfig:
    """Returns settings, the others of which are neutral."""
    return config.SamplingConfig(**{**NEUTRAL, **settings})


def words(key_2: np.ndarray, index: int, id_K: np.ndarray) -> np.ndarray:
    """Returns the random words of candidates, uint32."""
    key = sampling.fold_in((key_2[:1], key_2[1:]), np.array([index], np.uint32))
    return sampling.fold_in(key, id_K.astype(np.uint32))[0]


def noise(word_K: np.ndarray) -> np.ndarray:
    """Returns the exponential noise of random words: the uniform number is a float32, the rest float64."""
    uniform_K = np.minimum((word_K.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), 1 - 2.0**-24)
    return -np.log1p(-uniform_K.astype(np.float64))


def adjusted(logits_V: np.ndarray, counts_V: np.ndarray, settings: config.SamplingConfig) -> np.ndarray:
    """Returns the logits with bias, bans and penalties."""
    bias_V = np.full(len(logits_V), -np.inf if settings.allow else 0.0)
    bias_V[np.array(settings.allow, int)] = 0
    for token, value in settings.logit_bias:
        bias_V[int(token)] += float(np.float32(value))
    bias_V[np.array(settings.ban, int)] = -np.inf
    penalized_V = logits_V.astype(np.float64) + bias_V
    repetition, frequency, presence = (
        float(np.float32(x))
        for x in (settings.repetition_penalty, settings.frequency_penalty, settings.presence_penalty)
    )
    for token in np.flatnonzero(counts_V):
        logit = penalized_V[token]
        logit = logit / repetition if logit > 0 else logit * repetition
        penalized_V[token] = logit - frequency * counts_V[token] - presence
    return penalized_V


def temperature(settings: config.SamplingConfig) -> float:
    """Returns the divisor of the logits, 0 for the most likely token."""
    value = min(settings.temperature, 2.0**126)
    return 0.0 if value < np.finfo(np.float32).tiny else float(np.float32(value))


def kept(adjusted_V: np.ndarray, settings: config.SamplingConfig) -> list[int]:
    """Returns the ids of the candidates that are kept, the most likely first."""
    ids = sorted(np.flatnonzero(adjusted_V > -np.inf).tolist(), key=lambda i: (-adjusted_V[i], i))
    divisor = temperature(settings)
    if divisor == 0:
        return ids[:1]
    ids = ids[: settings.top_k or None]
    weights = np.exp((adjusted_V[ids] - adjusted_V[ids[0]]) / divisor)
    number = len(ids)
    if settings.top_p < 1:
        number = 1 + int(np.searchsorted(weights.cumsum() / weights.sum(), float(np.float32(settings.top_p))))
    if settings.min_p > 0:
        number = min(number, int((weights >= float(np.float32(settings.min_p))).sum()))
    return ids[:number]


class Draw(NamedTuple):
    """One draw; see ``sampling.Choice``."""

    token: int
    sampled_logprob: float
    kept: int
    kept_mass: float
    lead: float


def draw(adjusted_V: np.ndarray, noise_V: np.ndarray, settings: config.SamplingConfig) -> Draw:
    """Draws a token: the highest score among the candidates that are kept."""
    ids, divisor = kept(adjusted_V, settings), temperature(settings)
    scaled_V = (adjusted_V - adjusted_V.max()) / (divisor or 1)
    if divisor == 0:
        first, second, *_ = (*np.sort(adjusted_V)[::-1], -np.inf)
        return Draw(ids[0], 0.0, 1, 1 / np.exp(scaled_V).sum(), min(first - second, LARGEST))
    score = {token: scaled_V[token] - np.log(noise_V[token]) for token in ids}
    ranked = sorted(ids, key=lambda i: (-score[i], i))
    lead = (score[ranked[0]] - score[ranked[1]]) * divisor if len(ids) > 1 else LARGEST
    mass = np.exp(scaled_V[ids]).sum()
    return Draw(
        token=ranked[0],
        sampled_logprob=scaled_V[ranked[0]] - np.log(mass),
        kept=len(ids),
        kept_mass=mass / np.exp(scaled_V).sum(),
        lead=min(lead, LARGEST),
    )


def leaves(adjusted_V: np.ndarray, settings: config.SamplingConfig, token: int, distance: float) -> bool:
    """Returns whether logits that move apart by ``distance`` can make the cuts drop a kept token.

    The worst moves are those of all candidates that then precede the token up, and of the others down.
    """
    is_up_V = adjusted_V > adjusted_V[token] - distance
    is_up_V[token] = False
    return token not in kept(adjusted_V + np.where(is_up_V, distance / 2, -distance / 2), settings)


def enters(adjusted_V: np.ndarray, settings: config.SamplingConfig, distance: float) -> bool:
    """Returns whether logits that move apart by ``distance`` can make the cuts keep the first candidate that was cut.

    The best moves are those of the candidate and of all that follow it up, and of the others down.
    """
    first = first_cut(adjusted_V, settings)
    if first is None:
        return False
    id_V = np.arange(len(adjusted_V))
    is_up_V = (adjusted_V < adjusted_V[first]) | ((adjusted_V == adjusted_V[first]) & (id_V >= first))
    return first in kept(adjusted_V + np.where(is_up_V, distance / 2, -distance / 2), settings)


def least(happens: Callable[[float], bool], largest: float) -> float:
    """Returns the least distance at which something happens; ``LARGEST`` if it does not at ``largest``."""
    if not happens(largest):
        return LARGEST
    low, high = 0.0, largest
    for _ in range(36):
        middle = (low + high) / 2
        low, high = (low, middle) if happens(middle) else (middle, high)
    return high


def first_cut(adjusted_V: np.ndarray, settings: config.SamplingConfig) -> int | None:
    """Returns the most likely candidate that was cut; None if there is none."""
    ids = set(kept(adjusted_V, settings))
    others = [i for i in np.flatnonzero(adjusted_V > -np.inf).tolist() if i not in ids]
    return min(others, key=lambda i: (-adjusted_V[i], i), default=None)


def cut(adjusted_V: np.ndarray, settings: config.SamplingConfig, token: int) -> float:
    """Returns how far logits must move apart for the token to be cut, or for another candidate to be kept."""
    if temperature(settings) == 0:
        return LARGEST
    largest = 1000 * max(temperature(settings), 1)
    return min(
        least(lambda distance: leaves(adjusted_V, settings, token, distance), largest),
        least(lambda distance: enters(adjusted_V, settings, distance), largest),
    )
