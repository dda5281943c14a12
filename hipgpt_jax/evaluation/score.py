"""Scores of a text under a model: per token, and their means over every token but the first."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import transformer
from hipgpt_jax.text import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Mean scores over the tokens of a text.

    Attributes:
        loss: Mean negative log-likelihood per token, in nats.
        nats_per_byte: The same per byte of the predicted tokens; comparable between vocabularies.
        accuracy: Share of tokens that were the likeliest, in [0, 1]. Of several equally likely tokens each counts; in
            a ``TextScore`` only the one of rank 1.
        tokens: Number of predicted tokens.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """Per-token scores of a text. The first token has none, because nothing precedes it.

    Attributes:
        ids: Token ids of the text.
        tokens: The text that each token completes, as in ``record.Record``.
        logprobs: Log-probability of each id but the first, in nats, float32.
        ranks: Rank of each in the order of likelihood; 1 is the likeliest.
        score: The means over them.
        sampled_logprobs: Log-probability of each under sampling settings, if those were given; minus infinity for an id
            that they cut.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: np.ndarray
    ranks: np.ndarray
    score: Score
    sampled_logprobs: np.ndarray | None = None

    def __repr__(self) -> str:
        means = f"{self.score.loss:.4f} nats per token, {self.score.nats_per_byte:.4f} per byte"
        return f"<TextScore {len(self.ids)} tokens, {means}: {config.shortened(''.join(self.tokens))}>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Distribution of the token after a prompt, from the most likely token to the least.

    Attributes:
        ids: Every id of the vocabulary; of equally likely ones the lower id is first.
        tokens: The text of each.
        logprobs: Log-probability of each in the model's own distribution, in nats, float32.
        sampled_logprobs: Log-probability of each under the sampling settings; minus infinity if they cut it.
    """

    ids: np.ndarray
    tokens: tuple[str, ...]
    logprobs: np.ndarray
    sampled_logprobs: np.ndarray

    @classmethod
    def of(cls, before_V: np.ndarray, after_V: np.ndarray, vocabulary: tokenizer.Tokenizer) -> "NextToken":
        """Returns the distribution with these log-probabilities, before and after the settings."""
        ids = np.argsort(-before_V, kind="stable")
        tokens = tuple(map(vocabulary.show, ids.tolist()))
        return cls(ids=ids, tokens=tokens, logprobs=before_V[ids], sampled_logprobs=after_V[ids])

    def __repr__(self) -> str:
        likely = zip(self.tokens[:3], np.exp(self.logprobs[:3]), strict=False)
        shown = ", ".join(f"{token!r} {probability:.1%}" for token, probability in likely)
        return f"<NextToken {shown}, {np.isfinite(self.sampled_logprobs).sum()} of {len(self.ids)} kept>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """Score of one of the texts that may follow a prompt.

    Attributes:
        text: The text.
        ids: Its token ids.
        logprob: Its log-probability after the prompt, in nats.
        bytes: Its length in UTF-8.
    """

    text: str
    ids: tuple[int, ...]
    logprob: float
    bytes: int

    @property
    def per_token(self) -> float:
        """Log-probability per token."""
        return self.logprob / len(self.ids)

    @property
    def per_byte(self) -> float:
        """Log-probability per byte, which favours neither long choices nor those with common words."""
        return self.logprob / self.bytes


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss; infinity beyond float64, from a loss of 709.8 on."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_finite(score: Score) -> Score:
    """Returns a score; raises FloatingPointError if its loss is infinite or not a number."""
    if not math.isfinite(score.loss):
        raise FloatingPointError(
            f"the model's log-probabilities are not finite (loss {score.loss}): its weights are damaged or diverged. "
            f"Use another step of the run"
        )
    return score


def check_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Returns token ids, a list or a one-dimensional array of any integer type, as Python integers.

    Raises:
        ValueError: They are no such ids, fewer than two, or not in the vocabulary.
    """
    is_array = getattr(ids, "ndim", None) == 1
    if not is_array and (not isinstance(ids, Sequence) or isinstance(ids, (str, bytes, bytearray))):
        raise ValueError(f"a text to score must be a text or a list of ids: got {config.shortened(ids)}")
    if len(ids) < 2:
        raise ValueError(f"a text to score needs at least 2 tokens, the first of which has no score: got {len(ids)}")
    numbers = [config.as_int(token_id) for token_id in (np.asarray(ids).tolist() if is_array else ids)]
    if None in numbers:
        raise ValueError(f"ids must be integers: got {config.shortened(ids[numbers.index(None)])}")
    found = tuple(number for number in numbers if number is not None)
    if not 0 <= min(found) <= max(found) < vocab_size:
        raise ValueError(f"ids must be at least 0 and below the vocabulary's size {vocab_size}")
    return found


def rows_of(length: int) -> int:
    """Returns how many windows of a length to score at a time: 2048 tokens keep a CPU busy and need little memory."""
    return max(1, 2048 // length)


class Windows(NamedTuple):
    """Windows over a text that predict each token but the first exactly once.

    The first window predicts all its ``length`` tokens, each from those before it. Every further window begins
    ``stride`` tokens later and predicts its last ``stride`` tokens, each from at least ``length - stride + 1`` and at
    most ``length`` tokens. A stride of 1 is the exact sliding window of generation, ``N`` that of ``--window_stride
    N``; a stride of ``length`` gives windows that do not overlap.

    Attributes:
        starts: First position of each window.
        length: Inputs per window, ``T``.
        stride: Tokens from one window to the next.
        targets: Number of predicted tokens, one less than the text has.
    """

    starts: np.ndarray
    length: int
    stride: int
    targets: int

    @classmethod
    def over(cls, targets: int, *, length: int, stride: int) -> "Windows":
        """Returns the windows over a text of ``targets + 1`` tokens, for a stride in ``[1, length]``."""
        return cls(np.arange(1 + -(-max(0, targets - length) // stride)) * stride, length, stride, targets)

    def batches(self, batch_size: int, max_batches: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the positions of the inputs of each batch, and which predictions count, both ``[B, T]``.

        Inputs beyond the end repeat the last one, and the last batch repeats its windows; neither counts. At most
        ``max_batches`` are yielded, evenly spread over the text; 0 yields all.
        """
        groups = [self.starts[i : i + batch_size] for i in range(0, len(self.starts), batch_size)]
        if 0 < max_batches < len(groups):
            groups = [groups[i * len(groups) // max_batches] for i in range(max_batches)]
        T = np.arange(self.length)
        for group in groups:
            start_B1 = np.resize(group, batch_size)[:, None]
            counts_BT = ((start_B1 == 0) | (self.length - self.stride <= T)) & (start_B1 + T < self.targets)
            counts_BT[len(group) :] = False
            yield np.minimum(start_B1 + T, self.targets - 1), counts_BT


def _put_whole(shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
    del shape
    return jnp.asarray(read(slice(None)))


def _reader(ids: np.ndarray, position_BT: np.ndarray) -> Callable[[slice], np.ndarray]:
    """Returns a function that reads the ids of a range of rows."""
    return lambda rows: ids[position_BT[rows]].astype(np.int32)


def evaluate(
    model: transformer.Transformer,
    params: Any,
    ids: np.ndarray,
    *,
    text_bytes: int,
    batch_size: int,
    length: int,
    stride: int | None = None,
    max_batches: int = 0,
    put: Callable[[tuple[int, ...], Callable[[slice], np.ndarray]], jax.Array] = _put_whole,
    before_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Returns the mean scores of every token but the first; ``Windows`` defines the context of each.

    Args:
        model: The model.
        params: Its parameters.
        ids: Token ids of the text, at least two.
        text_bytes: Bytes of text that the ids after the first stand for.
        batch_size: Windows per batch.
        length: Inputs per window, at most the model's ``max_seq_len``.
        stride: Tokens from one window to the next, in ``[1, length]``; None is ``length``, without overlap.
        max_batches: Batches to score, evenly spread over the text; 0 scores all.
        put: Puts a batch on the devices of the parameters, given its shape and a function that reads a range of rows.
        before_batch: Called before each batch; an exception ends the scoring.

    Raises:
        ValueError: The stride is out of range.
    """
    stride = _check_stride(length if stride is None else stride, length)
    windows = Windows.over(len(ids) - 1, length=length, stride=stride)
    nll, correct, scored = 0.0, 0, 0
    for position_BT, counts_BT in windows.batches(batch_size, max_batches):
        before_batch()
        readers = (_reader(ids, position_BT), _reader(ids, position_BT + 1), counts_BT.__getitem__)
        batch = (put(counts_BT.shape, read) for read in readers)
        batch_nll, batch_correct = _sum_batch(model, params, *batch)
        nll, correct, scored = nll + float(batch_nll), correct + int(batch_correct), scored + int(counts_BT.sum())
    return _mean(nll / scored, correct / scored, scored, tokens=len(ids) - 1, text_bytes=text_bytes)


def score_text(
    model: transformer.Transformer,
    params: Any,
    ids: Sequence[int],
    *,
    vocabulary: tokenizer.Tokenizer,
    window: int,
    stride: int,
) -> TextScore:
    """Scores every token but the first; ``Windows`` defines the context of each.

    Args:
        model: The model.
        params: Its parameters.
        ids: Token ids, as ``check_ids`` returns them.
        vocabulary: The model's tokenizer.
        window: Largest number of tokens that the model sees.
        stride: Tokens from one window to the next, in ``[1, window]``.

    Raises:
        ValueError: The stride is out of range.
        FloatingPointError: A log-probability is infinite or not a number.
    """
    _check_stride(stride, window)
    array = np.asarray(ids, np.int32)
    # Few lengths, few compilations: padding on the right changes no score.
    length = min(window, 1 << (len(ids) - 2).bit_length())
    windows = Windows.over(len(ids) - 1, length=length, stride=min(stride, length))
    nll, ranks = np.zeros(len(ids) - 1, np.float32), np.zeros(len(ids) - 1, np.int32)
    for position_BT, counts_BT in windows.batches(min(rows_of(length), len(windows.starts))):
        found = _score_batch(model, params, array[position_BT], array[position_BT + 1])
        nll[position_BT[counts_BT]] = np.asarray(found.nll_BT)[counts_BT]
        ranks[position_BT[counts_BT]] = np.asarray(found.rank_BT)[counts_BT]
    logprobs = np.minimum(0 - nll, 0)  # rounding can give a likelihood above 1
    mean = -float(logprobs.astype(np.float64).mean())
    text_bytes = len(vocabulary.decode_bytes(ids[1:]))
    score = _mean(mean, float((ranks == 1).mean()), len(nll), tokens=len(nll), text_bytes=text_bytes)
    return TextScore(
        ids=tuple(ids), tokens=_pieces(vocabulary, ids), logprobs=logprobs, ranks=ranks, score=check_finite(score)
    )


@functools.partial(jax.jit, static_argnames="model")
def _score_batch(
    model: transformer.Transformer, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array
) -> loss.TokenScores:
    return loss.score_tokens(model.bind({"params": params})(tokens_BT, dropout=0.0), targets_BT)


# A program of its own: beside per-token outputs XLA adds the float32 sum up in another order.
@functools.partial(jax.jit, static_argnames="model")
def _sum_batch(
    model: transformer.Transformer, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, counts_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums the negative log-likelihood and the top tokens over the predictions that count."""
    scores = _score_batch(model, params, tokens_BT, targets_BT)
    return jnp.sum(scores.nll_BT, where=counts_BT), jnp.sum(scores.is_top_BT, where=counts_BT)


def _mean(loss: float, accuracy: float, scored: int, *, tokens: int, text_bytes: int) -> Score:
    per_byte = loss * tokens / max(1, text_bytes)
    return Score(loss=loss, nats_per_byte=per_byte, accuracy=accuracy, tokens=scored)


def _check_stride(stride: int, window: int) -> int:
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be at least 1 and at most the window of {window} tokens: got {stride}")
    return stride


def _pieces(vocabulary: tokenizer.Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    decoder = vocabulary.decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    pieces[-1] += decoder.finish()
    return tuple(pieces)
