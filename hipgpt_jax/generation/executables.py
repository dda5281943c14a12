"""Compiled programs of a model on its devices."""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config, devices
from hipgpt_jax.generation import backends, decoding, export_cache, logprobs, placement, topk
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import parameters

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer

_Executable = Callable[..., Any]
_Step = tuple[decoding.DecodeState, decoding.StepOutput]


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
    """A model on a device, or on several that share it, and its compiled programs.

    A program is compiled once: ahead, by ``compiling``, or when it is first used. Both use one table and the same
    argument shapes, so nothing that was compiled ahead is compiled again.

    Attributes:
        model: Shape of the model.
        window: Tokens that the model sees.
        stride: Tokens by which a full window slides.
        backend: Choices that depend on the platform.
        params: The parameters on the devices.
        functions: The jitted functions by name.
    """

    def __init__(
        self,
        model: config.ModelConfig,
        dtype: str,
        window: int,
        stride: int,
        attention: str,
        backend: backends.Backend,
        where: placement.Placement | None = None,
    ) -> None:
        self.model, self.window, self.stride, self.backend = model, window, stride, backend
        self.params: parameters.Params = {}
        self._dtype, self._attention = dtype, attention
        self._placement = where or placement.Placement(devices.local())
        self._compiled: dict[Program, futures.Future[_Executable]] = {}
        self._lock = threading.Lock()
        self.functions = self._functions()

    def with_rule(self, rule: topk.Rule) -> "Executables":
        """Returns programs of the same parameters that apply a rule."""
        other = self._uncompiled()
        other.backend = self.backend.with_rule(rule)
        other.functions = other._functions()
        return other

    def on(self, where: placement.Placement) -> "Executables":
        """Returns the same programs for other devices; they are traced once for all, and compiled for each."""
        other = self._uncompiled()
        other._placement = where
        return other

    def _functions(self) -> dict[str, Any]:
        settings = self.model, self._dtype, self._attention, self.window, self.stride, self.backend
        return _functions(*settings, self._placement)

    def _uncompiled(self) -> "Executables":
        other = copy.copy(self)
        other._compiled, other._lock = {}, threading.Lock()
        return other

    @property
    def module(self) -> "transformer.Transformer":
        """The model."""
        return _module(self.model, self._dtype, self._attention, self.backend.transposes_kernels)

    def load(self, params: parameters.Params) -> None:
        """Loads parameters. Nothing is recompiled, as the model is the same."""
        params = self._placement.put(parameters.cast(params, self._dtype))
        self.params = parameters.transpose_kernels(params) if self.backend.transposes_kernels else params

    def blank_state(self) -> decoding.DecodeState:
        """Returns unused slots, without a cache."""
        state = decoding.blank_state(self.backend.num_slots, self.window, self.model.vocab_size)
        return self._placement.put(state, may_alias=False)  # the programs overwrite it

    def blocks(self, rows: int, first: int, last: int) -> tuple[kv.Block, ...]:
        """Returns the shapes of the cache blocks from index ``first`` up to ``last``."""
        return self.backend.layout.shapes(self.model, rows, self._dtype, first, last)

    def empty_blocks(self, first: int, last: int) -> tuple[kv.Block, ...]:
        """Returns zeroed cache blocks from index ``first`` up to ``last``."""
        shapes = self.blocks(self.backend.num_slots, first, last)
        return kv.empty(shapes, self._placement.shardings(shapes))

    def programs_for(self, first: int, num_tokens: int, *, top_logprobs: bool) -> Iterator[Program]:
        """Yields the programs that decode a sample, so that none is compiled after its first token.

        Args:
            first: Length of its context before the first step.
            num_tokens: Maximum number of sampled tokens.
            top_logprobs: Whether the most likely tokens are recorded.
        """
        W, last, B = self.window, first + num_tokens, self.backend.num_slots
        lengths = {*range(first, min(last, W))}
        slides = last > W
        if slides and self.stride > 1:  # after a slide, the context has W - stride + 1 tokens
            after = W - self.stride + 1
            lengths |= {*range(after, min(after + last - W - 1, W))}
        for blocks in sorted({self.backend.plan_steps(length)[0] for length in lengths}):
            # On a GPU both programs, whatever this sample's settings: other settings then compile nothing.
            yield from (Program(name, blocks=blocks) for name in self.functions if name.startswith("decode"))
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

        A row's results depend on its own ids, the bucket and ``rows`` alone.

        Args:
            contexts: Ids, all of one bucket.
            rows: Rows of the program, at least as many as there are contexts; the others are padding.
        """
        if not any(contexts):
            return ()
        length = backends.prefill_bucket(len(contexts[0]), self.window)
        context_BT = np.zeros((rows, length), np.int32)
        for row, ids in enumerate(contexts):
            context_BT[row, : len(ids)] = ids
        return self.run(Program("prefill", rows=rows, length=length), self.params, context_BT)

    def top_logprobs(self, logits_TBV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns ``logprobs.top_logprobs`` of several steps."""
        T, B, _ = logits_TBV.shape
        return self.run(Program("top_logprobs", rows=B, length=T), logits_TBV)

    def run(self, program: Program, *args: object) -> Any:
        """Runs a program, compiled if need be."""
        if program not in self._compiled:
            with self.compiling([program]):
                pass
        return self._compiled[program].result()(*args)

    @contextlib.contextmanager
    def compiling(self, programs: Iterable[Program]) -> Iterator[None]:
        """Compiles programs that are not in the table yet, in threads, while the block runs."""
        with futures.ThreadPoolExecutor() as threads:
            compiled: list[futures.Future[_Executable]] = []
            for program in programs:
                with self._lock:
                    if program not in self._compiled:
                        # Only lowering holds Python's lock, so XLA compiles a program while the next one is lowered.
                        self._compiled[program] = threads.submit(self._compile_fn(program))
                    compiled.append(self._compiled[program])
            yield
            for each in compiled:
                each.result()

    def _compile_fn(self, program: Program) -> Callable[[], _Executable]:
        if jax.config.values["jax_disable_jit"]:  # a user's own setting, under which JAX compiles nothing ahead
            return lambda: self.functions[program.name]
        return self.lower(program).compile

    def lower(self, program: Program) -> jax.stages.Lowered:
        """Lowers a program for the shapes of its arguments."""
        args = self.shapes(program)

        def bind(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            # Parameters are on the devices already, and their kernels may be transposed.
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding)

        # Bound to the devices, so that programs accept one another's results.
        return self.functions[program.name].lower(*jax.tree.map(bind, args, self._placement.shardings(args)))

    def shapes(self, program: Program) -> tuple[object, ...]:
        """Returns the shapes of a program's arguments."""
        B, W, V = self.backend.num_slots, self.window, self.model.vocab_size
        state, one_slot = decoding.blank_state(B, W, V), decoding.blank_state(1, W, V)
        index = jax.ShapeDtypeStruct((), np.int32)
        blocks = self.blocks(B, 0, program.blocks)
        match program.name:
            case "prefill":
                return self.params, jax.ShapeDtypeStruct((program.rows, program.length), np.int32)
            case "insert":
                prefix = self.blocks(program.rows, 0, program.blocks)
                return (blocks if B > 1 else ()), state, index, one_slot, prefix, index
            case "decode" | "decode_full_vocab":
                cache = self.backend.split(blocks)
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
    model: config.ModelConfig,
    dtype: str,
    attention: str,
    window: int,
    stride: int,
    backend: backends.Backend,
    where: placement.Placement,
) -> dict[str, Any]:
    """Returns the jitted functions by name.

    None of them refers to the ``Executables``, so its programs are freed with it.
    """
    module = functools.partial(_module, model, dtype, attention, backend.transposes_kernels)
    settings = repr((model, dtype, attention, window, stride, backend))

    def jit(function: _Executable, name: str, **options: Any) -> Any:
        function = _named(function, name, where)
        options["compiler_options"] = {**backend.compiler_options, **options.get("compiler_options", {})}
        return jax.jit(export_cache.cached(function, settings) if backend.exports_programs else function, **options)

    def prefill(params: parameters.Params, context_BT: jax.Array) -> tuple[kv.Block, ...]:
        return decoding.prefill_cache(module(), params, context_BT, backend.layout)

    def decode(
        plan: topk.Plan, params: parameters.Params, state: decoding.DecodeState, frozen: tuple[kv.Block, ...]
    ) -> _Step:
        state = state._replace(cache=state.cache._replace(frozen=frozen))
        stops_early = backend.waits_for_ends
        return decoding.decode_steps(module(), params, state, plan, backend.max_steps, stops_early=stops_early)

    def slide(params: parameters.Params, state: decoding.DecodeState) -> _Step:
        state, output = decoding.slide_step(module(), params, state, stride, backend.layout, backend.plan)
        return state, jax.tree.map(lambda x: x[None], output)

    def slide_all(params: parameters.Params, state: decoding.DecodeState) -> _Step:
        state, output = slide(params, state)
        # With a stride of 1, a window that is full stays full: its cache is never read.
        return state._replace(cache=decoding.NO_CACHE), output

    def slide_slot(params: parameters.Params, state: decoding.DecodeState, slot: jax.Array) -> tuple[object, ...]:
        one = jax.tree.map(lambda x: jnp.repeat(x, backend.fewest_rows, axis=0), decoding.take_slot(state, slot))
        one, output = slide(params, one)
        one, output = jax.tree.map(lambda x: x[:1], one), jax.tree.map(lambda x: x[:, :1], output)
        return one._replace(cache=decoding.NO_CACHE), one.cache.writable, output

    in_place = {"donate_argnums": 1, "compiler_options": backend.decode_options}
    decodes = dict(zip(("decode", "decode_full_vocab"), backend.decode_plans, strict=False))
    if not backend.exports_programs or not export_cache.has_cached(settings):
        module()  # importing Flax while a program is traced makes JAX 0.12 trace it again
    return {
        "prefill": jit(prefill, "prefill"),
        "insert": jit(_insert, "insert", donate_argnums=(0, 1) if backend.num_slots > 1 else 0),
        **{name: jit(functools.partial(decode, plan), name, **in_place) for name, plan in decodes.items()},
        "slide": jit(slide_all, "slide"),
        "slide_slot": jit(slide_slot, "slide_slot"),
        "merge": jit(decoding.where, "merge"),
        "top_logprobs": jit(logprobs.top_logprobs, "top_logprobs"),
    }


def _named(function: _Executable, name: str, where: placement.Placement) -> _Executable:
    """Returns ``function`` with its results placed, under the name of its program in profiles, logs and the cache."""

    def call(*args: Any) -> Any:
        return where.constrain(function(*args))

    call.__name__ = name
    return call


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


@functools.cache
def _module(
    model: config.ModelConfig, dtype: str, attention: str, transposes_kernels: bool
) -> "transformer.Transformer":
    # Imported here, because a start that finds its programs in the cache needs no Flax, whose import takes 0.15 s.
    from hipgpt_jax.model import transformer

    return transformer.Transformer(
        model, dtype, attention_impl=attention, full_precision=True, transposed_kernels=transposes_kernels
    )
