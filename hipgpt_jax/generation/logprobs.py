"""Statistics of a sampled token: log-probabilities, rank, and how little would have changed it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.generation import sampling


class TokenStats(NamedTuple):
    """Statistics of the newest token of each slot, arrays ``[B]``, or of several steps, ``[T, B]``.

    They are computed in the step that samples the token, whether they are recorded or not, so recording cannot change
    a token.

    Attributes:
        logprob_B: Log-probability in nats under the model's own distribution: temperature 1, the whole vocabulary,
            before bias, bans, penalties and cuts.
        rank_B: Rank in that distribution, 1 for the most likely token; ties go to the lower id.
        sampled_logprob_B: See ``sampling.Choice``, like the others.
        kept_B: Number of candidates.
        kept_mass_B: Their probability before the cuts.
        lead_B: Distance to another token by the draw.
        cut_B: Distance to another token by the cuts.
    """

    # A separate program for these cost a recorded run of 16 rows 13 % of its speed; here it costs 4 % in all, and a
    # stream that records nothing 2 to 3 % (D256 L8, 2 cores).
    logprob_B: jax.Array
    rank_B: jax.Array
    sampled_logprob_B: jax.Array
    kept_B: jax.Array
    kept_mass_B: jax.Array
    lead_B: jax.Array
    cut_B: jax.Array


def token_stats(logits_BV: jax.Array, choice: sampling.Choice) -> TokenStats:
    """Returns the statistics of chosen tokens.

    Args:
        logits_BV: The model's logits.
        choice: The tokens, and how they were chosen.
    """
    token_B, *how = choice
    logits_BV = logits_BV.astype(jnp.float32)
    token_B1 = token_B[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=-1)
    id_1V = jnp.arange(logits_BV.shape[1])[None]
    is_more_likely_BV = (logits_BV > own_B1) | ((logits_BV == own_B1) & (id_1V < token_B1))
    logprob_B = jnp.minimum(own_B1 - _logsumexp(logits_BV), 0)[:, 0]
    return TokenStats(logprob_B, 1 + is_more_likely_BV.sum(axis=-1, dtype=jnp.int32), *how)


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
