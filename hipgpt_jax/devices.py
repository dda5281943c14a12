"""Choice of the platform before JAX starts, and memory settings of CPUs."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hipgpt_jax import config

DEVICES = ("auto", "cpu", "rocm", "cuda")
PLUGIN_FAMILIES = ("cuda12", "cuda13", "rocm7", "rocm10")

# Command buffers crash some ROCm installations, above all in loops; AMD's documentation and JAX's own ROCm tests switch
# them off. Without preallocation a desktop card stays usable.
_ROCM_XLA_FLAG = "--xla_gpu_enable_command_buffer="
_ROCM_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"

# By default XLA measures several kernels for each matrix product and takes the fastest, so that another process may
# take another kernel and round differently; and some kernels add in varying order. This flag switches both off.
_DETERMINISTIC_XLA_FLAG = "--xla_gpu_deterministic_ops=true"
_DETERMINISTIC_XLA_FLAGS = (
    "xla_gpu_deterministic_ops",
    "xla_gpu_exclude_nondeterministic_ops",
    "xla_gpu_autotune_level",
)
# Without measurements Triton takes an arbitrary tile size: a decode step of GPT-2 with 64 slots on an H200 takes 3.5 ms
# with Triton's kernels and 2.8 ms with those of cuBLAS.
_LIBRARY_XLA_FLAG = "--xla_gpu_enable_triton_gemm=false"

_ASYNC_DISPATCH = "jax_cpu_enable_async_dispatch"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h


def gpu_defaults(environ: Mapping[str, str], *, rocm: bool, deterministic: bool) -> dict[str, str]:
    """Returns the environment variables that a GPU needs, except those that the user has set.

    Args:
        environ: The environment.
        rocm: Whether it is an AMD GPU.
        deterministic: Whether all processes must compute the same bits.
    """
    chosen = {}
    flags = own = environ.get("XLA_FLAGS", "")
    if rocm and "xla_gpu_enable_command_buffer" not in own:
        flags = f"{flags} {_ROCM_XLA_FLAG}"
    if deterministic and not any(name in own for name in _DETERMINISTIC_XLA_FLAGS):
        flags = f"{flags} {_DETERMINISTIC_XLA_FLAG}"
        if "xla_gpu_enable_triton_gemm" not in own:
            flags = f"{flags} {_LIBRARY_XLA_FLAG}"
    if flags != own:
        chosen["XLA_FLAGS"] = flags.strip()
    if rocm and _ROCM_PREALLOCATE not in environ:
        chosen[_ROCM_PREALLOCATE] = "false"
    return chosen


def _is_deterministic(environ: Mapping[str, str]) -> bool:
    """Returns whether ``XLA_FLAGS`` require deterministic operations; the last value of a flag counts."""
    parts = (flag.partition("=") for flag in environ.get("XLA_FLAGS", "").split())
    flags = {name: value for name, _, value in parts}
    return any(flags.get(f"--{name}", "false").lower() in ("", "true", "1") for name in _DETERMINISTIC_XLA_FLAGS[:2])


def plugins() -> list[str]:
    """Returns the installed JAX accelerator plugins, as ``name version``, without importing any."""
    names = (f"jax-{family}-plugin" for family in PLUGIN_FAMILIES)
    found = (d for name in names for d in importlib.metadata.distributions(name=name))
    return [f"{d.name} {d.version}" for d in found]


class Device(NamedTuple):
    """A device in JAX's terms.

    Attributes:
        platform: Such as ``cpu`` or ``gpu``.
        kind: Model of the device.
    """

    platform: str
    kind: str

    @property
    def is_nvidia(self) -> bool:
        """Whether it is an NVIDIA GPU. JAX calls AMD's ``gpu`` or ``rocm`` too."""
        return self.platform in ("gpu", "cuda") and "NVIDIA" in self.kind

    def attention(
        self, dtype: str, head_dim: int, *, trains: bool = False, environ: Mapping[str, str] = os.environ
    ) -> str:
        """Returns the implementation of attention to use, one of ``model.attention.IMPLEMENTATIONS``.

        cuDNN supports half precision only, and on all cards that have it head widths that are multiples of 8 up to 128.
        Its backward pass is not deterministic: JAX 0.11.2 cannot compile it if ``XLA_FLAGS`` require that.

        Args:
            dtype: Compute dtype.
            head_dim: Width of a head.
            trains: Whether there is a backward pass.
            environ: The environment.
        """
        is_supported = self.is_nvidia and dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
        return "cudnn" if is_supported and not (trains and _is_deterministic(environ)) else "xla"

    def __str__(self) -> str:
        return f"{self.platform} ({self.kind})"


def set_defaults(device: str, log: Callable[[str], None], *, deterministic: bool) -> None:
    """Sets and logs ``gpu_defaults`` if a GPU may be used; before JAX is imported.

    If JAX is imported already, they may have no effect and would still appear in records, so they are only logged.
    """
    found = " ".join(plugins())
    on_cpu = device == "cpu" or (device == "auto" and os.environ.get("JAX_PLATFORMS") == "cpu")
    if on_cpu or not (found or device != "auto"):
        return
    rocm = device == "rocm" or (device == "auto" and "rocm" in found)
    chosen = gpu_defaults(os.environ, rocm=rocm, deterministic=deterministic)
    if chosen and "jax" in sys.modules:
        wanted = " ".join(f"{name}={value!r}" for name, value in chosen.items())
        log(f"JAX was imported before and may have started: set {wanted} yourself, before Python starts")
        return
    for name, value in chosen.items():
        os.environ[name] = value
        log(f"set {name}={value}")


def start(device: str, log: Callable[[str], None], *, deterministic: bool = True) -> Device:
    """Starts JAX on ``device`` and returns the device it uses.

    ``auto`` leaves the choice to JAX and to ``JAX_PLATFORMS``; a line is logged if a GPU plugin is installed but JAX
    uses the CPU. All settings made here are logged.

    Args:
        device: One of ``DEVICES``.
        log: Receives lines for the user.
        deterministic: Whether all processes must compute the same bits, on GPUs too; the cost is the search for the
            fastest kernels.

    Raises:
        ValueError: JAX finds no such device, or has started on another one in this process.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}: got {device!r}")
    installed = plugins()
    set_defaults(device, log, deterministic=deterministic)

    import jax

    if device != "auto":
        jax.config.update("jax_platforms", device)
    reasons: list[str] = []
    try:
        with _collect_plugin_errors(reasons):
            first = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts that a platform is known
        if device == "auto":
            raise ValueError(f"JAX {jax.__version__} could not start: {first_line(error)}") from error
        raise ValueError(
            f"device {device!r}: JAX {jax.__version__} found no such device "
            f"(installed plugins: {', '.join(installed) or 'none'}; its error: "
            f"{'; '.join(reasons) or first_line(error)}). {_advice(device, installed)}, or use 'cpu'"
        ) from error
    if jax.config.values["jax_disable_jit"]:
        log("JAX_DISABLE_JIT is set: operations run one by one, so the first token takes minutes")
    if device == "auto" and first.platform == "cpu" and installed and not os.environ.get("JAX_PLATFORMS"):
        reason = f" ({'; '.join(reasons)})" if reasons else ""
        log(f"no GPU was found, although {', '.join(installed)} is installed{reason}: computing on the CPU")
    if device != "auto" and (first.platform == "cpu") != (device == "cpu"):
        raise ValueError(
            f"device {device!r}: JAX has already started on {first.platform} in this process. Choose the device before "
            f"anything else uses JAX, or use device='auto'"
        )
    return Device(first.platform, first.device_kind)


def check_number(number: object) -> None:
    """Raises ValueError if a number of devices is neither ``all``, nor None, nor an integer of at least 1."""
    if number is not None and number != "all" and _as_number(number) is None:
        raise ValueError(f"devices must be all, or an integer of at least 1: got {config.shortened(number)}")


def local(number: int | str | None = None, *, per_replica: int = 1) -> list[Any]:
    """Returns devices of this process for replicas of a model.

    Args:
        number: Number of devices, as an integer or in digits, or ``all``; those of one replica if absent.
        per_replica: Devices that share a model.

    Raises:
        ValueError: JAX has fewer devices, they are not of one kind, or they do not divide into replicas.
    """
    import jax

    check_number(number)
    if per_replica == 1 and number is None:
        return list(jax.device_put(0).devices())  # the default device, which a user may have set
    found = jax.local_devices()
    present = f"JAX has {len(found)} ({found[0].platform})"
    if found[0].platform == "cpu":
        present += ". JAX_NUM_CPU_DEVICES sets how many a CPU is divided into"
    if number is None and per_replica > len(found):
        raise ValueError(f"mesh is too large: model={per_replica} needs {per_replica} devices, and {present}")
    wanted = per_replica if number is None else len(found) if number == "all" else _as_number(number)
    assert wanted is not None
    if wanted > len(found):
        raise ValueError(f"devices must be at most {len(found)} here: got {wanted}, and {present}")
    if wanted % per_replica:
        raise ValueError(f"devices must be a multiple of {per_replica}, which share a model by the mesh: got {wanted}")
    chosen = found[:wanted]
    if len(kinds := {device.device_kind for device in chosen}) > 1:
        raise ValueError(f"devices must be of one kind, to compute the same bits: got {', '.join(sorted(kinds))}")
    return chosen


def _as_number(value: object) -> int | None:
    """Returns a positive integer, given as one or in digits; None for anything else."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
    number = config.as_int(value)
    return number if number is not None and number > 0 else None


def step_on_main_thread(environ: Mapping[str, str] = os.environ) -> bool:
    """Makes the thread that dispatches a program on a CPU also run it; before JAX starts.

    ``keep_freed_memory`` needs this. GPUs are not affected.

    Args:
        environ: The environment; the user's own setting takes precedence.

    Returns:
        Whether the setting was made.
    """
    if _ASYNC_DISPATCH.upper() in environ:
        return False

    import jax

    jax.config.update(_ASYNC_DISPATCH, False)
    return True


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Makes glibc keep freed memory, so that the next run of a program on a CPU reuses it.

    Args:
        environ: The environment; the user's own settings of the allocator take precedence.

    Returns:
        Whether the setting was made; always False without glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environ):
        return False
    # XLA allocates the temporaries of a program at each run. glibc returns blocks of 32 MB and more to the system,
    # which clears 12,700 pages per training step of nanoGPT's CPU configuration: 43 ms per step, not 31 (2 cores).
    # Blocks over 64 MB are kept only for the main thread, hence `step_on_main_thread`: with D256 L8 and 8 rows of 256
    # tokens, 212,000 fewer pages and 560 ms instead of 720.
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, 2**31 - 1) for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


@contextlib.contextmanager
def _collect_plugin_errors(errors: list[str]) -> Iterator[None]:
    """Appends the errors of plugins that do not start; JAX would log them with a traceback."""
    import logging

    def keep(record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info[1] is None:
            return True
        errors.append(first_line(record.exc_info[1]))
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _advice(device: str, installed: list[str]) -> str:
    if any(device in plugin for plugin in installed):
        return "hipgpt-doctor checks the driver and the plugin. Solve what it finds"
    needed = "ROCm 7 on the host" if device == "rocm" else "an NVIDIA driver"
    return f"Install it: pip install '.[{device}]' (requires {needed})"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
