"""Whether the installed packages are there and fit one another, read from their metadata without importing any."""

import importlib.metadata
import operator
import platform
import re
from collections.abc import Callable, Iterator

from hipgpt_jax import doctor

FAMILIES = ("rocm7", "rocm10", "cuda12", "cuda13")
LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tokenizers",
    "safetensors",
    "numpy",
    "absl-py",
    "rich",
)

_Numbers = tuple[int, ...]

_PACKAGE = "hipgpt-jax"
_COMPARE: dict[str, Callable[[_Numbers, _Numbers], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def version(name: str) -> str | None:
    """Returns the version of an installed distribution; None where it is absent or half removed."""
    found = next(iter(importlib.metadata.distributions(name=name)), None)
    return found.metadata["Version"] if found and "Version" in found.metadata else None


def satisfies(found: str, demand: str) -> bool:
    """Returns whether a version meets a demand, by its release numbers: a post-release is its release.

    >>> satisfies("0.10.0.post1", "==0.10.0.*"), satisfies("0.12.0.1", "<=0.12.0,>=0.11")
    (True, False)
    """
    return all(
        _COMPARE[sign](*_padded(found, wanted, is_prefix=bool(star)))
        for sign, wanted, star in re.findall(r"([=!<>]=|[<>])\s*(\d+(?:\.\d+)*)(\.\*)?", demand)
    )


def families() -> list[str]:
    """Returns the accelerators of ``FAMILIES`` that a plugin, or half of one, is installed for."""
    return [name for name in FAMILIES if version(f"jax-{name}-plugin") or version(f"jax-{name}-pjrt")]


def plugin_command(family: str) -> str:
    """Returns the command that installs a plugin fitting the installed JAX.

    ROCm plugins are released for JAX versions of three numbers only, so a JAX of four goes back to three.
    """
    found = re.match(r"\d+\.\d+\.\d+", version("jax") or "")
    if family.startswith("cuda"):
        exact = f"=={version('jax')}" if found else ""
        return f"pip install -U 'jax[{family}]{exact}'"
    if not found:
        return f"pip install -U jax jax-{family}-plugin jax-{family}-pjrt"
    parts = (f"'jax-{family}-{part}=={found[0]}.*'" for part in ("plugin", "pjrt"))
    return f"pip install -U 'jax=={found[0]}' {' '.join(parts)}"


def demands(name: str) -> dict[str, str]:
    """Returns the versions that an installed distribution always needs, by the name of what it needs."""
    needed = {}
    for line in next((found.requires for found in importlib.metadata.distributions(name=name)), None) or ():
        parts = re.match(r"([\w.-]+)\s*(?:\[[^]]*])?\s*\(?([^;)]*)\)?\s*(;?)", line)
        if parts and not parts[3]:
            needed[parts[1]] = parts[2].strip()
    return needed


def examine() -> Iterator[doctor.Finding]:
    """Looks at Python, at the libraries and at the accelerator plugins."""
    own = next((found.metadata for found in importlib.metadata.distributions(name=_PACKAGE)), None)
    if own is None:
        yield doctor.Finding(_PACKAGE, "not installed, run from its source: which versions it needs is not checked")
    demand = own["Requires-Python"] if own and "Requires-Python" in own else ">=3.11"
    fits = satisfies(platform.python_version(), demand)
    yield doctor.Finding(
        "Python",
        platform.python_version() + ("" if fits else f": {_PACKAGE} needs {demand}"),
        None if fits else f"Make an environment with another Python: python3.12 -m venv .venv (it needs {demand})",
    )
    needed = demands(_PACKAGE)
    for name in LIBRARIES:
        yield _library(name, needed.get(name, ""))
    for family in families():
        yield _plugin(family)
    if not families():
        yield doctor.Finding("JAX plugin", "none installed: JAX computes on the CPU")


def _library(name: str, demand: str) -> doctor.Finding:
    found, by = version(name), _PACKAGE
    if name == "jaxlib":
        demand, by = demands("jax").get("jaxlib", ""), f"jax {version('jax')}"
    if found is None:
        return doctor.Finding(name, "not installed", f"pip install '{name}{demand}'")
    if not satisfies(found, demand):
        return doctor.Finding(name, f"{found}: {by} needs {demand}", f"pip install '{name}{demand}'")
    return doctor.Finding(name, f"{found}, fits {by}" if name == "jaxlib" and demand else found)


def _plugin(family: str) -> doctor.Finding:
    """Holds both halves of a plugin against each other and against JAX, which JAX itself leaves out for ROCm."""
    name, jax = f"jax-{family}-plugin", version("jax")
    plugin, pjrt = version(name), version(f"jax-{family}-pjrt")
    if plugin is None:
        wrong = f"not installed, though jax-{family}-pjrt {pjrt} is"
    elif pjrt is None:
        wrong = f"{plugin} without its other half: jax-{family}-pjrt is not installed"
    elif plugin != pjrt:
        wrong = f"{plugin} with jax-{family}-pjrt {pjrt}: both must be of one version"
    elif jax is not None and not satisfies(plugin, f"=={jax}.*"):
        wrong = f"{plugin} with jax {jax}: the plugin must be of JAX's version"
    else:
        return doctor.Finding(name, f"{plugin}, fits its pjrt and jax {jax}")
    return doctor.Finding(name, wrong, plugin_command(family))


def _padded(found: str, wanted: str, *, is_prefix: bool) -> tuple[_Numbers, _Numbers]:
    first, second = (
        tuple(map(int, match[0].split("."))) if (match := re.match(r"\d+(?:\.\d+)*", text)) else ()
        for text in (found, wanted)
    )
    width = len(second) if is_prefix else max(len(first), len(second))
    return (first + (0,) * width)[:width], (second + (0,) * width)[:width]
