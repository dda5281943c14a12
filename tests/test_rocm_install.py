"""The extra ``rocm``: pip finds equal versions of JAX and its plugin for each supported Python."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _interpreter(version: str) -> str | None:
    """Returns a Python of a version, on PATH or of pyenv, run to see that it is more than a shim."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_extra_rocm_resolves_to_equal_versions(version: str, tmp_path: Path) -> None:
    if (python := _interpreter(version)) is None:
        pytest.skip(f"no Python {version} here")
    # The requirements of '.[rocm]' rather than the project, which pip would build each time.
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["rocm"]
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "--quiet", "install", "--dry-run", "--ignore-installed"]
    done = subprocess.run([*pip, f"--report={report}", *wanted], cwd=tmp_path, capture_output=True, text=True)
    if "No matching distribution found for jax-rocm7-plugin" in done.stderr:
        pytest.skip(f"the package index has no jax-rocm7-plugin for Python {version}")
    if "(from versions: none)" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    packages = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    found = {package["name"]: package["version"].partition(".post")[0] for package in packages}
    assert found["jax"] == found["jaxlib"] == found["jax-rocm7-plugin"] == found["jax-rocm7-pjrt"]
