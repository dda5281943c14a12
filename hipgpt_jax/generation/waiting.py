"""The queue of sequences that wait for a slot, and the batches in which their prompts are prefilled."""

import collections
import dataclasses
import threading
from collections.abc import Iterator, Sequence

from hipgpt_jax.generation import backends, engine, executables, requests
from hipgpt_jax.model import cache as kv

_PREFILL_TOKENS = 64  # per program, padding included, unless one prompt is longer
_LOOKAHEAD = 64  # requests


class PrefillBatch:
    """Contexts of one bucket, prefilled by one program on each device that needs one of them.

    Attributes:
        row_index: Row of each context.
        users: Devices, by their programs, that have taken a sequence of the batch.
    """

    # A prefix is computed again on another device rather than transferred, as its blocks are padded: of 8 prompts of
    # GPT-2 with 8 tokens each, they have 151 MB.

    def __init__(self, several: Sequence[executables.Executables], contexts: list[tuple[int, ...]], rows: int) -> None:
        self.row_index = {context: row for row, context in enumerate(contexts)}
        self.users: set[executables.Executables] = set()
        self._rows = rows
        self._locks = {programs: threading.Lock() for programs in several}
        self._blocks: dict[executables.Executables, tuple[kv.Block, ...]] = {}

    def prefix(self, context: tuple[int, ...], programs: executables.Executables) -> engine.Prefix:
        """Returns a prefilled context on the device of ``programs``; several replicas may call this at once."""
        with self._locks[programs]:
            if programs not in self._blocks:
                self._blocks[programs] = programs.prefill(list(self.row_index), self._rows)
            return engine.Prefix(self._blocks[programs], row=self.row_index[context], rows=self._rows)


@dataclasses.dataclass
class Waiting:
    """A sequence that waits for a slot.

    Attributes:
        sequence: The sequence.
        context: The ids to prefill; see ``requests.Request.context``.
        batch: The batch that they are prefilled in; None if the sequence has a ``max_tokens`` of 0.
    """

    sequence: requests.Sequence
    context: tuple[int, ...]
    batch: PrefillBatch | None = None


class WaitingQueue:
    """The sequences to come, in order, each with the batch in which its prompt is prefilled.

    A prompt's results depend on the rows of its prefill program, so those follow from the batch size and the bucket
    alone: as many as make 64 tokens, and no more than a replica has slots. If fewer prompts are at hand, the other rows
    are padding. So sequences are taken from their source ahead of need, unless a replica has one slot.
    """

    # 8 prompts of 8 tokens take 11 ms together and 32 ms one by one at D256 L8, 85 and 340 ms at GPT-2's size.

    def __init__(self, several: Sequence[executables.Executables], source: Iterator[requests.Sequence]) -> None:
        self._several, self._source = several, source
        self._window, self._backend = several[0].window, several[0].backend
        self._lookahead = _LOOKAHEAD if self._backend.num_slots > 1 else 1
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._last: PrefillBatch | None = None  # the samples of a prompt may be more than the lookahead

    def take(self, programs: executables.Executables) -> Waiting | None:
        """Returns the next sequence for a device, by its programs, with its batch; None after the last one.

        Sequences whose batch is another device's are left to it, as long as there are others.
        """
        while len(self._waiting) < self._lookahead and (sequence := next(self._source, None)) is not None:
            self._waiting.append(Waiting(sequence, sequence.request.context(self._window)))
        if not self._waiting:
            return None
        suits = (one.batch is None or programs in one.batch.users for one in self._waiting)
        index = next((index for index, is_own in enumerate(suits) if is_own), 0)
        taken = self._waiting[index]
        if taken.batch is None and taken.sequence.max_tokens:
            self._assign_batch(taken.context)
        if taken.batch is not None:
            taken.batch.users.add(programs)
        del self._waiting[index]
        taken.sequence.start()
        return taken

    def _assign_batch(self, context: tuple[int, ...]) -> None:
        """Assigns a batch to the sequences of a context, and to all others whose contexts are in it."""
        unassigned = [one for one in self._waiting if one.batch is None and one.sequence.max_tokens]
        if self._last is None or context not in self._last.row_index:
            bucket = self._bucket(context)
            rows = max(self._backend.fewest_rows, min(self._backend.num_slots, _PREFILL_TOKENS // bucket))
            contexts = [
                one for one in dict.fromkeys(each.context for each in unassigned) if self._bucket(one) == bucket
            ]
            self._last = PrefillBatch(self._several, contexts[:rows], rows)
        for one in unassigned:
            if one.context in self._last.row_index:
                one.batch = self._last

    def _bucket(self, context: tuple[int, ...]) -> int:
        return backends.prefill_bucket(len(context), self._window)
