"""Samples as text: their tokens decoded as they are drawn, cut at stop strings, and collected for records."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from hipgpt_jax.generation import events
from hipgpt_jax.text import stops, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A sample to make.

    Attributes:
        id: Of its prompt.
        prompt: The prompt's text.
        request: What is asked of the sampler.
    """

    id: str
    prompt: str
    request: events.Request


@dataclasses.dataclass(kw_only=True)
class Sample:
    """A sample as it grows; ``record.Record`` documents the fields.

    Attributes:
        job: What was asked for.
        ids: The ids drawn so far; empty if samples are not measured, as are ``tokens``, ``text`` and ``facts``.
        tokens: The text that each completed.
        text: The text, once the sample has ended.
        facts: The facts of each token.
        finish_reason: None until it ends.
        stop: The stop string found.
        error: Why it could not be finished.
        first_token: Seconds from its start to its first token.
        total: Seconds from its start to its end.
    """

    job: Job
    ids: list[int] = dataclasses.field(default_factory=list)
    tokens: list[str] = dataclasses.field(default_factory=list)
    text: str = ""
    facts: list[events.TokenFacts] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None
    error: str | None = None
    first_token: float | None = None
    total: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """A step of a sample: a token was drawn, it ended, or both.

    Attributes:
        index: Place of its job.
        text: What the sample's text grew by; nothing that a stop string could still cut off.
        sample: The sample so far.
        drew: Whether a token was drawn.
        finish_reason: None before its end.
    """

    index: int
    text: str
    sample: Sample
    drew: bool
    finish_reason: str | None


class Engine(Protocol):
    """Draws tokens for requests; see ``sampler.Sampler.run``."""

    def run(self, requests: Iterable[events.Request], *, measure: bool = False) -> Iterator[events.Event]: ...


class _Draft:
    """A sample and the decoding of its text."""

    def __init__(self, job: Job, vocabulary: tokenizer.Tokenizer, *, keep: bool) -> None:
        self.sample = Sample(job=job)
        self._keep = keep  # a text that is only streamed may be longer than memory holds
        self._count = 0
        self._pieces: list[str] = []
        self._decoder = vocabulary.decoder()
        self._stops = stops.StopFilter(job.request.generation.stop)
        self._passed = ""
        self.begin()

    def begin(self) -> None:
        """Has the sample's time start now."""
        self._began = time.perf_counter()

    def draw(self, token: int) -> bool:
        """Takes a token that is not the end token, and returns whether a stop string ends the sample."""
        text = self._decoder.push(token)
        if self._keep:
            self.sample.tokens.append(text)
        self._passed += self._stops.push(text)
        self.sample.stop = self._stops.found
        return self._stops.found is not None

    def update(self, event: events.Event) -> Update:
        """Applies an event of the sampler and returns the step of the sample."""
        sample, now = self.sample, time.perf_counter() - self._began
        if event.token is not None:
            self._count += 1
            sample.first_token = now if sample.first_token is None else sample.first_token
            if self._keep:
                sample.ids.append(event.token)
        if event.facts is not None and self._keep:
            sample.facts.append(event.facts)
        text, self._passed = self._passed, ""
        reason = event.finish_reason
        if reason is not None:
            text += self._end()
            reason = "stop" if sample.stop is not None else reason
            sample.finish_reason, sample.total = reason, now
            if reason == "error":
                sample.error = f"the model's numbers are not finite at token {self._count}: its weights are no good"
        if self._keep and text:
            self._pieces.append(text)
        if reason is not None:
            sample.text = "".join(self._pieces)
        return Update(index=event.index, text=text, sample=sample, drew=event.token is not None, finish_reason=reason)

    def _end(self) -> str:
        """Returns the text that was held back; an unfinished character is the last token's."""
        sample = self.sample
        rest = self._decoder.finish()
        if sample.tokens:
            sample.tokens[-1] += rest
        sample.tokens += [""] * (len(sample.ids) - len(sample.tokens))  # the end token has no text
        text = self._stops.push(rest) + self._stops.finish()
        sample.stop = self._stops.found
        return text


def make(engine: Engine, vocabulary: tokenizer.Tokenizer, jobs: Iterable[Job], *, measure: bool) -> Iterator[Update]:
    """Makes samples and yields their steps; ``sampler.Sampler.run`` says in which order.

    Args:
        engine: A sampler.
        vocabulary: Its model's tokenizer.
        jobs: Taken as ``Sampler.run`` takes requests.
        measure: Whether tokens are measured, and kept for the sample's record; it changes none.

    Raises:
        ValueError: A job cannot be served; ``sampler.Sampler.check`` tells beforehand.
    """
    drafts: dict[int, _Draft] = {}

    def requests() -> Iterator[events.Request]:
        for index, job in enumerate(jobs):
            draft = drafts[index] = _Draft(job, vocabulary, keep=measure)
            yield dataclasses.replace(job.request, begins=draft.begin, ends=draft.draw)

    for event in engine.run(requests(), measure=measure):
        update = drafts[event.index].update(event)
        if update.finish_reason is not None:
            del drafts[event.index]
        yield update
