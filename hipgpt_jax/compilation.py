"""The persistent compile cache, and counts of compilations and cache hits."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax import disk_cache

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
SIZE_VARIABLE = "JAX_COMPILATION_CACHE_MAX_SIZE"

# Suffixes of XLA's executables and of exported programs, which share the directory and the size limit.
EXECUTABLE, PROGRAM = ".xla", ".program"

_DEFAULT_MAX_BYTES = 10**9

_active: disk_cache.DiskCache | None = None
_open_file_cache: Callable[[str], Any]  # JAX's own


def cache_directory() -> Path:
    """Returns the cache directory.

    It is ``hipgpt_jax`` in ``JAX_COMPILATION_CACHE_DIR``, or ``hipgpt_jax/compiled`` in the user's cache directory.

    Raises:
        ValueError: ``JAX_COMPILATION_CACHE_DIR`` is remote.
        RuntimeError: The user has no home directory.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return _directory_in(own)
    # The XDG specification says to ignore relative paths.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ".cache"
    if not base.is_absolute():
        raise RuntimeError(f"the home directory {str(Path.home())!r} is not an absolute path")
    return base / "hipgpt_jax" / "compiled"


def use_cache(log: Callable[[str], None]) -> None:
    """Enables the persistent cache in ``cache_directory()``, also for small programs; for command-line programs.

    Entries are checked against their SHA-256 before use. If the directory cannot be written, or another user can write
    to it, one line is logged and every process compiles again.

    Args:
        log: Receives lines for the user.
    """
    import jax

    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        cache = _install(cache_directory, log)
        if cache is not None and not any(cache.entries()):
            log("the compile cache is new: this first start takes some seconds longer")
    except OSError as error:
        _disable(str(error), log)


def check_cache(log: Callable[[str], None]) -> None:
    """Replaces JAX's own persistent cache, if it is enabled, by a checked one; for use from Python.

    The checked one is in the subdirectory ``hipgpt_jax`` of that cache.

    Args:
        log: Receives lines for the user.
    """
    import jax

    root = jax.config.values["jax_compilation_cache_dir"]
    if root and jax.config.values["jax_enable_compilation_cache"] and active() is None:
        _install(lambda: _directory_in(root), log)


def active() -> disk_cache.DiskCache | None:
    """Returns the checked cache that JAX uses; None if it uses none or another one."""
    import jax

    is_used = _active is not None and jax.config.values["jax_compilation_cache_dir"] == str(_active.directory)
    return _active if is_used and jax.config.values["jax_enable_compilation_cache"] else None


def max_bytes() -> int | None:
    """Returns the size limit of the cache: ``JAX_COMPILATION_CACHE_MAX_SIZE`` (-1: none, returned as None), or 1 GB."""
    import jax

    size = jax.config.values["jax_compilation_cache_max_size"]
    if size == -1:
        return None if SIZE_VARIABLE in os.environ else _DEFAULT_MAX_BYTES
    return size


def cache_in(
    directory: Path, limit: int | None = None, log: Callable[[str], None] = lambda line: None
) -> disk_cache.DiskCache:
    """Returns the cache in a directory; see ``disk_cache.DiskCache`` for the arguments."""
    return disk_cache.DiskCache(directory, (EXECUTABLE, PROGRAM), limit, log)


class _Executables:
    """XLA's executables in the cache, with the interface that JAX calls.

    It has the methods of JAX's ``CacheInterface``, which need not be the base class; JAX only logs ``_path``.
    """

    def __init__(self, cache: disk_cache.DiskCache) -> None:
        self._cache, self._path = cache, cache.directory
        self._returned: set[str] = set()

    def get(self, key: str) -> bytes | None:
        found = self._cache.get(_name_of(key))
        if found is not None:
            self._returned.add(key)
        return found

    def put(self, key: str, value: bytes) -> None:
        if key in self._returned:  # JAX compiles a cached program again only if XLA cannot load it
            self._returned.remove(key)
            self._cache.discard(_name_of(key), "XLA cannot load it")
        self._cache.put(_name_of(key), value)


def _name_of(key: str) -> str:
    """Returns the entry's name of a key, which ends in a SHA-256 and may be too long for a file name."""
    return key[-100:] + EXECUTABLE


def _install(directory: Callable[[], Path], log: Callable[[str], None]) -> disk_cache.DiskCache | None:
    """Makes JAX use the cache in a directory, or none if that fails, and returns it."""
    import jax

    global _active
    try:
        path = disk_cache.safe_directory(directory())
    except (OSError, RuntimeError, ValueError) as error:
        return _disable(f"{error}; {CACHE_VARIABLE} can name another directory", log)
    _active = cache_in(path, max_bytes(), log)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # XLA's own caches in that directory would have neither digests nor a size limit.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # JAX would print two lines where the checked cache logs one.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
    if not _replace_jax_cache():
        return _disable(f"JAX {jax.__version__} has no hook to check its entries", log)
    return _active


def _replace_jax_cache() -> bool:
    """Makes JAX open ``_active`` instead of its own file cache; returns whether that worked."""
    global _open_file_cache
    # Private names, equal in JAX 0.10 to 0.12: the function that opens the cache, its caller, and the result.
    try:
        from jax._src import compilation_cache

        if compilation_cache.get_file_cache is not _open:
            _open_file_cache, compilation_cache.get_file_cache = compilation_cache.get_file_cache, _open
        compilation_cache.reset_cache()
        compilation_cache._initialize_cache()
        return isinstance(compilation_cache._cache, _Executables)
    except (ImportError, AttributeError, TypeError):
        return False


def _open(path: str) -> Any:
    if (cache := active()) is not None and path == str(cache.directory):
        return _Executables(cache), path
    return _open_file_cache(path)


def _disable(reason: str, log: Callable[[str], None]) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # an open cache would still be used
    log(f"compiling without a cache: {reason}")


def _directory_in(root: str) -> Path:
    if "://" in root:
        raise ValueError(f"{CACHE_VARIABLE}={root} is not a local directory, so its entries cannot be checked")
    return Path(root) / "hipgpt_jax"


class Compilations:
    """Counts of compilations and cache hits, from now on.

    Attributes:
        compiled: Programs that XLA compiled.
        cached: Programs that were loaded from the persistent cache.
    """

    def __init__(self) -> None:
        import jax

        self.compiled, self.cached = 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def __str__(self) -> str:
        cached = f"{self.cached} from the cache"
        if not self.compiled:
            return f"programs: {cached}"
        return f"programs: {self.compiled} compiled{f', {cached}' if self.cached else ''}"

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":  # also reported for cache hits
            self.compiled += 1

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == "/jax/compilation_cache/cache_hits":
            self.compiled, self.cached = self.compiled - 1, self.cached + 1
