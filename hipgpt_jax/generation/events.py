"""What is asked of a sampler and what it answers: requests and events."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from hipgpt_jax import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to make.

    Attributes:
        prompt_ids: The prompt's ids, at least one; those before the last ``W`` are not read.
        sample: Index of the sample among those of its prompt, from 0.
        generation: How many tokens, the seed, and the id that ends the sample.
        sampling: How each token is chosen.
        begins: Called when the sample's turn has come; it may be taken from its source before.
        ends: Called with each token but the end token as it is drawn; True ends the sample with it.
    """

    prompt_ids: tuple[int, ...]
    sample: int
    generation: config.GenerationConfig
    sampling: config.SamplingConfig
    begins: Callable[[], object] | None = None
    ends: Callable[[int], bool] | None = None


class TokenFacts(NamedTuple):
    """``facts.Facts`` of one token, as NumPy's values: a row of a step's, looked at where it is needed.

    Taken apart at once they would cost a recorded run of 16 rows 5 % of its tokens a second.
    """

    step: Any
    row: int

    @property
    def numbers_4(self) -> np.ndarray:
        """Log-probability in nats, rank from 1, margin and gap; see ``facts.numbers``."""
        return self.step.numbers_B4[self.row]

    @property
    def top(self) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens and their log-probabilities; none where they were not asked for."""
        none = np.zeros((self.row + 1, 0), np.int32), np.zeros((self.row + 1, 0), np.float32)
        ids_BK, logprobs_BK = self.step.top or none
        return ids_BK[self.row], logprobs_BK[self.row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a sample: a token was drawn, it ended, or both.

    Attributes:
        index: Place of the sample's request.
        token: The id drawn; None where the sample ends without one.
        finish_reason: ``length`` where the tokens or the window ran out, ``eos`` where the token is the
            end token, ``stop`` where the request's ``ends`` said so, ``error`` where the model's
            numbers are not finite; None before the end.
        facts: Measured where that was asked for.
    """

    index: int
    token: int | None = None
    finish_reason: str | None = None
    facts: TokenFacts | None = None


def event_of(index: int, token: int, found: TokenFacts | None, request: Request, *, last: bool) -> Event:
    """Returns the event of a token drawn for ``request``, and so whether the sample ends with it.

    Args:
        index: Place of the request.
        token: The id drawn; -1 where the model's numbers are not finite.
        found: Its facts, if they were measured.
        request: The request; its ``ends`` is told of the token.
        last: Whether it is the last token the sample may have.
    """
    if token < 0:
        return Event(index=index, finish_reason="error")
    if token == request.generation.eos_id:
        reason = "eos"
    elif request.ends is not None and request.ends(token):
        reason = "stop"
    else:
        reason = "length" if last else None
    return Event(index=index, token=token, finish_reason=reason, facts=found)


class _OfSample(Protocol):
    @property
    def index(self) -> int: ...
    @property
    def finish_reason(self) -> str | None: ...


_Happened = TypeVar("_Happened", bound=_OfSample)


def in_order(events: Iterable[_Happened]) -> Iterator[_Happened]:
    """Yields the events of the first sample as they come, then those of the second, and so on.

    >>> drawn = [Event(index=0, token=5), Event(index=1, token=6), Event(index=0, finish_reason="length")]
    >>> [(event.index, event.token) for event in in_order(drawn)]
    [(0, 5), (0, None), (1, 6)]
    """
    held: dict[int, list[_Happened]] = {}
    current = 0
    for event in events:
        held.setdefault(event.index, []).append(event)
        while waiting := held.pop(current, None):
            yield from waiting
            if waiting[-1].finish_reason is None:
                break
            current += 1
