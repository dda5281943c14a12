"""What a record says of a token: measured beside the decode step, by a program of its own.

The step is the same program whether its tokens are measured or not, so measuring cannot change them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, sampling


class Facts(NamedTuple):
    """Facts of the newest token, arrays ``[B]`` and, of the likeliest tokens, ``[B, K]``.

    Log-probabilities are in nats, of the model's own distribution: at temperature 1, of every token of
    the vocabulary, before penalty, top-k and top-p.

    Attributes:
        logprob_B: Log-probability of the token.
        rank_B: Its place in the order of likelihood; 1 is the likeliest, ties go to the lower id.
        margins: How safe the choice was.
        top_id_BK: The likeliest tokens, at most ``config.MAX_ALTERNATIVES``.
        top_logprob_BK: Their log-probabilities.
    """

    logprob_B: jax.Array
    rank_B: jax.Array
    margins: sampling.Margins
    top_id_BK: jax.Array
    top_logprob_BK: jax.Array


def measure(rows: decoding.Rows, before: decoding.State, after: decoding.State, *, alternatives: bool) -> Facts:
    """Measures the token that took the state from ``before`` to ``after``.

    Args:
        rows: Keys and settings.
        before: The state that the token was drawn in.
        after: The state with the token.
        alternatives: Whether to find the likeliest tokens too; else none are given. Changing it compiles again.
    """
    logits_BV = after.logits_BV.astype(jnp.float32)
    token_B1 = after.token_B[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=-1)
    id_1V = jnp.arange(logits_BV.shape[1])[None]
    likelier_BV = (logits_BV > own_B1) | ((logits_BV == own_B1) & (id_1V < token_B1))
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    top_BK, top_id_BK = jax.lax.top_k(
        logits_BV, min(config.MAX_ALTERNATIVES, logits_BV.shape[1]) if alternatives else 0
    )
    uniform_B = decoding.uniform(rows, before)
    return Facts(
        logprob_B=jnp.minimum(own_B1 - total_B1, 0)[:, 0],
        rank_B=1 + likelier_BV.sum(axis=-1),
        margins=sampling.margins(logits_BV, before.seen_BV, rows.settings, uniform_B),
        top_id_BK=top_id_BK,
        top_logprob_BK=jnp.minimum(top_BK - total_B1, 0),
    )
