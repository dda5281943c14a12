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

from hipgpt_jax import files
from hipgpt_jax.generation import carry, sampling
from hipgpt_jax.model import cache as kv

_PACKAGE = Path(__file__).parents[1]
_TRACED = ("config.py", "model/*.py", "generation/*.py")
_DIGEST_BYTES = hashlib.sha256().digest_size

for _node in (sampling.Settings, carry.Rows, carry.State, carry.Told, kv.Cache):
    jax.export.register_namedtuple_serialization(_node, serialized_name=f"hipgpt_jax.{_node.__name__}")


def kept(function: Callable[..., Any], settings: str) -> Callable[..., Any]:
    """Returns ``function`` for ``jax.jit``, which finds its program on disk if any process has traced it before.

    Where JAX has no compilation cache, or computes on a GPU, it is ``function`` itself: cuDNN's attention
    cannot be exported. What runs is the same program whether it was found or made. Nothing is said of a
    directory that cannot be written; ``compilation.use_cache`` has told of it.

    Args:
        function: Pure, of arrays; its name is that of the program.
        settings: All that the program follows from beside the code, JAX's settings and the arguments' shapes.
    """
    name = function.__name__.strip("_")

    def traced(*args: Any) -> Any:  # once for each shape of its arguments
        if (directory := _directory(settings)) is None:
            return function(*args)
        shapes = jax.tree.map(_shape, args)
        path = directory / f"{name}-{_digest(shapes)}"
        program = _read(path)
        if program is None:
            program = bytes(jax.export.export(jax.jit(function))(*shapes).serialize())
            _write(path, program)
        return _without_lapack(jax.export.deserialize(bytearray(program))).call(*args)

    traced.__name__ = name
    return traced


def any_kept(settings: str) -> bool:
    """Returns whether any program of these settings is on disk."""
    directory = _directory(settings)
    return directory is not None and directory.is_dir()


def _without_lapack(program: jax.export.Exported) -> jax.export.Exported:
    """Returns a program for CPUs that needs no LAPACK: with it JAX would import SciPy, 0.1 s of a start.

    JAX does where a program names CPUs as its platform. None is kept for another one.
    """
    unchecked = jax.export.DisabledSafetyCheck.platform()
    return dataclasses.replace(program, platforms=("any",), disabled_safety_checks=(unchecked,))


def _directory(settings: str) -> Path | None:
    place = jax.config.values["jax_compilation_cache_dir"]
    on_disk = place and "://" not in place and jax.config.values["jax_enable_compilation_cache"]
    if not on_disk or jax.default_backend() != "cpu":
        return None
    # A context manager's setting is the attribute's; not every setting has one.
    jax_settings = sorted((name, str(getattr(jax.config, name, value))) for name, value in jax.config.values.items())
    return Path(place) / "programs" / _digest((settings, jax_settings, _code()))


def _digest(follows_from: Any) -> str:
    return hashlib.sha256(repr(follows_from).encode()).hexdigest()


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


def _read(path: Path) -> bytes | None:
    """Returns a program, or None where there is none or its file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return program if hashlib.sha256(program).digest() == digest else None


def _write(path: Path, program: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(program).digest() + program)
    except OSError:
        return
