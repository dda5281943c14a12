"""JAX's persistent compilation cache, and what was compiled or found in it."""

import os
from collections.abc import Callable
from pathlib import Path

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def cache_directory() -> Path:
    """Returns where compiled programs are kept: ``JAX_COMPILATION_CACHE_DIR``, else under the user's cache directory.

    Raises:
        RuntimeError: The user has no home directory.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipgpt_jax" / "xla"


def use_cache(tell: Callable[[str], None]) -> None:
    """Turns on JAX's persistent compilation cache, for every program however small.

    ``JAX_COMPILATION_CACHE_DIR`` is respected; otherwise the directory is ``hipgpt_jax`` in the user's
    cache directory, for that user alone, because compiled code in it is run. Where that cannot be
    written, it is told, and every start compiles anew.
    """
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if os.environ.get(CACHE_VARIABLE):
        return
    try:
        directory = cache_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        if not any(directory.iterdir()):
            tell("compiling for this machine, into a new cache: this first start takes some seconds longer")
    except (OSError, RuntimeError) as error:
        tell(f"compiling without a cache: {error}. {CACHE_VARIABLE} names another directory for it")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


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
