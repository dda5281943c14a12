"""Machines for the doctor to look at, and what it says of them."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from hipgpt_jax import doctor
from hipgpt_jax.doctor import drivers, machine


def make_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a machine without GPUs, settings, other programs or runs, whatever the one below it has."""
    for name in (*machine.SETTINGS, "ROCM_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KFD", "NVIDIA", "ROCM"):
        monkeypatch.setattr(drivers, name, tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def troubles(findings: Iterable[doctor.Finding]) -> list[doctor.Finding]:
    """Returns the findings that are troubles."""
    return [finding for finding in findings if finding.advice is not None]


def about(topic: str, findings: Iterable[doctor.Finding]) -> doctor.Finding:
    """Returns the one finding on a topic."""
    (finding,) = (finding for finding in findings if finding.topic == topic)
    return finding
