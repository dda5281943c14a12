"""The key/value cache of a decode step, as a value of fixed shape, in parts of which a step reads the live ones."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout

from hipgpt_jax import config

SMALLEST_PART = 64
SMALLEST_PART_ON_GPU = 256
_PARTS = 4


class Cache(NamedTuple):
    """Keys and values of a run of slots; in the whole cache slot ``s`` holds position ``s``.

    A row's slots from its length on hold nothing that is ever attended to.

    Attributes:
        keys: ``L`` arrays ``[B, N, S, H]``. On a CPU at 1024 slots this layout reads a layer in
            0.36 ms, ``[B, S, N, H]`` in 1.86 ms; one stacked array costs a copy of each slice. On a GPU it is
            that, ``[B, L, N, S, H]``, of which each layer reads its own: a token is written by one
            kernel instead of ``L``.
        values: Likewise.
    """

    keys: tuple[jax.Array, ...] | jax.Array
    values: tuple[jax.Array, ...] | jax.Array

    @property
    def is_stacked(self) -> bool:
        """Whether all layers are one array."""
        return not isinstance(self.keys, tuple)

    @property
    def slots(self) -> int:
        """Slots of each row, ``S``."""
        return jax.tree.leaves(self.keys)[0].shape[-2]

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of a layer, each ``[B, N, S, H]``."""
        of_layer: Any = (slice(None), index) if self.is_stacked else index
        return self.keys[of_layer], self.values[of_layer]


def stack(cache: Cache) -> Cache:
    """Returns a cache of ``L`` arrays as one."""
    return Cache(jnp.stack(cache.keys, axis=1), jnp.stack(cache.values, axis=1))


def part_sizes(window: int) -> tuple[int, ...]:
    """Returns the slots of each part of a window's cache: 64, then as many as all before it, but at most a quarter.

    A step reads the parts that hold a token of any row, so its cost grows with the text and not with the
    window. Parts are summed one after the other, so one that holds nothing of a row changes no bit of it.
    At GPT-2's size a step of 64 rows with 40 tokens each reads their cache in 16 ms; of a first part of 256
    slots it took 55.

    >>> part_sizes(32), part_sizes(100), part_sizes(1024)
    ((32,), (64, 36), (64, 64, 128, 256, 256, 256))
    """
    sizes: list[int] = []
    while (left := window - sum(sizes)) > 0:
        most = max(SMALLEST_PART, -(-window // _PARTS))
        sizes.append(min(left, most, max(SMALLEST_PART, sum(sizes))))
    return tuple(sizes)


def part_sizes_on_gpu(window: int) -> tuple[int, ...]:
    """Returns the slots of each part on a GPU: a quarter of the window, at least 256, and the rest.

    A part costs four kernels a layer, of 2 µs each, whatever it holds. At GPT-2's size on an H200 a step of one
    row with a part of 1024 slots takes 0.6 ms, with four of 512 in all 0.9; one of 64 rows 1.5 and 1.3.

    >>> part_sizes_on_gpu(32), part_sizes_on_gpu(1024)
    ((32,), (256, 768))
    """
    first = min(window, max(SMALLEST_PART_ON_GPU, -(-window // _PARTS)))
    return (first, window - first) if window > first else (first,)


def shapes(
    model: config.ModelConfig, rows: int, sizes: tuple[int, ...], dtype: str, *, stacked: bool = False
) -> tuple[Cache, ...]:
    """Returns the shapes of a cache, in parts of these sizes."""

    def layers(size: int) -> Any:
        shape_NSH, L = (model.num_heads, size, model.head_dim), model.num_layers
        if stacked:
            return jax.ShapeDtypeStruct((rows, L, *shape_NSH), jnp.dtype(dtype))
        return (jax.ShapeDtypeStruct((rows, *shape_NSH), jnp.dtype(dtype)),) * L

    return tuple(Cache(layers(size), layers(size)) for size in sizes)


def empty(
    model: config.ModelConfig,
    rows: int,
    sizes: tuple[int, ...],
    dtype: str,
    device: Any = None,
    *,
    stacked: bool = False,
) -> tuple[Cache, ...]:
    """Returns a cache of zeros, in parts of these sizes, on a device."""
    wanted = shapes(model, rows, sizes, dtype, stacked=stacked)
    of_shape = {x: np.zeros(x.shape, x.dtype) for x in jax.tree.leaves(wanted)}

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(of_shape[x], device, may_alias=False)

    return jax.tree.map(zeros, wanted)


def holding(sizes: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Returns the sizes of the parts that hold any of the first ``slots`` slots.

    >>> holding((64, 64, 36), 64), holding((64, 64, 36), 65)
    ((64,), (64, 64))
    """
    starts = itertools.accumulate(sizes, initial=0)
    return tuple(size for size, start in zip(sizes, starts, strict=False) if start < slots)


def split(new: Cache, sizes: tuple[int, ...]) -> tuple[Cache, ...]:
    """Returns ``new``, with zeros behind it, in parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        stop = start + size

        def cut(x: jax.Array, start: int = start, stop: int = stop) -> jax.Array:
            own = x[..., start:stop, :]
            return jnp.pad(own, (*[(0, 0)] * (x.ndim - 2), (0, stop - start - own.shape[-2]), (0, 0)))

        parts.append(jax.tree.map(cut, new))
        start = stop
    return tuple(parts)


def append(part: Cache, new: Cache, slot_B: jax.Array) -> Cache:
    """Writes one token's keys and values at each row's slot, counted from the part's first.

    A row whose slot is not in the part is left as it is.

    Args:
        part: The part, stacked or not.
        new: ``L`` arrays ``[B, N, 1, H]``.
        slot_B: Slots.
    """
    S = part.slots
    slot_B = jnp.where(slot_B < 0, S, slot_B)  # a negative index would count from the end
    row_B = jnp.arange(slot_B.shape[0])

    def write(old: jax.Array, token: jax.Array) -> jax.Array:
        at = (row_B, *[slice(None)] * (old.ndim - 3), slot_B)
        return old.at[at].set(token[..., 0, :], mode="drop", unique_indices=True)

    return jax.tree.map(write, part, stack(new) if part.is_stacked else new)


def pinned(cache: tuple[Cache, ...]) -> tuple[Cache, ...]:
    """Returns a cache that lies as it came: a loop's XLA would turn on entry, and back, 2.4 GB for 64 rows of GPT-2.

    On a CPU it does not, and a program that says so cannot be exported: there the cache is returned as it is.
    """
    if not all(part.is_stacked for part in cache):
        return cache
    return jax.tree.map(lambda x: layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim)))), cache)
