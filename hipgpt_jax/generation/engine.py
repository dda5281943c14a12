"""Decoding on a device: compiled programs of a model, and the slots that they advance."""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, export_cache, logprobs, requests, sampling, topk
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import parameters

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer

_REGION_ANALYSIS = "xla_cpu_copy_insertion_use_region_analysis"

_SMALLEST_BUCKET = 8

# Steps per program. One token of GPT-2 keeps an H200 busy for 0.45 ms and its host, which passes 160 arrays, updates
# 216 captured kernels and fetches, for 1.4 ms. On a CPU, eight steps make a single slot of the documented default 2.5
# times as fast as one, of D256 L8 1.17 times. Several slots on a CPU gain nearly as much from four steps, and a slot
# that ends idles half as long: 64 slots of D256 L8 that stop at different tokens make 3382 tokens/s with four steps,
# 2907 with eight and 3306 with one; slots that end together 4189, 4420 and 4016.
_MAX_STEPS = 8
_MAX_STEPS_OF_SEVERAL_ON_CPU = 4
# On a CPU, a model with more weights gains nothing from several steps, and its text would arrive in bursts.
_MOST_WEIGHTS_FOR_SEVERAL_STEPS = 2**24

_SMALLEST_DIVIDED = 16
_PRODUCT_ON_ALL_CORES = 4 * 2**20  # bytes of float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """Everything that differs between a CPU and a GPU; see ``backend_for``.

    Attributes:
        layout: Blocks of the KV cache.
        plan: Candidates of a slide step, which serves all slots.
        decode_plans: Candidates of each decode program. Slots that need the full vocabulary use the last program, all
            others the first.
        max_steps: Most steps of a decode program.
        waits_for_ends: Whether a decode program ends when no slot is active, and a program that may be the last of a
            slot is awaited before the next is dispatched. A GPU would rather compute in vain than wait.
        crosses_blocks: Whether a program may take steps beyond the last block that it needs at first.
        freezes_blocks: Whether all blocks but the last are only read. Possible with one slot that crosses no blocks.
        transposes_kernels: Whether kernels are stored transposed; see ``parameters.transpose_kernels``.
        exports_programs: Whether traced programs are cached on disk. cuDNN's attention cannot be exported.
        compiler_options: XLA options of the decode programs.
        num_replicas: Number of engines that the slots are divided among.
        num_slots: Slots of each.
    """

    layout: kv.Layout
    plan: topk.Plan
    decode_plans: tuple[topk.Plan, ...]
    max_steps: int
    waits_for_ends: bool
    crosses_blocks: bool
    freezes_blocks: bool
    transposes_kernels: bool
    exports_programs: bool
    compiler_options: Mapping[str, bool]
    num_replicas: int
    num_slots: int


def backend_for(platform: str, model: config.ModelConfig, window: int, batch_size: int) -> Backend:
    """Returns the backend of a platform, ``cpu`` or a GPU's name.

    Args:
        platform: The platform.
        model: Shape of the model.
        window: Tokens that the model sees.
        batch_size: Slots of all replicas.
    """
    is_cpu = platform == "cpu"
    plan = topk.plan_for(model.vocab_size, platform)
    num_replicas = _num_replicas(model, batch_size) if is_cpu else 1
    num_slots = batch_size // num_replicas
    return Backend(
        layout=kv.cpu_layout(window) if is_cpu else kv.gpu_layout(window),
        plan=plan,
        decode_plans=(plan,) if is_cpu else (plan.smallest, plan.full_vocab),
        max_steps=_max_steps_on_cpu(model, num_slots) if is_cpu else _MAX_STEPS,
        waits_for_ends=is_cpu,
        crosses_blocks=not is_cpu,
        freezes_blocks=is_cpu and num_slots == 1,
        transposes_kernels=not is_cpu,
        exports_programs=is_cpu,
        compiler_options=in_place_options(os.environ) if is_cpu else {},
        num_replicas=num_replicas,
        num_slots=num_slots,
    )


def _num_replicas(model: config.ModelConfig, batch_size: int) -> int:
    """Returns the number of engines that step side by side on a CPU.

    The number of cores does not enter, because the slots of a replica are part of the arithmetic.
    """
    # XLA's products and attention of up to 64 rows keep one core busy. D256 L8, 2 cores: a step of 16 slots takes 3.7
    # ms in two replicas and 5.1 ms in one; with 256 tokens in the cache 7.0 and 11.3 ms. 8 slots gain nothing.
    # Products of 4 MB and more keep both cores busy, and two replicas read them twice: 16 slots of D512 L8 take 22.6
    # ms in two and 19.9 ms in one; of GPT-2, 91 and 68 ms, and 64 slots 174 and 151 ms.
    largest = 4 * model.embed_dim * model.ff_hidden_dim
    is_divided = batch_size >= _SMALLEST_DIVIDED and batch_size % 2 == 0 and largest < _PRODUCT_ON_ALL_CORES
    return 2 if is_divided else 1


def _max_steps_on_cpu(model: config.ModelConfig, num_slots: int) -> int:
    D, F = model.embed_dim, model.ff_hidden_dim
    weights = model.num_layers * (4 * D * D + 2 * D * F) + model.vocab_size * D
    if weights > _MOST_WEIGHTS_FOR_SEVERAL_STEPS:
        return 1
    return _MAX_STEPS if num_slots == 1 else _MAX_STEPS_OF_SEVERAL_ON_CPU


def in_place_options(environ: Mapping[str, str]) -> dict[str, bool]:
    """Returns the XLA options by which a decode program on a CPU updates the cache in place.

    Without the analysis, XLA copies every buffer that is both read and written: 96 copies of 3 MB for GPT-2, 108 to
    160 ms per token. If ``XLA_FLAGS`` sets the option, that value is used.
    """
    return {} if _REGION_ANALYSIS in environ.get("XLA_FLAGS", "") else {_REGION_ANALYSIS: True}


def prefill_bucket(length: int, window: int) -> int:
    """Returns the padded length of a context: 8, 12, 16, 24, 32, 48, … or the window.

    All lengths of a bucket share one program, and at most a third of a bucket above 8 is padding.

    >>> [prefill_bucket(length, window=100) for length in (1, 9, 13, 70, 100)]
    [8, 12, 16, 96, 100]
    """
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)


@functools.cache
def _module(
    model: config.ModelConfig, dtype: str, attention: str, transposes_kernels: bool
) -> "transformer.Transformer":
    # Imported here, because a start that finds its programs in the cache needs no Flax, whose import takes 0.15 s.
    from hipgpt_jax.model import transformer

    return transformer.Transformer(
        model, dtype, attention_impl=attention, full_precision=True, transposed_kernels=transposes_kernels
    )


class Program(NamedTuple):
    """Key of a compiled program; its arguments' shapes follow from it.

    Attributes:
        name: Name of the function.
        blocks: Cache blocks that it reads or writes.
        rows: Rows that it prefills or takes a slot from.
        length: Tokens that it prefills, or steps whose outputs it reads.
    """

    name: str
    blocks: int = 0
    rows: int = 0
    length: int = 0


class Executables:
    """A model on a device and its compiled programs, shared by all replicas.

    A program is compiled once: ahead, by ``compiling``, or when it is first used. Both use one table and the same
    argument shapes, so nothing that was compiled ahead is compiled again.

    Attributes:
        model: Shape of the model.
        window: Tokens that the model sees.
        stride: Tokens by which a full window slides.
        backend: Choices that depend on the platform.
        params: The parameters on the device.
    """

    def __init__(
        self, model: config.ModelConfig, dtype: str, window: int, stride: int, attention: str, backend: Backend
    ) -> None:
        self.model, self.window, self.stride, self.backend = model, window, stride, backend
        self.params: parameters.Params = {}
        self._dtype, self._attention = dtype, attention
        self._device: Any = None
        self._compiled: dict[Program, futures.Future[Callable[..., Any]]] = {}
        self._lock = threading.Lock()
        self._functions = _functions(model, dtype, attention, window, stride, backend)

    @property
    def module(self) -> "transformer.Transformer":
        """The model."""
        return _module(self.model, self._dtype, self._attention, self.backend.transposes_kernels)

    def load(self, params: parameters.Params) -> None:
        """Loads parameters. Nothing is recompiled, as the model is the same."""
        params = jax.device_put(parameters.cast(params, self._dtype))
        (self._device,) = next(iter(jax.tree.leaves(params))).devices()
        params = jax.device_put(params, self._device)  # committed, as the results of the programs are
        self.params = parameters.transpose_kernels(params) if self.backend.transposes_kernels else params

    def blank_state(self) -> decoding.DecodeState:
        """Returns unused slots, without a cache."""
        state = decoding.blank_state(self.backend.num_slots, self.window, self.model.vocab_size)
        return jax.device_put(state, self._device, may_alias=False)  # the programs overwrite it

    def blocks(self, rows: int, first: int, last: int) -> tuple[kv.Block, ...]:
        """Returns the shapes of the cache blocks from index ``first`` up to ``last``."""
        return self.backend.layout.shapes(self.model, rows, self._dtype, first, last)

    def empty_blocks(self, first: int, last: int) -> tuple[kv.Block, ...]:
        """Returns zeroed cache blocks from index ``first`` up to ``last``."""
        return kv.empty(self.blocks(self.backend.num_slots, first, last), self._device)

    def split(self, blocks: tuple[kv.Block, ...]) -> kv.Cache:
        """Divides blocks into those that a decode program only reads and those that it may write."""
        num_frozen = len(blocks) - 1 if self.backend.freezes_blocks else 0
        return kv.Cache(blocks[:num_frozen], blocks[num_frozen:])

    def plan_steps(self, longest: int) -> tuple[int, int]:
        """Returns the cache blocks that a decode program reads for a longest context, and the most steps it takes.

        On a CPU it stops at the end of the block with the next slot, since reading a block before it is needed costs
        time. On a GPU it reads all blocks that its steps might need, so that steps never depend on a request's end.
        """
        layout, most = self.backend.layout, self.backend.max_steps
        if self.backend.crosses_blocks:
            return layout.num_blocks(min(longest + most, self.window)), most
        num_blocks = layout.num_blocks(longest + 1)
        return num_blocks, min(most, layout.starts[num_blocks] - longest)

    def programs_for(self, first: int, num_tokens: int, *, top_logprobs: bool) -> Iterator[Program]:
        """Yields the programs that decode a sample, so that none is compiled after its first token.

        Args:
            first: Length of its context before the first step.
            num_tokens: Most tokens that it may have.
            top_logprobs: Whether the most likely tokens are recorded.
        """
        W, last, B = self.window, first + num_tokens, self.backend.num_slots
        lengths = {*range(first, min(last, W))}
        slides = last > W
        if slides and self.stride > 1:  # after a slide, the context has W - stride + 1 tokens
            after = W - self.stride + 1
            lengths |= {*range(after, min(after + last - W - 1, W))}
        for blocks in sorted({self.plan_steps(length)[0] for length in lengths}):
            # On a GPU both programs, whatever this sample's settings: other settings then compile nothing.
            yield from (Program(name, blocks=blocks) for name in self._functions if name.startswith("decode"))
        if slides and self.stride == 1:
            yield Program("slide")
            if B > 1:
                yield Program("merge")  # beside slots that are not full
        elif slides:
            yield Program("slide_slot")
            yield Program("insert", blocks=self.backend.layout.num_blocks(W - self.stride + 1), rows=1)
        if top_logprobs and lengths:
            yield Program("top_logprobs", rows=B, length=self.backend.max_steps)
        if top_logprobs and slides:
            yield Program("top_logprobs", rows=1 if self.stride > 1 else B, length=1)

    def prefill(self, contexts: Sequence[tuple[int, ...]], rows: int) -> tuple[kv.Block, ...]:
        """Returns the KV cache of contexts; nothing is computed for empty ones.

        A row's numbers depend on its own ids, the bucket and ``rows`` alone.

        Args:
            contexts: Ids, all of one bucket.
            rows: Rows of the program, at least as many as there are contexts; the others are padding.
        """
        if not any(contexts):
            return ()
        length = prefill_bucket(len(contexts[0]), self.window)
        context_BT = np.zeros((rows, length), np.int32)
        for row, ids in enumerate(contexts):
            context_BT[row, : len(ids)] = ids
        return self.run(Program("prefill", rows=rows, length=length), self.params, context_BT)

    def top_logprobs(self, logits_TBV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns ``logprobs.top_logprobs`` of several steps."""
        T, B, _ = logits_TBV.shape
        return self.run(Program("top_logprobs", rows=B, length=T), logits_TBV)

    def run(self, program: Program, *args: Any) -> Any:
        """Runs a program, compiled if need be."""
        if program not in self._compiled:
            with self.compiling([program]):
                pass
        return self._compiled[program].result()(*args)

    @contextlib.contextmanager
    def compiling(self, programs: Iterable[Program]) -> Iterator[None]:
        """Compiles programs that are not in the table yet, in threads, while the block runs."""
        with futures.ThreadPoolExecutor() as threads:
            compiled: list[futures.Future[Callable[..., Any]]] = []
            for program in programs:
                with self._lock:
                    if program not in self._compiled:
                        # Only lowering holds Python's lock, so XLA compiles a program while the next one is lowered.
                        self._compiled[program] = threads.submit(self._lower(program).compile)
                    compiled.append(self._compiled[program])
            yield
            for each in compiled:
                each.result()

    def _lower(self, program: Program) -> jax.stages.Lowered:
        # Bound to the device, so that programs accept one another's results.
        place = jax.sharding.SingleDeviceSharding(self._device)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), self._shapes(program))
        return self._functions[program.name].lower(*shapes)

    def _shapes(self, program: Program) -> tuple[Any, ...]:
        """Returns the shapes of a program's arguments."""
        B, W, V = self.backend.num_slots, self.window, self.model.vocab_size
        state, one_slot = decoding.blank_state(B, W, V), decoding.blank_state(1, W, V)
        index = jax.ShapeDtypeStruct((), np.int32)
        blocks = self.blocks(B, 0, program.blocks)
        match program.name:
            case "sample_key":
                return (jax.ShapeDtypeStruct((3,), np.uint32),)
            case "prefill":
                return self.params, jax.ShapeDtypeStruct((program.rows, program.length), np.int32)
            case "insert":
                prefix = self.blocks(program.rows, 0, program.blocks)
                return (blocks if B > 1 else ()), state, index, one_slot, prefix, index
            case "decode" | "decode_full_vocab":
                cache = self.split(blocks)
                return self.params, state._replace(cache=cache._replace(frozen=())), cache.frozen
            case "slide":
                return self.params, state
            case "slide_slot":
                return self.params, state, index
            case "merge":
                return jax.ShapeDtypeStruct((B,), bool), state, state
            case "top_logprobs":
                return (jax.ShapeDtypeStruct((program.length, program.rows, V), np.float32),)
            case name:
                raise AssertionError(name)


def _functions(
    model: config.ModelConfig, dtype: str, attention: str, window: int, stride: int, backend: Backend
) -> dict[str, Any]:
    """Returns the jitted functions by name.

    None of them refers to the ``Executables``, so its programs are freed with it.
    """
    module = functools.partial(_module, model, dtype, attention, backend.transposes_kernels)
    settings = repr((model, dtype, attention, window, stride, backend))

    def jit(function: Callable[..., Any], name: str, **options: Any) -> Any:
        function = functools.partial(function)  # its own object, to be named: in profiles, logs and the cache
        function.__name__ = name  # type: ignore[attr-defined]
        return jax.jit(export_cache.cached(function, settings) if backend.exports_programs else function, **options)

    def prefill(params: parameters.Params, context_BT: jax.Array) -> tuple[kv.Block, ...]:
        return decoding.prefill_cache(module(), params, context_BT, backend.layout)

    def decode(
        plan: topk.Plan, params: parameters.Params, state: decoding.DecodeState, frozen: tuple[kv.Block, ...]
    ) -> tuple[decoding.DecodeState, decoding.StepOutput]:
        state = state._replace(cache=state.cache._replace(frozen=frozen))
        stops_early = backend.waits_for_ends
        return decoding.decode_steps(module(), params, state, plan, backend.max_steps, stops_early=stops_early)

    def slide(params: parameters.Params, state: decoding.DecodeState) -> tuple[Any, ...]:
        state, output = decoding.slide_step(module(), params, state, stride, backend.layout, backend.plan)
        return state, jax.tree.map(lambda x: x[None], output)

    def slide_all(params: parameters.Params, state: decoding.DecodeState) -> tuple[Any, ...]:
        state, output = slide(params, state)
        # With a stride of 1, a window that is full stays full: its cache is never read.
        return state._replace(cache=decoding.NO_CACHE), output

    def slide_slot(params: parameters.Params, state: decoding.DecodeState, slot: jax.Array) -> tuple[Any, ...]:
        one, output = slide(params, decoding.take_slot(state, slot))
        return one._replace(cache=decoding.NO_CACHE), one.cache.writable, output

    in_place = {"donate_argnums": 1, "compiler_options": dict(backend.compiler_options)}
    decodes = dict(zip(("decode", "decode_full_vocab"), backend.decode_plans, strict=False))
    if not backend.exports_programs or not export_cache.has_cached(settings):
        module()  # importing Flax while a program is traced makes JAX 0.12 trace it again
    return {
        "sample_key": jit(lambda words_3: jax.random.key_data(sampling.sample_key(words_3))[None], "sample_key"),
        "prefill": jit(prefill, "prefill"),
        "insert": jit(_insert, "insert", donate_argnums=0),
        **{name: jit(functools.partial(decode, plan), name, **in_place) for name, plan in decodes.items()},
        "slide": jit(slide_all, "slide"),
        "slide_slot": jit(slide_slot, "slide_slot"),
        "merge": jit(decoding.where, "merge"),
        "top_logprobs": jit(logprobs.top_logprobs, "top_logprobs"),
    }


def _insert(
    blocks: tuple[kv.Block, ...],
    state: decoding.DecodeState,
    slot: jax.Array,
    one: decoding.DecodeState,
    prefix: tuple[kv.Block, ...],
    row: jax.Array,
) -> tuple[decoding.DecodeState, tuple[kv.Block, ...]]:
    """Replaces a slot of a state, and of as many blocks as ``prefix`` has by a row of those.

    A single slot is all of the state: no cache is allocated to be replaced then.
    """
    # Allocating one took 2 ms of the 30 ms to the first token of D256 L8.
    own = decoding.take_slot(prefix, row)
    if len(state.token_B) == 1:
        return one, own
    return decoding.put_slot(state, slot, one), decoding.put_slot(blocks, slot, own)


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
        counts: Number of tokens that each slot may have; fewer if it ended.
        output: Arrays ``[T, B, ...]``.
        first_slot: Slot of the output's first row.
    """

    counts: Mapping[int, int]
    output: decoding.StepOutput
    first_slot: int = 0


class Engine:
    """The slots of one replica, each with a sample or unused."""

    def __init__(self, executables: Executables) -> None:
        """Allocates slots; nothing is compiled, and no cache is allocated, before the first sample."""
        self._executables = executables
        num_slots = executables.backend.num_slots
        # Copies on the host of what the device knows, ahead of it: they count dispatched tokens.
        self._lengths = [0] * num_slots
        self._num_sampled = [0] * num_slots
        self._programs = ["decode"] * num_slots
        self._state = executables.blank_state()  # without the cache
        self._blocks: tuple[kv.Block, ...] = ()  # as many as were needed so far

    def insert(self, prefix: Prefix, slot: int, request: requests.Request) -> None:
        """Gives a slot to a sample whose context, all of its prompt but the last token, is prefilled."""
        executables, model = self._executables, self._executables.model
        words_3 = sampling.seed_words(request.generation.seed, request.prompt_ids, request.sample)
        key_12 = executables.run(Program("sample_key"), words_3)
        one = decoding.initial_state(
            key_12,
            request.prompt_ids,
            request.sampling,
            request.generation.eos_id,
            W=executables.window,
            V=model.vocab_size,
        )
        self._put(slot, one, prefix)
        self._lengths[slot], self._num_sampled[slot] = int(one.length_B[0]), 0
        plan = executables.backend.plan
        needs_full_vocab = len(executables.backend.decode_plans) > 1 and plan.needs_full_vocab(request.sampling)
        self._programs[slot] = "decode_full_vocab" if needs_full_vocab else "decode"

    def evict(self, slot: int) -> None:
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
            limits: For each slot, the most tokens that it may have.
        """
        executables = self._executables
        params, state = executables.params, self._state
        full = [slot for slot in limits if self._lengths[slot] >= executables.window]
        others = {slot: limit for slot, limit in limits.items() if slot not in full}
        decoded: list[Decoded] = []
        together = executables.stride == 1 and len(full) > 0
        slid = executables.run(Program("slide"), params, state) if together else None
        alone = [] if together else [(slot, self._slide_slot(slot)) for slot in full]
        for name in ("decode", "decode_full_vocab"):
            if group := {slot: limit for slot, limit in others.items() if self._programs[slot] == name}:
                decoded.append(self._decode_group(name, group))
        if slid is not None:
            state, output = slid
            if others:
                is_full_B = np.isin(np.arange(len(self._lengths)), full)
                state = executables.run(Program("merge"), is_full_B, state, self._state)
            self._state = state
            decoded.append(Decoded(dict.fromkeys(full, 1), output))
        for slot, (one, blocks, output) in alone:
            self._put(slot, one, Prefix(blocks, row=0, rows=1))
            decoded.append(Decoded({slot: 1}, output, first_slot=slot))
        for slot in full:
            self._lengths[slot] = executables.window - executables.stride + 1
            self._num_sampled[slot] += 1
        return decoded

    def _slide_slot(self, slot: int) -> tuple[decoding.DecodeState, tuple[kv.Block, ...], decoding.StepOutput]:
        executables = self._executables
        return executables.run(Program("slide_slot"), executables.params, self._state, np.int32(slot))

    def _decode_group(self, name: str, limits: Mapping[int, int]) -> Decoded:
        """Dispatches steps of slots that share a program and whose windows are not full."""
        executables = self._executables
        num_blocks, most = executables.plan_steps(max(self._lengths[slot] for slot in limits))
        counts = {slot: min(limit, most, executables.window - self._lengths[slot]) for slot, limit in limits.items()}
        limit_B: Any = np.array(self._num_sampled, np.int32)
        limit_B[list(counts)] += list(counts.values())
        cache = executables.split(self._first_blocks(num_blocks))
        state = self._state._replace(limit_B=limit_B, cache=cache._replace(frozen=()))
        program = Program(name, blocks=num_blocks)
        state, output = executables.run(program, executables.params, state, cache.frozen)
        self._state = state._replace(cache=decoding.NO_CACHE)
        self._blocks = (*cache.frozen, *state.cache.writable, *self._blocks[num_blocks:])
        for slot, count in counts.items():
            self._lengths[slot] += count
            self._num_sampled[slot] += count
        return Decoded(counts, output)

    def _put(self, slot: int, one: decoding.DecodeState, prefix: Prefix) -> None:
        """Replaces a slot and its row of the first blocks."""
        num_blocks = len(prefix.blocks)
        blocks = () if len(self._lengths) == 1 else self._first_blocks(num_blocks)
        program = Program("insert", blocks=num_blocks, rows=prefix.rows if num_blocks else 0)
        index = np.int32(slot), one, prefix.blocks, np.int32(prefix.row)
        self._state, blocks = self._executables.run(program, blocks, self._state, *index)
        self._blocks = (*blocks, *self._blocks[num_blocks:])

    def _first_blocks(self, number: int) -> tuple[kv.Block, ...]:
        """Returns the first blocks, of which those are allocated that were never needed before."""
        self._blocks += self._executables.empty_blocks(len(self._blocks), number)
        return self._blocks[:number]
