"""Statistics of a sampled token: log-probability, rank, and how little would have changed it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.generation import topk


class TokenStats(NamedTuple):
    """Statistics of the newest token of each slot, arrays ``[B]``, or of several steps, ``[T, B]``.

    They are computed in the step that samples the token, whether they are recorded or not, so recording cannot change
    a token.

    Attributes:
        logprob_B: Log-probability in nats under the model's own distribution: temperature 1, the whole vocabulary,
            before penalty, top-k and top-p.
        rank_B: Rank in that distribution, 1 for the most likely token; ties go to the lower id.
        margin_B: See ``margin``; at temperature 0, the gap.
        gap_B: See ``gap``.
    """

    # A separate program for these cost a recorded run of 16 rows 13 % of its speed; here it costs 4 % in all, and a
    # stream that records nothing 2 to 3 % (D256 L8, 2 cores).
    logprob_B: jax.Array
    rank_B: jax.Array
    margin_B: jax.Array
    gap_B: jax.Array


def token_stats(logits_BV: jax.Array, token_B: jax.Array, margin_B: jax.Array, gap_B: jax.Array) -> TokenStats:
    """Returns the statistics of sampled tokens.

    Args:
        logits_BV: The model's logits.
        token_B: Sampled ids.
        margin_B: Their margins.
        gap_B: Their gaps.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    token_B1 = token_B[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=-1)
    id_1V = jnp.arange(logits_BV.shape[1])[None]
    is_more_likely_BV = (logits_BV > own_B1) | ((logits_BV == own_B1) & (id_1V < token_B1))
    logprob_B = jnp.minimum(own_B1 - _logsumexp(logits_BV), 0)[:, 0]
    return TokenStats(logprob_B, 1 + is_more_likely_BV.sum(axis=-1, dtype=jnp.int32), margin_B, gap_B)


def top_logprobs(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ids and log-probabilities ``[B, K]`` of the ``config.MAX_ALTERNATIVES`` most likely tokens, or of all.

    There may be more axes before ``B``.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    top_BK, id_BK = jax.lax.top_k(logits_BV, min(config.MAX_ALTERNATIVES, logits_BV.shape[-1]))
    return id_BK, jnp.minimum(top_BK - _logsumexp(logits_BV), 0)


def _logsumexp(logits_BV: jax.Array) -> jax.Array:
    highest_B1 = logits_BV.max(axis=-1, keepdims=True)
    return highest_B1 + jnp.log(jnp.exp(logits_BV - highest_B1).sum(axis=-1, keepdims=True))


def margin(
    cumulative_BK: jax.Array,
    num_top_k_B: jax.Array,
    num_kept_B: jax.Array,
    rank_B: jax.Array,
    top_p_B: jax.Array,
    uniform_B: jax.Array,
) -> jax.Array:
    """Returns how far the draw was from another token, at most 1.

    It is the smallest of the distances from the uniform number to a boundary of the token's interval that has another
    token behind it, and from ``top_p`` to a share at which the nucleus would have ended one candidate earlier or
    later, if that changes the token.

    Args:
        cumulative_BK: Cumulative sums of the candidates' unnormalized probabilities, most likely first.
        num_top_k_B: Candidates that top-k left.
        num_kept_B: Candidates that top-p left of those.
        rank_B: Rank of the sampled candidate, from 0.
        top_p_B: In (0, 1].
        uniform_B: The uniform number in [0, 1).
    """

    def mass(num_B: jax.Array) -> jax.Array:
        return topk.at_rank(cumulative_BK, jnp.clip(num_B - 1, 0, num_top_k_B - 1))

    below_B, above_B = jnp.where(rank_B > 0, mass(rank_B), 0), mass(rank_B + 1)
    fewer_B, kept_B, more_B, all_B = (mass(n) for n in (num_kept_B - 1, num_kept_B, num_kept_B + 1, num_top_k_B))
    margin_B = jnp.where(rank_B > 0, uniform_B - below_B / kept_B, 1)
    margin_B = jnp.minimum(margin_B, jnp.where(rank_B < num_kept_B - 1, above_B / kept_B - uniform_B, 1))
    # The mass at which the nucleus would end otherwise, the mass it would then have, and whether that can be.
    one_fewer, one_more = (fewer_B, fewer_B, num_kept_B > 1), (kept_B, more_B, num_kept_B < num_top_k_B)
    for end_B, other_B, is_possible_B in (one_fewer, one_more):
        changes_B = is_possible_B & ((uniform_B * other_B < below_B) | (uniform_B * other_B >= above_B))
        distance_B = jnp.where(changes_B & (top_p_B < 1), jnp.abs(top_p_B - end_B / all_B), 1)
        margin_B = jnp.minimum(margin_B, distance_B)
    return jnp.maximum(margin_B, 0)


def gap(sorted_BK: jax.Array, rank_B: jax.Array) -> jax.Array:
    """Returns the distance of the token's logit, after the penalty, to the nearer of its neighbours by rank.

    It is the largest float32 if there is no neighbour.

    Args:
        sorted_BK: Candidates' logits, in descending order.
        rank_B: Rank of the sampled candidate, from 0.
    """
    last = sorted_BK.shape[1] - 1
    own_B = topk.at_rank(sorted_BK, rank_B)
    up_B = jnp.where(rank_B > 0, topk.at_rank(sorted_BK, jnp.maximum(rank_B - 1, 0)) - own_B, jnp.inf)
    down_B = jnp.where(rank_B < last, own_B - topk.at_rank(sorted_BK, jnp.minimum(rank_B + 1, last)), jnp.inf)
    return jnp.minimum(jnp.minimum(up_B, down_B), jnp.finfo(jnp.float32).max)
