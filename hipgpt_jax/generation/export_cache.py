"""Disk cache of traced programs, beside JAX's own cache of compiled ones.

JAX finds compiled code by the program, so Python would have to trace the model at every start to ask for it. Exported
programs are found by everything that they depend on instead.
"""

# The run in the package generates 50 tokens in 1.03 s instead of 1.45 s, from the start of Python to its end. Importing
# Flax, which only tracing needs, is 0.15 s of that (2 cores, both caches filled).

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
from hipgpt_jax.generation import decoding, logprobs, sampling
from hipgpt_jax.model import cache as kv

_PACKAGE = Path(__file__).parents[1]
_TRACED = ("config.py", "numerics.py", "model/*.py", "generation/*.py")

for _node in (
    sampling.SamplingParams,
    logprobs.TokenStats,
    decoding.DecodeState,
    decoding.StepOutput,
    kv.Block,
    kv.Cache,
):
    jax.export.register_namedtuple_serialization(_node, serialized_name=f"hipgpt_jax.{_node.__name__}")


def cached(function: Callable[..., Any], settings: str) -> Callable[..., Any]:
    """Returns ``function`` for ``jax.jit``, traced only if its program is not in the cache.

    Without a cache ``function`` itself is traced. The same program runs whether it was found or traced.

    Args:
        function: Pure function of arrays; its name is the program's.
        settings: Everything that the program depends on, except for the code, JAX's settings and the arguments' shapes.
    """
    name = function.__name__

    def load_or_trace(*args: Any) -> Any:  # runs once for each shape of the arguments
        if (cache := _cache()) is None:
            return function(*args)
        shapes = jax.tree.map(_shape, args)
        entry = f"{_prefix(settings)}-{name}-{_digest(shapes)}{compilation.PROGRAM}"
        if (found := cache.get(entry)) is not None:
            try:
                return _load(found, function).call(*args)
            # The entry's digest is right, so this version of the package wrote it. JAX reads it with flatbuffers, which
            # raises errors of any type on bytes of another version.
            except Exception as error:
                cache.discard(entry, str(error))
        program = bytes(jax.export.export(jax.jit(function))(*shapes).serialize())
        cache.put(entry, program)
        return _load(program, function).call(*args)

    load_or_trace.__name__ = name
    return load_or_trace


def has_cached(settings: str) -> bool:
    """Returns whether the cache has any program of these settings."""
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
    """Returns a program of no named platform.

    For a program that names CPUs, JAX loads LAPACK through SciPy, whose import takes 0.1 s. Programs are cached for
    CPUs alone.
    """
    unchecked = jax.export.DisabledSafetyCheck.platform()
    return dataclasses.replace(program, platforms=("any",), disabled_safety_checks=(unchecked,))


def _cache() -> disk_cache.DiskCache | None:
    return compilation.active() if jax.default_backend() == "cpu" else None


def _prefix(settings: str) -> str:
    """Returns a digest of everything that a program depends on, except for its name and the arguments' shapes."""
    # A context manager changes the attribute; not every setting has one.
    jax_settings = sorted((name, str(getattr(jax.config, name, value))) for name, value in jax.config.values.items())
    return _digest((settings, jax_settings, _code()))


def _digest(key: Any) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]  # half of it: a file name holds two


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    abstract: Any = jax.typeof(x)
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, weak_type=abstract.weak_type)


@functools.cache
def _code() -> str:
    """Returns a digest of all code that is traced."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("jax", "jaxlib", "flax"):
        digest.update(importlib.metadata.version(package).encode())
    for path in sorted(path for pattern in _TRACED for path in _PACKAGE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
