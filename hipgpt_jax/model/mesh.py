"""The device mesh, and one table of how each parameter and the KV cache are sharded over it.

The axes are ``data`` (each device has its own rows of the batch), ``fsdp`` (likewise, with parameters and optimizer
state sharded) and ``model`` (matrix products are sharded too). XLA inserts the communication.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "model")

_ROWS = PartitionSpec(("data", "fsdp"))
_REPLICATED = PartitionSpec()

# By the last two names of a parameter's path. Column-parallel layers shard their outputs, row-parallel ones their
# inputs, so that each pair communicates once (Shoeybi et al., Megatron-LM, 2019). Embeddings are sharded along the
# width, because few sizes divide a vocabulary such as GPT-2's 50257.
_SPECS = {
    ("wte", "embedding"): PartitionSpec(None, ("fsdp", "model")),
    ("wpe", "embedding"): PartitionSpec(None, ("fsdp", "model")),
    ("c_attn", "kernel"): PartitionSpec("fsdp", "model"),
    ("c_attn", "bias"): PartitionSpec("model"),
    ("c_fc", "kernel"): PartitionSpec("fsdp", "model"),
    ("c_fc", "bias"): PartitionSpec("model"),
    ("c_proj", "kernel"): PartitionSpec("model", "fsdp"),
    ("c_proj", "bias"): _REPLICATED,
    ("ln_1", "scale"): _REPLICATED,
    ("ln_1", "bias"): _REPLICATED,
    ("ln_2", "scale"): _REPLICATED,
    ("ln_2", "bias"): _REPLICATED,
    ("ln_f", "scale"): _REPLICATED,
    ("ln_f", "bias"): _REPLICATED,
}
# The fields of a ``cache.Block`` are sharded by heads, which are the third axis from the end.
_CACHE_FIELDS = ("keys", "values")


def parse(text: str | None, *, batch_size: int, available: int) -> dict[str, int]:
    """Returns the size of each axis.

    Args:
        text: Such as ``data=4,model=2``; axes not named have size 1. None puts as many devices on ``data`` as divide
            the batch.
        batch_size: Sequences computed at once; ``data`` times ``fsdp`` must divide them.
        available: Number of devices.

    Raises:
        ValueError: An axis is unknown or repeated, a size is not a positive integer, there are too few devices, or
            the batch does not divide.
    """
    if text is None:
        return {"data": math.gcd(batch_size, available), "fsdp": 1, "model": 1}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES or not equals or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"mesh must be such as data=4,model=2, with the axes {', '.join(AXES)} once: got {text!r}")
        sizes[name] = int(size)
    found = {name: sizes.get(name, 1) for name in AXES}
    if math.prod(found.values()) > available:
        raise ValueError(f"mesh {text} needs {math.prod(found.values())} devices: JAX has {available}")
    if batch_size % (found["data"] * found["fsdp"]):
        raise ValueError(
            f"mesh {text} divides the rows of a step by {found['data'] * found['fsdp']}: {batch_size} rows (--batch by "
            f"--grad-accum) do not divide"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shardings of arrays over a mesh with the axes ``AXES``."""

    mesh: Mesh | AbstractMesh

    @classmethod
    def create(cls, sizes: dict[str, int]) -> "Layout":
        """Returns the layout over the first devices; several processes must use all of their devices."""
        devices = jax.devices()[: math.prod(sizes.values())]
        if jax.process_count() > 1 and len(devices) < jax.device_count():
            raise ValueError(
                f"the mesh of {jax.process_count()} processes must use all their {jax.device_count()} devices: got "
                f"{','.join(f'{axis}={size}' for axis, size in sizes.items())}. Give --mesh, and a --batch that data "
                f"times fsdp divides, or start fewer processes"
            )
        return cls(_make_mesh(sizes, devices))

    @classmethod
    def over_model(cls, devices: Sequence[Any]) -> "Layout":
        """Returns the layout over devices that share a model, all on the axis ``model``."""
        return cls(_make_mesh({"data": 1, "fsdp": 1, "model": len(devices)}, devices))

    @property
    def abstract(self) -> "Layout":
        """The layout of as many devices, whichever they are: a program that is constrained by it suits all of them."""
        return Layout(self.mesh.abstract_mesh)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding that puts the whole array on every device."""
        return NamedSharding(self.mesh, _REPLICATED)

    def shardings_for(self, tree: Any) -> Any:
        """Returns the sharding of each array of a tree: parameters, optimizer state with their paths, cache blocks.

        Raises:
            ValueError: An axis does not divide a parameter.
        """
        return jax.tree_util.tree_map_with_path(self._sharding_for, tree)

    def shard_batch(self, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
        """Returns a batch with its rows sharded, or replicated if they do not divide.

        Args:
            shape: Its shape.
            read: Returns a range of its rows; called only for those of this process's devices.
        """
        divides = shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
        sharding = NamedSharding(self.mesh, _ROWS) if divides else self.replicated

        def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return read(index[0])

        return jax.make_array_from_callback(shape, sharding, read_shard)

    def shard(self, tree: Any) -> Any:
        """Returns a tree of the host's parameters with their shardings; each device gets only its own shards."""
        return jax.tree.map(_shard, tree, self.shardings_for(tree))

    def to_host(self, tree: Any) -> Any:
        """Returns a tree of NumPy arrays, gathered from all devices and processes."""
        if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
            return jax.device_get(tree)
        return jax.device_get(jax.jit(lambda x: x, out_shardings=self.replicated)(tree))

    def _sharding_for(self, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        spec = _spec_for(path, names, leaf)
        for size, axes in zip(leaf.shape, spec, strict=False):
            axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
            divisor = math.prod(self.mesh.shape[axis] for axis in axes)
            if size % divisor:
                raise ValueError(
                    f"mesh {dict(self.mesh.shape)} divides {'.'.join(names)} of shape {leaf.shape} by {divisor}: "
                    f"{size} does not divide. Choose other sizes for fsdp and model"
                )
        return NamedSharding(self.mesh, spec)


def _spec_for(path: tuple[Any, ...], names: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    if leaf.ndim and names:
        return _SPECS[names[-2:]]
    is_cache = any(isinstance(key, jax.tree_util.GetAttrKey) and key.name in _CACHE_FIELDS for key in path)
    return PartitionSpec(*[None] * (leaf.ndim - 3), "model") if is_cache else _REPLICATED


def _make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _shard(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
