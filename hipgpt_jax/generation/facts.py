"""What a record says of a token beside its id.

Four numbers are found in the step that draws the token, whether it is recorded or not: recording cannot
change a token. A program of its own, beside the step, cost a recorded run of 16 rows 13 % of its speed;
here a record costs some 4 in all, and a stream that records nothing 2 to 3 (D256 L8, 2 cores). The likeliest other
tokens, where asked for, are found by a program beside the step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.generation import sampling


class Facts(NamedTuple):
    """Facts of the newest token of each row.

    Log-probabilities are in nats, of the model's own distribution: at temperature 1, of every token of
    the vocabulary, before penalty, top-k and top-p.

    Attributes:
        numbers_B4: See ``numbers``.
        top: Where asked for, see ``likeliest``.
    """

    numbers_B4: jax.Array
    top: tuple[jax.Array, jax.Array] | None


def numbers(logits_BV: jax.Array, choice: sampling.Choice) -> jax.Array:
    """Returns four numbers of each row's choice, float32 ``[B, 4]``.

    They are the token's log-probability; its rank in the order of likelihood, 1 for the likeliest, ties
    to the lower id; and the choice's margin and gap.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    token_B1 = choice.token_B[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=-1)
    id_1V = jnp.arange(logits_BV.shape[1])[None]
    likelier_BV = (logits_BV > own_B1) | ((logits_BV == own_B1) & (id_1V < token_B1))
    logprob_B = jnp.minimum(own_B1 - _log_total(logits_BV), 0)[:, 0]
    rank_B = 1 + likelier_BV.sum(axis=-1, dtype=jnp.float32)  # exact below 2**24 tokens
    return jnp.stack([logprob_B, rank_B, choice.margin_B, choice.gap_B], axis=1)


def likeliest(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ids and log-probabilities ``[B, K]`` of the ``config.MAX_ALTERNATIVES`` likeliest tokens, or of all.

    There may be more axes before ``B``.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    top_BK, top_id_BK = jax.lax.top_k(logits_BV, min(config.MAX_ALTERNATIVES, logits_BV.shape[-1]))
    return top_id_BK, jnp.minimum(top_BK - _log_total(logits_BV), 0)


def _log_total(logits_BV: jax.Array) -> jax.Array:
    highest_B1 = logits_BV.max(axis=-1, keepdims=True)
    return highest_B1 + jnp.log(jnp.exp(logits_BV - highest_B1).sum(axis=-1, keepdims=True))
