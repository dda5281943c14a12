"""The platform and the compilation cache: what is set, what is left alone, and what is told."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from hipgpt_jax import devices

OFF = "--xla_gpu_enable_command_buffer="


EXACT = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("rocm", "exact", "environ", "chosen"),
    [
        (True, False, {}, {"XLA_FLAGS": OFF, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
        (True, True, {}, {"XLA_FLAGS": f"{OFF} {EXACT}", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
        (True, False, {"XLA_FLAGS": "--a=1"}, {"XLA_FLAGS": f"--a=1 {OFF}", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
        (True, False, {"XLA_FLAGS": f"{OFF}FUSION", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, {}),
        (False, True, {}, {"XLA_FLAGS": EXACT}),
        (False, True, {"XLA_FLAGS": "--xla_gpu_deterministic_ops=false"}, {}),
        (False, True, {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops"}, {}),
        (False, True, {"XLA_FLAGS": EXACT.split()[1]}, {"XLA_FLAGS": " ".join(reversed(EXACT.split()))}),
        (False, False, {}, {}),
    ],
)
def test_settings_of_a_gpu_leave_the_users_own_alone(
    rocm: bool, exact: bool, environ: dict[str, str], chosen: dict[str, str]
) -> None:
    assert devices.gpu_defaults(environ, rocm=rocm, exact=exact) == chosen


_DEFAULTS = """
import os, sys
from hipgpt_jax import devices
if sys.argv[1] == "late":
    import jax
devices.plugins = lambda: sys.argv[3:]
devices.set_defaults(sys.argv[2], print, exact=True)
print(os.environ.get("XLA_FLAGS", ""))
"""


@pytest.mark.parametrize(
    ("arguments", "own", "printed"),
    [
        (["early", "auto"], {}, [""]),
        (["early", "cpu", "jax-cuda13-plugin 0.10.2"], {}, [""]),
        (["early", "auto", "jax-cuda13-plugin 0.10.2"], {"JAX_PLATFORMS": "cpu"}, [""]),
        (["early", "auto", "jax-cuda13-plugin 0.10.2"], {}, [f"set XLA_FLAGS={EXACT}", EXACT]),
        (["early", "cuda"], {"XLA_FLAGS": "--a=1"}, [f"set XLA_FLAGS=--a=1 {EXACT}", f"--a=1 {EXACT}"]),
        (
            ["early", "auto", "jax-rocm7-plugin 0.10.2"],
            {},
            [f"set XLA_FLAGS={OFF} {EXACT}", "set XLA_PYTHON_CLIENT_PREALLOCATE=false", f"{OFF} {EXACT}"],
        ),
        (
            ["late", "auto", "jax-cuda13-plugin 0.10.2"],
            {},
            [
                f"JAX was imported before and may have started: set XLA_FLAGS='{EXACT}' yourself, before Python starts",
                "",
            ],
        ),
    ],
)
def test_settings_of_a_gpu_are_told_and_made_before_jax(
    arguments: list[str], own: dict[str, str], printed: list[str]
) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", _DEFAULTS, *arguments]
    done = subprocess.run(command, env={**environ, **own}, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == printed


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "implementation"),
    [
        (devices.Device("gpu", "NVIDIA H200"), "bfloat16", 64, "cudnn"),
        (devices.Device("cuda", "NVIDIA H200"), "bfloat16", 128, "cudnn"),
        (devices.Device("gpu", "NVIDIA H200"), "float32", 64, "xla"),
        (devices.Device("gpu", "NVIDIA H200"), "bfloat16", 36, "xla"),
        (devices.Device("gpu", "NVIDIA H200"), "bfloat16", 256, "xla"),
        (devices.Device("gpu", "AMD Radeon RX 7900 XTX"), "bfloat16", 64, "xla"),
        (devices.Device("cpu", "cpu"), "bfloat16", 64, "xla"),
    ],
)
def test_attention_is_cudnns_where_it_can_be(
    device: devices.Device, dtype: str, head_dim: int, implementation: str
) -> None:
    assert device.attention(dtype, head_dim) == implementation


@pytest.mark.parametrize(
    ("flags", "implementation"),
    [
        ("", "cudnn"),
        ("--xla_gpu_deterministic_ops=true", "xla"),
        ("--xla_gpu_exclude_nondeterministic_ops --a=1", "xla"),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", "cudnn"),
        ("--xla_gpu_autotune_level=0", "cudnn"),
    ],
)
def test_attention_adds_up_in_one_order_where_training_must(flags: str, implementation: str) -> None:
    """CuDNN's does not in its backward pass; generation has none."""
    device, environ = devices.Device("gpu", "NVIDIA H200"), {"XLA_FLAGS": flags}
    assert device.attention("bfloat16", 64, trains=True, environ=environ) == implementation
    assert device.attention("bfloat16", 64, environ=environ) == "cudnn"


NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def read_settings() -> dict[str, object]:
    return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture
def settings() -> Iterator[dict[str, object]]:
    """The configuration that the cache sets, put back after the test."""
    before = read_settings()
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_directory_is_left_alone_and_every_program_is_cached(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    devices.use_compilation_cache(lambda line: None)
    now = read_settings()
    assert now["jax_compilation_cache_dir"] == settings["jax_compilation_cache_dir"]
    assert now["jax_persistent_cache_min_compile_time_secs"] == 0.0
    assert not (tmp_path / "xdg").exists()


def test_a_new_cache_is_the_users_alone_and_told_of_once(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told: list[str] = []
    devices.use_compilation_cache(told.append)
    directory = tmp_path / "hipgpt_jax" / "xla"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert read_settings()["jax_compilation_cache_dir"] == str(directory)
    assert len(told) == 1
    assert "first start" in told[0]
    (directory / "program").write_text("")
    devices.use_compilation_cache(told.append)
    assert len(told) == 1


def test_a_cache_that_cannot_be_written_is_told_and_no_error(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told: list[str] = []
    devices.use_compilation_cache(told.append)
    assert "compiling without a cache" in told[0]


_FAULTS = """
import resource
from hipgpt_jax import devices
done = devices.step_on_main_thread(), devices.keep_freed_memory()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: (jax.lax.optimization_barrier(x * 2)[::-1] + x).sum())
x = jnp.ones(25_000_000)
faults = []
for turn in range(8):  # the heap may grow once more where another block has taken a bit of the place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*done, min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
@pytest.mark.parametrize(
    ("own", "on_main_thread", "kept"),
    [
        ({}, True, True),
        ({"MALLOC_ARENA_MAX": "4"}, True, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, True, False),
        ({"JAX_CPU_ENABLE_ASYNC_DISPATCH": "1"}, False, True),
    ],
)
def test_freed_memory_is_kept_unless_the_user_decides(own: dict[str, str], on_main_thread: bool, kept: bool) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], env={**environ, **own}, capture_output=True, text=True, check=True, timeout=60
    )
    *was_done, faults = done.stdout.split()
    assert was_done == [str(on_main_thread), str(kept)]
    assert (int(faults) < 1000) == (on_main_thread and kept), "a temporary of 100 MB is some 25,000 pages"
