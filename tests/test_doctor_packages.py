"""``hipgpt-doctor`` on what is installed: libraries, plugins, drivers and ROCm that fit one another or do not."""

import re
from collections.abc import Callable
from pathlib import Path

import machines
import pytest

from hipgpt_jax import doctor


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.make_bare(tmp_path, monkeypatch)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the metadata of distributions before that of the installed ones."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def put(*names: str) -> None:
        for name in names:
            project, _, version = name.partition(" ")
            folder = site / f"{project.replace('-', '_')}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")

    return put


@pytest.mark.slow
def test_a_plugin_with_which_jax_finds_only_the_cpu_is_a_problem(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("jax-rocm7-plugin 0.10.2", "jax-rocm7-pjrt 0.10.2")
    check = machines.about("JAX device", doctor.check_jax())
    assert "no GPU was found, but the plugin for rocm7 is installed" in check.text
    assert "JAX_PLATFORMS=rocm" in (check.advice or "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machines.problems(doctor.check_jax()) == []


@pytest.mark.parametrize(
    ("names", "text", "advice"),
    [
        ("rocm7-plugin 0.10.2, rocm7-pjrt 0.10.2, jax 0.10.2", "0.10.2, matches its pjrt and jax 0.10.2", None),
        ("rocm7-plugin 0.10.0.post1, rocm7-pjrt 0.10.0.post1, jax 0.10.0", "0.10.0.post1, matches", None),
        (
            "rocm7-plugin 0.9.1, rocm7-pjrt 0.9.1, jax 0.10.2",
            "0.9.1 with jax 0.10.2: the versions must be equal",
            "pip install -U 'jax==0.10.2' 'jax-rocm7-plugin==0.10.2.*' 'jax-rocm7-pjrt==0.10.2.*'",
        ),
        (
            "rocm7-plugin 0.10.2, rocm7-pjrt 0.10.1, jax 0.10.2",
            "0.10.2 with jax-rocm7-pjrt 0.10.1: the versions must be equal",
            "'jax-rocm7-pjrt==0.10.2.*'",
        ),
        ("rocm7-plugin 0.10.2, jax 0.10.2", "jax-rocm7-pjrt is not installed", "'jax-rocm7-pjrt==0.10.2.*'"),
        ("rocm7-pjrt 0.10.2, jax 0.10.2", "not installed, but jax-rocm7-pjrt", "'jax-rocm7-plugin==0.10.2.*'"),
        ("rocm10-plugin 0.12.0, rocm10-pjrt 0.12.0, jax 0.12.0.1", "0.12.0 with jax 0.12.0.1", "'jax==0.12.0'"),
        (
            "cuda13-plugin 0.10.1, cuda13-pjrt 0.10.1, jax 0.10.2",
            "0.10.1 with jax 0.10.2",
            "pip install -U 'jax[cuda13]==0.10.2'",
        ),
    ],
)
def test_both_halves_of_a_plugin_must_fit_jax(
    installed: Callable[..., None], names: str, text: str, advice: str | None
) -> None:
    installed(*(name if name.startswith("jax ") else f"jax-{name}" for name in names.split(", ")))
    (check,) = (check for check in doctor.check_packages() if check.topic.endswith("-plugin"))
    assert text in check.text
    assert (check.advice is None) == (advice is None)
    assert (advice or "") in (check.advice or "")


def test_the_installed_libraries_fit() -> None:
    found = list(doctor.check_packages())
    assert machines.problems(found) == []
    assert {check.topic for check in found} >= {"Python", "jax", "jaxlib", "flax", "zstandard"}


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("flax 0.12.9", "0.12.9: hipgpt-jax requires ", "pip install 'flax"),
        ("jax 0.13.0", "0.13.0: hipgpt-jax requires ", "pip install 'jax"),
        ("jaxlib 0.4.1", "0.4.1: jax ", "pip install 'jaxlib"),
    ],
)
def test_a_library_of_another_version_is_a_problem(
    installed: Callable[..., None], name: str, text: str, advice: str
) -> None:
    installed(name)
    check = machines.about(name.split()[0], doctor.check_packages())
    assert check.text.startswith(text)
    assert (check.advice or "").startswith(advice)


def test_a_half_removed_library_is_not_installed(installed: Callable[..., None], tmp_path: Path) -> None:
    installed("optax 0.2.8")
    (tmp_path / "site/optax-0.2.8.dist-info/METADATA").unlink()
    check = machines.about("optax", doctor.check_packages())
    assert check.text == "not installed"
    assert (check.advice or "").startswith("pip install 'optax")


def test_a_gpu_without_a_plugin_is_a_problem_unless_the_cpu_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machines.problems(doctor.check_drivers()) == []
    (tmp_path / "KFD").touch()
    (tmp_path / "NVIDIA").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    amd, nvidia = machines.problems(doctor.check_drivers())
    assert re.match(r"pip install -U 'jax==[\d.]+' 'jax-rocm7-plugin==[\d.]+\.\*'", amd.advice or "")
    assert nvidia.text == "driver 580.65.06, but no JAX plugin is installed"
    assert re.match(r"pip install -U 'jax\[cuda13\]==[\d.]+'", nvidia.advice or "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machines.problems(doctor.check_drivers()) == []


def test_a_plugin_without_driver_or_rocm_is_a_problem(installed: Callable[..., None], tmp_path: Path) -> None:
    installed("jax-rocm7-plugin 0.10.2", "jax-rocm7-pjrt 0.10.2", "jax-cuda13-plugin 0.10.2", "jax-cuda13-pjrt 0.10.2")
    amd, rocm, nvidia = machines.problems(doctor.check_drivers())
    assert "--device=/dev/dri" in (amd.advice or "")
    assert (rocm.advice or "").startswith("Install ROCm 7;")
    assert "NVIDIA's driver" in (nvidia.advice or "")
    (tmp_path / "KFD").touch()
    (tmp_path / "ROCM/.info").mkdir(parents=True)
    (tmp_path / "ROCM/.info/version").write_text("7.2.0-43\n")
    assert machines.problems(doctor.check_drivers()) == [nvidia]
    assert machines.about("ROCm", doctor.check_drivers()).text == f"7.2.0-43 in {tmp_path / 'ROCM'}"
    (tmp_path / "ROCM/.info/version").write_text("10.1.0\n")
    advice = machines.problems(doctor.check_drivers())[0].advice or ""
    assert advice.startswith("pip uninstall -y jax-rocm7-plugin jax-rocm7-pjrt && pip install -U ")
    assert "jax-rocm10-plugin" in advice


def test_rocm_from_pip_and_a_driver_that_only_nvidia_smi_knows_are_found(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "pip_rocm").mkdir()
    for name, said in (("rocm-sdk", tmp_path / "pip_rocm"), ("nvidia-smi", "570.1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {said}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    found = list(doctor.check_drivers())
    assert machines.about("ROCm", found).text == f"unknown version in {tmp_path / 'pip_rocm'}"
    assert machines.about("NVIDIA GPU", found).text.startswith("driver 570.1")
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert machines.about("NVIDIA GPU", doctor.check_drivers()).text == "no driver"
