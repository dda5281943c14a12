"""``hipgpt-doctor`` on what is installed: libraries, plugins, drivers and ROCm that fit one another or do not."""

import re
from collections.abc import Callable
from pathlib import Path

import machines
import pytest

from hipgpt_jax.doctor import drivers, machine, packages


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


def test_a_plugin_with_which_jax_finds_only_the_cpu_is_a_trouble(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("jax-rocm7-plugin 0.10.2", "jax-rocm7-pjrt 0.10.2")
    finding = machines.about("JAX device", machine.probe())
    assert "no GPU was found, though the plugin for rocm7 is installed" in finding.text
    assert "JAX_PLATFORMS=rocm" in (finding.advice or "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machines.troubles(machine.probe()) == []


@pytest.mark.parametrize(
    ("names", "text", "advice"),
    [
        ("rocm7-plugin 0.10.2, rocm7-pjrt 0.10.2, jax 0.10.2", "0.10.2, fits its pjrt and jax 0.10.2", None),
        ("rocm7-plugin 0.10.0.post1, rocm7-pjrt 0.10.0.post1, jax 0.10.0", "0.10.0.post1, fits", None),
        (
            "rocm7-plugin 0.9.1, rocm7-pjrt 0.9.1, jax 0.10.2",
            "0.9.1 with jax 0.10.2: the plugin must be of JAX's version",
            "pip install -U 'jax==0.10.2' 'jax-rocm7-plugin==0.10.2.*' 'jax-rocm7-pjrt==0.10.2.*'",
        ),
        (
            "rocm7-plugin 0.10.2, rocm7-pjrt 0.10.1, jax 0.10.2",
            "0.10.2 with jax-rocm7-pjrt 0.10.1: both must be of one version",
            "'jax-rocm7-pjrt==0.10.2.*'",
        ),
        ("rocm7-plugin 0.10.2, jax 0.10.2", "jax-rocm7-pjrt is not installed", "'jax-rocm7-pjrt==0.10.2.*'"),
        ("rocm7-pjrt 0.10.2, jax 0.10.2", "not installed, though jax-rocm7-pjrt", "'jax-rocm7-plugin==0.10.2.*'"),
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
    (finding,) = (finding for finding in packages.examine() if finding.topic.endswith("-plugin"))
    assert text in finding.text
    assert (finding.advice is None) == (advice is None)
    assert (advice or "") in (finding.advice or "")


def test_the_installed_libraries_fit() -> None:
    found = list(packages.examine())
    assert machines.troubles(found) == []
    assert {finding.topic for finding in found} >= {"Python", *packages.LIBRARIES}


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("flax 0.12.9", "0.12.9: hipgpt-jax needs ", "pip install 'flax"),
        ("jax 0.13.0", "0.13.0: hipgpt-jax needs ", "pip install 'jax"),
        ("jaxlib 0.4.1", "0.4.1: jax ", "pip install 'jaxlib"),
    ],
)
def test_a_library_of_another_version_is_a_trouble(
    installed: Callable[..., None], name: str, text: str, advice: str
) -> None:
    installed(name)
    finding = machines.about(name.split()[0], packages.examine())
    assert finding.text.startswith(text)
    assert (finding.advice or "").startswith(advice)


def test_a_half_removed_library_is_not_installed(installed: Callable[..., None], tmp_path: Path) -> None:
    installed("optax 0.2.8")
    (tmp_path / "site/optax-0.2.8.dist-info/METADATA").unlink()
    finding = machines.about("optax", packages.examine())
    assert finding.text == "not installed"
    assert (finding.advice or "").startswith("pip install 'optax")


def test_a_gpu_without_a_plugin_is_a_trouble_unless_the_cpu_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machines.troubles(drivers.examine()) == []
    (tmp_path / "KFD").touch()
    (tmp_path / "NVIDIA").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    amd, nvidia = machines.troubles(drivers.examine())
    assert re.match(r"pip install -U 'jax==[\d.]+' 'jax-rocm7-plugin==[\d.]+\.\*'", amd.advice or "")
    assert nvidia.text == "driver 580.65.06, but no JAX plugin is installed"
    assert re.match(r"pip install -U 'jax\[cuda13\]==[\d.]+'", nvidia.advice or "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machines.troubles(drivers.examine()) == []


def test_a_plugin_without_driver_or_rocm_is_a_trouble(installed: Callable[..., None], tmp_path: Path) -> None:
    installed("jax-rocm7-plugin 0.10.2", "jax-rocm7-pjrt 0.10.2", "jax-cuda13-plugin 0.10.2", "jax-cuda13-pjrt 0.10.2")
    amd, rocm, nvidia = machines.troubles(drivers.examine())
    assert "--device=/dev/dri" in (amd.advice or "")
    assert (rocm.advice or "").startswith("Install ROCm 7;")
    assert "NVIDIA's driver" in (nvidia.advice or "")
    (tmp_path / "KFD").touch()
    (tmp_path / "ROCM/.info").mkdir(parents=True)
    (tmp_path / "ROCM/.info/version").write_text("7.2.0-43\n")
    assert machines.troubles(drivers.examine()) == [nvidia]
    assert machines.about("ROCm", drivers.examine()).text == f"7.2.0-43 in {tmp_path / 'ROCM'}"
    (tmp_path / "ROCM/.info/version").write_text("10.1.0\n")
    advice = machines.troubles(drivers.examine())[0].advice or ""
    assert advice.startswith("pip uninstall -y jax-rocm7-plugin jax-rocm7-pjrt && pip install -U ")
    assert "jax-rocm10-plugin" in advice


def test_rocm_from_pip_and_a_driver_that_only_nvidia_smi_knows_are_found(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "pip_rocm").mkdir()
    for name, said in (("rocm-sdk", tmp_path / "pip_rocm"), ("nvidia-smi", "570.1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {said}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    found = list(drivers.examine())
    assert machines.about("ROCm", found).text == f"of unknown version in {tmp_path / 'pip_rocm'}"
    assert machines.about("NVIDIA GPU", found).text.startswith("driver 570.1")
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert machines.about("NVIDIA GPU", drivers.examine()).text == "no driver"
