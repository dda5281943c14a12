"""The machine: its processor, the devices that JAX finds, and the cache of compiled programs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from hipgpt_jax import compilation, devices, disk_cache, doctor, numerics
from hipgpt_jax.doctor import drivers, packages

PROBE_TIMEOUT_S = 180.0
SETTINGS = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "JAX_ROCM_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "JAX_CUDA_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
)

# JAX runs in a process of its own, because a plugin that does not fit can end the process or hang.
_MARK = "hipgpt-doctor:"
_PROBE = f"""
import json, jax
def limit(device):
    try:
        return (device.memory_stats() or {{}}).get("bytes_limit")
    except RuntimeError:
        return None
print("{_MARK}", json.dumps([[d.platform, d.device_kind, d.id, limit(d)] for d in jax.devices()]), flush=True)
int(jax.numpy.arange(4).sum())
print("{_MARK}", flush=True)
import flax.linen
print("{_MARK}", flush=True)
"""
_STAGES = ("does not start", "does not compute", "starts, but Flax does not import with it", "fails as it ends")


def examine() -> Iterator[doctor.Finding]:
    """Looks at the processor, the GPU drivers, the environment and the devices that JAX finds."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield doctor.Finding("machine", f"{numerics.cores()} CPU cores, {memory / 1e9:.1f} GB of memory")
    yield from drivers.examine()
    for name in SETTINGS:
        if name in os.environ:
            yield doctor.Finding("environment", f"{name}={os.environ[name]}")
    yield from probe()


def probe() -> Iterator[doctor.Finding]:
    """Starts JAX in another process, lists its devices, computes on the first and imports Flax."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],
            env=_probe_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        yield doctor.Finding(
            "JAX",
            f"does not start: nothing came of it in {PROBE_TIMEOUT_S:g} seconds",
            "See which processes hold the GPU (rocm-smi, nvidia-smi) and end them, or stay on the CPU: --device cpu",
        )
        return
    said = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if said:
        yield from _devices(json.loads(said[0]))
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        ended = f"exit code {done.returncode}" if done.returncode > 0 else signal.strsignal(-done.returncode)
        yield doctor.Finding(
            "JAX",
            f"{_STAGES[len(said)]}: {lines[-1].strip()[:300] if lines else 'it said nothing'} ({ended})",
            _repair(len(said)),
        )


def cache() -> doctor.Finding:
    """Looks at the cache of compiled programs: where it is, what it holds, whether it can be written and by whom."""
    advice = f"Name a directory of your own for it: export {compilation.CACHE_VARIABLE}=..."
    try:
        place = compilation.cache_directory().absolute()
        if missing := disk_cache.missing_directories(place):
            parent = missing[0].parent
            can_write = os.access(parent, os.W_OK | os.X_OK)
            text = f"{place}: not made yet" + ("" if can_write else f", and {parent} cannot be written")
            return doctor.Finding("compile cache", text, None if can_write else advice)
        sizes = [entry.stat().st_size for entry in compilation.cache_in(place).entries()]
    except (OSError, RuntimeError, ValueError) as error:
        return doctor.Finding("compile cache", str(error), advice)
    text = f"{place}: {len(sizes)} programs, {sum(sizes) / 1e6:.1f} MB"
    if not os.access(place, os.W_OK | os.X_OK):
        return doctor.Finding("compile cache", f"{text}, and it cannot be written", advice)
    return doctor.Finding("compile cache", text)


def _devices(found: list[tuple[str, str, int, int | None]]) -> Iterator[doctor.Finding]:
    plugin = ", ".join(packages.families())
    for platform, kind, number, limit in found:
        memory = "" if limit is None else f", {limit / 1e9:.1f} GB for JAX"
        text = f"{number}: {platform}" + ("" if kind == platform else f" ({kind})") + memory
        if platform == "cpu" and plugin and drivers.wants_gpu():
            advice = f"See why: JAX_PLATFORMS={plugin[:4]} {sys.executable} -c 'import jax; jax.devices()'"
            yield doctor.Finding(
                "JAX device", f"{text}: no GPU was found, though the plugin for {plugin} is installed", advice
            )
            return
        yield doctor.Finding("JAX device", text)


def _repair(stage: int) -> str:
    asked, jax = os.environ.get("JAX_PLATFORMS"), packages.version("jax")
    if stage == 2:
        return f"pip install --force-reinstall 'flax{packages.demands('hipgpt-jax').get('flax', '')}'"
    if asked not in (None, "", "cpu"):
        return f"Try without JAX_PLATFORMS={asked}, or install JAX for it (README, Installing)"
    if os.environ.get("XLA_FLAGS"):
        return f"Try without XLA_FLAGS={os.environ['XLA_FLAGS']}"
    if packages.families() and drivers.wants_gpu():
        return "Run JAX_PLATFORMS=cpu hipgpt-doctor: if JAX starts then, its plugin or the driver is to blame, not JAX"
    exact = f"'jax=={jax}' 'jaxlib=={packages.version('jaxlib') or jax}'" if jax else "jax jaxlib"
    return f"pip install --force-reinstall {exact}"


def _probe_environment() -> dict[str, str]:
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "JAX_TRACEBACK_FILTERING": "off"}
    if any(name.startswith("rocm") for name in packages.families()):
        environ |= devices.gpu_defaults(environ, rocm=True, exact=False)
    return environ
