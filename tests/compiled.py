"""Cache of XLA executables, shared by test runs and processes. Compiling dominates a run without it."""

import hashlib
import os
from pathlib import Path

import jax
from jax._src import compilation_cache

from hipgpt_jax import disk_cache, numerics

_SUFFIX = ".xla"
_MAX_BYTES = 2 * 10**9

# Shared by clones, and keyed by instruction set, because an executable may not run on another processor. The package's
# own cache, including exported programs, is in "hipgpt_jax" in this directory.
_KIND = repr((jax.__version__, numerics.processor(), numerics.instruction_sets()))
_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
DIRECTORY = _HOME / "hipgpt_jax" / "tests" / hashlib.sha256(_KIND.encode()).hexdigest()[:16]

# The environment of a process that uses JAX without the package's cache. One at a time: JAX writes entries in place.
PROCESS = {
    "JAX_COMPILATION_CACHE_DIR": str(DIRECTORY / "processes"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


class _Executables:
    """Executables by JAX's keys, with the methods of JAX's ``CacheInterface``; unlike in JAX, writes are atomic."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache = disk_cache.DiskCache(disk_cache.safe_directory(path), (_SUFFIX,), _MAX_BYTES, print)

    def get(self, key: str) -> bytes | None:
        return self._cache.get(key[-100:] + _SUFFIX)

    def put(self, key: str, value: bytes) -> None:
        self._cache.put(key[-100:] + _SUFFIX, value)


def use() -> None:
    """Makes JAX cache every executable of this process."""
    kept, opened = _Executables(DIRECTORY), compilation_cache.get_file_cache
    compilation_cache.get_file_cache = lambda path: (kept, path) if path == str(DIRECTORY) else opened(path)
    restore()


def restore() -> None:
    """Makes JAX use this cache again after a test or an in-process program has selected another."""
    settings = {
        "jax_compilation_cache_dir": str(DIRECTORY),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    if any(jax.config.values[name] != value for name, value in settings.items()):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
