"""Choice of the platform, and its settings."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import fakes
import jax
import pytest

from hipgpt_jax import devices

OFF = "--xla_gpu_enable_command_buffer="


EXACT = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("rocm", "deterministic", "environ", "chosen"),
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
def test_gpu_settings_do_not_change_those_of_the_user(
    rocm: bool, deterministic: bool, environ: dict[str, str], chosen: dict[str, str]
) -> None:
    assert devices.gpu_defaults(environ, rocm=rocm, deterministic=deterministic) == chosen


_DEFAULTS = """
import os, sys
from hipgpt_jax import devices
if sys.argv[1] == "late":
    import jax
devices.plugins = lambda: sys.argv[3:]
devices.set_defaults(sys.argv[2], print, deterministic=True)
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
def test_gpu_settings_are_made_and_logged_before_jax_starts(
    arguments: list[str], own: dict[str, str], printed: list[str]
) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", _DEFAULTS, *arguments]
    done = subprocess.run(command, env={**environ, **own}, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == printed


_START = """
import sys
from hipgpt_jax import devices
try:
    devices.start(sys.argv[1], lambda line: line.startswith("set ") or print(line))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "printed"),
    [
        ("auto", "no GPU was found, although jax-rocm7-plugin 0.1.2 is installed (No AMD GPUs): computing on the CPU"),
        ("rocm", "(installed plugins: jax-rocm7-plugin 0.1.2; its error: No AMD GPUs). hipgpt-doctor checks the "),
    ],
)
def test_a_plugin_that_does_not_start_is_reported_in_a_line(device: str, printed: str, tmp_path: Path) -> None:
    """AMD's plugin raises an error if there is no GPU, which JAX logs with a traceback."""
    for name, text in (
        ("jax_plugins/xla_rocm7/__init__.py", "def initialize():\n    raise ValueError('No AMD GPUs\\nmore')\n"),
        ("jax_rocm7_plugin-0.1.2.dist-info/METADATA", "Name: jax-rocm7-plugin\nVersion: 0.1.2\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), str(Path(devices.__file__).parents[1])])
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", _START, device]
    done = subprocess.run(command, env={**environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert printed in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


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
def test_attention_is_cudnns_where_supported(
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
def test_attention_is_deterministic_where_xla_flags_require_it(flags: str, implementation: str) -> None:
    """CuDNN's does not in its backward pass; generation has none."""
    device, environ = devices.Device("gpu", "NVIDIA H200"), {"XLA_FLAGS": flags}
    assert device.attention("bfloat16", 64, trains=True, environ=environ) == implementation
    assert device.attention("bfloat16", 64, environ=environ) == "cudnn"


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


@pytest.mark.slow
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


def test_disabled_jit_is_logged() -> None:
    notes: list[str] = []
    devices.start("cpu", notes.append)
    assert not [note for note in notes if "JAX_DISABLE_JIT" in note]
    with jax.disable_jit():
        devices.start("cpu", notes.append)
    assert [note for note in notes if note.startswith("JAX_DISABLE_JIT is set")]


@pytest.mark.slow
def test_generation_works_with_jit_disabled() -> None:
    """JAX refuses to compile ahead of a call then, so functions are called as they are."""
    wanted = [fakes.request((5, 6), num_tokens=3, temperature=0.0)]
    expected = fakes.tokens_of(fakes.make_scheduler(), wanted)
    with jax.disable_jit():
        assert fakes.tokens_of(fakes.make_scheduler.__wrapped__(), wanted) == expected
