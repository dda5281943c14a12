"""Samples that wait for a row, and their prompts, of which those of one bucket are read together."""

import collections
import dataclasses
import threading
from collections.abc import Iterator, Sequence

from hipgpt_jax.generation import events, programs
from hipgpt_jax.model import cache as kv

_TOGETHER = 64  # tokens
_AHEAD = 64  # samples


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample to be made.

    Attributes:
        index: Its request's place among all.
        request: What is asked for.
        limit: Tokens it may have.
        ids: Of its prompt, those that the window holds.
    """

    index: int
    request: events.Request
    limit: int
    ids: tuple[int, ...]

    @property
    def context(self) -> tuple[int, ...]:
        """What is read before its first step, which takes in the last of the ids."""
        return self.ids[:-1]


class Group:
    """Contexts of one bucket, read by one program, once, when the first of them is wanted.

    Attributes:
        row_of: Each context's row.
    """

    def __init__(self, compiled: programs.Programs, contexts: Sequence[tuple[int, ...]], rows: int) -> None:
        """Prepares a group of ``rows``, those beyond the contexts padding; nothing is read yet."""
        self.row_of = {ids: row for row, ids in enumerate(contexts)}
        self._programs, self._rows = compiled, rows
        self._lock = threading.Lock()
        self._found: tuple[kv.Cache, ...] | None = None

    def read(self) -> tuple[kv.Cache, ...]:
        """Returns what ``Programs.read_contexts`` does; lanes may ask at once."""
        with self._lock:
            if self._found is None:
                self._found = self._programs.read_contexts(tuple(self.row_of), self._rows)
            return self._found


@dataclasses.dataclass
class _Waiting:
    sample: Sample
    group: Group | None = None


class Queue:
    """The samples to come, in order, each with the group that its prompt is read in.

    A prompt's numbers depend on how many rows are read by its program, so those follow from the decode width
    and the bucket alone: as many as make 64 tokens, and no more than a lane has. Where fewer prompts are at
    hand the rest is padding, so samples are taken from their source ahead of need, unless a lane is of one row.
    8 prompts of 8 tokens take 11 ms together and 32 alone at D256 L8, 85 and 340 at GPT-2's size.
    """

    def __init__(self, compiled: programs.Programs, source: Iterator[Sample]) -> None:
        """Prepares a queue; nothing is taken from ``source`` yet.

        Args:
            compiled: What reads the prompts, for a lane's rows.
            source: The samples, in order.
        """
        self._programs, self._source = compiled, source
        self._ahead: collections.deque[_Waiting] = collections.deque()
        self._last: Group | None = None  # the samples of one prompt may be more than are taken ahead

    def take(self) -> tuple[Sample, Group | None] | None:
        """Returns the next sample and its group, None where the sample may have no token; None after the last."""
        while len(self._ahead) < (_AHEAD if self._programs.rows > 1 else 1):
            if (sample := next(self._source, None)) is None:
                break
            self._ahead.append(_Waiting(sample))
        if not self._ahead:
            return None
        if self._ahead[0].group is None and self._ahead[0].sample.limit:
            self._group(self._ahead[0].sample.context)
        first = self._ahead.popleft()
        if first.sample.request.begins is not None:
            first.sample.request.begins()
        return first.sample, first.group

    def _group(self, context: tuple[int, ...]) -> None:
        """Gives the sample that waits first a group, and all others whose contexts are in it."""
        alone = [each for each in self._ahead if each.group is None and each.sample.limit]
        if self._last is None or context not in self._last.row_of:
            size = self._programs.bucket(context)
            rows = max(1, min(self._programs.rows, _TOGETHER // size))
            alike = dict.fromkeys(each.sample.context for each in alone)
            contexts = [ids for ids in alike if self._programs.bucket(ids) == size]
            self._last = Group(self._programs, contexts[:rows], rows)
        for each in alone:
            if each.sample.context in self._last.row_of:
                each.group = self._last
