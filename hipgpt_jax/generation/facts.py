"""What a record says of a token: measured beside the decode step, by a program of its own.

The step is the same program whether its tokens are measured or not, so measuring cannot change them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, sampling


class Facts(NamedTuple):
    """Facts of the newest token of each row.

    Log-probabilities are in nats, of the model's own distribution: at temperature 1, of every token of
    the vocabulary, before penalty, top-k and top-p.

    Attributes:
        numbers_4B: In one array, because fetching five cost a recorded run of 16 rows a tenth of its
            speed: log-probability of the token; its rank in the order of likelihood, 1 for the likeliest,
            ties to the lower id; and its margin and gap, see ``sampling.Margins``.
        top: Where asked for, ids ``[B, K]`` and log-probabilities of the ``config.MAX_ALTERNATIVES``
            likeliest tokens, or of all where there are fewer.
    """

    numbers_4B: jax.Array
    top: tuple[jax.Array, jax.Array] | None


def measure(rows: decoding.Rows, before: decoding.State, after: decoding.State, *, alternatives: bool) -> Facts:
    """Measures the token that took the state from ``before`` to ``after``.

    Args:
        rows: Keys and settings.
        before: The state that the token was drawn in.
        after: The state with the token.
        alternatives: Whether to find the likeliest tokens too. Changing it compiles again.
    """
    logits_BV = after.logits_BV.astype(jnp.float32)
    token_B1 = after.token_B[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=-1)
    id_1V = jnp.arange(logits_BV.shape[1])[None]
    likelier_BV = (logits_BV > own_B1) | ((logits_BV == own_B1) & (id_1V < token_B1))
    highest_B1 = logits_BV.max(axis=-1, keepdims=True)
    total_B1 = highest_B1 + jnp.log(jnp.exp(logits_BV - highest_B1).sum(axis=-1, keepdims=True))
    logprob_B = jnp.minimum(own_B1 - total_B1, 0)[:, 0]
    rank_B = 1 + likelier_BV.sum(axis=-1, dtype=jnp.float32)  # exact below 2**24 tokens
    margins = sampling.margins(logits_BV, before.seen_BV, rows.settings, decoding.uniform(rows, before))
    top = None
    if alternatives:
        top_BK, top_id_BK = jax.lax.top_k(logits_BV, min(config.MAX_ALTERNATIVES, logits_BV.shape[1]))
        top = top_id_BK, jnp.minimum(top_BK - total_B1, 0)
    return Facts(jnp.stack([logprob_B, rank_B, margins.margin_B, margins.gap_B]), top)
