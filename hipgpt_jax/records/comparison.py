"""Comparison of a record with the sample regenerated from it."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hipgpt_jax.generation import requests, sampling, scheduler
from hipgpt_jax.records import record, replay, rounding
from hipgpt_jax.text import tokenizer

# How far two computations of one logit, or of one log-probability, may be apart. Seen in float32: 2e-5 between batch
# sizes and between cached and whole contexts on a CPU, 1e-4 between GPT-2 here and in another framework. Seen in
# bfloat16 between cached and whole contexts: 0.16 among 57,000 log-probabilities of the shipped run.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.3}

_STATISTICS = ("logprobs", "ranks", "margins", "gaps", "top_logprobs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fork:
    """The first token that differs between a record and its regenerated sample.

    Attributes:
        place: Index of the token.
        recorded: Id in the record; None where the record ends.
        found: Regenerated id; None where the regenerated sample ends.
        margin: Regenerated margin there; None where that sample ends.
        gap: Regenerated gap there; None where that sample ends.
    """

    place: int
    recorded: int | None
    found: int | None
    margin: float | None
    gap: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alteration:
    """A field of a record that its regeneration contradicts.

    Attributes:
        field: Name of the field.
        place: Index of the first token concerned; None for a field of the whole sample.
        recorded: Number in the record; None where it is no single number.
        found: Regenerated number; None where there is none to compare.
    """

    field: str
    place: int | None = None
    recorded: float | None = None
    found: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Verdict on a record.

    Attributes:
        recorded: The record.
        found: The regenerated sample; it ends one token after the record's ids at the latest.
        fork: First token that differs; None where ids and end are the same.
        altered: Fields that neither the regenerated sample nor rounding explains.
        is_rounding: Whether rounding explains the fork and everything recorded after it.
        logprob_error: Largest difference of a log-probability before the fork, in nats.
    """

    recorded: record.Record
    found: record.Record
    fork: Fork | None
    altered: tuple[Alteration, ...]
    is_rounding: bool
    logprob_error: float

    @property
    def is_identical(self) -> bool:
        """Whether the record is confirmed."""
        return self.fork is None and not self.altered


class Judge:
    """Compares records of one run and one decoding configuration with their regenerated samples.

    Where the record's numerics and versions are those of the replay, every field must be equal. Where they differ,
    statistics must be within the tolerance of the regenerated ones, or else possible for logits within the tolerance
    of those recomputed here (``rounding.Draw``): ranks may differ where neighbours are nearly tied, margins where the
    end of the nucleus is uncertain. No verdict depends on a margin or a gap in the record.

    After a fork the recorded ids cannot be regenerated, since each token depends on those before it. There the
    distribution after the recorded ids is recomputed for every further token, so that one near tie does not excuse
    whatever follows it.
    """

    def __init__(self, engine: scheduler.Scheduler, vocabulary: tokenizer.Tokenizer) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._computed: tuple[Any, np.ndarray] = (None, np.zeros(0))

    def compare(self, recorded: record.Record, found: record.Record) -> Comparison:
        """Compares a record with its regenerated sample.

        Args:
            recorded: The record; its ids are those of the vocabulary.
            found: Its sample, regenerated from ``replay.shortened``.
        """
        fork = _find_fork(recorded, found)
        place = len(recorded.ids) if fork is None else fork.place
        is_exact = (recorded.numerics, recorded.versions) == (found.numerics, found.versions)
        statistics = _differences(recorded, found, place) if is_exact else self._unlikely(recorded, found, place)
        altered = [*_altered(recorded, found, ("prompt", "prompt_dropped", "error")), *statistics]
        is_rounding = False
        if fork is None:
            altered += _altered(recorded, found, ("tokens", "text", "stop"))
        elif fork.recorded is not None and fork.found is not None:
            after = list(self._unexplained(recorded, place))
            is_rounding = not altered and not after
            altered += after if not _is_at(after, "ids", place) else []
        pairs = zip(recorded.logprobs[:place], found.logprobs[:place], strict=True)
        return Comparison(
            recorded=recorded,
            found=found,
            fork=fork,
            altered=_first_of_each(altered),
            is_rounding=is_rounding,
            logprob_error=max((abs(old - new) for old, new in pairs), default=0.0),
        )

    def _unlikely(self, recorded: record.Record, found: record.Record, end: int) -> Iterator[Alteration]:
        """Yields statistics before ``end`` that rounding does not explain."""
        if (recorded.top_logprobs is None) != (found.top_logprobs is None):
            yield Alteration(field="top_logprobs")
        tolerance = TOLERANCE[recorded.numerics.dtype]
        for place in range(end):
            if not _is_near(recorded, found, place, tolerance):
                for name in self._contradictions(recorded, place):
                    yield _alteration(name, place, recorded, found)

    def _unexplained(self, recorded: record.Record, fork: int) -> Iterator[Alteration]:
        """Yields what rounding does not explain from the fork on: an id, which is the last, statistics, or the end."""
        for place in range(fork, len(recorded.ids)):
            for name in self._contradictions(recorded, place):
                yield Alteration(field=name, place=place)
                if name == "ids":
                    return
        told = self._retell(recorded)
        ends = {"finish_reason": told.finish_reason, "tokens": tuple(told.tokens), "text": told.text, "stop": told.stop}
        yield from (Alteration(field=name) for name, value in ends.items() if getattr(recorded, name) != value)

    def _contradictions(self, recorded: record.Record, place: int) -> Iterator[str]:
        """Yields the fields at a token that no logits within the tolerance explain."""
        token, tolerance = recorded.ids[place], TOLERANCE[recorded.numerics.dtype]
        draw = self._draw(recorded, place, tolerance)
        margins = draw.margins(token)
        if margins is None:
            yield "ids"
            return
        if abs(recorded.logprobs[place] - draw.logprobs[token]) > tolerance:
            yield "logprobs"
        for name, interval in (("ranks", draw.ranks(token)), ("margins", margins), ("gaps", draw.gaps(token))):
            if not interval.holds(getattr(recorded, name)[place]):
                yield name
        if recorded.top_logprobs is not None:
            best = recorded.top_logprobs[place]
            if not self._are_likeliest(best, recorded.settings.top_logprobs, draw, tolerance):
                yield "top_logprobs"

    def _are_likeliest(
        self, best: Sequence[tuple[int, float, str]], count: int, draw: rounding.Draw, tolerance: float
    ) -> bool:
        """Returns whether the likeliest tokens can be these: each near its own log-probability and that of its rank."""
        ids, size = [token for token, _, _ in best], self._vocabulary.vocab_size
        if len(best) != min(count, size) or len(set(ids)) < len(ids) or max(ids, default=0) >= size:
            return False
        in_order = np.sort(draw.logprobs)[::-1]
        return all(
            text == self._vocabulary.show(token)
            and abs(logprob - draw.logprobs[token]) <= tolerance
            and abs(logprob - ranked) <= tolerance
            for (token, logprob, text), ranked in zip(best, in_order, strict=False)
        )

    def _draw(self, recorded: record.Record, place: int, tolerance: float) -> rounding.Draw:
        """Recomputes the draw of a record's token from the record's own ids before it."""
        ids = (*recorded.prompt_ids, *recorded.ids)
        length = len(recorded.prompt_ids) + place
        start = replay.window_start(recorded, length)
        seen_V = np.zeros(self._engine.model.vocab_size, bool)
        seen_V[list(ids[:length])] = True
        key = sampling.sample_key(sampling.seed_words(recorded.seed, recorded.prompt_ids, recorded.sample))
        uniform = float(sampling.uniform(key, jax.numpy.uint32(place)))
        logits_V = self._logits(ids[start : start + self._engine.window])[length - start - 1]
        return rounding.Draw(logits_V, seen_V, recorded.settings.configs()[2], uniform, tolerance)

    def _logits(self, ids: tuple[int, ...]) -> np.ndarray:
        """Returns the logits ``[T, V]`` after each of some ids; those computed last are kept."""
        if self._computed[0] != ids:
            width = min(self._engine.window, 1 << (len(ids) - 1).bit_length())  # of few widths, few compilations
            padded_1T = np.zeros((1, width), np.int32)
            padded_1T[0, : len(ids)] = ids
            self._computed = ids, np.asarray(_forward(self._engine.module, self._engine.params, padded_1T))[0]
        return self._computed[1]

    def _retell(self, recorded: record.Record) -> requests.Sequence:
        """Returns the sequence of the recorded ids, with the text and the end that follow from them."""
        request = replay.request(recorded)
        sequence = requests.Sequence(request, self._engine.max_tokens(request), self._vocabulary)
        for token in recorded.ids:
            if sequence.append(token).finish_reason is not None:
                break
        return sequence


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    return model.bind({"params": params})(tokens_BT, dropout=0.0)


def _find_fork(recorded: record.Record, found: record.Record) -> Fork | None:
    pairs = list(zip(recorded.ids, found.ids, strict=False))
    place = next((index for index, (old, new) in enumerate(pairs) if old != new), len(pairs))
    is_whole = place == len(recorded.ids) == len(found.ids)
    if is_whole and recorded.finish_reason == found.finish_reason:
        return None

    def at(values: Sequence[Any]) -> Any:
        return values[place] if place < len(values) else None

    return Fork(
        place=place,
        recorded=at(recorded.ids),
        found=at(found.ids),
        margin=at(found.margins),
        gap=at(found.gaps),
    )


def _altered(recorded: record.Record, found: record.Record, names: Iterable[str]) -> Iterator[Alteration]:
    return (Alteration(field=name) for name in names if getattr(recorded, name) != getattr(found, name))


def _differences(recorded: record.Record, found: record.Record, end: int) -> Iterator[Alteration]:
    """Yields statistics before ``end`` that are not equal."""
    for name in _STATISTICS:
        old, new = getattr(recorded, name), getattr(found, name)
        if (old is None) != (new is None):
            yield Alteration(field=name)
        elif old is not None and old[:end] != new[:end]:
            place = next(place for place in range(end) if old[place] != new[place])
            yield _alteration(name, place, recorded, found)


def _alteration(name: str, place: int, recorded: record.Record, found: record.Record) -> Alteration:
    if name == "top_logprobs":
        return Alteration(field=name, place=place)
    old, new = getattr(recorded, name)[place], getattr(found, name)[place]
    return Alteration(field=name, place=place, recorded=old, found=new)


def _is_near(recorded: record.Record, found: record.Record, place: int, tolerance: float) -> bool:
    """Returns whether the statistics of a token are so near that nothing need be recomputed."""
    if recorded.ranks[place] != found.ranks[place]:
        return False
    if abs(recorded.margins[place] - found.margins[place]) > tolerance / 2:  # at temperature 1, shares move half as far
        return False
    pairs = [(getattr(recorded, name)[place], getattr(found, name)[place]) for name in ("logprobs", "gaps")]
    if recorded.top_logprobs is not None and found.top_logprobs is not None:
        old, new = recorded.top_logprobs[place], found.top_logprobs[place]
        if [(token, text) for token, _, text in old] != [(token, text) for token, _, text in new]:
            return False
        pairs += [(one[1], two[1]) for one, two in zip(old, new, strict=True)]
    return all(abs(one - two) <= tolerance for one, two in pairs)


def _is_at(altered: Sequence[Alteration], field: str, place: int) -> bool:
    return any((one.field, one.place) == (field, place) for one in altered)


def _first_of_each(altered: Iterable[Alteration]) -> tuple[Alteration, ...]:
    first: dict[str, Alteration] = {}
    for one in altered:
        first.setdefault(one.field, one)
    return tuple(first.values())
