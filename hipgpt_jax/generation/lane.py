"""Samples that are made side by side: they enter and leave the rows of a batch one by one."""

from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import batch, carry, events, facts, waiting
from hipgpt_jax.generation import programs as compiled

_SMALLEST_DIVIDED = 16
_PRODUCT_ON_ALL_CORES = 4 * 2**20  # bytes of float32


class Drawn(NamedTuple):
    """Tokens that one program drew.

    Attributes:
        rows: By place, the sample, how many tokens it drew, and whether the last of them is the last it may have.
        tokens: Arrays ``[B]`` or, of several steps, ``[T, B]``.
        facts: Theirs, if measured.
    """

    rows: dict[int, tuple[waiting.Sample, int, bool]]
    tokens: Any
    facts: Any


class Lane:
    """Places of a batch, each with a sample or free.

    Programs are started one ahead of those being fetched, so that the device does not wait.
    """

    def __init__(self, programs: compiled.Programs, *, measure: bool) -> None:
        """Prepares a lane; nothing is compiled before its first sample.

        Args:
            programs: Its functions, with parameters loaded.
            measure: Whether events carry facts; it changes no token.
        """
        self._programs = programs
        self._measured = measure
        self._batch = batch.Batch(programs)
        self._rows: list[waiting.Sample | None] = [None] * programs.rows
        self._started = [0] * programs.rows
        self._under_way: list[Drawn] = []

    @property
    def free(self) -> list[int]:
        """Places without a sample."""
        return [place for place, row in enumerate(self._rows) if row is None]

    @property
    def busy(self) -> bool:
        """Whether it holds a sample."""
        return any(self._rows)

    def admit(self, place: int, sample: waiting.Sample, group: waiting.Group) -> None:
        """Gives a free place to a sample; the next step draws its first token.

        The prompt is read but for its last token, which that step takes in like any other, so all tokens are drawn
        by one program. Where a program of its own drew the first, a start with a cold cache took 5.0 s for 3.3.

        Args:
            place: One of ``free``.
            sample: It may have a token.
            group: Its prompt is read with this one's.
        """
        first = len(sample.context)
        likeliest = self._measured and sample.request.generation.top_logprobs > 0
        with futures.ThreadPoolExecutor() as threads:
            # One is lowered while XLA compiles or loads the ones before: only lowering holds Python's lock.
            needed = self._batch.needed(first, first + sample.limit, likeliest=likeliest)
            under_way = [threads.submit(program.lower(*args).compile) for program, args in needed]
            read = group.read()
            self._rows[place], self._started[place] = sample, 0
            self._batch.enter(place, sample, read, group.row_of[sample.context])
            for compilation in under_way:
                compilation.result()

    def step(self) -> list[Drawn]:
        """Starts the next tokens of every row that wants one, and fetches those started before them."""
        drawn, self._under_way = self._under_way or self._start(), []
        if self._goes_ahead(drawn):
            self._under_way = self._start()
        return [Drawn(each.rows, *jax.tree.map(np.asarray, (each.tokens, each.facts))) for each in drawn]

    def _goes_ahead(self, drawn: list[Drawn]) -> bool:
        """Whether tokens are started before those just drawn are fetched.

        First tokens are fetched before: a CPU may run a program as it is started. So are, on a CPU, a sample's last,
        that the next takes its row at once, and those of a lone row that a stop string may end, which the step does
        not see: what is computed for nothing takes longer than the wait. 64 rows of D256 L8 that end at different
        tokens make 3534 tokens/s, and 3099 where a row idles through the next program.
        """
        rows = [(place, *row) for each in drawn for place, row in each.rows.items()]
        if not self._programs.on_gpu:
            may_stop = self._programs.is_lone and self._programs.most_steps > 1
            if any(is_last or (may_stop and sample.request.generation.stop) for _, sample, _, is_last in rows):
                return False
        return any(self._started[place] > count for place, _, count, _ in rows)

    def settle(self, drawn: list[Drawn]) -> Iterator[events.Event]:
        """Yields the events of fetched tokens; a sample that ends with one leaves its place free."""
        for each in drawn:
            several = each if each.tokens.ndim == 2 else jax.tree.map(lambda x: x[None], each._replace(rows={}))
            for index, token_B in enumerate(several.tokens):
                found = jax.tree.map(lambda x, index=index: x[index], several.facts)
                for place, (row, count, last) in each.rows.items():
                    if index < count and self._rows[place] is row:
                        is_last = last and index == count - 1
                        yield self._event(place, row, int(token_B[place]), found, last=is_last)

    def _event(
        self, place: int, row: waiting.Sample, token: int, found: facts.Facts | None, *, last: bool
    ) -> events.Event:
        of_token = None if found is None else events.TokenFacts(found, place)
        event = events.event_of(row.index, token, of_token, row.request, last=last)
        if event.finish_reason is not None:
            self._rows[place] = None
        if event.finish_reason == "error":
            self._batch.clear(place)
        return event

    def _start(self) -> list[Drawn]:
        rows = {place: row for place, row in enumerate(self._rows) if row is not None}
        wanted = {place: self._most(place, row) for place, row in rows.items() if row.limit > self._started[place]}
        return [self._measure(each, rows) for each in self._batch.step(wanted)] if wanted else []

    def _most(self, place: int, row: waiting.Sample) -> int:
        """Returns the tokens that a row may draw at once; on a CPU the first of a lone one is not kept waiting."""
        is_first = self._programs.is_lone and not self._started[place]
        return 1 if is_first else row.limit - self._started[place]

    def _measure(self, drawn: batch.Drawn, rows: dict[int, waiting.Sample]) -> Drawn:
        """Notes what was drawn of each sample, and has looked at what is said of it."""
        of_rows = {}
        for place, count in drawn.counts.items():
            self._started[place] += count
            of_rows[place] = rows[place], count, self._started[place] == rows[place].limit
        noted = Drawn(of_rows, drawn.told.token_B, self._facts(drawn.told, of_rows))
        if self._programs.on_gpu:  # now, before other steps: what is asked for later comes after those
            for x in jax.tree.leaves((noted.tokens, noted.facts)):
                x.copy_to_host_async()
        return noted

    def _facts(self, told: carry.Told, rows: dict[int, tuple[waiting.Sample, int, bool]]) -> facts.Facts | None:
        if not self._measured:
            return None
        wanted = any(row.request.generation.top_logprobs for row, _, _ in rows.values())
        return facts.Facts(told.numbers_B4, self._programs.likeliest(told.logits_BV) if wanted else None)


def count(width: int, platform: str, model: config.ModelConfig) -> int:
    """Returns the number of lanes that a decode width is divided among; the rows of each are ``width`` over it.

    On a CPU two lanes step side by side: XLA's products and attention of up to 64 rows keep one core
    busy. At D256 L8 with 2 cores a step of 16 rows takes 3.7 ms as two lanes and 5.1 as one, and with
    256 tokens in the cache 7.0 and 11.3; at 8 rows nothing is gained. Products of 4 MB and more keep
    both busy, and two lanes read them twice: 16 rows of D512 L8 take 22.6 ms as two and 19.9 as one, of
    GPT-2 91 and 68, where 64 take 174 and 151. The number of cores does not enter, because the rows of a
    lane are part of the arithmetic.
    """
    largest = 4 * model.embed_dim * model.ff_hidden_dim
    divided = width >= _SMALLEST_DIVIDED and width % 2 == 0 and largest < _PRODUCT_ON_ALL_CORES
    return 2 if platform == "cpu" and divided else 1
