"""From logits to a token: penalty, temperature, top-k, top-p, draw, in this order.

Each transform is an exact identity at its neutral value, and every setting is a traced value, so
changing one never compiles again. The random bits are threefry's; ``tests/test_sampling.py`` pins
them by golden vectors, because JAX promises only a distribution across versions.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config, numerics
from hipgpt_jax.generation import candidates


class Settings(NamedTuple):
    """Sampling settings of each row, arrays ``[B]``; see ``config.SamplingConfig``."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    penalty_B: jax.Array


def settings(rows: Sequence[config.SamplingConfig]) -> Settings:
    """Returns the settings of each row, as NumPy's arrays; a ``top_k`` of 2**31 or more keeps all, as 0 does."""

    def column(values: Iterable[float], dtype: type) -> Any:
        with np.errstate(
            over="ignore"
        ):  # above 3.4e38, a temperature becomes inf: all that are kept are equally likely
            return np.array(list(values), dtype)

    return Settings(
        column((row.temperature for row in rows), np.float32),
        column((row.top_k if row.top_k < 2**31 else 0 for row in rows), np.int32),
        column((row.top_p for row in rows), np.float32),
        column((row.repetition_penalty for row in rows), np.float32),
    )


def key_words(seed: int, prompt_ids: Sequence[int], sample: int) -> np.ndarray:
    """Returns the three words that the key of a sample is folded from, uint32 ``[3]``.

    Args:
        seed: In ``[0, 2**32)``.
        prompt_ids: All of the prompt's ids; their word is the first 32 bits of the SHA-256 of the
            ids as little-endian 32-bit words.
        sample: Index of the sample, from 0.
    """
    words = np.asarray(prompt_ids, dtype="<u4").tobytes()
    digest = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
    return np.array([seed, digest, sample], np.uint32)


def sample_key(words_3: np.ndarray | jax.Array) -> jax.Array:
    """Returns the key of one sample: of the seed, the prompt's ids and the sample's index, in turn.

    Args:
        words_3: From ``key_words``.
    """
    key = numerics.key_of(words_3[0])
    return jax.random.fold_in(jax.random.fold_in(key, words_3[1]), words_3[2])


def uniform(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the uniform number of the token at ``index``: a multiple of 2**-24 in [0, 1).

    Key and number are made of raw threefry words, so no JAX setting changes them.
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
    return logits_BV / jnp.where(temperature_B < candidates.SMALLEST_TEMPERATURE, 1, temperature_B)[:, None]


def count_top_k(top_k_B: jax.Array, size: int) -> jax.Array:
    """Returns how many of the ``size`` most likely candidates top-k keeps: exactly ``top_k``; all where it is 0."""
    return jnp.where(top_k_B == 0, size, jnp.minimum(top_k_B, size))


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
    reached_BK = cumulative_BK >= (top_p_B * at_rank(cumulative_BK, kept_B - 1))[:, None]
    return jnp.where(top_p_B < 1, 1 + jnp.argmax(reached_BK, axis=-1), kept_B)


def draw(cumulative_BK: jax.Array, kept_B: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns the rank of the first candidate whose cumulative share exceeds the uniform number.

    The number scales the sum, instead of the sums being divided by it: as it is at least 2**-24
    below 1, the last candidate kept always exceeds it, however the sums were rounded.

    >>> draw(jnp.array([[0.5, 0.75, 1.0]]), kept_B=jnp.array([2]), uniform_B=jnp.array([0.7])).tolist()
    [1]
    """
    threshold_B = uniform_B * at_rank(cumulative_BK, kept_B - 1)
    return jnp.argmax(cumulative_BK > threshold_B[:, None], axis=-1)


class Choice(NamedTuple):
    """The token of each row, and how safe it is: how much must change before it is another. Arrays ``[B]``.

    Attributes:
        token_B: Ids, int32.
        margin_B: Distance from the uniform number to the nearest boundary that would have changed the
            token, or from ``top_p`` to the share at which the nucleus would have ended a candidate
            earlier or later, where that changes it; 1 where nothing of this would have. At temperature
            0, the gap of the two best logits.
        gap_B: Distance of the token's logit, after the penalty, to the nearer one of its neighbours in
            the order of candidates, with which it would have changed places.
    """

    token_B: jax.Array
    margin_B: jax.Array
    gap_B: jax.Array


def choose(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    row: Settings,
    uniform_B: jax.Array,
    search: candidates.Search | None = None,
) -> Choice:
    """Chooses a token for each row; a row's choice depends on nothing but that row.

    The margins are found here, where the candidates stand sorted, and not by a program of their own,
    which would sort again: see ``facts``.

    Args:
        logits_BV: Logits of the next token.
        seen_BV: Tokens of the prompt and the output so far.
        row: Sampling settings.
        uniform_B: Uniform numbers in [0, 1).
        search: How candidates are found; as on a CPU, by default.
    """

    def pick(sorted_BK: jax.Array, id_BK: jax.Array, size: int) -> Choice:
        cumulative_BK = jnp.cumsum(jnp.exp(scale(sorted_BK[:, :size], row.temperature_B)), axis=-1)
        top_k_B = count_top_k(row.top_k_B, size)
        kept_B = count_top_p(cumulative_BK, top_k_B, row.top_p_B)
        rank_B = draw(cumulative_BK, kept_B, uniform_B)
        margin_B = _margin(cumulative_BK, top_k_B, kept_B, rank_B, row.top_p_B, uniform_B)
        is_greedy_B = row.temperature_B < candidates.SMALLEST_TEMPERATURE
        rank_B = jnp.where(is_greedy_B, 0, rank_B)
        gap_B = _gap(sorted_BK, rank_B)
        return Choice(at_rank(id_BK, rank_B), jnp.where(is_greedy_B, gap_B, margin_B), gap_B)

    return _of_candidates(pick, logits_BV, seen_BV, row, search or candidates.search_on(logits_BV.shape[1], "cpu"))


def _margin(
    cumulative_BK: jax.Array,
    top_k_B: jax.Array,
    kept_B: jax.Array,
    rank_B: jax.Array,
    top_p_B: jax.Array,
    uniform_B: jax.Array,
) -> jax.Array:
    """Returns ``Choice.margin_B`` of a draw of ``rank`` among the ``kept`` candidates that top-p left of ``top_k``."""

    def reached(count_B: jax.Array) -> jax.Array:
        return at_rank(cumulative_BK, jnp.clip(count_B - 1, 0, top_k_B - 1))

    below_B, above_B = jnp.where(rank_B > 0, reached(rank_B), 0), reached(rank_B + 1)
    kept_less_B, total_B, kept_more_B, whole_B = (reached(n) for n in (kept_B - 1, kept_B, kept_B + 1, top_k_B))
    margin_B = jnp.where(rank_B > 0, uniform_B - below_B / total_B, 1)
    margin_B = jnp.minimum(margin_B, jnp.where(rank_B < kept_B - 1, above_B / total_B - uniform_B, 1))
    # The nucleus could have ended a candidate earlier or later: where its share ends, and what is drawn from then.
    earlier, later = (kept_less_B, kept_less_B, kept_B > 1), (total_B, kept_more_B, kept_B < top_k_B)
    for end_B, other_B, possible_B in (earlier, later):
        changes_B = possible_B & ((uniform_B * other_B < below_B) | (uniform_B * other_B >= above_B))
        distance_B = jnp.where(changes_B & (top_p_B < 1), jnp.abs(top_p_B - end_B / whole_B), 1)
        margin_B = jnp.minimum(margin_B, distance_B)
    return jnp.maximum(margin_B, 0)


def _gap(sorted_BK: jax.Array, rank_B: jax.Array) -> jax.Array:
    """Returns ``Choice.gap_B``, finite: the largest float32 where there is no neighbour."""
    last = sorted_BK.shape[1] - 1
    own_B = at_rank(sorted_BK, rank_B)
    up_B = jnp.where(rank_B > 0, at_rank(sorted_BK, jnp.maximum(rank_B - 1, 0)) - own_B, jnp.inf)
    down_B = jnp.where(rank_B < last, own_B - at_rank(sorted_BK, jnp.minimum(rank_B + 1, last)), jnp.inf)
    return jnp.minimum(jnp.minimum(up_B, down_B), jnp.finfo(jnp.float32).max)


def at_rank(x_BK: jax.Array, rank_B: jax.Array) -> jax.Array:
    """Returns the element of each row at its rank."""
    return jnp.take_along_axis(x_BK, rank_B[:, None], axis=-1)[:, 0]


def _of_candidates(
    pick: Callable[[jax.Array, jax.Array, int], Choice],
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    row: Settings,
    search: candidates.Search,
) -> Choice:
    """Applies ``pick`` to the penalized logits and their ids, best first, and to how many of them are candidates.

    A row gets as many candidates as its own settings need, and one more for its gap: its result does
    not depend on what other rows need, which runs beside it.
    """
    logits_BV = penalize(logits_BV.astype(jnp.float32), seen_BV, row.penalty_B)
    logits_BV = jnp.where(logits_BV == 0, 0, logits_BV)  # to top_k, -0.0 is less than 0.0
    V, tiers = logits_BV.shape[1], search.tiers
    needed_B = jnp.where(
        row.temperature_B < candidates.SMALLEST_TEMPERATURE, 1, jnp.where(row.top_k_B == 0, V, row.top_k_B)
    )

    def among(size: int) -> Choice:
        find = candidates.top_in_chunks if search.in_chunks and size < V else jax.lax.top_k
        # Behind a barrier, since XLA sorts the whole vocabulary for a top_k that is sliced: 6.1 ms instead of 0.1.
        sorted_BK, id_BK = jax.lax.optimization_barrier(find(logits_BV, min(size + 1, V)))
        return pick(sorted_BK, id_BK, size)

    if len(tiers) == 1:
        return among(tiers[0])
    tier_B = (needed_B[:, None] > jnp.asarray(tiers[:-1], jnp.int32)[None]).sum(axis=-1, dtype=jnp.int32)
    none_B = jnp.zeros(len(logits_BV), jnp.float32)
    found = Choice(none_B.astype(jnp.int32), none_B, none_B)
    for tier, size in enumerate(tiers):

        def take(found: Choice, tier: int = tier, size: int = size) -> Choice:
            return jax.tree.map(lambda own, other: jnp.where(tier_B == tier, own, other), among(size), found)

        found = jax.lax.cond(jnp.any(tier_B == tier), take, lambda found: found, found)
    return found
