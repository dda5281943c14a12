"""Requests and the sequences that answer them: ids, text and statistics of a sample as it grows. No JAX."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.text import stops, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to generate.

    Attributes:
        prompt_ids: Ids of the prompt, at least one. The model sees only the last ``W``; all of them enter the key and
            the repetition penalty.
        sample: Index of the sample among those of its prompt, from 0.
        generation: Number of tokens, seed, end token and stop strings.
        sampling: How tokens are chosen.
        id: Id of the prompt.
        prompt: Text of the prompt.
        rule: Name and digest of the rule that the sample follows.
    """

    prompt_ids: tuple[int, ...]
    sample: int
    generation: config.GenerationConfig
    sampling: config.SamplingConfig
    id: str = ""
    prompt: str = ""
    rule: str | None = None

    def context(self, window: int) -> tuple[int, ...]:
        """Returns the ids that are prefilled: the last ``window`` of the prompt, except for the very last one.

        The first decode step takes that one in like any other, so one program samples all tokens.
        """
        # A separate program for the first token made a start with a cold cache take 5.0 s instead of 3.3 s.
        return self.prompt_ids[-window:][:-1]


class Stats(NamedTuple):
    """Statistics of one token: a view of a fetched step's arrays.

    Attributes:
        step: Statistics of the step, NumPy arrays ``[B]``; see ``logprobs.TokenStats``.
        top: Ids and log-probabilities ``[B, K]`` of the most likely tokens, if they were requested.
        row: The token's row.
    """

    # Taking the step's arrays apart at once would cost a recorded run of 16 slots 5 % of its speed.
    step: Any
    top: tuple[np.ndarray, np.ndarray] | None
    row: int

    def __getattr__(self, name: str) -> Any:
        """Returns a statistic by its name in ``logprobs.TokenStats`` without the axis, such as ``logprob``."""
        return getattr(self.step, f"{name}_B")[self.row]

    def top_logprobs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and log-probabilities of the ``count`` most likely tokens; none if they were not requested."""
        if self.top is None:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        ids_BK, logprobs_BK = self.top
        return ids_BK[self.row, :count], logprobs_BK[self.row, :count]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One step of a sequence: a token was sampled, the sequence ended, or both.

    Attributes:
        index: Index of the request.
        token: The sampled id; None if the sequence ended without one.
        text: Text that the sequence grew by; a stop string cannot cut it off any more.
        stats: Statistics of the token, if they were requested.
        finish_reason: ``length`` if the tokens or the window ran out, ``eos`` after the end token, ``stop`` after a
            stop string, ``error`` if the model's logits are not finite; None before the end.
        sequence: The sequence so far.
    """

    index: int
    token: int | None = None
    text: str = ""
    stats: Stats | None = None
    finish_reason: str | None = None
    sequence: "Sequence"


class Sequence:
    """A sample as it grows; ``record.Record`` documents the fields.

    Attributes:
        index: Index of the request.
        request: The request.
        max_tokens: Maximum number of sampled tokens.
        ids: Sampled ids; empty if the sequence keeps nothing, like ``tokens``, ``text`` and ``stats``.
        tokens: Text that each token completed.
        stats: Statistics of each token.
        text: The whole text, once the sequence has ended.
        finish_reason: None until it ends.
        stop: The stop string that ended it.
        error: Why it could not be finished.
        first_token: Seconds from ``start`` to the first token.
        total: Seconds from ``start`` to the end.
    """

    def __init__(
        self,
        request: Request,
        max_tokens: int,
        vocabulary: tokenizer.Tokenizer | None = None,
        *,
        index: int = 0,
        keeps: bool = True,
    ) -> None:
        """Begins a sequence without tokens.

        Args:
            request: The request.
            max_tokens: Maximum number of sampled tokens.
            vocabulary: Decodes the tokens; None leaves the text empty.
            index: Index of the request.
            keeps: Whether tokens, text and statistics are kept for a record. A text that is only streamed may be
                longer than memory holds.
        """
        self.index, self.request, self.max_tokens = index, request, max_tokens
        self.ids: list[int] = []
        self.tokens: list[str] = []
        self.stats: list[Stats] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop: str | None = None
        self.error: str | None = None
        self.first_token: float | None = None
        self.total = 0.0
        self._keeps = keeps
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._decoder = vocabulary.decoder() if vocabulary else None
        self._stops = stops.StopFilter(request.generation.stop)
        self.start()

    def start(self) -> None:
        """Starts the sequence's clock."""
        self._started = time.perf_counter()

    def append(self, token: int, stats: Stats | None = None) -> Output:
        """Appends a sampled token, or ends the sequence with an error if it is -1.

        Args:
            token: The id; -1 if the logits were not finite.
            stats: Its statistics.
        """
        if token < 0:
            return self._end("error")
        self._num_tokens += 1
        if self.first_token is None:
            self.first_token = time.perf_counter() - self._started
        is_end_token = token == self.request.generation.eos_id
        piece = "" if is_end_token or self._decoder is None else self._decoder.push(token)  # an end token has no text
        is_early = self._num_tokens <= self.request.generation.min_tokens
        text = piece if is_early else self._stops.push(piece)
        if self._keeps:
            self.ids.append(token)
            self.tokens.append(piece)
            if stats is not None:
                self.stats.append(stats)
        if is_end_token or self._stops.found is not None or self._num_tokens >= self.max_tokens:
            return self._end("eos" if is_end_token else "length", token, text, stats)
        return self._output(token, text, stats)

    def finish(self) -> Output:
        """Ends a sequence with ``max_tokens`` of 0."""
        return self._end("length")

    def _end(self, reason: str, token: int | None = None, text: str = "", stats: Stats | None = None) -> Output:
        """Ends the sequence; a stop string, which may end only in text that was held back, precedes other reasons."""
        text += self._flush()
        self.stop = self._stops.found
        self.finish_reason = reason if self.stop is None else "stop"
        if self.finish_reason == "error":
            self.error = f"the model's logits are not finite at token {self._num_tokens}: the weights are damaged"
            if self.request.rule is not None:
                self.error = (
                    f"the logits after the rule are not finite at token {self._num_tokens}: the rule must return "
                    f"finite numbers, or minus infinity for a part of the tokens"
                )
        self.total = time.perf_counter() - self._started
        output = self._output(token, text, stats)
        self.text = "".join(self._pieces)
        return output

    def _output(self, token: int | None, text: str, stats: Stats | None) -> Output:
        if self._keeps and text:
            self._pieces.append(text)
        return Output(
            index=self.index, token=token, text=text, stats=stats, finish_reason=self.finish_reason, sequence=self
        )

    def _flush(self) -> str:
        """Returns the text that was held back; an unfinished character belongs to the last token with text."""
        rest = self._decoder.finish() if self._decoder else ""
        if self._keeps and self.ids:
            last = -2 if self.ids[-1] == self.request.generation.eos_id else -1
            if len(self.tokens) >= -last:
                self.tokens[last] += rest
        return self._stops.push(rest) + self._stops.finish()


def in_order(outputs: Iterable[Output]) -> Iterator[Output]:
    """Yields the outputs of the first request as they come, then those of the second, and so on."""
    held: dict[int, list[Output]] = {}
    current = 0
    for output in outputs:
        held.setdefault(output.index, []).append(output)
        while ready := held.pop(current, None):
            yield from ready
            if ready[-1].finish_reason is None:
                break
            current += 1
