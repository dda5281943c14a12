"""Rows on the device that compiled steps take on together: their state, their cache, and which programs they need."""

from collections.abc import Collection, Iterator, Mapping
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
    """Rows, each with a sample's context or without meaning; they never affect one another.

    Attributes:
        is_lone: Whether it is one row on a CPU, which has programs of its own.
    """

    def __init__(self, programs: compiled.Programs, rows: int) -> None:
        """Prepares rows; nothing is compiled.

        Args:
            programs: Their functions, with parameters loaded.
            rows: How many.
        """
        self._programs, self._width = programs, rows
        self._lengths = [0] * rows  # the host's copy of the state's
        self._wide = [False] * rows  # whether the settings need more candidates than a step on a GPU has
        self._ends = [-1] * rows  # the token that ends each
        self.is_lone = rows == 1 and not programs.on_gpu
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
        self._wide[place] = programs.search.is_wide(request.sampling)
        self._ends[place] = request.generation.eos_id

    def clear(self, place: int) -> None:
        """Empties a row's cache: what NaN left there is multiplied by 0 for the next sample, which it outlives."""
        self._cache = jax.tree.map(lambda x: x.at[place].set(0), self._cache)

    def step(self, wanted: Mapping[int, int]) -> list[Drawn]:
        """Starts the next tokens of rows: from the cache, or read anew where a window is full.

        With a stride of 1 a full row is read anew at every token, so all rows are, together; with a
        larger one rows fill up at different steps, and each is read alone.

        Args:
            wanted: Places, each with the most tokens it may have. On a GPU, and where ``is_lone``, it gets several of
                them, as long as its window is not full; else one.
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
        """Takes rows on that are not full."""
        if not wanted:
            return []
        if self.is_lone:
            return [self._take_lone_steps(wanted[0])]
        if not self._programs.on_gpu:
            return [self._take_step(wanted)]
        # A row is taken on by the program that its own settings call for, whatever the others'.
        groups = [
            {place: most for place, most in wanted.items() if self._wide[place] == wide} for wide in (False, True)
        ]
        programs = self._programs.steps, self._programs.steps_wide
        return [self._take_steps(program, group) for program, group in zip(programs, groups, strict=True) if group]

    def _drawn(self, counts: Mapping[int, int], told: carry.Told) -> Drawn:
        for place, count in counts.items():
            self._lengths[place] += count
        return Drawn(counts, told)

    def _take_steps(self, program: Any, wanted: Mapping[int, int]) -> Drawn:
        """Takes rows on by several tokens, no further than their window."""
        programs, W = self._programs, self._programs.window
        counts = {place: min(most, programs.most_steps, W - self._lengths[place]) for place, most in wanted.items()}
        left_B = np.zeros(self._width, np.int32)
        left_B[list(counts)] = list(counts.values())
        # Of the cache a row reads what all of the program's steps might, so that its last tokens read as others do.
        live = 1 + programs.part_of(max(min(self._lengths[place] + programs.most_steps, W) - 1 for place in counts))
        arguments = programs.params, self._of_rows, self._state, self._parts(live), left_B
        self._state, cache, told = program(*arguments)
        self._cache = (*cache, *self._cache[live:])
        return self._drawn(counts, told)

    def _take_lone_steps(self, most: int) -> Drawn:
        """Takes the only row on by several tokens, no further than the part of the cache where the first stands."""
        programs, length = self._programs, self._lengths[0]
        live = programs.part_of(length) + 1
        count = min(most, programs.most_steps, programs.starts[live] - length)
        *before, last = self._parts(live)
        arguments = programs.params, self._of_rows, self._state, tuple(before), last, count, self._ends[0]
        self._state, last, told = programs.lone_steps(*arguments)
        self._cache = (*before, last, *self._cache[live:])
        return self._drawn({0: count}, told)

    def _take_step(self, wanted: Collection[int]) -> Drawn:
        """Takes rows on by a token, and appends to the parts of the cache where it stands: theirs may be several."""
        programs, rows, state = self._programs, self._of_rows, self._state
        written = {programs.part_of(self._lengths[place]) for place in wanted}
        live = max(written) + 1
        *before, last = self._parts(live)
        self._state, new = programs.advance(programs.params, rows, state, (*before, last))
        cache = list(self._cache)
        for part in written:
            cache[part] = programs.append(cache[part], new, state.length_B, programs.starts[part])
        self._cache = tuple(cache)
        return self._drawn(dict.fromkeys(wanted, 1), programs.told(self._state))

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
        cache, (new,) = (programs.shapes(self._width, sizes) for sizes in (programs.sizes, (1,)))
        for live in sorted({programs.part_of(length) + 1 for length in stepped}):
            if not programs.is_new("advance", live):
                continue
            if programs.on_gpu:  # both, whatever this sample's settings: others compile nothing
                for program in (programs.steps, programs.steps_wide):
                    yield program, (params, rows, state, cache[:live], np.zeros(self._width, np.int32))
                continue
            if self.is_lone:
                yield programs.lone_steps, (params, rows, state, cache[: live - 1], cache[live - 1], 0, 0)
                continue
            yield programs.advance, (params, rows, state, cache[:live])
            for part in range(live):
                if programs.is_new("append", programs.sizes[part]):
                    yield programs.append, (cache[part], new, state.length_B, programs.starts[part])
        if last > W and programs.is_new("roll"):
            yield from self._rolling(cache)
        if likeliest:
            several = programs.on_gpu or self.is_lone
            if (last > W or not several) and programs.is_new("likeliest of one step"):
                yield programs.likeliest, (state.logits_BV,)
            if several and stepped and programs.is_new("likeliest of several"):
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
