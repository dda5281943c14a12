"""Loss and accuracy of given tokens."""

import dataclasses
import functools
import math
from collections.abc import Callable
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
        loss: Mean negative log-likelihood per token, in nats.
        nats_per_byte: The same per byte of the tokens predicted, all but the first; comparable between vocabularies.
        accuracy: Share of tokens that were the most likely one, in [0, 1]. Of several as likely each is
            right; in ``score.TextScore`` the one of the lowest id, whose rank is 1.
        tokens: Tokens predicted.
    """

    loss: float
    nats_per_byte: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinity beyond float64."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text."""
        return self.nats_per_byte / math.log(2)


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss; infinity where float64 cannot represent it, from a loss of 709.8 on."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def require_finite(found: Score) -> Score:
    """Returns a score; raises FloatingPointError if its loss is infinite or not a number."""
    if not math.isfinite(found.loss):
        raise FloatingPointError(
            f"the model's log-probabilities are not finite (loss {found.loss}): its weights are damaged or diverged. "
            f"Use another step of the run"
        )
    return found


@jax.custom_vjp
def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the loss of each target in nats, ``[B, T]``, of logits in float32.

    Its gradient, ``softmax - one_hot``, is one expression, which XLA makes where it is multiplied; as JAX derives
    it, the one is scattered into an array of float32 as large as the logits.
    """
    return _losses(logits_BTV, targets_BT)[0]


def _losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return total_BT - picked_BT, (logits_BTV, targets_BT, total_BT)


def _gradients(saved: tuple[jax.Array, jax.Array, jax.Array], of_loss_BT: jax.Array) -> tuple[jax.Array, None]:
    logits_BTV, targets_BT, total_BT = saved
    share_BTV = jnp.exp(logits_BTV - total_BT[..., None])
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    return (share_BTV - is_target_BTV.astype(share_BTV.dtype)) * of_loss_BT[..., None], None


negative_log_likelihood.defvjp(_losses, _gradients)


def sum_tokens(logits_BTV: jax.Array, targets_BT: jax.Array, kept_BT: jax.Array | None = None) -> TokenSums:
    """Sums the loss and the correct predictions of the targets kept, all by default; log-softmax in float32.

    A target whose logit no other exceeds is right. Asked by ``argmax``, which XLA does not vectorize, a
    step of the documented default takes 7.4 ms on a CPU instead of 6.0.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    nll_BT = negative_log_likelihood(logits_BTV, targets_BT)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    correct_BT = picked_BT == logits_BTV.max(axis=-1)
    return TokenSums(jnp.sum(nll_BT, where=kept_BT), jnp.sum(correct_BT, where=kept_BT))


@functools.partial(jax.jit, static_argnames="model")
def _sum_window(
    model: transformer.Transformer, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, kept_BT: jax.Array
) -> TokenSums:
    return sum_tokens(model.bind({"params": params})(tokens_BT, dropout=0.0), targets_BT, kept_BT)


def rows_of(length: int) -> int:
    """Returns how many windows of a length to score at a time: 2048 tokens keep a CPU busy and need little memory."""
    return max(1, 2048 // length)


def check_stride(stride: int, window: int) -> None:
    """Raises ValueError where windows of a length cannot lie ``stride`` apart."""
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be at least 1 and at most the window of {window} tokens: got {stride}")


class Windows(NamedTuple):
    """How a text is cut into windows, so that each token but the first is predicted once.

    The context rule: the first window predicts all its ``length`` tokens, each from those before it.
    Every further one begins ``stride`` tokens after the one before and predicts the last ``stride`` of
    its own, so each from at least ``length - stride + 1`` and at most ``length`` tokens. A stride of 1 is the
    exact sliding window of generation, ``N`` that of ``--window_stride N``, ``length`` cuts the
    text into windows that do not overlap.

    Attributes:
        starts: Where the windows begin.
        length: Inputs in a window, ``T``.
        stride: Tokens from one window to the next.
        targets: Tokens that are predicted, one less than the text has.
    """

    starts: np.ndarray
    length: int
    stride: int
    targets: int

    @classmethod
    def over(cls, targets: int, *, length: int, stride: int) -> "Windows":
        """Returns the windows over a text of ``targets + 1`` tokens; raises ValueError for a stride out of range."""
        check_stride(stride, length)
        further = -(-max(0, targets - length) // stride)
        return cls(np.arange(1 + further) * stride, length, stride, targets)

    def places(self, starts: np.ndarray) -> np.ndarray:
        """Returns the places of the inputs of windows, ``[B, T]``; beyond the end they repeat the last one."""
        return np.minimum(starts[:, None] + np.arange(self.length), self.targets - 1)

    def counted(self, starts: np.ndarray) -> np.ndarray:
        """Returns which predictions of windows count, ``[B, T]``."""
        T = np.arange(self.length)
        is_new = (starts[:, None] == 0) | (self.length - self.stride <= T)
        return is_new & (starts[:, None] + T < self.targets)


def score(
    model: transformer.Transformer,
    params: Any,
    ids: np.ndarray,
    *,
    text_bytes: int,
    batch_size: int,
    length: int,
    stride: int | None = None,
    max_batches: int = 0,
    place: Callable[[np.ndarray], jax.Array] = jnp.asarray,
    before_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Scores every token of ``ids`` but the first, each once; ``Windows`` has the context rule.

    Args:
        model: The model.
        params: Its parameters.
        ids: Token ids of the text.
        text_bytes: Bytes of text that the ids after the first stand for.
        batch_size: Windows at a time.
        length: Inputs in a window, at most the model's ``max_seq_len``.
        stride: Tokens from one window to the next; ``length`` if absent, so that they do not overlap.
        max_batches: Batches scored, evenly spread over the text; 0 scores all.
        place: Puts a batch of rows where the parameters are.
        before_batch: Called before each batch; what it raises ends the scoring.
    """
    targets = len(ids) - 1
    windows = Windows.over(targets, length=length, stride=length if stride is None else stride)
    batches = [windows.starts[i : i + batch_size] for i in range(0, len(windows.starts), batch_size)]
    if 0 < max_batches < len(batches):
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    nll, correct, scored = 0.0, 0, 0
    for batch in batches:
        before_batch()
        padded = np.resize(batch, batch_size)
        at_BT, kept_BT = windows.places(padded), windows.counted(padded)
        kept_BT[len(batch) :] = False
        sums = _sum_window(
            model,
            params,
            place(ids[at_BT].astype(np.int32)),
            place(ids[at_BT + 1].astype(np.int32)),
            place(kept_BT),
        )
        nll, correct, scored = nll + float(sums.nll), correct + int(sums.correct), scored + int(kept_BT.sum())
    loss = nll / scored
    return Score(loss=loss, nats_per_byte=loss * targets / max(1, text_bytes), accuracy=correct / scored, tokens=scored)
