"""Rows that one compiled step advances together: samples enter and leave them one by one."""

from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, events, facts, sampling, waiting
from hipgpt_jax.generation import programs as compiled
from hipgpt_jax.model import cache as kv

_SMALLEST_DIVIDED = 16
_PRODUCT_ON_ALL_CORES = 4 * 2**20  # bytes of float32


class Drawn(NamedTuple):
    """A step's tokens: which rows drew one and whether it is their last, the tokens, and the facts if measured."""

    rows: dict[int, tuple[waiting.Sample, bool]]
    token_B: Any
    facts: Any


class Lane:
    """Rows of a decode step, each a sample or free.

    A step is started one token ahead of the one being fetched, so that the device does not wait.
    """

    def __init__(self, programs: compiled.Programs, width: int, *, measure: bool) -> None:
        """Prepares a lane; nothing is compiled before its first sample.

        Args:
            programs: Its functions, with parameters loaded.
            width: Its rows.
            measure: Whether events carry facts; it changes no token.
        """
        model, B, W = programs.model, width, programs.window
        self._programs = programs
        self._measured = measure
        self._rows: list[waiting.Sample | None] = [None] * B
        self._started = [0] * B
        self._lengths = [0] * B  # the host's copy of the state's
        self._under_way: Drawn | None = None
        self._is_lone = width == 1 and not programs.on_gpu
        self._of_rows, self._state = decoding.blank(B, W, model.vocab_size, programs.device)
        self._is_redrawn = [False] * B  # places whose settings need more candidates than a step has
        self._cache: tuple[kv.Cache, ...] = ()  # as many parts as were needed so far

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
        with futures.ThreadPoolExecutor() as threads:
            # One is lowered while XLA compiles or loads the ones before: only lowering holds Python's lock.
            needed = self._needed(first, first + sample.limit, sample.request)
            under_way = [threads.submit(program.lower(*args).compile) for program, args in needed]
            read = group.read()
            self._rows[place] = sample
            self._started[place], self._lengths[place] = 0, first
            self._enter(place, sample, read, group.row_of[sample.context])
            for compilation in under_way:
                compilation.result()

    def _enter(self, place: int, sample: waiting.Sample, read: tuple[kv.Cache, ...], row: int) -> None:
        """Gives a row of the batch to a sample, and to its cache the contents of a row of ``read``."""
        programs, request = self._programs, sample.request
        context_1S = np.zeros((1, programs.window), np.int32)
        context_1S[0, : len(sample.context)] = sample.context
        seen_1V = np.zeros((1, programs.model.vocab_size), bool)
        seen_1V[0, list(request.prompt_ids)] = True
        words_3 = sampling.key_words(request.generation.seed, request.prompt_ids, request.sample)
        length_1, token_1 = np.array([len(sample.context)], np.int32), np.array([sample.ids[-1]], np.int32)
        settings = sampling.settings([request.sampling])
        (self._is_redrawn[place],) = sampling.needs_more(settings, programs.search, programs.model.vocab_size, of=np)
        one = words_3, settings, length_1, token_1, context_1S, seen_1V
        self._put(programs.enter, place, one, read, row)

    def step(self) -> Drawn | None:
        """Starts the next token of every row that wants one, and fetches those started before it.

        First tokens are fetched before others are started: a CPU may run a program as it is started.
        """
        drawn, self._under_way = self._under_way or self._start(), None
        if drawn is None:
            return None
        if any(self._started[place] > 1 for place in drawn.rows):
            self._under_way = self._start()
        return drawn._replace(token_B=np.asarray(drawn.token_B), facts=jax.tree.map(np.asarray, drawn.facts))

    def settle(self, drawn: Drawn) -> list[events.Event]:
        """Returns the events of fetched tokens; a sample that ends with one leaves its place free."""
        live = [place for place, (row, _) in drawn.rows.items() if self._rows[place] is row]
        return [self._event(place, drawn) for place in live]

    def _event(self, place: int, drawn: Drawn) -> events.Event:
        row, last = drawn.rows[place]
        found = None if drawn.facts is None else events.TokenFacts(drawn.facts, place)
        event = events.event_of(row.index, int(drawn.token_B[place]), found, row.request, last=last)
        if event.finish_reason is not None:
            self._rows[place] = None
        if event.finish_reason == "error":  # what it left is multiplied by 0 for the next sample, which NaN outlives
            self._cache = jax.tree.map(lambda x: x.at[place].set(0), self._cache)
        return event

    def _start(self) -> Drawn | None:
        wanted: dict[int, tuple[waiting.Sample, bool]] = {}
        for place, row in enumerate(self._rows):
            if row is not None and self._started[place] < row.limit:
                self._started[place] += 1
                wanted[place] = row, self._started[place] == row.limit
        if not wanted:
            return None
        token_B, numbers_B4 = self._next(wanted)
        if not self._measured:
            return Drawn(wanted, token_B, None)
        asked = any(row.request.generation.top_logprobs for row, _ in wanted.values())
        likeliest = self._programs.likeliest(self._state.logits_BV) if asked else None
        return Drawn(wanted, token_B, facts.Facts(numbers_B4, likeliest))

    def _next(self, wanted: Iterable[int]) -> tuple[jax.Array, jax.Array]:
        """Takes the state a token on for the rows wanted: from the cache, or read anew where a window is full.

        With a stride of 1 a full row is read anew at every token, so all rows are, together; with a
        larger one rows fill up at different steps, and each is read alone.

        Returns:
            The new tokens and their numbers.
        """
        programs, rows, state = self._programs, self._of_rows, self._state
        params, lengths, W = programs.params, self._lengths, programs.window
        full = [place for place in wanted if lengths[place] >= W]
        cached = [lengths[place] for place in wanted if lengths[place] < W]
        together = full and programs.stride == 1
        rolled = programs.roll(params, rows, state) if together else None
        alone = [] if together else [(place, programs.roll_row(params, rows, state, place)) for place in full]
        told = None
        if cached:
            written = {programs.part_of(length) for length in cached}
            self._state, told = self._advance(state, max(written) + 1, written)
        if rolled is not None:
            is_full_B = np.isin(np.arange(len(self._rows)), full)
            self._state = programs.where(is_full_B, rolled, self._state) if cached else rolled
        for place, (one, cache) in alone:
            self._put(programs.put, place, one, cache)
        for place in wanted:
            lengths[place] = W - programs.stride + 1 if lengths[place] >= W else lengths[place] + 1
        if any(self._is_redrawn[place] for place in wanted):
            self._state, told = programs.redraw(rows, self._state)
            return told
        return programs.told(self._state) if full or told is None else told

    def _advance(self, state: decoding.State, live: int, written: Iterable[int]) -> tuple[decoding.State, Any]:
        """Returns the state after ``state``, and appends to the parts ``written`` of the ``live`` ones that are read.

        One program for a lone row on a CPU: a token of D256 L8 takes 1.68 ms, 1.85 with two, to the same bits.
        The slots of several rows may be in several parts. One program for all of that on a GPU, which also gives
        what is told of the state.
        """
        programs, rows = self._programs, self._of_rows
        if programs.on_gpu:
            after, cache, told = programs.whole(programs.params, rows, state, self._parts(live))
            self._cache = (*cache, *self._cache[live:])
            return after, told
        *before, last = self._parts(live)
        if self._is_lone:
            after, last = programs.step(programs.params, rows, state, tuple(before), last)
            self._cache = (*before, last, *self._cache[live:])
            return after, None
        after, new = programs.advance(programs.params, rows, state, (*before, last))
        cache = list(self._cache)
        for part in written:
            cache[part] = programs.append(cache[part], new, state.length_B, programs.starts[part])
        self._cache = tuple(cache)
        return after, None

    def _parts(self, number: int) -> tuple[kv.Cache, ...]:
        """Returns the first parts of the cache, those made anew that were never needed before."""
        programs, missing = self._programs, self._programs.sizes[len(self._cache) : number]
        self._cache += programs.empty(len(self._rows), missing)
        return self._cache[:number]

    def _put(self, program: Any, place: int, one: Any, cache: tuple[kv.Cache, ...], row: int = 0) -> None:
        """Replaces a row by ``put`` or ``enter`` of the programs."""
        live = len(cache)
        old = self._replaced(() if len(self._rows) == 1 else self._parts(live))
        (self._of_rows, self._state), parts = program(*old, place, one, cache, row)
        self._cache = (*parts, *self._cache[live:])

    def _replaced(self, cache: tuple[kv.Cache, ...]) -> tuple[tuple[kv.Cache, ...], Any]:
        """Returns what a row is replaced in: nothing where it is the only one."""
        return ((), None) if len(self._rows) == 1 else (cache, (self._of_rows, self._state))

    def _needed(self, first: int, last: int, request: events.Request) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Yields, with arguments, what steps from contexts of ``first`` tokens up to ``last`` need for the first time.

        So nothing compiles after the first token of a sample.
        """
        programs, rows, state = self._programs, self._of_rows, self._state
        params, W, again = programs.params, programs.window, programs.window - programs.stride + 1
        stepped = {*range(first, min(last, W))}
        if last > W and programs.stride > 1:  # and what a full window falls back to
            stepped |= {*range(again, min(again + last - W - 1, W))}
        cache, (new,) = (programs.shapes(len(self._rows), sizes) for sizes in (programs.sizes, (1,)))
        for live in sorted({programs.part_of(length) + 1 for length in stepped}):
            if not programs.is_new("advance", live):
                continue
            if programs.on_gpu:
                yield programs.whole, (params, rows, state, cache[:live])
                continue
            if self._is_lone:
                yield programs.step, (params, rows, state, cache[: live - 1], cache[live - 1])
                continue
            yield programs.advance, (params, rows, state, cache[:live])
            for part in range(live):
                if programs.is_new("append", programs.sizes[part]):
                    yield programs.append, (cache[part], new, state.length_B, programs.starts[part])
        if programs.on_gpu and programs.is_new("redraw"):  # whatever this request's settings: others compile nothing
            yield programs.redraw, (rows, state)
        if last > W and programs.is_new("roll"):
            yield from self._rolling(cache)
        if self._measured and request.generation.top_logprobs and programs.is_new("likeliest"):
            yield programs.likeliest, (state.logits_BV,)

    def _rolling(self, cache: tuple[kv.Cache, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Yields what a full window needs, with arguments."""
        programs, rows, state = self._programs, self._of_rows, self._state
        if programs.on_gpu:
            yield programs.told, (state,)
        if programs.stride > 1:
            row = programs.params, rows, state, 0
            yield programs.roll_row, row
            one, read = programs.on_device(jax.eval_shape(programs.roll_row, *row))
            yield programs.put, (*self._replaced(cache[: len(read)]), 0, one, read, 0)
        else:
            yield programs.roll, (programs.params, rows, state)
            if len(self._rows) > 1:  # beside rows that are not full
                yield programs.where, (np.zeros(len(self._rows), bool), state, state)


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
