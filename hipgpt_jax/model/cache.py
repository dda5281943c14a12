"""The key/value cache of decoding: blocks of positions, of which a step reads those in use."""

import bisect
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout

from hipgpt_jax import config

SMALLEST_BLOCK = 64
SMALLEST_BLOCK_ON_GPU = 256
_BLOCKS_PER_WINDOW = 4  # on a CPU no block is larger than this part of the window, on a GPU the first one is as large


class Block(NamedTuple):
    """Keys and values of consecutive positions.

    Positions at and beyond a row's length are masked out. They must be finite, because 0 · NaN is NaN.

    Attributes:
        keys: ``L`` arrays ``[B, N, S, H]``, or one array ``[B, L, N, S, H]`` if the layers are stacked.
        values: Likewise.
    """

    # On a CPU with 1024 positions, reading a layer takes 0.36 ms in this layout and 1.86 ms as [B, S, N, H]. A stacked
    # array costs a copy of each layer's slice there. On a GPU a stacked array is better: a token is written by one
    # kernel instead of L.
    keys: tuple[jax.Array, ...] | jax.Array
    values: tuple[jax.Array, ...] | jax.Array

    @property
    def is_stacked(self) -> bool:
        """Whether all layers are one array."""
        return not isinstance(self.keys, tuple)

    @property
    def num_positions(self) -> int:
        """Positions per row, ``S``."""
        return jax.tree.leaves(self.keys)[0].shape[-2]

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of a layer, each ``[B, N, S, H]``."""
        of_layer: Any = (slice(None), index) if self.is_stacked else index
        return self.keys[of_layer], self.values[of_layer]


class Cache(NamedTuple):
    """The blocks that a decode step reads, from position 0 to the next position of the longest row.

    Attributes:
        frozen: Blocks without the next position of any row. They are read and never written.
        writable: The blocks after them.
    """

    frozen: tuple[Block, ...]
    writable: tuple[Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks."""
        return (*self.frozen, *self.writable)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Division of a window's cache into blocks.

    Attributes:
        block_sizes: Positions of each block.
        stacked: Whether all layers of a block are one array.
    """

    block_sizes: tuple[int, ...]
    stacked: bool = False

    @property
    def bounds(self) -> tuple[int, ...]:
        """The first position of each block, then the window."""
        return tuple(itertools.accumulate(self.block_sizes, initial=0))

    def num_blocks(self, positions: int) -> int:
        """Returns the number of blocks that hold any of the first ``positions``.

        >>> layout = Layout((64, 64, 36))
        >>> layout.num_blocks(0), layout.num_blocks(64), layout.num_blocks(65)
        (0, 1, 2)
        """
        return bisect.bisect_left(self.bounds[:-1], positions)

    def shapes(
        self, model: config.ModelConfig, rows: int, dtype: str, first: int = 0, last: int | None = None
    ) -> tuple[Block, ...]:
        """Returns the shapes of the blocks from ``first`` up to ``last``, by default of all.

        Args:
            model: Shape of the model.
            rows: Rows, ``B``.
            dtype: Type of keys and values.
            first: Index of the first block.
            last: Index after the last block.
        """

        def layers(size: int) -> Any:
            shape_NSH, L = (model.num_heads, size, model.head_dim), model.num_layers
            if self.stacked:
                return jax.ShapeDtypeStruct((rows, L, *shape_NSH), jnp.dtype(dtype))
            return (jax.ShapeDtypeStruct((rows, *shape_NSH), jnp.dtype(dtype)),) * L

        return tuple(Block(layers(size), layers(size)) for size in self.block_sizes[first:last])

    def split(self, block: Block) -> tuple[Block, ...]:
        """Returns an unstacked block that starts at position 0 as the first blocks of this layout, zero-padded."""
        if self.stacked:
            block = stack(block)
        num_blocks = self.num_blocks(block.num_positions)
        return tuple(_slice(block, *bounds) for bounds in itertools.pairwise(self.bounds[: num_blocks + 1]))


def cpu_layout(window: int) -> Layout:
    """Returns the blocks for a CPU: 64 positions, then as many as all blocks before, at most a quarter of the window.

    The cost of a step grows with the text and not with the window. Blocks are summed one after the other, so
    a block that holds no token of a row changes no bit of that row.

    >>> cpu_layout(32).block_sizes, cpu_layout(1024).block_sizes
    ((32,), (64, 64, 128, 256, 256, 256))
    """
    # GPT-2, 64 rows with 40 tokens each: a step reads its cache in 16 ms, with a first block of 256 positions in 55 ms.
    sizes: list[int] = []
    most = max(SMALLEST_BLOCK, -(-window // _BLOCKS_PER_WINDOW))
    while (left := window - sum(sizes)) > 0:
        sizes.append(min(left, most, max(SMALLEST_BLOCK, sum(sizes))))
    return Layout(tuple(sizes))


def gpu_layout(window: int, *, stacked: bool = True) -> Layout:
    """Returns the blocks for a GPU: a quarter of the window, at least 256 positions, and the rest.

    >>> gpu_layout(32).block_sizes, gpu_layout(1024).block_sizes
    ((32,), (256, 768))
    """
    # Each block costs four kernels per layer, of 2 µs each, whatever it holds. GPT-2 on an H200: a step of one row
    # takes 0.6 ms with one block of 1024 positions and 0.9 ms with four of 512 in all; a step of 64 rows 1.5 and 1.3
    # ms.
    first = min(window, max(SMALLEST_BLOCK_ON_GPU, -(-window // _BLOCKS_PER_WINDOW)))
    return Layout((first, window - first) if window > first else (first,), stacked=stacked)


def empty(shapes: tuple[Block, ...], shardings: Any = None) -> tuple[Block, ...]:
    """Returns blocks of zeros of the given shapes, with the shardings of a like tree or on the default device."""
    zeros = {x: np.zeros(x.shape, x.dtype) for x in jax.tree.leaves(shapes)}
    # The buffers are donated, so they must not alias the host's array.
    return jax.device_put(jax.tree.map(zeros.__getitem__, shapes), shardings, may_alias=False)


def stack(block: Block) -> Block:
    """Returns a block of ``L`` arrays as a block of one array."""
    return Block(jnp.stack(block.keys, axis=1), jnp.stack(block.values, axis=1))


def append(cache: Cache, token: Block, position_B: jax.Array) -> Cache:
    """Writes the keys and values of one token per row into the writable blocks.

    Args:
        cache: The cache.
        token: ``L`` arrays ``[B, N, 1, H]``.
        position_B: Position of each row's token. A row whose position is negative or in no writable block is left
            unchanged.
    """
    start = sum(block.num_positions for block in cache.frozen)
    blocks: list[Block] = []
    for block in cache.writable:
        blocks.append(_append(block, token, position_B - start))
        start += block.num_positions
    return cache._replace(writable=tuple(blocks))


def _append(block: Block, token: Block, position_B: jax.Array) -> Block:
    position_B = jnp.where(position_B < 0, block.num_positions, position_B)  # a negative index would count from the end
    row_B = jnp.arange(position_B.shape[0])

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        index = (row_B, *[slice(None)] * (old.ndim - 3), position_B)
        return old.at[index].set(new[..., 0, :], mode="drop", unique_indices=True)

    return jax.tree.map(write, block, stack(token) if block.is_stacked else token)


def _slice(block: Block, start: int, stop: int) -> Block:
    """Returns positions ``[start, stop)`` of a block, padded with zeros beyond its last one."""

    def cut(x: jax.Array) -> jax.Array:
        own = x[..., start:stop, :]
        return jnp.pad(own, (*[(0, 0)] * (x.ndim - 2), (0, stop - start - own.shape[-2]), (0, 0)))

    return jax.tree.map(cut, block)


def with_fixed_layout(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Constrains stacked blocks to the memory layout of their axes.

    Without the constraint, XLA chooses another layout inside a loop on a GPU and transposes the cache on entry and
    exit: 2.4 GB for 64 rows of GPT-2. On a CPU it does not, and a constrained program could not be exported, so
    unstacked blocks are returned unchanged.
    """
    if not all(block.is_stacked for block in blocks):
        return blocks
    return jax.tree.map(lambda x: layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim)))), blocks)
