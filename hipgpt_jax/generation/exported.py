"""Programs as ``jax.export`` writes them, kept beside JAX's own cache of what XLA made of them.

JAX finds compiled code by the program, so Python has to trace the model at every start to ask for it. Kept
programs are found by what they follow from. The run in the package made 50 tokens in 1.03 s instead of 1.45, from
``python`` to the end, of which importing Flax is 0.15: that is only done to trace (2 cores, both caches filled).
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export

from hipgpt_jax import compilation, disk_cache
from hipgpt_jax.generation import carry, sampling
from hipgpt_jax.model import cache as kv

_PACKAGE = Path(__file__).parents[1]
_TRACED = ("config.py", "numerics.py", "model/*.py", "generation/*.py")

for _node in (sampling.Settings, carry.Rows, carry.State, carry.Told, kv.Cache):
    jax.export.register_namedtuple_serialization(_node, serialized_name=f"hipgpt_jax.{_node.__name__}")


def kept(function: Callable[..., Any], settings: str) -> Callable[..., Any]:
    """Returns ``function`` for ``jax.jit``, to be traced only if its program is not in the cache.

    Without a cache, and on a GPU, it is ``function`` itself: cuDNN's attention cannot be exported. The same program
    runs whether it was found or made.

    Args:
        function: Pure, of arrays; its name is that of the program.
        settings: All that the program depends on, except for the code, JAX's settings and the arguments' shapes.
    """
    name = function.__name__.strip("_")

    def traced(*args: Any) -> Any:  # once for each shape of its arguments
        if (cache := _cache()) is None:
            return function(*args)
        shapes = jax.tree.map(_shape, args)
        entry = f"{_prefix(settings)}-{name}-{_digest(shapes)}{compilation.PROGRAM}"
        if (found := cache.get(entry)) is not None:
            try:
                return _load(found, function).call(*args)
            # The digest holds, so the entry was written with this content. JAX reads it with flatbuffers, which
            # raises errors of any type on bytes that were not made by itself.
            except Exception as error:
                cache.discard(entry, str(error))
        program = bytes(jax.export.export(jax.jit(function))(*shapes).serialize())
        cache.put(entry, program)
        return _load(program, function).call(*args)

    traced.__name__ = name
    return traced


def any_kept(settings: str) -> bool:
    """Returns whether any program of these settings is in the cache."""
    if (cache := _cache()) is None:
        return False
    prefix = _prefix(settings)
    try:
        return any(entry.name.startswith(prefix) for entry in cache.entries())
    except OSError:
        return False


def _load(program: bytes, function: Callable[..., Any]) -> jax.export.Exported:
    found = jax.export.deserialize(bytearray(program))
    if found.fun_name != function.__name__:
        raise ValueError(f"it is the program {found.fun_name!r}")
    return _without_lapack(found)


def _without_lapack(program: jax.export.Exported) -> jax.export.Exported:
    """Returns a program for CPUs that needs no LAPACK: with it JAX would import SciPy, 0.1 s of a start.

    JAX does where a program names CPUs as its platform. None is kept for another one.
    """
    unchecked = jax.export.DisabledSafetyCheck.platform()
    return dataclasses.replace(program, platforms=("any",), disabled_safety_checks=(unchecked,))


def _cache() -> disk_cache.DiskCache | None:
    return compilation.active() if jax.default_backend() == "cpu" else None


def _prefix(settings: str) -> str:
    """Returns a digest of all that a program depends on, except for its name and the arguments' shapes."""
    # A context manager's setting is the attribute's; not every setting has one.
    jax_settings = sorted((name, str(getattr(jax.config, name, value))) for name, value in jax.config.values.items())
    return _digest((settings, jax_settings, _code()))


def _digest(follows_from: Any) -> str:
    return hashlib.sha256(repr(follows_from).encode()).hexdigest()[:32]  # two of them stand in a file's name


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    abstract: Any = jax.typeof(x)
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, weak_type=abstract.weak_type)


@functools.cache
def _code() -> str:
    """Returns a digest of all code that a program is traced by."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("jax", "jaxlib", "flax"):
        digest.update(importlib.metadata.version(package).encode())
    for path in sorted(path for pattern in _TRACED for path in _PACKAGE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
