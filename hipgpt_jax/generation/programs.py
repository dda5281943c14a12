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
from hipgpt_jax.generation import candidates, carry, decoding, exported, facts, sampling
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import parameters

if TYPE_CHECKING:
    from hipgpt_jax.model import transformer

_REGION_ANALYSIS = "xla_cpu_copy_insertion_use_region_analysis"

_SMALLEST_BUCKET = 8

# Tokens of a row that a program draws at most. One token of GPT-2 keeps an H200 busy for 0.45 ms and its host, which
# hands over 160 arrays, brings 216 captured kernels up to date and fetches, for 1.4 ms. On a CPU eight at once make a
# lone row of the documented default 2.5 times as fast as one after the other, of D256 L8 1.17 times; there, a model of
# more weights than this gains nothing, and its text would come in lumps. Several rows on a CPU gain nearly as much by
# four, and a row that ends waits for the others half as long: 64 of D256 L8 that stop at different tokens make 3382
# tokens/s by four, 2907 by eight and 3306 one by one; those that end together 4189, 4420 and 4016.
_STEPS = 8
_STEPS_OF_SEVERAL_ON_CPU = 4
_MOST_WEIGHTS = 2**24


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
        platform: What the functions suit, ``cpu`` or a GPU's.
        rows: Of a batch.
        most_steps: Steps that one program takes at most.
        search: How a step finds candidates.
    """

    def __init__(
        self, model: config.ModelConfig, rows: int, window: int, stride: int, dtype: str, attention: str, platform: str
    ) -> None:
        self.model, self.dtype, self._attention, self.platform = model, dtype, attention, platform
        self.rows, self.most_steps = rows, steps_at_once(model, rows, platform)
        self.params: Any = None
        self.device: Any = None
        self.window, self.stride = window, stride
        stacked = self.on_gpu
        self.sizes = sizes = kv.part_sizes_on_gpu(window) if stacked else kv.part_sizes(window)
        self.starts = list(itertools.accumulate(self.sizes, initial=0))
        self.search = search = candidates.search_on(model.vocab_size, platform)
        module = functools.partial(_module, model, dtype, attention, stacked)
        count = self.most_steps
        settings = repr((model, dtype, attention, window, stride, sizes, search, count))

        def fill(params: Any, context_BT: jax.Array) -> Any:
            return decoding.fill(module(), params, context_BT, sizes=sizes, stacked=stacked)

        def stepping(search: candidates.Search) -> Callable[..., Any]:
            def steps(params: Any, rows: carry.Rows, state: carry.State, *more: Any) -> Any:
                options = {"search": search, "count": count, "stops_early": not stacked}
                return decoding.steps(module(), params, rows, state, *more, **options)

            return steps

        rolled = functools.partial(decoding.roll, stride=stride, sizes=sizes, stacked=stacked, search=search)

        def roll(params: Any, rows: carry.Rows, state: carry.State) -> carry.State:
            return rolled(module(), params, rows, state)[0]

        def roll_row(params: Any, rows: carry.Rows, state: carry.State, place: jax.Array) -> Any:
            """Rolls one row alone; returns its row of the batch and its cache."""
            row = carry.take(rows, place)
            own = carry.take(state, place)
            state, cache = rolled(module(), params, row, own)
            return (row, state), cache

        def program(function: Callable[..., Any], **of_jit: Any) -> Any:
            return jax.jit(function if stacked else exported.kept(function, settings), **of_jit)

        # None of them refers to this object, so that it goes, and all code with it, as soon as it is not used.
        self.fill = program(fill)
        self.enter = program(_enter, donate_argnums=0)
        self.put = program(_put, donate_argnums=0)
        if stacked:
            choices = search.narrow, search.wide
            self.steps, self.steps_wide = (program(stepping(chosen), donate_argnums=(2, 4)) for chosen in choices)
            self.told = jax.jit(_told)
        else:
            self.steps = program(stepping(search), donate_argnums=4, compiler_options=in_place(os.environ))
            self.told = carry.Told.of
        self.roll = program(roll)
        self.roll_row = program(roll_row)
        self.where = program(carry.where)
        self.likeliest = program(facts.likeliest)
        self._ran: set[Hashable] = set()
        if stacked or not exported.any_kept(settings):
            module()  # Flax brings along what JAX 0.12 traces anew for, if it comes while a program is traced

    @property
    def on_gpu(self) -> bool:
        """Whether the functions suit a GPU, where there is ``steps_wide``, for rows that need more candidates."""
        return self.platform != "cpu"

    @property
    def is_lone(self) -> bool:
        """Whether they are of one row on a CPU."""
        return self.rows == 1 and not self.on_gpu

    @property
    def module(self) -> "transformer.Transformer":
        """The model."""
        return _module(self.model, self.dtype, self._attention, self.on_gpu)

    def load(self, params: Any) -> None:
        """Takes parameters of the model; other ones than before compile nothing again."""
        there = jax.device_put(parameters.cast(params, self.dtype))
        self.device = next(iter(jax.tree.leaves(there)[0].devices()))
        # Bound to it, as what a kept program returns is: to other arguments a program is lowered again.
        there = jax.device_put(there, self.device)
        self.params = parameters.turned(there) if self.on_gpu else there

    def read_contexts(self, contexts: Sequence[tuple[int, ...]], rows: int) -> tuple[kv.Cache, ...]:
        """Returns the cache that contexts leave, in the parts that hold them.

        The program follows from the bucket and ``rows`` alone, and there a row's numbers from its own ids.

        Args:
            contexts: Ids of one bucket. Where they are all empty no program runs.
            rows: To be read, at least as many as there are contexts; the rest is padding.
        """
        if not any(contexts):
            return ()
        context_BT = np.zeros((rows, self.bucket(contexts[0])), np.int32)
        for row, ids in enumerate(contexts):
            context_BT[row, : len(ids)] = ids
        return self.fill(self.params, context_BT)

    def shapes(self, rows: int, sizes: tuple[int, ...]) -> tuple[kv.Cache, ...]:
        """Returns a cache to lower a program by: shapes on the device, in parts of these sizes."""
        return self.on_device(kv.shapes(self.model, rows, sizes, self.dtype, stacked=self.on_gpu))

    def empty(self, rows: int, sizes: tuple[int, ...]) -> tuple[kv.Cache, ...]:
        """Returns an empty cache on the device, in parts of these sizes."""
        return kv.empty(self.model, rows, sizes, self.dtype, self.device, stacked=self.on_gpu)

    def on_device(self, shapes: Any) -> Any:
        """Returns shapes as they are of arrays on the device; those of others are lowered again."""
        place = jax.sharding.SingleDeviceSharding(self.device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def bucket(self, ids: tuple[int, ...]) -> int:
        """Returns the slots read for a context."""
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
def _module(model: config.ModelConfig, dtype: str, attention: str, on_gpu: bool) -> "transformer.Transformer":
    """Returns the model; only where a program is traced, because importing Flax takes 0.15 s of a start."""
    from hipgpt_jax.model import transformer

    return transformer.Transformer(model, dtype, attention=attention, exact=True, turned=on_gpu)


def steps_at_once(model: config.ModelConfig, rows: int, platform: str) -> int:
    """Returns the most steps that one program takes on a platform.

    >>> gpt2 = config.ModelConfig(vocab_size=50257, embed_dim=768, num_heads=12, ff_hidden_dim=3072, num_layers=12)
    >>> [steps_at_once(model, 1, platform) for model in (config.ModelConfig(), gpt2) for platform in ("cpu", "cuda")]
    [8, 8, 1, 8]
    >>> [steps_at_once(config.ModelConfig(), 2, platform) for platform in ("cpu", "cuda")]
    [4, 8]
    """
    D, F = model.embed_dim, model.ff_hidden_dim
    weights = model.num_layers * (4 * D * D + 2 * D * F) + model.vocab_size * D
    if platform == "cpu" and weights > _MOST_WEIGHTS:
        return 1
    return _STEPS if platform != "cpu" or rows == 1 else _STEPS_OF_SEVERAL_ON_CPU


def in_place(environ: Mapping[str, str]) -> dict[str, bool]:
    """Returns the options by which XLA lets a program read a buffer and write it where it lies.

    It then runs what reads before what writes, and copies nothing. Where ``XLA_FLAGS`` decides this, it does.
    """
    return {} if _REGION_ANALYSIS in environ.get("XLA_FLAGS", "") else {_REGION_ANALYSIS: True}


def bucket(length: int, window: int) -> int:
    """Returns the slots read for a context: 8, 12, 16, 24, 32, 48, … or the window.

    A length compiles nothing that another length of its bucket has compiled, and at most a third of
    a bucket above 8 is padding.

    >>> [bucket(length, window=100) for length in (1, 9, 13, 70, 100)]
    [8, 12, 16, 96, 100]
    """
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)


def _told(state: carry.State) -> carry.Told:
    """Returns copies, because the next steps take over the memory of the state."""
    return jax.tree.map(jnp.copy, carry.Told.of(state))


def _enter(
    cache: tuple[kv.Cache, ...], batch: Any, place: jax.Array, one: Any, read: tuple[kv.Cache, ...], row: jax.Array
) -> tuple[Any, tuple[kv.Cache, ...]]:
    """Gives a row of the batch to a sample whose context is read but for its newest token; the cache as ``_put``."""
    words_3, settings, length_1, token_1, context_1S, seen_1V = one
    rows = carry.Rows(jax.random.key_data(sampling.sample_key(words_3))[None], settings)
    no_numbers_14, no_logits_1V = jnp.zeros((1, 4), jnp.float32), jnp.zeros(seen_1V.shape, jnp.float32)
    index_1 = jnp.zeros_like(length_1)
    state = carry.State(index_1, token_1, no_numbers_14, length_1, context_1S, seen_1V, no_logits_1V)
    return _put(cache, batch, place, (rows, state), read, row)


def _put(
    cache: tuple[kv.Cache, ...], batch: Any, place: jax.Array, one: Any, read: tuple[kv.Cache, ...], row: jax.Array
) -> tuple[Any, tuple[kv.Cache, ...]]:
    """Replaces a row of the batch by ``one``, and of as many parts of the cache as ``read`` has by a row of that.

    Where there is no batch these are all of it. No cache is made to be replaced then: 2 ms of 30 at D256 L8.
    """
    own = carry.take(read, row)
    return (one, own) if batch is None else (carry.put(batch, place, one), carry.put(cache, place, own))
