"""Programs as ``jax.export`` writes them, kept beside JAX's own cache of what XLA made of them.

JAX finds compiled code by the program, so Python has to trace the model at every start to ask for it. Kept
programs are found by what they follow from. The run in the package makes 50 tokens in 1.03 s instead of 1.45, from
``python`` to the end, of which importing Flax is 0.15: that is only done to trace (2 cores, both caches filled).
"""

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
from hipgpt_jax.generation import decoding, sampling
from hipgpt_jax.model import cache as kv

_PACKAGE = Path(__file__).parents[1]
_TRACED = ("config.py", "model/*.py", "generation/*.py")
_DIGEST_BYTES = hashlib.sha256().digest_size

for _node in (sampling.Settings, decoding.Rows, decoding.State, kv.Cache):
    jax.export.register_namedtuple_serialization(_node, serialized_name=f"hipgpt_jax.{_node.__name__}")


def kept(function: Callable[..., Any], settings: str) -> Callable[..., Any]:
    """Returns ``function`` for ``jax.jit``, which finds its program on disk if any process has traced it before.

    Where JAX has no compilation cache, or computes on a GPU, it is ``function`` itself: cuDNN's attention
    cannot be exported. What runs is the same program whether it was found or made. Nothing is said of a
    directory that cannot be written; ``devices.use_compilation_cache`` has told of it.

    Args:
        function: Pure, of arrays; its name is that of the program.
        settings: All that the program follows from beside the code, JAX's settings and the arguments' shapes.
    """
    name = function.__name__.strip("_")

    def traced(*args: Any) -> Any:  # once for each shape of its arguments
        if (directory := _directory()) is None:
            return function(*args)
        shapes = jax.tree.map(_shape, args)
        path = directory / f"{name}-{_key(name, settings, shapes)}"
        program = _read(path)
        if program is None:
            program = jax.export.export(jax.jit(function))(*shapes)
            _write(path, bytes(program.serialize()))
        return program.call(*args)

    traced.__name__ = name
    return traced


def _directory() -> Path | None:
    directory = jax.config.values["jax_compilation_cache_dir"]
    on_disk = directory and "://" not in directory and jax.config.values["jax_enable_compilation_cache"]
    return Path(directory) / "programs" if on_disk and jax.default_backend() == "cpu" else None


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    abstract: Any = jax.typeof(x)
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, weak_type=abstract.weak_type)


def _key(*follows_from: Any) -> str:
    # A context manager's setting is the attribute's; not every setting has one.
    jax_settings = sorted((name, str(getattr(jax.config, name, value))) for name, value in jax.config.values.items())
    return hashlib.sha256(repr((follows_from, jax_settings, _code())).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Returns a digest of all code that a program is traced by."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("jax", "jaxlib", "flax"):
        digest.update(importlib.metadata.version(package).encode())
    for path in sorted(path for pattern in _TRACED for path in _PACKAGE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> jax.export.Exported | None:
    """Returns a program, or None where there is none or its file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return jax.export.deserialize(bytearray(program)) if hashlib.sha256(program).digest() == digest else None


def _write(path: Path, program: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(program).digest() + program)
    except OSError:
        return
