"""The slots of a replica: what each of them holds, and the programs that advance them."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from hipgpt_jax.generation import decoding, executables, requests, sampling
from hipgpt_jax.model import cache as kv


class Prefix(NamedTuple):
    """A prefilled context: a row of cache blocks.

    Attributes:
        blocks: The blocks, of all contexts that were prefilled together.
        row: The context's row.
        rows: Number of rows.
    """

    blocks: tuple[kv.Block, ...]
    row: int
    rows: int


class Decoded(NamedTuple):
    """Tokens sampled by one program.

    Attributes:
        counts: Maximum number of tokens of each slot; it has fewer if it ended.
        output: Arrays ``[T, B, ...]``.
        first_slot: Slot of the output's first row.
    """

    counts: Mapping[int, int]
    output: decoding.StepOutput
    first_slot: int = 0


class Engine:
    """The slots of one replica, each with a sample or unused."""

    def __init__(self, programs: executables.Executables) -> None:
        """Allocates slots; nothing is compiled, and no cache is allocated, before the first sample."""
        self._programs = programs
        num_slots = programs.backend.num_slots
        # Copies on the host of what the device knows, ahead of it: they count dispatched tokens.
        self._lengths = [0] * num_slots
        self._num_sampled = [0] * num_slots
        self._decode_names = ["decode"] * num_slots
        self._state = programs.blank_state()  # without the cache
        self._blocks: tuple[kv.Block, ...] = ()  # as many as were needed so far

    def insert(self, prefix: Prefix, slot: int, request: requests.Request) -> None:
        """Gives a slot to a sample whose context is prefilled; see ``requests.Request.context``."""
        programs = self._programs
        one = decoding.initial_state(request, programs.window, programs.model.vocab_size)
        self._put(slot, one, prefix)
        self._lengths[slot], self._num_sampled[slot] = int(one.length_B[0]), 0
        plan = programs.backend.plan
        needs_full_vocab = len(programs.backend.decode_plans) > 1 and plan.needs_full_vocab(request.sampling)
        self._decode_names[slot] = "decode_full_vocab" if needs_full_vocab else "decode"

    def clear_cache(self, slot: int) -> None:
        """Zeroes a slot's cache after NaN.

        Masked positions are multiplied by 0, and 0 · NaN is NaN, so NaNs would leak into the slot's next sample.
        """
        self._blocks = jax.tree.map(lambda x: x.at[slot].set(0), self._blocks)

    def decode(self, limits: Mapping[int, int]) -> list[Decoded]:
        """Dispatches the next tokens of slots.

        A slot whose window is full slides it, prefills it again and gets one token. With a stride of 1 it does so at
        every token, so all full slots do together. With a larger stride, windows fill up at different steps, and each
        slot slides alone.

        Args:
            limits: Maximum number of tokens of each slot.
        """
        programs = self._programs
        params, state = programs.params, self._state
        full = [slot for slot in limits if self._window_is_full(slot)]
        others = {slot: limit for slot, limit in limits.items() if slot not in full}
        decoded: list[Decoded] = []
        # Slides read the state before the decode programs, which are given its memory. Their results are put in place
        # after those, which leave full slots unchanged.
        together = programs.stride == 1 and len(full) > 0
        slid = programs.run(executables.Program("slide"), params, state) if together else None
        alone = [] if together else [(slot, self._slide_slot(slot)) for slot in full]
        for name in ("decode", "decode_full_vocab"):
            if group := {slot: limit for slot, limit in others.items() if self._decode_names[slot] == name}:
                decoded.append(self._decode_group(name, group))
        if slid is not None:
            state, output = slid
            if others:
                is_full_B = np.isin(np.arange(len(self._lengths)), full)
                state = programs.run(executables.Program("merge"), is_full_B, state, self._state)
            self._state = state
            decoded.append(Decoded(dict.fromkeys(full, 1), output))
        for slot, (one, blocks, output) in alone:
            self._put(slot, one, Prefix(blocks, row=0, rows=1))
            decoded.append(Decoded({slot: 1}, output, first_slot=slot))
        for slot in full:
            self._lengths[slot] = programs.window - programs.stride + 1
            self._num_sampled[slot] += 1
        return decoded

    def _window_is_full(self, slot: int) -> bool:
        """Returns whether a slot's window must slide before its next token: the rule ``roll`` of a full window."""
        return self._lengths[slot] >= self._programs.window

    def _slide_slot(self, slot: int) -> tuple[decoding.DecodeState, tuple[kv.Block, ...], decoding.StepOutput]:
        programs = self._programs
        return programs.run(executables.Program("slide_slot"), programs.params, self._state, np.int32(slot))

    def _decode_group(self, name: str, limits: Mapping[int, int]) -> Decoded:
        """Dispatches steps of slots that share a program and whose windows are not full."""
        programs = self._programs
        num_blocks, most = programs.backend.plan_steps(max(self._lengths[slot] for slot in limits))
        counts = {slot: min(limit, most, programs.window - self._lengths[slot]) for slot, limit in limits.items()}
        limit_B = sampling.host_array([n + counts.get(slot, 0) for slot, n in enumerate(self._num_sampled)], np.int32)
        cache = programs.backend.split(self._grow_blocks(num_blocks))
        state = self._state._replace(limit_B=limit_B, cache=cache._replace(frozen=()))
        program = executables.Program(name, blocks=num_blocks)
        state, output = programs.run(program, programs.params, state, cache.frozen)
        self._state = state._replace(cache=decoding.NO_CACHE)
        self._blocks = (*cache.frozen, *state.cache.writable, *self._blocks[num_blocks:])
        for slot, count in counts.items():
            self._lengths[slot] += count
            self._num_sampled[slot] += count
        return Decoded(counts, output)

    def _put(self, slot: int, one: decoding.DecodeState, prefix: Prefix) -> None:
        """Replaces a slot and its row of the first blocks."""
        num_blocks = len(prefix.blocks)
        blocks = () if len(self._lengths) == 1 else self._grow_blocks(num_blocks)
        program = executables.Program("insert", blocks=num_blocks, rows=prefix.rows if num_blocks else 0)
        new = np.int32(slot), one, prefix.blocks, np.int32(prefix.row)
        self._state, blocks = self._programs.run(program, blocks, self._state, *new)
        self._blocks = (*blocks, *self._blocks[num_blocks:])

    def _grow_blocks(self, number: int) -> tuple[kv.Block, ...]:
        """Grows the KV cache to at least ``number`` blocks, and returns the first ones."""
        self._blocks += self._programs.empty_blocks(len(self._blocks), number)
        return self._blocks[:number]
