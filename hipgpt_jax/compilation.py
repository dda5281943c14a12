"""The cache of compiled programs, and counts of what was compiled and what was found there."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax import disk_cache

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
SIZE_VARIABLE = "JAX_COMPILATION_CACHE_MAX_SIZE"

# Endings of the names of XLA's executables and of exported programs, which share the directory and the size limit.
EXECUTABLE, PROGRAM = ".xla", ".program"

_DEFAULT_MAX_BYTES = 10**9

_active: disk_cache.DiskCache | None = None
_open_file_cache: Callable[[str], Any]  # JAX's own


def cache_directory() -> Path:
    """Returns the directory of compiled programs.

    It is ``hipgpt_jax`` in ``JAX_COMPILATION_CACHE_DIR``, whose other files are JAX's own, or else
    ``hipgpt_jax/compiled`` in the user's cache directory.

    Raises:
        ValueError: ``JAX_COMPILATION_CACHE_DIR`` is remote.
        RuntimeError: The user has no home directory.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return _directory_in(own)
    # The XDG specification has relative paths ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ".cache"
    if not base.is_absolute():
        raise RuntimeError(f"the home directory {str(Path.home())!r} is not an absolute path")
    return base / "hipgpt_jax" / "compiled"


def use_cache(tell: Callable[[str], None]) -> None:
    """Turns on the persistent cache for every program, however small; for command-line programs.

    The directory is ``cache_directory()``. Entries are checked against their SHA-256 before they are used. Where the
    directory cannot be written, or another user can write there, one line says so and every start compiles anew.

    Args:
        tell: Receives lines for the user.
    """
    import jax

    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        cache = _install(cache_directory, tell)
        if cache is not None and not any(cache.entries()):
            tell("compiling for this machine, into a new cache: this first start takes some seconds longer")
    except OSError as error:
        _go_without(str(error), tell)


def check_cache(tell: Callable[[str], None]) -> None:
    """Has the entries of JAX's own persistent cache checked, if the process has one; for use from Python.

    They are then in ``hipgpt_jax`` in that cache's directory. Nothing changes where JAX has no such cache.

    Args:
        tell: Receives lines for the user.
    """
    import jax

    place = jax.config.values["jax_compilation_cache_dir"]
    if place and jax.config.values["jax_enable_compilation_cache"] and active() is None:
        _install(lambda: _directory_in(place), tell)


def active() -> disk_cache.DiskCache | None:
    """Returns the cache that JAX uses; None where it uses none, or one that is not ours."""
    import jax

    is_used = _active is not None and jax.config.values["jax_compilation_cache_dir"] == str(_active.directory)
    return _active if is_used and jax.config.values["jax_enable_compilation_cache"] else None


def max_bytes() -> int | None:
    """Returns the size limit of the cache: ``JAX_COMPILATION_CACHE_MAX_SIZE``, -1 for none, or else 1 GB."""
    import jax

    size = jax.config.values["jax_compilation_cache_max_size"]
    if size == -1:
        return None if SIZE_VARIABLE in os.environ else _DEFAULT_MAX_BYTES
    return size


def cache_in(
    directory: Path, limit: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> disk_cache.DiskCache:
    """Returns the cache in a directory; see ``disk_cache.DiskCache`` for its size limit and ``tell``."""
    return disk_cache.DiskCache(directory, (EXECUTABLE, PROGRAM), limit, tell)


class _Executables:
    """XLA's executables in the cache, with the methods that JAX calls.

    JAX's ``CacheInterface`` has ``get``, ``put`` and ``_path``, which is only logged; it need not be the base class.
    """

    def __init__(self, cache: disk_cache.DiskCache) -> None:
        self._cache, self._path = cache, cache.directory
        self._given: set[str] = set()

    def get(self, key: str) -> bytes | None:
        found = self._cache.get(_name_of(key))
        if found is not None:
            self._given.add(key)
        return found

    def put(self, key: str, value: bytes) -> None:
        if key in self._given:  # JAX compiles a program whose executable it was given only if XLA cannot load that
            self._given.remove(key)
            self._cache.discard(_name_of(key), "XLA cannot load it")
        self._cache.put(_name_of(key), value)


def _name_of(key: str) -> str:
    """Returns the name of an executable's entry; the key ends in a SHA-256, the rest may be too long for a file."""
    return key[-100:] + EXECUTABLE


def _install(directory: Callable[[], Path], tell: Callable[[str], None]) -> disk_cache.DiskCache | None:
    """Makes JAX use the cache in a directory, or none if that is not possible, and returns it."""
    import jax

    global _active
    try:
        place = disk_cache.safe_directory(directory())
    except (OSError, RuntimeError, ValueError) as error:
        return _go_without(f"{error}; {CACHE_VARIABLE} can name another directory", tell)
    _active = cache_in(place, max_bytes(), tell)
    jax.config.update("jax_compilation_cache_dir", str(place))
    # Not XLA's caches of its own in that directory: they have neither digests nor a size limit.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # JAX would print two lines for what `_active` reports in one.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
    if not _take_over_from_jax():
        return _go_without(f"JAX {jax.__version__} offers no way to check its entries", tell)
    return _active


def _take_over_from_jax() -> bool:
    """Has JAX open ``_active`` in place of its own file cache; returns whether it did."""
    global _open_file_cache
    # Private, and the same in JAX 0.10 to 0.12: the function that opens the cache, what calls it, and its result.
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


def _go_without(reason: str, tell: Callable[[str], None]) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # a cache that is open already would still be used
    tell(f"compiling without a cache: {reason}")


def _directory_in(place: str) -> Path:
    if "://" in place:
        raise ValueError(f"{CACHE_VARIABLE}={place} is not a local directory, so its entries cannot be checked")
    return Path(place) / "hipgpt_jax"


class Compilations:
    """Counts the programs that XLA is given from now on, and of which the compiled code came from the cache.

    Attributes:
        compiled: Programs compiled.
        cached: Programs whose compiled code was read from the persistent cache.
    """

    def __init__(self) -> None:
        import jax

        self.compiled, self.cached = 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def __str__(self) -> str:
        cached = f"{self.cached} from the cache"
        if not self.compiled:
            return f"programs: {cached}"
        return f"programs: {self.compiled} compiled{f', {cached}' if self.cached else ''}"

    def _took(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":  # told of a program from the cache too
            self.compiled += 1

    def _happened(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == "/jax/compilation_cache/cache_hits":
            self.compiled, self.cached = self.compiled - 1, self.cached + 1
