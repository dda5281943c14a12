"""The GPU drivers and ROCm, held against the installed plugins."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hipgpt_jax import doctor
from hipgpt_jax.doctor import packages

KFD = Path("/dev/kfd")
NVIDIA = Path("/proc/driver/nvidia/version")
ROCM = Path("/opt/rocm")


def examine() -> Iterator[doctor.Finding]:
    """Looks for AMD's and NVIDIA's drivers and for ROCm, and holds them against the installed plugins.

    Where ``JAX_PLATFORMS`` is ``cpu`` a GPU that JAX cannot use is no trouble.
    """
    found = packages.families()
    rocm, cuda = (next((name for name in found if name.startswith(kind)), None) for kind in ("rocm", "cuda"))
    for finding in (_amd(rocm, bool(found)), _rocm(rocm), _nvidia(cuda, bool(found))):
        yield finding if wants_gpu() else doctor.Finding(finding.topic, finding.text)


def wants_gpu() -> bool:
    """Returns whether JAX may take a GPU: ``JAX_PLATFORMS=cpu`` forbids it."""
    return os.environ.get("JAX_PLATFORMS") != "cpu"


def _amd(family: str | None, has_plugin: bool) -> doctor.Finding:
    if not KFD.exists():
        text, advice = f"no driver ({KFD} is not there)", None
        if family:
            text += f", though jax-{family}-plugin is installed"
            advice = f"Load the amdgpu driver, or give it to the container: --device={KFD} --device=/dev/dri"
        return doctor.Finding("AMD GPU", text, advice)
    if (family or not has_plugin) and not os.access(KFD, os.R_OK | os.W_OK):
        advice = "sudo usermod -aG render,video $USER, then log in anew"
        return doctor.Finding("AMD GPU", f"driver found, but you may not open {KFD}", advice)
    if not has_plugin:
        advice = f"{packages.plugin_command(_family_for(_rocm_version()))}, or export JAX_PLATFORMS=cpu to do without"
        return doctor.Finding("AMD GPU", "driver found, but no JAX plugin is installed", advice)
    return doctor.Finding("AMD GPU", "driver found")


def _rocm(family: str | None) -> doctor.Finding:
    root, version = _rocm_root(), _rocm_version()
    if root is None:
        needed = family and family.removeprefix("rocm")
        return doctor.Finding(
            "ROCm",
            "not found" + (f", and jax-{family}-plugin needs it" if family else ""),
            f"Install ROCm {needed}; where it is installed, name its place: export ROCM_PATH=..." if family else None,
        )
    text = f"{version or 'of unknown version'} in {root}"
    if family and version and family != f"rocm{version.partition('.')[0]}":
        advice = f"Install ROCm {family.removeprefix('rocm')}"
        if (other := _family_for(version)) != family:
            advice = f"pip uninstall -y jax-{family}-plugin jax-{family}-pjrt && {packages.plugin_command(other)}"
        return doctor.Finding("ROCm", f"{text}, and jax-{family}-plugin is built for another", advice)
    return doctor.Finding("ROCm", text)


def _nvidia(family: str | None, has_plugin: bool) -> doctor.Finding:
    version = None
    if NVIDIA.is_file():
        numbers = re.search(r"\s(\d+\.\d[\d.]*)\s", NVIDIA.read_text(errors="replace"))
        version = numbers[1] if numbers else "of unknown version"
    elif said := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        version = said.splitlines()[0]
    if version is None:
        advice = "Install NVIDIA's driver, or give the GPU to the container: --gpus all" if family else None
        though = f", though jax-{family}-plugin is installed" if family else ""
        return doctor.Finding("NVIDIA GPU", f"no driver{though}", advice)
    if not has_plugin:
        advice = f"{packages.plugin_command('cuda13')}, or export JAX_PLATFORMS=cpu to do without"
        return doctor.Finding("NVIDIA GPU", f"driver {version}, but no JAX plugin is installed", advice)
    return doctor.Finding("NVIDIA GPU", f"driver {version}")


def _family_for(rocm: str | None) -> str:
    return "rocm10" if rocm and rocm.startswith("10.") else "rocm7"


def _rocm_root() -> Path | None:
    named = os.environ.get("ROCM_PATH") or (ROCM if ROCM.is_dir() else _output("rocm-sdk", "path", "--root"))
    return Path(named) if named and Path(named).is_dir() else None


def _rocm_version() -> str | None:
    root = _rocm_root()
    try:
        return (root / ".info" / "version").read_text(errors="replace").strip() if root else None
    except OSError:
        return None


def _output(command: str, *arguments: str) -> str | None:
    """Returns what a program of another's prints; None where it is absent or fails."""
    if (path := shutil.which(command)) is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None
