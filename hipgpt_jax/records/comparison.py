"""Comparison of a record with the sample regenerated from it."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hipgpt_jax.generation import decoding, requests, sampling, scheduler, topk
from hipgpt_jax.records import forced, record, replay, rounding
from hipgpt_jax.text import tokenizer

# Largest difference between two computations of one logit or log-probability. Seen in float32: 2e-5 between batch sizes
# and between cached and full contexts on a CPU, 1e-4 between GPT-2 here and in another framework. Seen in bfloat16
# between cached and full contexts: 0.16 among 57,000 log-probabilities of the shipped run.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.3}

# Regenerated statistics that are this near, times the tolerance, need no closer look.
_NEAR = {"logprobs": 1.0, "sampled_logprobs": 1.0, "kept_mass": 0.5, "leads": 1.0, "cuts": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fork:
    """The first token that differs between a record and its regenerated sample.

    Attributes:
        index: Index of the token.
        recorded: Recorded id; None if the record ends before it.
        regenerated: Regenerated id; None if the regenerated sample ends before it.
        lead: Regenerated lead of the token; None without a regenerated id.
        cut: Regenerated cut of the token; None without a regenerated id.
    """

    index: int
    recorded: int | None
    regenerated: int | None
    lead: float | None
    cut: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A field of a record that its regeneration contradicts.

    Attributes:
        field: Name of the field.
        index: Index of the first token concerned; None for a field of the whole sample.
        recorded: Recorded number; None if the field is not a number per token.
        regenerated: Regenerated number; None if there is none.
    """

    field: str
    index: int | None = None
    recorded: float | None = None
    regenerated: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Verdict on a record.

    Attributes:
        recorded: The record.
        regenerated: The regenerated sample; it ends at most one token after the record's ids.
        fork: First token that differs; None if the ids and the end are the same.
        mismatches: Fields that neither the regenerated sample nor rounding explains.
        is_rounding: Whether rounding explains the fork and everything recorded after it.
        logprob_error: Largest difference of a log-probability before the fork, in nats.
    """

    recorded: record.Record
    regenerated: record.Record
    fork: Fork | None
    mismatches: tuple[Mismatch, ...]
    is_rounding: bool
    logprob_error: float

    @property
    def is_identical(self) -> bool:
        """Whether the record is confirmed."""
        return self.fork is None and not self.mismatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Redrawn:
    """A token that is drawn otherwise than recorded.

    Attributes:
        index: Index of the token.
        recorded: Recorded id.
        drawn: Id drawn now, after the recorded ids before it.
        lead: Lead of that draw.
        cut: Cut of that draw.
        is_rounding: Whether rounding explains the recorded id.
    """

    index: int
    recorded: int
    drawn: int
    lead: float
    cut: float
    is_rounding: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Screening:
    """Verdict on a record whose ids were fed to the model, each drawn again.

    Attributes:
        tokens: Number of ids.
        redrawn: Those that are drawn otherwise.
        unexplained: Number of ids of which rounding does not explain the id or a statistic. Alternatives are not
            compared.
        mismatches: Fields that rounding does not explain: of tokens, except ids, and of the whole sample.
        logprob_error: Largest difference of a log-probability, in nats.
    """

    tokens: int
    redrawn: tuple[Redrawn, ...]
    unexplained: int
    mismatches: tuple[Mismatch, ...]
    logprob_error: float

    @property
    def is_explained(self) -> bool:
        """Whether every token is the recorded one, or differs by rounding."""
        return not self.unexplained and not self.mismatches


class Judge:
    """Compares records of one run and one decoding configuration with their regenerated samples.

    If a record has the numerics and versions of the replay, every field must be equal. Otherwise a statistic must be
    within the tolerance of the regenerated one, or possible for logits within the tolerance of those recomputed here
    (``rounding.Draw``): ranks can differ between near ties, leads if it is uncertain which candidates are kept.
    Recorded leads and cuts never decide. A cut is judged only where the numerics are equal.

    Recorded ids after a fork cannot be regenerated, since each token depends on those before it. There the distribution
    after the recorded ids is recomputed for every token, so that one near tie does not excuse whatever follows it.
    """

    def __init__(self, generator: scheduler.Scheduler, vocabulary: tokenizer.Tokenizer) -> None:
        self._scheduler, self._vocabulary = generator, vocabulary
        self._last_logits: tuple[tuple[int, ...], np.ndarray] = ((), np.zeros(0))

    def compare(self, recorded: record.Record, regenerated: record.Record) -> Comparison:
        """Compares a record with its regenerated sample.

        Args:
            recorded: The record; its ids are those of the vocabulary.
            regenerated: The sample of the request ``replay.shortened``.
        """
        fork = _find_fork(recorded, regenerated)
        end = len(recorded.ids) if fork is None else fork.index
        is_exact = (recorded.numerics, recorded.versions) == (regenerated.numerics, regenerated.versions)
        statistics = self._unequal if is_exact else self._implausible
        mismatches = list(_different(recorded, regenerated, ("prompt", "prompt_dropped", "error")))
        mismatches += statistics(recorded, regenerated, end)
        is_rounding = False
        if fork is None:
            mismatches += _different(recorded, regenerated, ("tokens", "text", "stop"))
        elif fork.recorded is not None and fork.regenerated is not None:
            unexplained = list(self._unexplained(recorded, end))
            is_rounding = not mismatches and not unexplained
            # If rounding does not explain the id at the fork, the fork itself is the mismatch.
            if Mismatch(field="ids", index=end) not in unexplained:
                mismatches += unexplained
        return Comparison(
            recorded=recorded,
            regenerated=regenerated,
            fork=fork,
            mismatches=_first_of_each(mismatches),
            is_rounding=is_rounding,
            logprob_error=_largest_difference(recorded.logprobs[:end], regenerated.logprobs[:end]),
        )

    def screen(self, recorded: record.Record, draws: forced.Draws) -> Screening:
        """Compares a record with the draws of its own ids."""
        drawn = _drawn(recorded, draws)
        redrawn: list[Redrawn] = []
        mismatches: list[Mismatch] = []
        unexplained = 0
        for index, (old, new) in enumerate(zip(recorded.ids, drawn.ids, strict=True)):
            if old == new and _is_near(recorded, drawn, index):
                continue
            found = [name for name in self._contradictions(recorded, index) if name != "top_logprobs"]
            unexplained += bool(found)
            mismatches += [_mismatch(name, index, recorded, drawn) for name in found if name != "ids"]
            if old != new:
                lead, cut, is_rounding = drawn.leads[index], drawn.cuts[index], "ids" not in found
                one = Redrawn(index=index, recorded=old, drawn=new, lead=lead, cut=cut, is_rounding=is_rounding)
                redrawn.append(one)
        return Screening(
            tokens=len(recorded.ids),
            redrawn=tuple(redrawn),
            unexplained=unexplained,
            mismatches=(*_first_of_each(mismatches), *self._ends(recorded)),
            logprob_error=_largest_difference(recorded.logprobs, drawn.logprobs),
        )

    def _unequal(self, recorded: record.Record, regenerated: record.Record, end: int) -> Iterator[Mismatch]:
        """Yields statistics before ``end`` that are not equal."""
        for name in record.STATISTICS:
            old, new = getattr(recorded, name), getattr(regenerated, name)
            if (old is None) != (new is None):
                yield Mismatch(field=name)
            elif old is not None and old[:end] != new[:end]:
                index = next(index for index in range(end) if old[index] != new[index])
                yield _mismatch(name, index, recorded, regenerated)

    def _implausible(self, recorded: record.Record, regenerated: record.Record, end: int) -> Iterator[Mismatch]:
        """Yields statistics before ``end`` that rounding does not explain."""
        if (recorded.top_logprobs is None) != (regenerated.top_logprobs is None):
            yield Mismatch(field="top_logprobs")
        for index in range(end):
            if not _is_near(recorded, regenerated, index):
                for name in self._contradictions(recorded, index):
                    yield _mismatch(name, index, recorded, regenerated)

    def _unexplained(self, recorded: record.Record, fork: int) -> Iterator[Mismatch]:
        """Yields what rounding does not explain from the fork on. An unexplained id is the last."""
        for index in range(fork, len(recorded.ids)):
            for name in self._contradictions(recorded, index):
                yield Mismatch(field=name, index=index)
                if name == "ids":
                    return
        yield from self._ends(recorded)

    def _ends(self, recorded: record.Record) -> Iterator[Mismatch]:
        """Yields the fields of the whole sample that do not follow from its ids."""
        sequence = self._sequence(recorded)
        ends = {
            "finish_reason": sequence.finish_reason,
            "tokens": tuple(sequence.tokens),
            "text": sequence.text,
            "stop": sequence.stop,
        }
        yield from (Mismatch(field=name) for name, value in ends.items() if getattr(recorded, name) != value)

    def _contradictions(self, recorded: record.Record, index: int) -> Iterator[str]:
        """Yields the fields of a token that no logits within the tolerance explain."""
        token, tolerance = recorded.ids[index], TOLERANCE[recorded.numerics.dtype]
        draw = self._draw(recorded, index, tolerance)
        if not draw.explains(token):
            yield "ids"
            return
        for name, interval in draw.statistics(token).items():
            if not interval.contains(getattr(recorded, name)[index]):
                yield name
        if recorded.top_logprobs is not None:
            top = recorded.top_logprobs[index]
            if not self._are_most_likely(top, recorded.settings.top_logprobs, draw, tolerance):
                yield "top_logprobs"

    def _are_most_likely(
        self, top: Sequence[tuple[int, float, str]], count: int, draw: rounding.Draw, tolerance: float
    ) -> bool:
        """Returns whether each token is near its own log-probability and that of its rank."""
        ids, size = [token for token, _, _ in top], self._vocabulary.vocab_size
        if len(top) != min(count, size) or len(set(ids)) < len(ids) or max(ids, default=0) >= size:
            return False
        in_order = np.sort(draw.logprobs)[::-1]
        return all(
            text == self._vocabulary.show(token)
            and abs(logprob - draw.logprobs[token]) <= tolerance
            and abs(logprob - ranked) <= tolerance
            for (token, logprob, text), ranked in zip(top, in_order, strict=False)
        )

    def _draw(self, recorded: record.Record, index: int, tolerance: float) -> rounding.Draw:
        """Recomputes the draw of a recorded token from the recorded ids before it."""
        request, ids = replay.request(recorded), (*recorded.prompt_ids, *recorded.ids)
        length = len(recorded.prompt_ids) + index
        window, stride = recorded.settings.window, recorded.settings.window_stride
        start = replay.window_start(len(recorded.prompt_ids), length, window, stride)
        logits_V = self._logits(ids[start : start + self._scheduler.window])[length - start - 1]
        state = decoding.states_at(request, recorded.ids, [start], index, W=self._scheduler.window, V=len(logits_V))
        bias_V, noise_V = _bias_and_noise(self._scheduler.plan.rule, state, logits_V[None])
        return rounding.Draw(
            logits_V,
            np.asarray(bias_V),
            np.asarray(state.counts_BV)[0],
            request.sampling,
            np.asarray(noise_V),
            tolerance,
        )

    def _logits(self, ids: tuple[int, ...]) -> np.ndarray:
        """Returns the logits ``[T, V]`` after each of the ids. Consecutive tokens usually share a context."""
        if self._last_logits[0] != ids:
            # Powers of two, so that few lengths are compiled.
            length = min(self._scheduler.window, 1 << (len(ids) - 1).bit_length())
            padded_1T = np.zeros((1, length), np.int32)
            padded_1T[0, : len(ids)] = ids
            logits_1TV = forced.all_logits(self._scheduler.module, self._scheduler.params, padded_1T)
            self._last_logits = ids, np.asarray(logits_1TV)[0]
        return self._last_logits[1]

    def _sequence(self, recorded: record.Record) -> requests.Sequence:
        """Returns the sequence of the recorded ids, with the text and the end that follow from them."""
        request = replay.request(recorded)
        sequence = requests.Sequence(request, self._scheduler.max_tokens(request), self._vocabulary)
        for token in recorded.ids:
            if sequence.append(token).finish_reason is not None:
                break
        if not sequence.max_tokens:
            sequence.finish()
        return sequence


@functools.partial(jax.jit, static_argnums=0)
def _bias_and_noise(
    rule: topk.Rule | None, state: decoding.DecodeState, logits_BV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns what is added to the logit of each token before the penalties, and the noise of each."""
    V = logits_BV.shape[1]
    plan = topk.plan_for(V, "cpu")._replace(rule=rule)
    bias_BV = decoding.restrict(state, logits_BV, plan) - logits_BV
    return bias_BV[0], sampling.noise(state.key_B2, state.num_sampled_B, jax.numpy.arange(V)[None])[0]


def _find_fork(recorded: record.Record, regenerated: record.Record) -> Fork | None:
    pairs = list(zip(recorded.ids, regenerated.ids, strict=False))
    index = next((index for index, (old, new) in enumerate(pairs) if old != new), len(pairs))
    is_complete = index == len(recorded.ids) == len(regenerated.ids)
    if is_complete and recorded.finish_reason == regenerated.finish_reason:
        return None

    def at_fork(values: Sequence[Any]) -> Any:
        return values[index] if index < len(values) else None

    return Fork(
        index=index,
        recorded=at_fork(recorded.ids),
        regenerated=at_fork(regenerated.ids),
        lead=at_fork(regenerated.leads),
        cut=at_fork(regenerated.cuts),
    )


def _different(recorded: record.Record, regenerated: record.Record, names: Iterable[str]) -> Iterator[Mismatch]:
    return (Mismatch(field=name) for name in names if getattr(recorded, name) != getattr(regenerated, name))


def _mismatch(name: str, index: int, recorded: record.Record, regenerated: record.Record) -> Mismatch:
    if name == "top_logprobs":
        return Mismatch(field=name, index=index)
    old, new = getattr(recorded, name)[index], getattr(regenerated, name)[index]
    return Mismatch(field=name, index=index, recorded=old, regenerated=new)


def _first_of_each(mismatches: Sequence[Mismatch]) -> tuple[Mismatch, ...]:
    """Returns the first mismatch of each field."""
    first = {mismatch.field: mismatch for mismatch in reversed(mismatches)}
    return tuple(mismatch for mismatch in mismatches if first[mismatch.field] is mismatch)


def _largest_difference(old: Sequence[float], new: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(old, new, strict=True)), default=0.0)


def _drawn(recorded: record.Record, draws: forced.Draws) -> record.Record:
    """Returns a record with the ids and statistics of draws, and the log-probabilities of its own ids."""
    stats = draws.stats
    return dataclasses.replace(
        recorded,
        ids=tuple(draws.token_T.tolist()),
        logprobs=record.shortest(draws.logprob_T),
        ranks=tuple(stats.rank_B.tolist()),
        sampled_logprobs=record.shortest(stats.sampled_logprob_B),
        kept=tuple(stats.kept_B.tolist()),
        kept_mass=record.shortest(stats.kept_mass_B),
        leads=record.shortest(stats.lead_B),
        cuts=record.shortest(stats.cut_B),
        top_logprobs=None,
    )


def _is_near(recorded: record.Record, regenerated: record.Record, index: int) -> bool:
    """Returns whether the statistics of a token are so near that its draw need not be recomputed."""
    tolerance = TOLERANCE[recorded.numerics.dtype]
    if any(getattr(recorded, name)[index] != getattr(regenerated, name)[index] for name in ("ranks", "kept")):
        return False
    if any(
        abs(getattr(recorded, name)[index] - getattr(regenerated, name)[index]) > factor * tolerance
        for name, factor in _NEAR.items()
    ):
        return False
    if recorded.top_logprobs is not None and regenerated.top_logprobs is not None:
        old, new = recorded.top_logprobs[index], regenerated.top_logprobs[index]
        if [(token, text) for token, _, text in old] != [(token, text) for token, _, text in new]:
            return False
        return all(abs(one[1] - two[1]) <= tolerance for one, two in zip(old, new, strict=True))
    return True
