"""From logits to a token: penalty, temperature, top-k, top-p, draw, in this order.

Every transform is an exact identity at its neutral value. Every setting is a traced value, so changing one never
recompiles. The random bits are threefry's; ``tests/test_sampling.py`` pins them by golden vectors, because JAX
guarantees only a distribution across versions.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hipgpt_jax import config, numerics
from hipgpt_jax.generation import logprobs, topk


class SamplingParams(NamedTuple):
    """Sampling settings of each slot, arrays ``[B]``; see ``config.SamplingConfig``."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    penalty_B: jax.Array


def sampling_params(settings: Sequence[config.SamplingConfig]) -> SamplingParams:
    """Returns the settings of each slot as arrays."""
    # A temperature above 3.4e38 becomes infinite: all candidates that are kept are equally likely.
    with np.errstate(over="ignore"):
        return SamplingParams(
            host_array([one.temperature for one in settings], np.float32),
            host_array([one.top_k if one.top_k < 2**31 else 0 for one in settings], np.int32),  # 0 keeps all too
            host_array([one.top_p for one in settings], np.float32),
            host_array([one.repetition_penalty for one in settings], np.float32),
        )


def host_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> jax.Array:
    """Returns a NumPy array, typed as the JAX array that a jitted function makes of it."""
    return cast(jax.Array, np.asarray(values, dtype))


def seed_words(seed: int, prompt_ids: Sequence[int], sample: int) -> np.ndarray:
    """Returns the three words that the key of a sample is derived from, uint32 ``[3]``.

    Args:
        seed: In ``[0, 2**32)``.
        prompt_ids: All ids of the prompt. Their word is the first four bytes of the SHA-256 of the ids as
            little-endian 32-bit words, read as a little-endian number.
        sample: Index of the sample, from 0.
    """
    words = np.asarray(prompt_ids, dtype="<u4").tobytes()
    digest = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
    return np.array([seed, digest, sample], np.uint32)


def sample_key(words_3: np.ndarray | jax.Array) -> jax.Array:
    """Returns the key of a sample: the key of the seed, with the prompt's word and the sample's index folded in.

    Args:
        words_3: From ``seed_words``.
    """
    key = numerics.key_of(words_3[0])
    return jax.random.fold_in(jax.random.fold_in(key, words_3[1]), words_3[2])


def uniform(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the uniform number of the token at ``index``: a multiple of 2**-24 in [0, 1).

    Key and number are made of raw threefry words, so no setting of JAX changes them.
    """
    word = jax.random.key_data(jax.random.fold_in(key, index))[..., 0]
    return (word >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    r"""Applies the repetition penalty, once per distinct token.

    For a token that was seen, ``l' = l / penalty`` if ``l > 0``, else ``l' = l * penalty``. Other logits are unchanged.

    Args:
        logits_BV: Logits, float32.
        seen_BV: Tokens of the prompt and of the output so far.
        penalty_B: Positive; 1 is the identity.

    References:
        Keskar et al., `CTRL: A Conditional Transformer Language Model for Controllable Generation
        <https://arxiv.org/abs/1909.05858>`_, 2019.
    """
    penalty_B1 = penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def scale(logits_BK: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Subtracts each row's maximum and divides by the temperature: ``(l - max l) / temperature``.

    Args:
        logits_BK: Logits, float32.
        temperature_B: At least 0. A temperature of 0 does not divide: ``choose`` then takes the most likely token.
    """
    # The maximum is subtracted first, so that no temperature, however small, overflows.
    logits_BK = logits_BK - logits_BK.max(axis=-1, keepdims=True)
    return logits_BK / jnp.where(is_greedy(temperature_B), 1, temperature_B)[:, None]


def is_greedy(temperature_B: jax.Array) -> jax.Array:
    """Returns the rows that take their most likely token: temperature 0, or so small that float32 flushes it to 0."""
    return temperature_B < topk.SMALLEST_TEMPERATURE


def num_top_k(top_k_B: jax.Array, num: int) -> jax.Array:
    """Returns how many of ``num`` candidates top-k keeps: exactly ``top_k``, or all for 0."""
    return jnp.where(top_k_B == 0, num, jnp.minimum(top_k_B, num))


def num_top_p(cumulative_BK: jax.Array, num_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Returns the size of the nucleus: the fewest of ``num`` candidates whose share of their mass reaches ``top_p``.

    The candidate that crosses the threshold is kept; a ``top_p`` of 1 keeps all.

    Args:
        cumulative_BK: Cumulative sums of the candidates' unnormalized probabilities, most likely first.
        num_B: Candidates that count, at least 1.
        top_p_B: In (0, 1].

    References:
        Holtzman et al., `The Curious Case of Neural Text Degeneration <https://arxiv.org/abs/1904.09751>`_, 2020.
    """
    reached_BK = cumulative_BK >= (top_p_B * topk.at_rank(cumulative_BK, num_B - 1))[:, None]
    return jnp.where(top_p_B < 1, 1 + jnp.argmax(reached_BK, axis=-1), num_B)


def draw(cumulative_BK: jax.Array, num_B: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns the rank of the first candidate whose cumulative share of the mass exceeds the uniform number.

    >>> draw(jnp.array([[0.5, 0.75, 1.0]]), num_B=jnp.array([2]), uniform_B=jnp.array([0.7])).tolist()
    [1]
    """
    # The mass is scaled by the number, instead of the sums being divided by the mass: since the number is at least
    # 2**-24 below 1, the last candidate always exceeds the threshold, however the sums were rounded.
    threshold_B = uniform_B * topk.at_rank(cumulative_BK, num_B - 1)
    return jnp.argmax(cumulative_BK > threshold_B[:, None], axis=-1)


class Choice(NamedTuple):
    """The token of each row and the distances to another token, arrays ``[B]``.

    Attributes:
        token_B: Ids, int32.
        margin_B: See ``logprobs.margin``; at temperature 0, the gap.
        gap_B: See ``logprobs.gap``.
    """

    token_B: jax.Array
    margin_B: jax.Array
    gap_B: jax.Array


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, params: SamplingParams, uniform_B: jax.Array, num: int, *, chunked: bool
) -> Choice:
    """Chooses a token for each row among its ``num`` most likely candidates.

    Args:
        logits_BV: Logits of the next token.
        seen_BV: Tokens of the prompt and of the output so far.
        params: Sampling settings.
        uniform_B: Uniform numbers in [0, 1).
        num: Number of candidates; at least ``top_k``, or the vocabulary's size for 0. Changing it recompiles.
        chunked: See ``topk.Plan``. Changing it recompiles.
    """
    logits_BV = penalize(logits_BV.astype(jnp.float32), seen_BV, params.penalty_B)
    logits_BV = jnp.where(logits_BV == 0, 0, logits_BV)  # to top_k, -0.0 is less than 0.0
    # One candidate more than can be drawn, for the gap.
    sorted_BK, id_BK = topk.candidates(logits_BV, min(num + 1, logits_BV.shape[1]), chunked=chunked)
    scaled_BK = scale(sorted_BK[:, :num], params.temperature_B)
    cumulative_BK = jnp.cumsum(jnp.exp(scaled_BK), axis=-1)
    num_top_k_B = num_top_k(params.top_k_B, num)
    num_kept_B = num_top_p(cumulative_BK, num_top_k_B, params.top_p_B)
    rank_B = draw(cumulative_BK, num_kept_B, uniform_B)
    margin_B = logprobs.margin(cumulative_BK, num_top_k_B, num_kept_B, rank_B, params.top_p_B, uniform_B)
    rank_B = jnp.where(is_greedy(params.temperature_B), 0, rank_B)
    gap_B = logprobs.gap(sorted_BK, rank_B)
    margin_B = jnp.where(is_greedy(params.temperature_B), gap_B, margin_B)
    return Choice(topk.at_rank(id_BK, rank_B), margin_B, gap_B)


def sample(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    params: SamplingParams,
    uniform_B: jax.Array,
    plan: topk.Plan | None = None,
) -> Choice:
    """Chooses a token for each row from as many candidates as the row's settings need; see ``choose``.

    Args:
        logits_BV: Logits of the next token.
        seen_BV: Tokens of the prompt and of the output so far.
        params: Sampling settings.
        uniform_B: Uniform numbers in [0, 1).
        plan: Numbers of candidates; a CPU's by default.
    """
    plan = plan or topk.plan_for(logits_BV.shape[1], "cpu")
    choose_among: Callable[[int], Choice] = functools.partial(
        choose, logits_BV, seen_BV, params, uniform_B, chunked=plan.chunked
    )
    zero_B = jnp.zeros(len(logits_BV), jnp.float32)
    none = Choice(zero_B.astype(jnp.int32), zero_B, zero_B)
    return topk.choose_bucket(choose_among, none, plan, params.top_k_B, is_greedy(params.temperature_B))
