"""The platform that JAX computes on, chosen before it starts, and its compilation cache."""

import importlib.metadata
import os
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import NamedTuple

DEVICES = ("auto", "cpu", "rocm", "cuda")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "jax-rocm10-plugin")

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# Captured command buffers crash some ROCm set-ups, above all in loops; AMD's documents and JAX's own
# ROCm tests switch them off. Taking memory as it is needed leaves a desktop card usable.
_ROCM_XLA_FLAG = "--xla_gpu_enable_command_buffer="
_ROCM_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def rocm_defaults(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Returns the settings that ROCm needs and the environment does not already decide."""
    chosen = {}
    flags = environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        chosen["XLA_FLAGS"] = f"{flags} {_ROCM_XLA_FLAG}".strip()
    if _ROCM_PREALLOCATE not in environ:
        chosen[_ROCM_PREALLOCATE] = "false"
    return chosen


def plugins() -> list[str]:
    """Returns the installed JAX accelerator plugins, as ``name version``, without importing any."""
    found = (d for name in _PLUGINS for d in importlib.metadata.distributions(name=name))
    return [f"{d.name} {d.version}" for d in found]


class Device(NamedTuple):
    """What JAX computes on, in JAX's words."""

    platform: str
    kind: str

    def __str__(self) -> str:
        return f"{self.platform} ({self.kind})"


def start(device: str, tell: Callable[[str], None]) -> Device:
    """Starts JAX on ``device`` and returns what it computes on.

    ``auto`` leaves the choice to JAX, and to ``JAX_PLATFORMS`` where the user has set it; it says so
    where a GPU plugin is installed and JAX took the CPU all the same. Every setting made here is told.

    Args:
        device: One of ``DEVICES``.
        tell: Takes a line for the user.

    Raises:
        ValueError: JAX has no such device; the message says what it found and how to install. Or it has
            started on another one in this process already.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}: got {device!r}")
    installed = plugins()
    if device == "rocm" or (device == "auto" and any("rocm" in plugin for plugin in installed)):
        for name, value in rocm_defaults(os.environ).items():
            os.environ[name] = value
            tell(f"set {name}={value}")

    import jax

    if device != "auto":
        jax.config.update("jax_platforms", device)
    try:
        first = jax.devices()[0]
    except RuntimeError as error:
        if device == "auto":
            raise ValueError(f"JAX {jax.__version__} could not start: {_first_line(error)}") from error
        raise ValueError(
            f"--device {device}: JAX {jax.__version__} found no such device "
            f"(plugins installed: {', '.join(installed) or 'none'}; it said: {_first_line(error)}). "
            f"{_advice(device)}, or use --device cpu"
        ) from error
    if device == "auto" and first.platform == "cpu" and installed and not os.environ.get("JAX_PLATFORMS"):
        tell(f"computing on the CPU, although {', '.join(installed)} is installed: no GPU was found")
    if device != "auto" and (first.platform == "cpu") != (device == "cpu"):
        raise ValueError(
            f"device {device!r}: JAX has started on {first.platform} in this process already. Choose the device "
            f"before anything else uses JAX, or take device='auto'"
        )
    return Device(first.platform, first.device_kind)


def cache_directory() -> Path:
    """Returns where compiled programs are kept: ``JAX_COMPILATION_CACHE_DIR``, else under the user's cache directory.

    Raises:
        RuntimeError: The user has no home directory.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipgpt_jax" / "xla"


def use_compilation_cache(tell: Callable[[str], None]) -> None:
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


def _advice(device: str) -> str:
    needs = "ROCm 7 on the host" if device == "rocm" else "an NVIDIA driver"
    return f"Install with pip install 'hipgpt-jax[{device}]' (it needs {needs})"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
