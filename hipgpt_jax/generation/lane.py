"""Rows that one compiled step advances together: samples enter and leave them one by one."""

import functools
from collections.abc import Callable, Iterable
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
        self._is_lone = width == 1 and programs.device.platform == "cpu"
        self._of_rows, self._state = decoding.blank(B, W, model.vocab_size, programs.device)
        self._cache: tuple[kv.Cache, ...] = ()  # as many parts as were needed so far

    @property
    def free(self) -> list[int]:
        """Places without a sample."""
        return [place for place, row in enumerate(self._rows) if row is None]

    @property
    def busy(self) -> bool:
        """Whether it holds a sample."""
        return any(self._rows)

    def admit(self, place: int, sample: waiting.Sample, group: waiting.Group) -> events.Event:
        """Gives a free place to a sample and returns the event of its first token.

        Args:
            place: One of ``free``.
            sample: It may have a token.
            group: Its prompt is read with this one's.
        """
        length, limit, request = len(sample.ids), sample.limit, sample.request
        # Beside the prompt's: XLA compiles in its own threads. A start with a cold cache takes 4.4 s instead of 4.9.
        with futures.ThreadPoolExecutor(1) as thread:
            never_run = self._never_run(length, length + limit - 1, request) if limit > 1 else ()
            under_way = [thread.submit(program) for program in never_run]
            logits_BV, cache = group.read()
            row = group.row_of[sample.ids]
            rows, state = self._begin(sample, logits_BV, row)
            for program in under_way:
                program.result()
        measured = self._facts(state, [request])
        self._rows[place] = sample
        self._started[place], self._lengths[place] = 1, length
        if limit > 1:
            self._put(place, (rows, state), cache, row)
        drawn = Drawn({0: (sample, limit == 1)}, *jax.device_get((state.token_B, measured)))
        return self._event(place, drawn, 0)

    def _begin(self, sample: waiting.Sample, logits_BV: jax.Array, row: int) -> tuple[decoding.Rows, decoding.State]:
        """Draws a sample's first token from the logits after its prompt; returns its row of the batch."""
        programs, request = self._programs, sample.request
        context_1S = np.zeros((1, programs.window), np.int32)
        context_1S[0, : len(sample.ids)] = sample.ids
        seen_1V = np.zeros((1, programs.model.vocab_size), bool)
        seen_1V[0, list(request.prompt_ids)] = True
        words_3 = sampling.key_words(request.generation.seed, request.prompt_ids, request.sample)
        length_1 = np.array([len(sample.ids)], np.int32)
        settings = sampling.settings([request.sampling])
        return programs.begin(words_3, settings, length_1, context_1S, seen_1V, logits_BV, row)

    def step(self) -> Drawn | None:
        """Starts the next token of every row that wants one, and fetches those started before it, if any were."""
        drawn, self._under_way = self._under_way, self._start()
        return drawn and drawn._replace(token_B=np.asarray(drawn.token_B), facts=jax.tree.map(np.asarray, drawn.facts))

    def settle(self, drawn: Drawn) -> list[events.Event]:
        """Returns the events of fetched tokens; a sample that ends with one leaves its place free."""
        live = [place for place, (row, _) in drawn.rows.items() if self._rows[place] is row]
        return [self._event(place, drawn, place) for place in live]

    def _event(self, place: int, drawn: Drawn, of: int) -> events.Event:
        """The event of the token that stands at row ``of`` of ``drawn``, for the sample at ``place``."""
        row, last = drawn.rows[of]
        found = None if drawn.facts is None else events.TokenFacts(drawn.facts, of)
        event = events.event_of(row.index, int(drawn.token_B[of]), found, row.request, last=last)
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
        self._next(wanted)
        measured = self._facts(self._state, [row.request for row, _ in wanted.values()])
        return Drawn(wanted, self._state.token_B, measured)

    def _facts(self, state: decoding.State, of: Iterable[events.Request]) -> facts.Facts | None:
        if not self._measured:
            return None
        wanted = any(request.generation.top_logprobs for request in of)
        return facts.Facts(state.numbers_B4, self._programs.likeliest(state.logits_BV) if wanted else None)

    def _next(self, wanted: Iterable[int]) -> None:
        """Takes the state a token on for the rows wanted: from the cache, or read anew where a window is full.

        With a stride of 1 a full row is read anew at every token, so all rows are, together; with a
        larger one rows fill up at different steps, and each is read alone.
        """
        programs, rows, state = self._programs, self._of_rows, self._state
        params, lengths, W = programs.params, self._lengths, programs.window
        full = [place for place in wanted if lengths[place] >= W]
        cached = [lengths[place] for place in wanted if lengths[place] < W]
        together = full and programs.stride == 1
        rolled = programs.roll(params, rows, state) if together else None
        alone = [] if together else [(place, programs.roll_row(params, rows, state, place)) for place in full]
        if cached:
            written = {programs.part_of(length) for length in cached}
            self._state = self._advance(state, max(written) + 1, written)
        if rolled is not None:
            is_full_B = np.isin(np.arange(len(self._rows)), full)
            self._state = programs.where(is_full_B, rolled, self._state) if cached else rolled
        for place, (one, cache) in alone:
            self._put(place, one, cache)
        for place in wanted:
            lengths[place] = W - programs.stride + 1 if lengths[place] >= W else lengths[place] + 1

    def _advance(self, state: decoding.State, live: int, written: Iterable[int]) -> decoding.State:
        """Returns the state after ``state``, and appends to the parts ``written`` of the ``live`` ones that are read.

        One program for a lone row on a CPU: a token of D256 L8 takes 1.68 ms, 1.85 with two, to the same bits.
        The slots of several rows may be in several parts.
        """
        programs, rows = self._programs, self._of_rows
        *before, last = self._parts(live)
        if self._is_lone:
            after, last = programs.step(programs.params, rows, state, tuple(before), last)
            self._cache = (*before, last, *self._cache[live:])
            return after
        after, new = programs.advance(programs.params, rows, state, (*before, last))
        cache = list(self._cache)
        for part in written:
            cache[part] = programs.append(cache[part], new, state.length_B, programs.starts[part])
        self._cache = tuple(cache)
        return after

    def _parts(self, number: int) -> tuple[kv.Cache, ...]:
        """Returns the first parts of the cache, those made anew that were never needed before."""
        programs, missing = self._programs, self._programs.sizes[len(self._cache) : number]
        self._cache += kv.empty(programs.model, len(self._rows), missing, programs.dtype, programs.device)
        return self._cache[:number]

    def _put(self, place: int, one: Any, cache: tuple[kv.Cache, ...], row: int = 0) -> None:
        batch, live = (self._of_rows, self._state), len(cache)
        (self._of_rows, self._state), parts = self._programs.put(self._parts(live), batch, place, one, cache, row)
        self._cache = (*parts, *self._cache[live:])

    def _never_run(self, first: int, last: int, request: events.Request) -> list[Callable[[], object]]:
        """Returns runs, for nothing, of what contexts of ``first`` to ``last`` tokens need for the first time.

        So nothing compiles after the first token of a sample. They leave the batch and its cache as they are.
        """
        programs, found = self._programs, []
        W, again = programs.window, programs.window - programs.stride + 1
        stepped = {*range(first, min(last, W))}
        if last > W and programs.stride > 1:  # and what a full window falls back to
            stepped |= {*range(again, min(again + last - W - 1, W))}
        for live in sorted({programs.part_of(length) + 1 for length in stepped}):
            if programs.is_new("advance", live):
                found.append(functools.partial(self._try_advance, live))
        if last > W and programs.is_new("roll"):
            found.append(self._try_roll)
        if self._measured and request.generation.top_logprobs and programs.is_new("likeliest"):
            found.append(functools.partial(self._facts, self._state, [request]))
        return found

    def _try_advance(self, live: int) -> None:
        programs = self._programs
        nowhere_B = jax.device_put(np.full(len(self._rows), programs.window, np.int32), programs.device)
        written = [part for part in range(live) if programs.is_new("append", programs.sizes[part])]
        self._advance(self._state._replace(length_B=nowhere_B), live, written)

    def _try_roll(self) -> None:
        programs, rows, state = self._programs, self._of_rows, self._state
        if programs.stride > 1:
            _, cache = programs.roll_row(programs.params, rows, state, 0)
            self._put(0, *decoding.take(((rows, state), self._parts(len(cache))), 0))  # as it was
        else:
            programs.where(np.zeros(len(self._rows), bool), programs.roll(programs.params, rows, state), state)


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
