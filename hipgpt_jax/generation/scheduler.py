"""Scheduling of requests: which sample has which slot, which prompts are prefilled together, and what is dispatched.

The device runs ahead of the host: a replica dispatches the next programs before it fetches the outputs of those
before. So its host-side counts (``Engine``'s lengths, ``_Slot.num_dispatched``) are of dispatched tokens, and
``Sequence`` counts fetched ones. A replica's engine and slots are used by one thread at a time: its own, if there
are several, while it steps and inserts; the caller's while outputs are appended to sequences. The waiting queue and the
sequences belong to the caller's thread alone.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from hipgpt_jax import config, devices
from hipgpt_jax.generation import backends, engine, executables, logprobs, placement, requests, topk, waiting
from hipgpt_jax.model import parameters
from hipgpt_jax.text import tokenizer

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer


class Scheduler:
    """Generates samples, up to ``batch_size`` per device at a time; when one ends, the next request takes its slot.

    Streams and batches run the same compiled step, so they give the same tokens bit for bit. So do any number of
    devices.

    Attributes:
        model: Shape of the model.
        window: Tokens that the model sees.
    """

    def __init__(
        self,
        model: config.ModelConfig,
        params: parameters.Params,
        decoding: config.DecodingConfig,
        attention: str = "xla",
        platform: str | None = None,
        on: Sequence[Any] | None = None,
    ) -> None:
        """Loads parameters; nothing is compiled before the first token.

        Args:
            model: Shape of the model.
            params: Its parameters.
            decoding: Window, stride, overflow rule, batch size, type and mesh.
            attention: As of ``transformer.Transformer``.
            platform: ``cpu`` or a GPU's name, whose backend is used; by default the platform that JAX computes on.
            on: The devices: a replica on each, or on as many together as the mesh has. By default those of one replica.

        Raises:
            ValueError: The window or the stride does not fit the model, or the platform lacks the numerics.
        """
        self.model = model
        self.window = decoding.resolve_window(model)
        self._decoding = decoding
        platform = platform or jax.default_backend()
        invariant = decoding.numerics == "invariant"
        size = decoding.resolve_mesh(model)
        backend = backends.backend_for(
            platform, model, self.window, decoding.batch_size, invariant=invariant, mesh_size=size
        )
        on = on or devices.local(per_replica=size)
        first, *others = (placement.Placement(on[start : start + size]) for start in range(0, len(on), size))
        programs = executables.Executables(
            model, decoding.dtype, self.window, decoding.window_stride, attention, backend, first
        )
        self._programs = [programs, *map(programs.on, others)]
        self.load(params)

    def with_rule(self, rule: topk.Rule) -> "Scheduler":
        """Returns a scheduler of the same parameters whose samples follow a rule."""
        other = copy.copy(self)
        other._programs = [programs.with_rule(rule) for programs in self._programs]
        return other

    @property
    def plan(self) -> topk.Plan:
        """How all slots are sampled together."""
        return self._programs[0].backend.plan

    @property
    def module(self) -> "transformer.Transformer":
        """The model as a Flax module."""
        return self._programs[0].module

    @property
    def params(self) -> parameters.Params:
        """Its parameters on the devices of the first replica."""
        return self._programs[0].params

    def load(self, params: parameters.Params) -> None:
        """Loads other parameters of the same model; nothing is recompiled."""
        for programs in self._programs:
            programs.load(params)

    def check(self, request: requests.Request) -> None:
        """Raises ValueError if a request cannot be served."""
        if not request.prompt_ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.model.vocab_size:
            raise ValueError(
                f"the prompt's ids must be at least 0 and below the vocabulary's size {self.model.vocab_size}"
            )
        request.generation.check_vocabulary(self.model.vocab_size)
        self._decoding.check_fits(self.window, len(request.prompt_ids), request.generation.num_tokens)

    def max_tokens(self, request: requests.Request) -> int:
        """Returns the most tokens that a sample can have: the number requested, or as many as the window holds."""
        if self._decoding.overflow != "stop":
            return request.generation.num_tokens
        return min(request.generation.num_tokens, self.window - min(len(request.prompt_ids), self.window) + 1)

    def run(
        self,
        incoming: Iterable[requests.Request],
        vocabulary: tokenizer.Tokenizer | None = None,
        *,
        measure: bool = False,
    ) -> Iterator[requests.Output]:
        """Yields the outputs of requests: those of one request in order, interleaved with those of others.

        Args:
            incoming: Requests, taken as they are needed; up to 64 ahead of that if a replica has several slots.
            vocabulary: Decodes the tokens; without it outputs have no text.
            measure: Whether outputs have statistics, and sequences keep them for a record. It changes no token.

        Raises:
            ValueError: A request is empty, or cannot fit the window while overflow is an error.
        """
        replicas = [
            _Replica(programs, measure=measure)
            for programs in self._programs
            for _ in range(programs.backend.num_replicas)
        ]
        queue = waiting.WaitingQueue(self._programs, self._sequences(incoming, vocabulary, keeps=measure))
        return _run_one(replicas[0], queue) if len(replicas) == 1 else _run_several(replicas, queue)

    def _sequences(
        self, incoming: Iterable[requests.Request], vocabulary: tokenizer.Tokenizer | None, *, keeps: bool
    ) -> Iterator[requests.Sequence]:
        for index, request in enumerate(incoming):
            self.check(request)
            yield requests.Sequence(request, self.max_tokens(request), vocabulary, index=index, keeps=keeps)


@dataclasses.dataclass(eq=False)
class _Slot:
    """A slot's sequence, and the number of its tokens that were dispatched."""

    sequence: requests.Sequence
    num_dispatched: int = 0

    @property
    def budget(self) -> int:
        """Tokens left to dispatch."""
        return self.sequence.max_tokens - self.num_dispatched


class _Fetched(NamedTuple):
    """Outputs that the host fetches.

    Attributes:
        token_TB: Sampled ids.
        stats: Their statistics, if they are measured.
        top: Ids and log-probabilities of the most likely tokens, if a sequence records them.
    """

    token_TB: jax.Array
    stats: logprobs.TokenStats | None
    top: tuple[jax.Array, jax.Array] | None


class _InFlight(NamedTuple):
    """A dispatched program.

    Attributes:
        slots: The sequence of each slot, and its number of tokens.
        first_slot: Slot of the first row.
        outputs: Arrays on the device; NumPy arrays once they are fetched.
    """

    slots: dict[int, tuple[_Slot, int]]
    first_slot: int
    outputs: _Fetched


class _Replica:
    """An engine, and the sequences in its slots."""

    def __init__(self, programs: executables.Executables, *, measure: bool) -> None:
        self.programs, self._measures = programs, measure
        self._engine = engine.Engine(programs)
        self._slots: list[_Slot | None] = [None] * programs.backend.num_slots
        self._in_flight: list[_InFlight] = []

    @property
    def free_slots(self) -> list[int]:
        return [index for index, slot in enumerate(self._slots) if slot is None]

    @property
    def is_busy(self) -> bool:
        return any(self._slots)

    def insert(self, index: int, taken: waiting.Waiting) -> None:
        """Gives a free slot to a sequence; the next step samples its first token."""
        assert taken.batch is not None
        sequence = taken.sequence
        records_top = self._measures and sequence.request.generation.top_logprobs > 0
        needed = self.programs.programs_for(len(taken.context), sequence.max_tokens, top_logprobs=records_top)
        with self.programs.compiling(needed):
            self._slots[index] = _Slot(sequence)
            self._engine.insert(taken.batch.prefix(taken.context, self.programs), index, sequence.request)

    def advance(self, taken: "list[tuple[int, waiting.Waiting]]") -> list[_InFlight]:
        """Gives free slots, by their indices, to sequences and steps."""
        for index, one in taken:
            self.insert(index, one)
        return self.step()

    def step(self) -> list[_InFlight]:
        """Dispatches the next tokens of every sequence, and fetches those that were dispatched before."""
        programs, self._in_flight = self._in_flight or self._dispatch(), []
        if self._dispatches_ahead(programs):
            self._in_flight = self._dispatch()
        return [self._fetch(program) for program in programs]

    def _dispatches_ahead(self, programs: list[_InFlight]) -> bool:
        """Returns whether further programs are dispatched before these are fetched.

        Not after a first token, because a CPU may run a program as it is dispatched. Nor, on a CPU, after a
        sequence's last token, so that its slot is reused at once, or while a stop string may end a single slot's
        sequence mid-program: wasted steps cost more than waiting.
        """
        # 64 slots of D256 L8 that end at different tokens make 3534 tokens/s; 3099 if slots idle in the next program.
        slots = [each for program in programs for each in program.slots.values()]
        backend = self.programs.backend
        if backend.waits_for_ends:
            waits_for_stops = backend.num_slots == 1 and backend.max_steps > 1
            if any(
                slot.budget == 0 or (waits_for_stops and slot.sequence.request.generation.stop) for slot, _ in slots
            ):
                return False
        return any(slot.num_dispatched > count for slot, count in slots)

    def _dispatch(self) -> list[_InFlight]:
        """Dispatches the next tokens of every sequence that may have more."""
        slots = {index: slot for index, slot in enumerate(self._slots) if slot is not None and slot.budget > 0}
        limits = {index: self._step_limit(slot) for index, slot in slots.items()}
        return [self._count(decoded, slots) for decoded in self._engine.decode(limits)] if limits else []

    def _step_limit(self, slot: _Slot) -> int:
        """Returns the most tokens of a program; the first one of a single slot on a CPU is not kept waiting."""
        return 1 if self.programs.backend.freezes_blocks and not slot.num_dispatched else slot.budget

    def _count(self, decoded: engine.Decoded, slots: dict[int, _Slot]) -> _InFlight:
        """Counts dispatched tokens, and dispatches what is recorded of them."""
        for index, count in decoded.counts.items():
            slots[index].num_dispatched += count
        counted = {index: (slots[index], count) for index, count in decoded.counts.items()}
        output = decoded.output
        records_top = self._measures and any(
            slot.sequence.request.generation.top_logprobs for slot, _ in counted.values()
        )
        outputs = _Fetched(
            output.token_B,
            output.stats if self._measures else None,
            self.programs.top_logprobs(output.logits_BV) if records_top else None,
        )
        if not self.programs.backend.waits_for_ends:
            for x in jax.tree.leaves(outputs):  # a copy that is requested later would come after further steps
                x.copy_to_host_async()
        return _InFlight(counted, decoded.first_slot, outputs)

    def _fetch(self, program: _InFlight) -> _InFlight:
        return program._replace(outputs=jax.tree.map(np.asarray, program.outputs))

    def append_outputs(self, program: _InFlight) -> Iterator[requests.Output]:
        """Appends the tokens of a fetched program to their sequences; a sequence that ends frees its slot."""
        for step, token_B in enumerate(program.outputs.token_TB):
            _, stats, top = jax.tree.map(lambda x, step=step: x[step], program.outputs)
            for index, (slot, count) in program.slots.items():
                if step >= count or self._slots[index] is not slot:
                    continue
                row = index - program.first_slot
                output = slot.sequence.append(
                    int(token_B[row]), None if stats is None else requests.Stats(stats, top, row)
                )
                if output.finish_reason is not None:
                    self._slots[index] = None
                if output.finish_reason == "error":
                    self._engine.clear_cache(index)
                yield output


def _run_one(replica: _Replica, queue: waiting.WaitingQueue) -> Iterator[requests.Output]:
    """Runs the sequences of a queue on one replica. Outputs are yielded one by one, so that a text grows steadily."""
    while True:
        for slot in replica.free_slots:
            for taken in _take(queue, replica.programs):
                if isinstance(taken, requests.Output):
                    yield taken
                else:
                    replica.insert(slot, taken)
        if not replica.is_busy:
            return
        for program in replica.step():
            yield from replica.append_outputs(program)


def _run_several(replicas: list[_Replica], queue: waiting.WaitingQueue) -> Iterator[requests.Output]:
    """Runs the sequences of a queue on replicas side by side.

    On a CPU, JAX runs the programs of one thread in turn, so each replica has a thread of its own. All replicas step
    together, so the order of the outputs does not depend on the threads' timing.
    """
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(futures.ThreadPoolExecutor(1)) for _ in replicas]
        outputs: list[requests.Output] = []
        while True:
            # 64 prompts at D256 L8 take 140 ms in both threads instead of 180 ms in one, on 2 cores.
            steps: list[tuple[_Replica, futures.Future[list[_InFlight]]]] = []
            for replica, thread in zip(replicas, threads, strict=True):
                new: list[tuple[int, waiting.Waiting]] = []
                for slot in replica.free_slots:
                    for taken in _take(queue, replica.programs):
                        if isinstance(taken, requests.Output):
                            yield taken
                        else:
                            new.append((slot, taken))
                if new or replica.is_busy:
                    steps.append((replica, thread.submit(replica.advance, new)))
            yield from outputs  # the consumer works while the replicas do
            if not steps:
                return
            fetched = [(replica, program) for replica, step in steps for program in step.result()]
            outputs = [output for replica, program in fetched for output in replica.append_outputs(program)]


def _take(
    queue: waiting.WaitingQueue, programs: executables.Executables
) -> Iterator[requests.Output | waiting.Waiting]:
    """Yields the ends of sequences with a ``max_tokens`` of 0, then the next sequence that needs a slot."""
    while taken := queue.take(programs):
        if taken.batch is not None:
            yield taken
            return
        yield taken.sequence.finish()
