"""Checks of packages, GPU drivers, JAX, the compile cache and runs, for ``hipgpt-doctor``.

JAX, NumPy and tokenizers are never imported here, so the checks also work where those are broken.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging import requirements, specifiers, version

from hipgpt_jax import compilation, devices, disk_cache, files, numerics
from hipgpt_jax.runs import directory, states
from hipgpt_jax.text import manifest

KFD = Path("/dev/kfd")
NVIDIA = Path("/proc/driver/nvidia/version")
ROCM = Path("/opt/rocm")
PROBE_TIMEOUT_S = 180.0

# Environment variables that decide which devices JAX finds and how it uses them.
VARIABLES = re.compile(
    r"JAX_PLATFORMS|XLA_FLAGS|XLA_PYTHON_CLIENT_(PREALLOCATE|MEM_FRACTION)|JAX_COMPILATION_CACHE_DIR"
    r"|((JAX_)?CUDA|JAX_ROCM|ROCR|HIP)_VISIBLE_DEVICES"
)

# JAX runs in a process of its own, because a plugin that does not match can abort the process or hang. Each line with
# the mark ends one of the stages.
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
_STAGES = ("does not start", "does not compute", "starts, but Flax fails to import", "fails at exit")

_PACKAGE = "hipgpt-jax"


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        topic: What was checked, in a word or two.
        text: What was found.
        advice: How to solve the problem, on one line; None if there is none.
    """

    topic: str
    text: str
    advice: str | None = None


def check_packages() -> Iterator[Check]:
    """Checks the versions of Python, libraries and JAX plugins by their metadata, without importing any."""
    own = next((found.metadata for found in importlib.metadata.distributions(name=_PACKAGE)), None)
    if own is None:
        yield Check(_PACKAGE, "not installed, runs from its source: required versions are not checked")
    python = ".".join(map(str, sys.version_info[:3]))
    supported = specifiers.SpecifierSet(own["Requires-Python"] if own and "Requires-Python" in own else ">=3.11")
    if supported.contains(python):
        yield Check("Python", python)
    else:
        advice = f"Make an environment with another Python: python3.12 -m venv .venv (required: {supported})"
        yield Check("Python", f"{python}: {_PACKAGE} requires {supported}", advice)
    required = {"jax": specifiers.SpecifierSet(), **_requirements(_PACKAGE)}
    for name, versions in required.items():
        yield _check_library(name, versions, _PACKAGE)
        if name == "jax":
            yield _check_library("jaxlib", _requirements("jax").get("jaxlib", versions), f"jax {_version('jax')}")
    for family in _plugin_families():
        yield _check_plugin(family)
    if not _plugin_families():
        yield Check("JAX plugin", "none installed: JAX computes on the CPU")


def _check_library(name: str, required: specifiers.SpecifierSet, by: str) -> Check:
    found = _version(name)
    if found is None:
        return Check(name, "not installed", f"pip install '{name}{required}'")
    if not required.contains(found, prereleases=True):
        return Check(name, f"{found}: {by} requires {required}", f"pip install '{name}{required}'")
    return Check(name, f"{found}, matches {by}" if name == "jaxlib" else found)


def _check_plugin(family: str) -> Check:
    """Checks both halves of a plugin against JAX's version, which JAX itself does not do for ROCm."""
    name, jax = f"jax-{family}-plugin", _version("jax")
    plugin, pjrt = _version(name), _version(f"jax-{family}-pjrt")
    if plugin is None:
        problem = f"not installed, but jax-{family}-pjrt {pjrt} is"
    elif pjrt is None:
        problem = f"{plugin}, but jax-{family}-pjrt is not installed"
    elif plugin != pjrt:
        problem = f"{plugin} with jax-{family}-pjrt {pjrt}: the versions must be equal"
    elif jax and not specifiers.SpecifierSet(f"=={version.Version(jax).base_version}.*").contains(plugin, True):
        problem = f"{plugin} with jax {jax}: the versions must be equal"
    else:
        return Check(name, f"{plugin}, matches its pjrt and jax {jax}")
    return Check(name, problem, _install_command(family))


def _version(name: str) -> str | None:
    """Returns the version of an installed distribution; None if it is absent or half removed."""
    found = next(iter(importlib.metadata.distributions(name=name)), None)
    return found.metadata["Version"] if found and "Version" in found.metadata else None


def _requirements(name: str) -> dict[str, specifiers.SpecifierSet]:
    """Returns the versions that an installed distribution requires unconditionally, by package."""
    lines = next((found.requires for found in importlib.metadata.distributions(name=name)), None) or ()
    return {one.name: one.specifier for one in map(requirements.Requirement, lines) if one.marker is None}


def _plugin_families() -> list[str]:
    """Returns the accelerators, such as ``rocm7``, for which at least one half of a plugin is installed."""
    return [
        family
        for family in devices.PLUGIN_FAMILIES
        if _version(f"jax-{family}-plugin") or _version(f"jax-{family}-pjrt")
    ]


def _install_command(family: str) -> str:
    """Returns the command that installs a plugin for the installed JAX."""
    jax = _version("jax")
    if family.startswith("cuda"):
        return f"pip install -U 'jax[{family}]{f'=={jax}' if jax else ''}'"
    if jax is None:
        return f"pip install -U jax jax-{family}-plugin jax-{family}-pjrt"
    # ROCm plugins exist only for JAX versions of three numbers, so a JAX of four numbers is downgraded.
    release = ".".join(map(str, version.Version(jax).release[:3]))
    parts = (f"'jax-{family}-{part}=={release}.*'" for part in ("plugin", "pjrt"))
    return f"pip install -U 'jax=={release}' {' '.join(parts)}"


def check_machine() -> Iterator[Check]:
    """Checks the processor, the GPU drivers, JAX's environment variables and JAX itself."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Check("machine", f"{numerics.cores()} CPU cores, {memory / 1e9:.1f} GB of memory")
    yield from check_drivers()
    for name, value in os.environ.items():
        if VARIABLES.fullmatch(name):
            yield Check("environment", f"{name}={value}")
    yield from check_jax()


def check_drivers() -> Iterator[Check]:
    """Checks that the drivers of AMD and NVIDIA, ROCm and the JAX plugins match.

    With ``JAX_PLATFORMS=cpu``, a GPU that JAX cannot use is not a problem.
    """
    rocm, cuda = (
        next((family for family in _plugin_families() if family.startswith(kind)), None) for kind in ("rocm", "cuda")
    )
    for check in (_check_amd(rocm), _check_rocm(rocm), _check_nvidia(cuda)):
        yield check if _may_use_gpu() else dataclasses.replace(check, advice=None)


def _may_use_gpu() -> bool:
    return os.environ.get("JAX_PLATFORMS") != "cpu"


def _check_amd(family: str | None) -> Check:
    has_driver = KFD.exists()
    if has_driver and (family or not _plugin_families()) and not os.access(KFD, os.R_OK | os.W_OK):
        advice = "sudo usermod -aG render,video $USER, then log in again"
        return Check("AMD GPU", f"driver found, but you may not open {KFD}", advice)
    advice = f"Load the amdgpu driver, or in a container: --device={KFD} --device=/dev/dri"
    return _check_driver("AMD GPU", "driver found" if has_driver else None, family, advice, _family_for(_rocm()[1]))


def _check_rocm(family: str | None) -> Check:
    root, release = _rocm()
    if root is None and family:
        advice = f"Install ROCm {family.removeprefix('rocm')}; if it is installed, set its path: export ROCM_PATH=..."
        return Check("ROCm", f"not found, but jax-{family}-plugin needs it", advice)
    if root is None:
        return Check("ROCm", "not found")
    text = f"{release or 'unknown version'} in {root}"
    if family and release and family != f"rocm{release.partition('.')[0]}":
        advice = f"Install ROCm {family.removeprefix('rocm')}"
        if (other := _family_for(release)) != family:
            advice = f"pip uninstall -y jax-{family}-plugin jax-{family}-pjrt && {_install_command(other)}"
        return Check("ROCm", f"{text}, but jax-{family}-plugin is built for another version", advice)
    return Check("ROCm", text)


def _check_nvidia(family: str | None) -> Check:
    driver = None
    if NVIDIA.is_file():
        number = re.search(r"\s(\d+\.\d[\d.]*)\s", NVIDIA.read_text(errors="replace"))
        driver = f"driver {number[1]}" if number else "driver of unknown version"
    elif output := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        driver = f"driver {output.splitlines()[0]}"
    return _check_driver(
        "NVIDIA GPU", driver, family, "Install NVIDIA's driver, or in a container: --gpus all", "cuda13"
    )


def _check_driver(topic: str, driver: str | None, family: str | None, driver_advice: str, default_family: str) -> Check:
    """Checks a GPU driver against the JAX plugin of its vendor.

    Args:
        topic: The vendor.
        driver: The driver that was found; None if there is none.
        family: The plugin that is installed for this vendor; None if there is none.
        driver_advice: How to get the driver.
        default_family: The plugin to install if there is none for any vendor.
    """
    if driver is None and family:
        return Check(topic, f"no driver, but jax-{family}-plugin is installed", driver_advice)
    if driver and not _plugin_families():
        advice = f"{_install_command(default_family)}, or stay on the CPU: export JAX_PLATFORMS=cpu"
        return Check(topic, f"{driver}, but no JAX plugin is installed", advice)
    return Check(topic, driver or "no driver")


def _family_for(rocm: str | None) -> str:
    return "rocm10" if rocm and rocm.startswith("10.") else "rocm7"


def _rocm() -> tuple[Path | None, str | None]:
    """Returns the directory and the version of ROCm; None for what is unknown."""
    root = Path(os.environ.get("ROCM_PATH") or (ROCM if ROCM.is_dir() else _output("rocm-sdk", "path", "--root")) or "")
    if root == Path() or not root.is_dir():
        return None, None
    try:
        return root, (root / ".info" / "version").read_text(errors="replace").strip()
    except OSError:
        return root, None


def _output(command: str, *arguments: str) -> str | None:
    """Returns the output of another program; None if it is absent or fails."""
    if (path := shutil.which(command)) is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None


def check_jax() -> Iterator[Check]:
    """Starts JAX in another process, lists its devices, computes on the first one and imports Flax."""
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "JAX_TRACEBACK_FILTERING": "off"}
    if any(family.startswith("rocm") for family in _plugin_families()):
        environ |= devices.gpu_defaults(environ, rocm=True, deterministic=False)
    command = [sys.executable, "-P", "-c", _PROBE]
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, errors="replace", timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        advice = (
            "Find processes that hold the GPU (rocm-smi, nvidia-smi) and end them, or stay on the CPU: --device cpu"
        )
        yield Check("JAX", f"does not start: no output within {PROBE_TIMEOUT_S:g} seconds", advice)
        return
    stages = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if stages:
        yield from _check_devices(json.loads(stages[0]))
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1].strip()[:300] if lines else "no output"
        code = f"exit code {done.returncode}" if done.returncode > 0 else signal.strsignal(-done.returncode)
        yield Check("JAX", f"{_STAGES[len(stages)]}: {reason} ({code})", _jax_advice(len(stages)))


def _check_devices(found: list[tuple[str, str, int, int | None]]) -> Iterator[Check]:
    plugins = ", ".join(_plugin_families())
    for name, kind, number, limit in found:
        memory = "" if limit is None else f", {limit / 1e9:.1f} GB for JAX"
        text = f"{number}: {name}" + ("" if kind == name else f" ({kind})") + memory
        if name == "cpu" and plugins and _may_use_gpu():
            advice = f"See why: JAX_PLATFORMS={plugins[:4]} {sys.executable} -c 'import jax; jax.devices()'"
            yield Check("JAX device", f"{text}: no GPU was found, but the plugin for {plugins} is installed", advice)
            return
        yield Check("JAX device", text)


def _jax_advice(stage: int) -> str:
    platforms, jax = os.environ.get("JAX_PLATFORMS"), _version("jax")
    if _STAGES[stage].startswith("starts"):
        return f"pip install --force-reinstall 'flax{_requirements(_PACKAGE).get('flax', '')}'"
    if platforms not in (None, "", "cpu"):
        return f"Try without JAX_PLATFORMS={platforms}, or install JAX for it (docs/installing.md)"
    if os.environ.get("XLA_FLAGS"):
        return f"Try without XLA_FLAGS={os.environ['XLA_FLAGS']}"
    if _plugin_families() and _may_use_gpu():
        return "Run JAX_PLATFORMS=cpu hipgpt-doctor: if JAX starts then, the cause is its plugin or the driver"
    exact = f"'jax=={jax}' 'jaxlib=={_version('jaxlib') or jax}'" if jax else "jax jaxlib"
    return f"pip install --force-reinstall {exact}"


def check_cache() -> Check:
    """Checks the compile cache: its directory and size, whether it can be written, and by whom."""
    topic, advice = "compile cache", f"Choose a directory of your own: export {compilation.CACHE_VARIABLE}=..."
    try:
        path = compilation.cache_directory().absolute()
        if missing := disk_cache.missing_directories(path):
            parent = missing[0].parent
            if os.access(parent, os.W_OK | os.X_OK):
                return Check(topic, f"{path}: not created yet")
            return Check(topic, f"{path}: not created yet, and {parent} cannot be written", advice)
        sizes = [entry.stat().st_size for entry in compilation.cache_in(path).entries()]
    except (OSError, RuntimeError, ValueError) as error:
        return Check(topic, str(error), advice)
    text = f"{path}: {len(sizes)} programs, {sum(sizes) / 1e6:.1f} MB"
    if not os.access(path, os.W_OK | os.X_OK):
        return Check(topic, f"{text}, and it cannot be written", advice)
    return Check(topic, text)


def check_runs(only: str | None = None, *, verify: bool = True) -> Iterator[Check]:
    """Checks the runs of the package and of ``checkpoints/`` in the current directory.

    Args:
        only: The only run to check.
        verify: Whether to compare SHA-256 digests; otherwise only that the files exist.

    Raises:
        FileNotFoundError: There is no run of that name.
        ValueError: It is not a valid name.
    """
    directory.parse_run(only or "")
    if only is not None and only not in _runs(only):
        directory.find(only)
    if only is None:
        root = directory.CHECKPOINTS.absolute()
        own = [path for path in root.glob(f"[!.]*/{directory.LATEST_CONFIG}") if path.is_file()]
        text = f"{root}: {_count(len(own), 'run')}" if root.is_dir() else f"{root} does not exist"
        yield Check("checkpoints", text)
    for run, path in _runs(only).items():
        if only in (None, run):
            yield from _check_run(run, path, verify=verify)


def _runs(only: str | None) -> dict[str, Path]:
    """Returns the directory of each run, with or without a checkpoint, or the one that is given by its path."""
    if only is not None and directory.is_path(only):
        return {only: Path(only)}
    own = {path.name: path for path in directory.CHECKPOINTS.glob("[!.]*") if path.is_dir() and ".." not in path.name}
    return dict(sorted({**own, **{run: directory.find(run) for run in directory.names()}}.items()))


def _check_run(run: str, path: Path, *, verify: bool) -> list[Check]:
    """Returns one check if the run is intact, else one per problem."""
    config, weights = path / directory.LATEST_CONFIG, path / directory.LATEST_CHECKPOINT
    if not config.is_file():
        return [_check_unfinished_run(run, path)]
    latest, problem = _find_problem(run, path, None, verify=verify)
    older = [step for step in directory.steps(path) if not config.samefile(directory.config_path(path, step))]
    older = [step for step in older if step != latest]
    damaged = {step: text for step in older if (text := _find_problem(run, path, step, verify=verify)[1])}
    checks = []
    if problem is not None:
        name = "the latest step" if latest is None else f"step {latest}, the latest,"
        intact = [step for step in older if step not in damaged]
        advice = f"Restore the file, or train again: {_train_command(run)}"
        if path.parent == directory.SHIPPED:
            advice = "Restore the file (in a clone: git checkout hipgpt_jax/runs/shipped), or reinstall hipgpt-jax"
        elif intact:
            advice = f"Restore the file; until then, use --step {intact[-1]}"
        checks.append(Check("run", f"{run}: {name} is damaged: {problem}", advice))
    elif weights.is_symlink() and not weights.exists():
        target = directory.weights_beside(directory.config_path(path, latest or 0))
        checks.append(_check_dangling_link(run, weights, target))
    for step, text in damaged.items():
        file = directory.config_path(path, step)
        advice = f"Restore the file, or delete the step: rm {file} {directory.weights_beside(file)}"
        checks.append(Check("run", f"{run}: step {step} is damaged: {text}", advice))
    if checks:
        return checks
    status = "intact, digests checked" if verify else "complete, digests not checked"
    return [
        Check(
            "run", f"{run}: {_count(len(older) + 1, 'step')}, latest {latest}{_origin(run, path)}, {status}; in {path}"
        )
    ]


def _check_unfinished_run(run: str, path: Path) -> Check:
    link, steps = path / directory.LATEST_CONFIG, directory.steps(path)
    if link.is_symlink():
        return _check_dangling_link(run, link, directory.config_path(path, steps[-1]) if steps else None)
    if directory.has_checkpoint(path):
        return Check("run", f"{run}: started, no complete checkpoint yet; --resume continues it")
    return Check("run", f"{run}: a directory without a checkpoint; {_train_command(run)} starts there")


def _check_dangling_link(run: str, link: Path, target: Path | None) -> Check:
    advice = f"ln -sfn {target.name} {link}" if target else f"Restore that file, or train again: {_train_command(run)}"
    return Check("run", f"{run}: {link} points to {os.readlink(link)}, which does not exist", advice)


def _origin(run: str, path: Path) -> str:
    """Returns the checkpoint that an intact run was started from, for a line about it."""
    init_from = directory.read_checkpoint(run, None, path).init_from
    return f", started from {init_from}" if init_from else ""


def _find_problem(run: str, path: Path, step: int | None, *, verify: bool) -> tuple[int | None, str | None]:
    """Returns the number of a step, the latest by default, and its problem; None for what is unknown or absent."""
    number = None
    try:
        found = directory.read_checkpoint(run, step, path)
        number = found.step
        if verify:
            found.verify()
        elif missing := [path for path in (found.tokenizer, found.weights) if not path.is_file()]:
            return number, f"{missing[0]} is missing, but the config of step {number} names it"
    except (OSError, ValueError) as error:
        return number, str(error)
    return number, None


def _train_command(run: str) -> str:
    return f"hipgpt-train --run-name {shlex.quote(run)} --reset ..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def check_files(only: str | None = None) -> Iterator[Check]:
    """Checks the digests of the compile cache, and of the training files of every run; reads them whole.

    Args:
        only: The only run to check.
    """
    yield from _check_cache_entries()
    for run, path in _runs(only).items():
        if only in (None, run):
            yield from _check_tokens(run, path)
            yield from _check_states(run, path)


def _check_cache_entries() -> Iterator[Check]:
    try:
        cache = compilation.cache_in(compilation.cache_directory().absolute())
        damaged = list(cache.find_damaged())
        count = sum(1 for _ in cache.entries())
    except (OSError, RuntimeError, ValueError):  # it does not exist, or `check_cache` reports it
        return
    for name, reason in damaged:
        path = cache.directory / name
        yield Check("compile cache", f"{path}: {reason}", f"rm {shlex.quote(str(path))}")
    if not damaged:
        yield Check("compile cache", f"{count} programs, digests checked")


def _check_tokens(run: str, folder: Path) -> Iterator[Check]:
    path = folder / manifest.TOKENS_NAME
    if not path.exists():
        return
    try:
        data = manifest.Manifest.read(folder / manifest.MANIFEST_NAME)
        expected, size = (data.train_tokens + data.validation_tokens) * data.token_bytes, path.stat().st_size
        if size != expected:
            raise ValueError(f"{path} has {size} bytes: {manifest.MANIFEST_NAME} expects {expected}")
        if (digest := files.sha256(path)) != data.tokens_sha256:
            raise ValueError(f"{path} was changed: its sha256 is {digest[:12]}..., not {data.tokens_sha256[:12]}...")
    except (OSError, ValueError) as error:
        yield Check(
            manifest.TOKENS_NAME,
            f"{run}: {error}",
            f"Restore the file, or prepare the text again: {_train_command(run)}",
        )
    else:
        yield Check(manifest.TOKENS_NAME, f"{run}: {size / 1e6:.1f} MB, digest checked")


def _check_states(run: str, path: Path) -> Iterator[Check]:
    """Checks the training states that ``--resume`` reads."""
    name = directory.TRAIN_STATE_NAME
    try:
        found = states.verify_states(path)
    except OSError as error:
        yield Check(name, f"{run}: {error}", "Make the directory readable")
        return
    intact = [state.step for state in found if state.fault is None]
    alternative = f"continue with --resume from step {intact[-1]}" if intact else f"train again: {_train_command(run)}"
    for state in found:
        if state.fault:
            text = f"{run}: the state of step {state.step} is damaged: {state.fault}"
            yield Check(name, text, f"Restore it from a copy, or {alternative}")
    if intact:
        steps = ", ".join(map(str, intact))
        yield Check(name, f"{run}: {'states' if len(intact) > 1 else 'state'} of step {steps}, digests checked")
