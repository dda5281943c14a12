"""Loss and accuracy of given tokens."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax.model import transformer


class TokenSums(NamedTuple):
    """Sums over the tokens of a batch: negative log-likelihood in nats, and correct predictions."""

    nll: jax.Array
    correct: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        loss: Mean negative log-likelihood of a token, in nats.
        nats_per_byte: The same, a byte of the text; comparable between vocabularies.
        accuracy: Share of tokens that were the most likely one, in [0, 1].
        tokens: Tokens predicted.
    """

    loss: float
    nats_per_byte: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss, which is taken as 700 at most to stay finite."""
        return math.exp(min(self.loss, 700.0))


def sum_tokens(logits_BTV: jax.Array, targets_BT: jax.Array, kept_BT: jax.Array | None = None) -> TokenSums:
    """Sums the loss and the correct predictions of the targets kept, all by default; log-softmax in float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return TokenSums(jnp.sum(nll_BT, where=kept_BT), jnp.sum(correct_BT, where=kept_BT))


@functools.partial(jax.jit, static_argnames="model")
def _sum_window(
    model: transformer.Transformer, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, kept_BT: jax.Array
) -> TokenSums:
    return sum_tokens(model.bind({"params": params})(tokens_BT, dropout=0.0), targets_BT, kept_BT)


def score(
    model: transformer.Transformer,
    params: Any,
    ids: np.ndarray,
    *,
    text_bytes: int,
    batch_size: int,
    length: int,
    max_batches: int = 0,
) -> Score:
    """Scores every token of ``ids`` but the first, each once.

    The context rule: the text is cut into windows of ``length`` inputs that do not overlap, so the
    ``j``-th token of a window is predicted from the ``j`` tokens before it in that window and
    the last one of the window before.

    Args:
        model: The model.
        params: Its parameters.
        ids: Token ids of the text.
        text_bytes: Bytes of text that the scored ids stand for.
        batch_size: Windows at a time.
        length: Inputs in a window, at most the model's ``max_seq_len``.
        max_batches: Batches scored, evenly spread over the text; 0 scores all.
    """
    targets = len(ids) - 1
    starts = np.arange(0, targets, length)
    batches = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
    if 0 < max_batches < len(batches):
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    nll, correct, scored = 0.0, 0, 0
    for batch in batches:
        at_BT = np.minimum(np.resize(batch, batch_size)[:, None] + np.arange(length), targets - 1)
        kept_BT = np.resize(batch, batch_size)[:, None] + np.arange(length) < targets
        kept_BT[len(batch) :] = False
        sums = _sum_window(
            model,
            params,
            jnp.asarray(ids[at_BT], jnp.int32),
            jnp.asarray(ids[at_BT + 1], jnp.int32),
            jnp.asarray(kept_BT),
        )
        nll, correct, scored = nll + float(sums.nll), correct + int(sums.correct), scored + int(kept_BT.sum())
    loss = nll / scored
    return Score(loss=loss, nats_per_byte=loss * targets / text_bytes, accuracy=correct / scored, tokens=scored)
