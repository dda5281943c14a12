"""Rows on the device that compiled steps take on together: their state, their cache, and which programs they need."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hipgpt_jax.generation import carry, sampling, waiting
from hipgpt_jax.generation import programs as compiled
from hipgpt_jax.model import cache as kv


class Drawn(NamedTuple):
    """What one program drew: how many tokens of which rows, and arrays ``[B]`` or, of several steps, ``[T, B]``."""

    counts: Mapping[int, int]
    told: carry.Told


class Batch:
    """Rows, each with a sample's context or without meaning; they never affect one another."""

    def __init__(self, programs: compiled.Programs) -> None:
        """Prepares rows; nothing is compiled.

        Args:
            programs: Their functions, with parameters loaded.
        """
        self._programs = programs
        self._width = rows = programs.rows
        self._lengths = [0] * rows  # the host's copy of the state's
        self._wide = [False] * rows  # whether the settings need more candidates than a step on a GPU has
        self._ends = [-1] * rows  # the token that ends each
        self._of_rows, self._state = carry.blank(rows, programs.window, programs.model.vocab_size, programs.device)
        self._cache: tuple[kv.Cache, ...] = ()  # as many parts as were needed so far

    def enter(self, place: int, sample: waiting.Sample, read: tuple[kv.Cache, ...], row: int) -> None:
        """Gives a row to a sample, and to its cache the contents of a row of ``read``."""
        programs, request = self._programs, sample.request
        context_1S = np.zeros((1, programs.window), np.int32)
        context_1S[0, : len(sample.context)] = sample.context
        seen_1V = np.zeros((1, programs.model.vocab_size), bool)
        seen_1V[0, list(request.prompt_ids)] = True
        words_3 = sampling.key_words(request.generation.seed, request.prompt_ids, request.sample)
        length_1, token_1 = np.array([len(sample.context)], np.int32), np.array([sample.ids[-1]], np.int32)
        one = words_3, sampling.settings([request.sampling]), length_1, token_1, context_1S, seen_1V
        if programs.on_gpu:
            one = jax.device_put(one, programs.device)  # else what comes of it is not bound to it, and is lowered for
        self._put(programs.enter, place, one, read, row)
        self._lengths[place] = len(sample.context)
        self._wide[place] = programs.on_gpu and programs.search.is_wide(request.sampling)
        self._ends[place] = request.generation.eos_id

    def clear(self, place: int) -> None:
        """Empties a row's cache: what NaN left there is multiplied by 0 for the next sample, which it outlives."""
        self._cache = jax.tree.map(lambda x: x.at[place].set(0), self._cache)

    def step(self, wanted: Mapping[int, int]) -> list[Drawn]:
        """Starts the next tokens of rows: from the cache, or read anew where a window is full.

        With a stride of 1 a full row is read anew at every token, so all rows are, together; with a
        larger one rows fill up at different steps, and each is read alone.

        Args:
            wanted: Places, each with the most tokens it may have. As long as its window is not full it gets several
                of them, by one program; then one.
        """
        programs, rows, state = self._programs, self._of_rows, self._state
        full = [place for place in wanted if self._lengths[place] >= programs.window]
        cached = {place: most for place, most in wanted.items() if place not in full}
        together = full and programs.stride == 1
        rolled = programs.roll(programs.params, rows, state) if together else None
        alone = [] if together else [(place, programs.roll_row(programs.params, rows, state, place)) for place in full]
        drawn = self._advance(cached)
        if rolled is not None:
            is_full_B = np.isin(np.arange(self._width), full)
            self._state = programs.where(is_full_B, rolled, self._state) if cached else rolled
        for place, (one, cache) in alone:
            self._put(programs.put, place, one, cache)
        for place in full:
            self._lengths[place] = programs.window - programs.stride + 1
        return [*drawn, Drawn(dict.fromkeys(full, 1), programs.told(self._state))] if full else drawn

    def _advance(self, wanted: Mapping[int, int]) -> list[Drawn]:
        """Takes rows on that are not full, each by the program that its own settings call for, whatever the others'."""
        groups = {
            wide: {place: most for place, most in wanted.items() if self._wide[place] == wide} for wide in (False, True)
        }
        return [self._take_steps(group, wide=wide) for wide, group in groups.items() if group]

    def _take_steps(self, wanted: Mapping[int, int], *, wide: bool) -> Drawn:
        """Takes rows on by several tokens, no further than their window."""
        programs, W = self._programs, self._programs.window
        live, most = self._reach(max(self._lengths[place] for place in wanted))
        counts = {place: min(limit, most, W - self._lengths[place]) for place, limit in wanted.items()}
        left_B = np.zeros(self._width, np.int32)
        left_B[list(counts)] = list(counts.values())
        end_B = np.array(self._ends, np.int32)
        before, cache = self._divided(self._parts(live))
        arguments = programs.params, self._of_rows, self._state, before, cache, left_B, end_B
        self._state, cache, told = (programs.steps_wide if wide else programs.steps)(*arguments)
        self._cache = (*before, *cache, *self._cache[live:])
        for place, count in counts.items():
            self._lengths[place] += count
        return Drawn(counts, told)

    def _reach(self, longest: int) -> tuple[int, int]:
        """Returns how many parts of the cache a program reads for a longest context, and how far it takes that.

        On a CPU, no further than the part where its next slot stands: it reads no part before it is needed. On a
        GPU a row reads what all of the program's steps might, so that its last tokens read as others do.
        """
        programs, most = self._programs, self._programs.most_steps
        if programs.on_gpu:
            return 1 + programs.part_of(min(longest + most, programs.window) - 1), most
        live = 1 + programs.part_of(longest)
        return live, min(most, programs.starts[live] - longest)

    def _divided(self, cache: tuple[kv.Cache, ...]) -> tuple[tuple[kv.Cache, ...], tuple[kv.Cache, ...]]:
        """Returns the parts that a program only reads, which a lone row on a CPU has, and those it may write to."""
        first = len(cache) - 1 if self._programs.is_lone else 0
        return cache[:first], cache[first:]

    def _parts(self, number: int) -> tuple[kv.Cache, ...]:
        """Returns the first parts of the cache, those made anew that were never needed before."""
        self._cache += self._programs.empty(self._width, self._programs.sizes[len(self._cache) : number])
        return self._cache[:number]

    def _put(self, program: Any, place: int, one: Any, cache: tuple[kv.Cache, ...], row: int = 0) -> None:
        """Replaces a row by ``put`` or ``enter`` of the programs."""
        live = len(cache)
        old = self._replaced(() if self._width == 1 else self._parts(live))
        (self._of_rows, self._state), parts = program(*old, place, one, cache, row)
        self._cache = (*parts, *self._cache[live:])

    def _replaced(self, cache: tuple[kv.Cache, ...]) -> tuple[tuple[kv.Cache, ...], Any]:
        """Returns what a row is replaced in: nothing where it is the only one."""
        return ((), None) if self._width == 1 else (cache, (self._of_rows, self._state))

    def needed(self, first: int, last: int, *, likeliest: bool) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Yields, with arguments, what steps from contexts of ``first`` tokens up to ``last`` need for the first time.

        So nothing compiles after the first token of a sample.

        Args:
            first: Tokens that the first step finds in the context.
            last: Tokens that stand there after the last step, if the window holds them.
            likeliest: Whether the likeliest tokens are asked for.
        """
        programs, rows, state = self._programs, self._of_rows, self._state
        params, W, again = programs.params, programs.window, programs.window - programs.stride + 1
        reach = last + (programs.most_steps - 1 if programs.on_gpu else 0)
        stepped = {*range(first, min(reach, W))}
        if last > W and programs.stride > 1:  # and what a full window falls back to
            stepped |= {*range(again, min(again + reach - W - 1, W))}
        cache, none_B = programs.shapes(self._width, programs.sizes), np.zeros(self._width, np.int32)
        for live in sorted({programs.part_of(length) + 1 for length in stepped}):
            if programs.is_new("steps", live):
                arguments = params, rows, state, *self._divided(cache[:live]), none_B, none_B
                yield programs.steps, arguments
                if programs.on_gpu:  # both, whatever this sample's settings: others compile nothing
                    yield programs.steps_wide, arguments
        if last > W and programs.is_new("roll"):
            yield from self._rolling(cache)
        if likeliest:
            if last > W and programs.is_new("likeliest of one step"):
                yield programs.likeliest, (state.logits_BV,)
            if stepped and programs.is_new("likeliest of several"):
                shape = (programs.most_steps, *state.logits_BV.shape)
                yield programs.likeliest, programs.on_device((jax.ShapeDtypeStruct(shape, state.logits_BV.dtype),))

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
            if self._width > 1:  # beside rows that are not full
                yield programs.where, (np.zeros(self._width, bool), state, state)
