"""How the likeliest candidates of a draw are found on a platform."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # less is 0

# Enough for the default top_k, and for every documented one. With V 50257 on a CPU, top_k(128) takes 0.2 ms and a
# sort 18 ms; with V 5000 and 16 rows, top_k(16) takes 0.12 ms and top_k(128) 0.62.
ON_CPU = (16, 128)
# On a GPU a condition is looked at by the host, which waits for it: three of them made a step of GPT-2 on an H200 take
# 1.6 ms instead of 1.1. So a step has one number of candidates there, and another program takes rows that need more.
ON_GPU = 64
# A GPU sorts for a top_k of more than 16: 65 of 50257 it sorts out among 1571 chunks' maxima, then in the 65 chunks.
_CHUNK = 32


class Search(NamedTuple):
    """How the likeliest candidates of a row are found: what suits a platform; its results are the same.

    Attributes:
        tiers: Numbers of candidates. A row gets the smallest that its settings need; where the largest is less than
            that, what is chosen means nothing.
        in_chunks: Whether the vocabulary is narrowed down to chunks with the largest maxima before it is sorted.
    """

    tiers: tuple[int, ...]
    in_chunks: bool

    @property
    def narrow(self) -> "Search":
        """The first tier alone."""
        return self._replace(tiers=self.tiers[:1])

    @property
    def wide(self) -> "Search":
        """The last tier alone, which any settings are content with."""
        return self._replace(tiers=self.tiers[-1:])

    def is_wide(self, row: config.SamplingConfig) -> bool:
        """Returns whether settings need more candidates than the first tier has."""
        needed = row.top_k if 0 < row.top_k < self.tiers[-1] else self.tiers[-1]
        return bool(np.float32(row.temperature) >= SMALLEST_TEMPERATURE) and needed > self.tiers[0]


def search_on(V: int, platform: str) -> Search:
    """Returns how a platform searches ``V`` logits; the last tier is all of them."""
    sizes = ON_CPU if platform == "cpu" else (ON_GPU,)
    return Search((*(size for size in sizes if size < V), V), in_chunks=platform != "cpu")


def top_in_chunks(x_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns what ``lax.top_k`` does, by two small sorts: values and indices ``[B, k]``, ties by the lower index.

    No element of the ``k`` largest lies outside of the ``k`` chunks with the largest maxima: each of those holds
    one that comes before it.
    """
    B, V = x_BV.shape
    chunks = -(-V // _CHUNK)
    padded_BV = jnp.pad(x_BV, ((0, 0), (0, chunks * _CHUNK - V)), constant_values=-jnp.inf)
    x_BCX = padded_BV.reshape(B, chunks, _CHUNK)
    _, best_BK = jax.lax.top_k(x_BCX.max(axis=-1), min(k, chunks))
    few = jnp.take_along_axis(x_BCX, best_BK[:, :, None], axis=1).reshape(B, -1)
    within_X = jnp.arange(_CHUNK, dtype=best_BK.dtype)
    index = (best_BK[:, :, None] * _CHUNK + within_X[None, None]).reshape(B, -1)
    descending, index = jax.lax.sort((-few, index), num_keys=2)
    return -descending[:, :k], index[:, :k]
