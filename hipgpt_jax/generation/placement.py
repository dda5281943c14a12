"""The devices of a replica, and the part of each array that each of them holds."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax

from hipgpt_jax.model import mesh

_Tree = TypeVar("_Tree")


class Placement:
    """One device, or several that share a model: weights and KV cache are sharded, all other arrays replicated."""

    def __init__(self, devices: Sequence[Any]) -> None:
        """Takes the devices, at least one, in the order of the mesh."""
        self._device = devices[0]
        self._layout = mesh.Layout.over_model(devices) if len(devices) > 1 else None

    def shardings(self, tree: Any) -> Any:
        """Returns the sharding of each array of a tree of parameters, decode state and cache blocks."""
        if self._layout is not None:
            return self._layout.shardings_for(tree)
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        return jax.tree.map(lambda _: sharding, tree)

    def put(self, tree: _Tree, *, may_alias: bool | None = None) -> _Tree:
        """Returns a tree of arrays on the devices; see ``jax.device_put``."""
        return jax.device_put(tree, self.shardings(tree), may_alias=may_alias)

    def constrain(self, tree: _Tree) -> _Tree:
        """Returns the results of a program, constrained to their shardings."""
        # Without the constraint, XLA may choose others, and the next program would not accept them.
        if self._layout is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self._layout.abstract.shardings_for(tree))
