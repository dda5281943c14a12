"""The processor and the settings of JAX and drivers that can change a number, and keys that no setting changes.

Nothing here imports JAX before it is used.
"""

import functools
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

# JAX settings that can change a computed number, each with its default in JAX 0.10 to 0.12. Settings that are not
# listed log, cache, check, choose devices, or belong to features that this package does not use. Two that would matter
# are neutralized instead: jax_random_seed_offset by `key_of`, jax_threefry_partitionable by
# `train_step.fixed_random_bits`.
_JAX_SETTINGS: Mapping[str, Any] = {
    "eager_constant_folding": False,
    "jax_allow_f16_reductions": True,
    "jax_compiler_enable_remat_pass": True,
    "jax_cpu_collectives_implementation": "gloo",
    "jax_custom_vjp3": False,
    "jax_default_matmul_precision": None,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_enable_pgle": False,
    "jax_enable_x64": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_optimization_level": "UNKNOWN",
    "jax_pjrt_client_create_options": None,
    "jax_remat3": False,
    "jax_scan3": False,
    "jax_softmax_custom_jvp": False,
    "jax_use_direct_linearize": True,
    "jax_use_shardy_partitioner": True,
    "jax_use_simplified_jaxpr_constants": False,
    "jax_xla_profile_version": 0,
}

# Environment variables by which GPU libraries choose kernels or precision. XLA_FLAGS has a field of its own.
_VARIABLES = re.compile(
    r"NVIDIA_TF32_OVERRIDE|CUBLAS\w*|CUDNN_\w*|TF_CUDNN_\w*|HSA_OVERRIDE_GFX_VERSION"
    r"|(ROCBLAS|HIPBLASLT|TENSILE|MIOPEN)_\w*|TF_ENABLE_\w*|LIBTPU_INIT_ARGS"
)
_NOT_NUMERIC = re.compile(r"\w*(LOG|LAYER|PATH|CACHE_DIR|DISABLE_CACHE)\w*")

# Extensions of an instruction set that decide how wide, and with which fused operations, XLA's CPU code computes.
_EXTENSIONS = re.compile(
    r"sse\w*|ssse3|avx\w*|fma\w*|f16c|amx\w*|asimd\w*|neon|fp|fphp|sve\w*|sme\d?|bf16|i8mm|[fb]\d+mm"
)


# The directories of a path that is absolute, relative to a home directory, or begins with "..".
_DIRECTORIES = re.compile(r"(?<![\w.])(?:\w+:/)?(?:~[\w.-]*|\.\.)?/(?:[^\s=,'\"\])/]*/)*")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Returns the processor's model name, or its architecture if the system has no name for it."""
    found = _cpuinfo()
    return found.get("model name") or found.get("cpu") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Returns the processor's vector extensions, sorted; empty if the system does not list them."""
    found = _cpuinfo()
    names = (found.get("flags") or found.get("features") or "").split()
    return tuple(sorted({name for name in names if _EXTENSIONS.fullmatch(name)}))


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Returns the properties of the first processor that Linux lists, with keys in lower case."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").strip().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): " ".join(value.split()) for key, _, value in pairs}


def environment(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Returns the settings of JAX and of GPU libraries that can change a number and are not at their defaults.

    Args:
        environ: The environment.

    Returns:
        ``NAME=VALUE``, sorted, with paths cut to file names.
    """
    import jax

    values = jax.config.values
    changed = {
        name: values[name]
        for name, default in _JAX_SETTINGS.items()
        if name in values and values[name] != default and str(values[name]) != str(default)
    }
    names = (name for name in environ if _VARIABLES.fullmatch(name) and not _NOT_NUMERIC.fullmatch(name))
    changed |= {name: environ[name] for name in names}
    return tuple(sorted(without_directories(f"{name}={value}") for name, value in changed.items()))


def xla_flags() -> str:
    """Returns ``XLA_FLAGS``, with paths cut to file names."""
    return without_directories(os.environ.get("XLA_FLAGS", ""))


def without_directories(text: str) -> str:
    """Returns ``text`` with each absolute path cut to its last name, so that it can be published.

    >>> without_directories("--xla_dump_to=/home/ann/dump --xla_gpu_autotune_level=0")
    '--xla_dump_to=dump --xla_gpu_autotune_level=0'
    """
    return _DIRECTORIES.sub("", without_home(text)).removesuffix("~")


def without_home(text: str) -> str:
    """Returns ``text`` with ``~`` in place of the user's home directory."""
    try:
        home = str(Path.home())
    except RuntimeError:  # HOME is unset, and the user is not in the password database
        return text
    return text.replace(home, "~") if len(home) > 1 else text


def key_of(seed: "int | jax.Array | Any") -> "jax.Array":
    """Returns the threefry key with the words ``[0, seed]``.

    ``jax.random.key`` would add ``JAX_RANDOM_SEED_OFFSET`` to the seed.

    Args:
        seed: In ``[0, 2**32)``; may be traced.
    """
    import jax
    import jax.numpy as jnp

    word = jnp.asarray(seed, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(word), word]), impl="threefry2x32")
