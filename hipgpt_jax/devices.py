"""The platform that JAX computes on, chosen before it starts, and how a CPU keeps memory."""

import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

DEVICES = ("auto", "cpu", "rocm", "cuda")
PLUGIN_FAMILIES = ("cuda12", "cuda13", "rocm7", "rocm10")

# Captured command buffers crash some ROCm set-ups, above all in loops; AMD's documents and JAX's own
# ROCm tests switch them off. Taking memory as it is needed leaves a desktop card usable.
_ROCM_XLA_FLAG = "--xla_gpu_enable_command_buffer="
_ROCM_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"

# XLA times several kernels of a product and takes the fastest, so another start may take another one and round
# otherwise; and some of them add up in any order. This flag switches both off.
_EXACT_XLA_FLAG = "--xla_gpu_deterministic_ops=true"
_EXACT_XLA_FLAGS = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops", "xla_gpu_autotune_level")
# Kernels of Triton's are of whatever size comes first then: a step of 64 rows of GPT-2 on an H200 takes 3.5 ms with
# them, 2.8 with those of the vendor's library, which knows what suits a product.
_LIBRARY_XLA_FLAG = "--xla_gpu_enable_triton_gemm=false"

_ASYNC_DISPATCH = "jax_cpu_enable_async_dispatch"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def gpu_defaults(environ: Mapping[str, str], *, rocm: bool, exact: bool) -> dict[str, str]:
    """Returns the settings that a GPU needs and the environment does not already decide.

    Args:
        environ: The environment.
        rocm: Whether it is one of AMD's.
        exact: Whether another start must give the same bits.
    """
    chosen = {}
    flags = own = environ.get("XLA_FLAGS", "")
    if rocm and "xla_gpu_enable_command_buffer" not in own:
        flags = f"{flags} {_ROCM_XLA_FLAG}"
    if exact and not any(name in own for name in _EXACT_XLA_FLAGS):
        flags = f"{flags} {_EXACT_XLA_FLAG}"
        if "xla_gpu_enable_triton_gemm" not in own:
            flags = f"{flags} {_LIBRARY_XLA_FLAG}"
    if flags != own:
        chosen["XLA_FLAGS"] = flags.strip()
    if rocm and _ROCM_PREALLOCATE not in environ:
        chosen[_ROCM_PREALLOCATE] = "false"
    return chosen


def _must_be_deterministic(environ: Mapping[str, str]) -> bool:
    """Returns whether XLA is told to add up in one order: by the last setting of either flag."""
    parted = (flag.partition("=") for flag in environ.get("XLA_FLAGS", "").split())
    flags = {name: value for name, _, value in parted}
    return any(flags.get(f"--{name}", "false").lower() in ("", "true", "1") for name in _EXACT_XLA_FLAGS[:2])


def plugins() -> list[str]:
    """Returns the installed JAX accelerator plugins, as ``name version``, without importing any."""
    names = (f"jax-{family}-plugin" for family in PLUGIN_FAMILIES)
    found = (d for name in names for d in importlib.metadata.distributions(name=name))
    return [f"{d.name} {d.version}" for d in found]


class Device(NamedTuple):
    """What JAX computes on, in JAX's words."""

    platform: str
    kind: str

    @property
    def is_nvidia(self) -> bool:
        """Whether it is an NVIDIA GPU: JAX calls those of AMD ``gpu`` or ``rocm`` too."""
        return self.platform in ("gpu", "cuda") and "NVIDIA" in self.kind

    def attention(
        self, dtype: str, head_dim: int, *, trains: bool = False, environ: Mapping[str, str] = os.environ
    ) -> str:
        """Returns which implementation of attention suits it, one of ``model.attention.IMPLEMENTATIONS``.

        cuDNN's takes half precision alone, and heads of a multiple of 8 up to 128 on every card that has it. Its
        backward pass adds up in any order: where ``XLA_FLAGS`` forbid that, JAX 0.11.2 fails to compile it.

        Args:
            dtype: Type of the arithmetic.
            head_dim: Width of a head.
            trains: Whether there is a backward pass.
            environ: The environment.
        """
        suits = self.is_nvidia and dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
        return "cudnn" if suits and not (trains and _must_be_deterministic(environ)) else "xla"

    def __str__(self) -> str:
        return f"{self.platform} ({self.kind})"


def set_defaults(device: str, tell: Callable[[str], None], *, exact: bool) -> None:
    """Sets ``gpu_defaults`` where a GPU may be used, and tells of it; before JAX is imported.

    Once it is they may have no effect, and would all the same stand in a record: then they are told alone.
    """
    found = " ".join(plugins())
    on_cpu = device == "cpu" or (device == "auto" and os.environ.get("JAX_PLATFORMS") == "cpu")
    if on_cpu or not (found or device != "auto"):
        return
    rocm = device == "rocm" or (device == "auto" and "rocm" in found)
    chosen = gpu_defaults(os.environ, rocm=rocm, exact=exact)
    if chosen and "jax" in sys.modules:
        wanted = " ".join(f"{name}={value!r}" for name, value in chosen.items())
        tell(f"JAX was imported before and may have started: set {wanted} yourself, before Python starts")
        return
    for name, value in chosen.items():
        os.environ[name] = value
        tell(f"set {name}={value}")


def start(device: str, tell: Callable[[str], None], *, exact: bool = True) -> Device:
    """Starts JAX on ``device`` and returns what it computes on.

    ``auto`` leaves the choice to JAX, and to ``JAX_PLATFORMS`` where the user has set it; it says so
    where a GPU plugin is installed and JAX took the CPU all the same. Every setting made here is told.

    Args:
        device: One of ``DEVICES``.
        tell: Takes a line for the user.
        exact: Whether the same program gives the same bits at each start, on a GPU too; what that costs
            there is the search for the fastest kernels.

    Raises:
        ValueError: JAX has no such device; the message says what it found and how to install. Or it has
            started on another one in this process already.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}: got {device!r}")
    installed = plugins()
    set_defaults(device, tell, exact=exact)

    import jax

    if device != "auto":
        jax.config.update("jax_platforms", device)
    try:
        first = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts that a platform it was asked for is known
        if device == "auto":
            raise ValueError(f"JAX {jax.__version__} could not start: {first_line(error)}") from error
        raise ValueError(
            f"--device {device}: JAX {jax.__version__} found no such device "
            f"(plugins installed: {', '.join(installed) or 'none'}; it said: {first_line(error)}). "
            f"{_advice(device)}, or use --device cpu"
        ) from error
    if jax.config.values["jax_disable_jit"]:
        tell("JAX_DISABLE_JIT is set: each operation runs on its own, so the first token takes minutes")
    if device == "auto" and first.platform == "cpu" and installed and not os.environ.get("JAX_PLATFORMS"):
        tell(f"computing on the CPU, although {', '.join(installed)} is installed: no GPU was found")
    if device != "auto" and (first.platform == "cpu") != (device == "cpu"):
        raise ValueError(
            f"device {device!r}: JAX has started on {first.platform} in this process already. Choose the device "
            f"before anything else uses JAX, or take device='auto'"
        )
    return Device(first.platform, first.device_kind)


def step_on_main_thread(environ: Mapping[str, str] = os.environ) -> bool:
    """Has programs on a CPU run by the thread that starts them; before JAX starts.

    It is what ``keep_freed_memory`` needs, and changes nothing on a GPU. A user's own setting stands.

    Args:
        environ: Where that is looked for.

    Returns:
        Whether it was done.
    """
    if _ASYNC_DISPATCH.upper() in environ:
        return False

    import jax

    jax.config.update(_ASYNC_DISPATCH, False)
    return True


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Has the memory that a program on a CPU frees kept, so that its next run finds it.

    XLA takes the memory of a program's temporaries anew at each run of it. glibc gives blocks of 32 MB
    and more back to the system, which then clears 12,700 pages at each step of nanoGPT's CPU setting: 43
    ms a step, and 31 where ``mallopt`` has them kept (2 cores). Blocks of over 64 MB it keeps for the main
    thread alone, hence ``step_on_main_thread``: at D256 L8, 8 rows of 256, 212,000 pages fewer and 560 ms
    instead of 720. A user's own settings of the allocator stand.

    Args:
        environ: Where those are looked for.

    Returns:
        Whether it was done: elsewhere than with glibc nothing is.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, 2**31 - 1) for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def _advice(device: str) -> str:
    needs = "ROCm 7 on the host" if device == "rocm" else "an NVIDIA driver"
    return f"Install with pip install 'hipgpt-jax[{device}]' (it needs {needs})"


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, else its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
