"""Log-probabilities of given tokens, one by one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import transformer
from hipgpt_jax.text import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """What a model thinks of a text. The first token is predicted by nothing and has no score.

    Attributes:
        ids: Ids of the text.
        tokens: The text that each completed, as in ``record.Record``.
        logprobs: Log-probability of each id but the first, in nats, float32.
        ranks: Place of each in the order of likelihood; 1 is the likeliest.
        score: The mean over them.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: np.ndarray
    ranks: np.ndarray
    score: loss.Score


def check_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Returns ids, a list or a one-dimensional array of any integer type, as Python's integers.

    Raises:
        ValueError: They are not such, fewer than two, or not in the vocabulary.
    """
    is_array = getattr(ids, "ndim", None) == 1
    if not is_array and (not isinstance(ids, Sequence) or isinstance(ids, (str, bytes, bytearray))):
        raise ValueError(f"a text to score must be a text or a list of ids: got {config.shortened(ids)}")
    if len(ids) < 2:
        raise ValueError(f"a text to score needs at least 2 tokens, the first of which has no score: got {len(ids)}")
    found = [config.as_int(token_id) for token_id in (np.asarray(ids).tolist() if is_array else ids)]
    if None in found:
        raise ValueError(f"ids must be integers: got {config.shortened(ids[found.index(None)])}")
    numbers = tuple(number for number in found if number is not None)
    if not 0 <= min(numbers) <= max(numbers) < vocab_size:
        raise ValueError(f"ids must be at least 0 and below the vocabulary's size {vocab_size}")
    return numbers


def score_text(
    model: transformer.Transformer,
    params: Any,
    ids: Sequence[int],
    *,
    vocabulary: tokenizer.Tokenizer,
    window: int,
    stride: int,
) -> TextScore:
    """Scores every token of ``ids`` but the first, each once; ``loss.Windows`` has the context rule.

    Args:
        model: The model.
        params: Its parameters.
        ids: Token ids, at least two.
        vocabulary: The model's tokenizer.
        window: Tokens the model sees at most.
        stride: Tokens from one window to the next, in ``[1, window]``.

    Raises:
        ValueError: There are fewer than two tokens, an id is not in the vocabulary, or the stride is out of range.
        FloatingPointError: A log-probability is infinite or not a number.
    """
    ids = check_ids(ids, model.config.vocab_size)
    loss.check_stride(stride, window)
    array = np.asarray(ids, np.int32)
    length = min(window, 1 << (len(ids) - 2).bit_length())  # few lengths, few compilations; padding is to the right
    windows = loss.Windows.over(len(ids) - 1, length=length, stride=min(stride, length))
    rows = loss.rows_of(length)
    logprobs, ranks = np.zeros(len(ids) - 1, np.float32), np.zeros(len(ids) - 1, np.int32)
    for first in range(0, len(windows.starts), rows):
        starts = windows.starts[first : first + rows]
        padded = starts if len(windows.starts) <= rows else np.resize(starts, rows)
        at_BT, counted_BT = windows.places(padded), windows.counted(padded)
        counted_BT[len(starts) :] = False
        found = _score_windows(model, params, array[at_BT], array[at_BT + 1])
        logprobs[at_BT[counted_BT]], ranks[at_BT[counted_BT]] = (np.asarray(part)[counted_BT] for part in found)
    mean = -float(logprobs.astype(np.float64).mean())
    text_bytes = len(vocabulary.decode_bytes(ids[1:]))
    found = loss.Score(
        loss=mean,
        nats_per_byte=mean * len(logprobs) / max(1, text_bytes),
        accuracy=float((ranks == 1).mean()),
        tokens=len(logprobs),
    )
    return TextScore(
        ids=tuple(ids),
        tokens=_pieces(vocabulary, ids),
        logprobs=logprobs,
        ranks=ranks,
        score=loss.require_finite(found),
    )


@functools.partial(jax.jit, static_argnums=0)
def _score_windows(
    model: transformer.Transformer, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and rank of each target, as in ``facts.numbers``."""
    logits_BTV = model.bind({"params": params})(tokens_BT, dropout=0.0).astype(jnp.float32)
    own_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    id_V = jnp.arange(logits_BTV.shape[-1])[None, None]
    likelier_BTV = (logits_BTV > own_BT1) | ((logits_BTV == own_BT1) & (id_V < targets_BT[..., None]))
    logprob_BT = (own_BT1 - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True))[..., 0]
    return jnp.minimum(logprob_BT, 0), 1 + likelier_BTV.sum(axis=-1)


def _pieces(vocabulary: tokenizer.Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    decoder = vocabulary.decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    pieces[-1] += decoder.finish()
    return tuple(pieces)
