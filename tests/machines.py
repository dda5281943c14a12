"""Set-ups for the tests of the doctor, and access to its checks."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from hipgpt_jax import doctor


def make_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the GPUs, environment variables, programs and runs of the machine that runs the test."""
    for name in [*filter(doctor.VARIABLES.fullmatch, os.environ), "ROCM_PATH"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("KFD", "NVIDIA", "ROCM"):
        monkeypatch.setattr(doctor, name, tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def problems(checks: Iterable[doctor.Check]) -> list[doctor.Check]:
    """Returns the checks that found a problem."""
    return [check for check in checks if check.advice is not None]


def about(topic: str, checks: Iterable[doctor.Check]) -> doctor.Check:
    """Returns the one check of a topic."""
    (check,) = (check for check in checks if check.topic == topic)
    return check
