"""The compiled functions that a sampler drives, and which of them have run."""

import bisect
import functools
import itertools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, exported, facts, sampling
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import parameters

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer

_REGION_ANALYSIS = "xla_cpu_copy_insertion_use_region_analysis"

_SMALLEST_BUCKET = 8


class Programs:
    """The compiled functions of a model, a window and a number of rows; all lanes of a sampler share them.

    Attributes:
        model: Shape of the model.
        dtype: Type of its arithmetic.
        params: Its parameters, in that type, on the device.
        device: What computes.
        window: Tokens that the model sees.
        stride: Tokens dropped at a time where the window is full.
        sizes: Slots of each part of the cache.
        starts: The first slot of each part, and the window.
    """

    def __init__(self, model: config.ModelConfig, window: int, stride: int, dtype: str, attention: str) -> None:
        self.model, self.dtype, self._attention = model, dtype, attention
        self.params: Any = None
        self.device: Any = None
        self.window, self.stride = window, stride
        self.sizes = kv.part_sizes(window)
        self.starts = list(itertools.accumulate(self.sizes, initial=0))
        module = functools.partial(_module, model, dtype, attention)
        sizes, settings = self.sizes, repr((model, dtype, attention, window, stride, self.sizes))

        def read(params: Any, context_BT: jax.Array, length_B: jax.Array) -> Any:
            return decoding.read(module(), params, context_BT, length_B, sizes=sizes)

        def advance(params: Any, rows: decoding.Rows, state: decoding.State, cache: tuple[kv.Cache, ...]) -> Any:
            return decoding.advance(module(), params, rows, state, cache)

        def step(params: Any, rows: decoding.Rows, state: decoding.State, before: Any, last: kv.Cache) -> Any:
            return decoding.step(module(), params, rows, state, before, last)

        def roll(params: Any, rows: decoding.Rows, state: decoding.State) -> decoding.State:
            return decoding.roll(module(), params, rows, state, stride=stride, sizes=sizes)[0]

        def roll_row(params: Any, rows: decoding.Rows, state: decoding.State, place: jax.Array) -> Any:
            """Rolls one row alone; returns its row of the batch and its cache."""
            row = decoding.take(rows, place)
            own = decoding.take(state, place)
            state, cache = decoding.roll(module(), params, row, own, stride=stride, sizes=sizes)
            return (row, state), cache

        def program(function: Callable[..., Any], **of_jit: Any) -> Any:
            return jax.jit(exported.kept(function, settings), **of_jit)

        # None of them refers to this object, so that it goes, and all code with it, as soon as it is not used.
        self.read = program(read)
        self.begin = program(_begin)
        self.put = program(_put, donate_argnums=0)
        self.advance = program(advance)
        self.append = program(_append, donate_argnums=0)
        self.step = program(step, donate_argnums=4, compiler_options=in_place(os.environ))  # on a CPU alone
        self.roll = program(roll)
        self.roll_row = program(roll_row)
        self.where = program(decoding.where)
        self.likeliest = program(facts.likeliest)
        self._ran: set[Hashable] = set()
        if not exported.any_kept(settings):
            module()  # Flax brings along what JAX 0.12 traces anew for, if it comes while a program is traced

    @property
    def module(self) -> "transformer.Transformer":
        """The model."""
        return _module(self.model, self.dtype, self._attention)

    def load(self, params: Any) -> None:
        """Takes parameters of the model; other ones than before compile nothing again."""
        there = jax.device_put(parameters.cast(params, self.dtype))
        self.device = next(iter(jax.tree.leaves(there)[0].devices()))
        # Bound to it, as what a kept program returns is: to other arguments a program is lowered again.
        self.params = jax.device_put(there, self.device)

    def read_prompts(self, prompts: Sequence[tuple[int, ...]], rows: int) -> tuple[jax.Array, tuple[kv.Cache, ...]]:
        """Returns the logits after each prompt, and their cache.

        The program follows from the bucket and ``rows`` alone, and there a row's numbers from its own ids.

        Args:
            prompts: Ids of one bucket.
            rows: To be read, at least as many as there are prompts; the rest is padding.
        """
        tokens_BT, length_B = np.zeros((rows, self.bucket(prompts[0])), np.int32), np.ones(rows, np.int32)
        for row, ids in enumerate(prompts):
            tokens_BT[row, : len(ids)], length_B[row] = ids, len(ids)
        return self.read(self.params, tokens_BT, length_B)

    def bucket(self, ids: tuple[int, ...]) -> int:
        """Returns the slots read for a prompt."""
        return bucket(len(ids), self.window)

    def part_of(self, slot: int) -> int:
        """Returns the part that a slot stands in."""
        return bisect.bisect_right(self.starts, slot) - 1

    def is_new(self, *program: Hashable) -> bool:
        """Whether this is the first time that a program is named."""
        known = program in self._ran
        self._ran.add(program)
        return not known


@functools.cache
def _module(model: config.ModelConfig, dtype: str, attention: str) -> "transformer.Transformer":
    """Returns the model; only where a program is traced, because importing Flax takes 0.15 s of a start."""
    from hipgpt_jax.model import transformer

    return transformer.Transformer(model, dtype, attention=attention, exact=True)


def in_place(environ: Mapping[str, str]) -> dict[str, bool]:
    """Returns the options by which XLA lets a program read a buffer and write it where it lies.

    It then runs what reads before what writes, and copies nothing. Where ``XLA_FLAGS`` decides this, it does.
    """
    return {} if _REGION_ANALYSIS in environ.get("XLA_FLAGS", "") else {_REGION_ANALYSIS: True}


def bucket(length: int, window: int) -> int:
    """Returns the slots read for a prompt: 8, 12, 16, 24, 32, 48, … or the window.

    A length compiles nothing that another length of its bucket has compiled, and at most a third of
    a bucket above 8 is padding.

    >>> [bucket(length, window=100) for length in (1, 9, 13, 70, 100)]
    [8, 12, 16, 96, 100]
    """
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)


def _begin(
    words_3: jax.Array,
    settings: sampling.Settings,
    length_1: jax.Array,
    context_1S: jax.Array,
    seen_1V: jax.Array,
    logits_BV: jax.Array,
    row: jax.Array,
) -> tuple[decoding.Rows, decoding.State]:
    """Draws the first token of a sample from a row of ``logits_BV``; returns its row of the batch."""
    logits_1V = decoding.take(logits_BV, row)
    rows = decoding.Rows(jax.random.key_data(sampling.sample_key(words_3))[None], settings)
    zero_1 = jnp.zeros_like(length_1)
    none_14 = jnp.zeros((1, 4), jnp.float32)
    before = decoding.State(zero_1, zero_1, none_14, length_1, context_1S, seen_1V, logits_1V)
    return rows, decoding.draw(rows, before, logits_1V)


def _put(
    cache: tuple[kv.Cache, ...], batch: Any, place: jax.Array, one: Any, read: tuple[kv.Cache, ...], row: jax.Array
) -> tuple[Any, tuple[kv.Cache, ...]]:
    """Replaces a row of the batch by ``one``, and of as many parts of the cache as ``read`` has by a row of that."""
    return decoding.put(batch, place, one), decoding.put(cache, place, decoding.take(read, row))


def _append(part: kv.Cache, new: kv.Cache, length_B: jax.Array, start: jax.Array) -> kv.Cache:
    return kv.append(part, new, length_B - start)
