"""From logits to a token: penalty, temperature, top-k, top-p, draw, in this order.

Each transform is an exact identity at its neutral value, and every setting is a traced value, so
changing one never compiles again. The random bits are threefry's; ``tests/test_sampling.py`` pins
them by golden vectors, because JAX promises only a distribution across versions.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config

# Enough for every documented top_k. With V 50257 on a CPU, top_k(128) takes 0.2 ms, a sort 18 ms.
CANDIDATES = 128

_TINY = float(np.finfo(np.float32).tiny)


class Settings(NamedTuple):
    """Sampling settings of each row, arrays ``[B]``; see ``config.SamplingConfig``."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    penalty_B: jax.Array


def settings(rows: Sequence[config.SamplingConfig]) -> Settings:
    """Returns the settings of each row as arrays; a ``top_k`` of 2**31 or more keeps all, as 0 does."""
    return Settings(
        jnp.asarray([row.temperature for row in rows], jnp.float32),
        jnp.asarray([row.top_k if row.top_k < 2**31 else 0 for row in rows], jnp.int32),
        jnp.asarray([row.top_p for row in rows], jnp.float32),
        jnp.asarray([row.repetition_penalty for row in rows], jnp.float32),
    )


def sample_key(seed: int, prompt_ids: Sequence[int], sample: int) -> jax.Array:
    """Returns the key of one sample: of the seed, the prompt's ids and the sample's index, in turn.

    Args:
        seed: In ``[0, 2**32)``.
        prompt_ids: All of the prompt's ids; their digest is the first 32 bits of the SHA-256 of the
            ids as little-endian 32-bit words.
        sample: Index of the sample, from 0.
    """
    words = np.asarray(prompt_ids, dtype="<u4").tobytes()
    digest = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, np.uint32(digest)), np.uint32(sample))


def uniform(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the uniform number of the token at ``index``: a multiple of 2**-24 in [0, 1).

    The number is made of raw threefry words, so no setting of JAX's changes it.
    """
    word = jax.random.key_data(jax.random.fold_in(key, index))[..., 0]
    return (word >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of the tokens seen, once each.

    References:
        Keskar et al., CTRL: A Conditional Transformer Language Model, 2019.
    """
    penalty_B1 = penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def scale(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Divides the logits, less their maximum so that no temperature overflows, by the temperature.

    A temperature of 0 leaves them: the draw takes the most likely token whatever they are.
    """
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    return logits_BV / jnp.where(temperature_B < _TINY, 1, temperature_B)[:, None]


def count_top_k(top_k_B: jax.Array, candidates: int) -> jax.Array:
    """Returns how many of the most likely candidates top-k keeps: exactly ``top_k``; all where it is 0."""
    return jnp.where(top_k_B == 0, candidates, jnp.minimum(top_k_B, candidates))


def count_top_p(cumulative_BK: jax.Array, kept_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Returns how many of the ``kept`` candidates form the smallest set whose share reaches ``top_p``.

    The candidate that crosses the threshold is kept; a ``top_p`` of 1 keeps all.

    Args:
        cumulative_BK: Cumulative sums of the candidates' unnormalised probabilities, likeliest first.
        kept_B: Candidates that count, at least 1.
        top_p_B: In (0, 1].

    References:
        Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.
    """
    reached_BK = cumulative_BK >= (top_p_B * _at(cumulative_BK, kept_B - 1))[:, None]
    return jnp.where(top_p_B < 1, 1 + jnp.argmax(reached_BK, axis=-1), kept_B)


def draw(cumulative_BK: jax.Array, kept_B: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns the rank of the first candidate whose cumulative share exceeds the uniform number.

    The number scales the sum, instead of the sums being divided by it: as it is at least 2**-24
    below 1, the last candidate kept always exceeds it, however the sums were rounded.

    >>> draw(jnp.array([[0.5, 0.75, 1.0]]), kept_B=jnp.array([2]), uniform_B=jnp.array([0.7])).tolist()
    [1]
    """
    threshold_B = uniform_B * _at(cumulative_BK, kept_B - 1)
    return jnp.argmax(cumulative_BK > threshold_B[:, None], axis=-1)


def choose(logits_BV: jax.Array, seen_BV: jax.Array, row: Settings, uniform_B: jax.Array) -> jax.Array:
    """Chooses a token for each row; a row's choice depends on nothing but that row.

    Args:
        logits_BV: Logits of the next token.
        seen_BV: Tokens of the prompt and the output so far.
        row: Sampling settings.
        uniform_B: Uniform numbers in [0, 1).

    Returns:
        Ids ``[B]``, int32.
    """
    logits_BV = penalize(logits_BV.astype(jnp.float32), seen_BV, row.penalty_B)
    logits_BV = jnp.where(logits_BV == 0, 0, logits_BV)  # to top_k, -0.0 is less than 0.0
    V = logits_BV.shape[1]
    few_B = (row.top_k_B > 0) & (row.top_k_B <= CANDIDATES) | (row.temperature_B < _TINY)

    def among(candidates: int) -> jax.Array:
        sorted_BK, id_BK = jax.lax.top_k(logits_BV, min(candidates, V))
        cumulative_BK = jnp.cumsum(jnp.exp(scale(sorted_BK, row.temperature_B)), axis=-1)
        kept_B = count_top_k(row.top_k_B, sorted_BK.shape[1])
        kept_B = count_top_p(cumulative_BK, kept_B, row.top_p_B)
        rank_B = draw(cumulative_BK, kept_B, uniform_B)
        return _at(id_BK, jnp.where(row.temperature_B < _TINY, 0, rank_B))

    if V <= CANDIDATES:
        return among(V)
    return jax.lax.cond(
        jnp.all(few_B), lambda: among(CANDIDATES), lambda: jnp.where(few_B, among(CANDIDATES), among(V))
    )


def _at(x_BK: jax.Array, rank_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BK, rank_B[:, None], axis=-1)[:, 0]
