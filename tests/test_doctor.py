"""``hipgpt-doctor`` as a user meets it, with a JAX that works and with those that do not."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machines
import programs
import pytest

from hipgpt_jax import doctor


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.make_bare(tmp_path, monkeypatch)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., programs.Result]:
    """Runs ``hipgpt-doctor`` in this process."""
    return lambda *arguments: programs.call("doctor", *arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module of this source before the installed one, for the processes that are started."""

    def put(name: str, source: str) -> None:
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=os.pathsep)

    return put


def test_a_healthy_machine_has_no_problem(
    call: Callable[..., programs.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    result = call()
    assert (result.code, result.err) == (0, "")
    assert re.search(r"\n  ok +run +shakespeare: 1 step, latest 2000, intact, digests checked; in ", result.out)
    assert re.search(r"\n  ok +environment +JAX_PLATFORMS=cpu\n", result.out)
    assert re.search(r"\n  ok +JAX device +0: cpu\n", result.out)
    assert "PROBLEM" not in result.out
    assert result.out.splitlines()[-1] == "no problems"


def test_jax_is_not_imported_in_its_own_process() -> None:
    code = (
        "import sys, runpy; sys.argv = ['doctor']\n"
        "try: runpy.run_module('hipgpt_jax.cli.doctor', run_name='__main__')\n"
        "finally: print(sorted({'jax', 'flax', 'numpy', 'tokenizers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=programs.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('no such symbol')", "does not start: ImportError: no such symbol (exit code 1)"),
        ("import os; os.abort()", "does not start: no output (Aborted)"),
        ("import sys; print('banner'); sys.exit(3)", "does not start: no output (exit code 3)"),
    ],
)
def test_a_jax_that_does_not_start_is_a_problem_and_no_crash(
    call: Callable[..., programs.Result], module: Callable[[str, str], None], source: str, said: str
) -> None:
    module("jax", source)
    result = call()
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    (line,) = (i for i, text in enumerate(lines) if "PROBLEM" in text)
    assert re.fullmatch(rf" +PROBLEM +JAX +{re.escape(said)}", lines[line])
    assert re.fullmatch(r" +-> pip install --force-reinstall 'jax==[\d.]+' 'jaxlib==[\d.]+'", lines[line + 1])
    assert lines[-1] == "1 problem"
    assert "shakespeare" in result.out
    assert "Traceback" not in result.out


def test_it_works_in_a_process_of_its_own_beside_a_broken_jax(
    module: Callable[[str, str], None], tmp_path: Path
) -> None:
    module("jax", "raise ImportError('no such symbol')")
    result = programs.spawn("doctor", cwd=tmp_path)
    assert result.code == 1
    assert result.err == ""
    assert "PROBLEM JAX " in result.out


def test_a_jax_that_hangs_is_given_up(module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module("jax", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    begin = time.monotonic()
    (check,) = doctor.check_jax()
    assert time.monotonic() - begin < 15
    assert check.text == "does not start: no output within 0.5 seconds"
    assert "--device cpu" in (check.advice or "")


def test_memory_is_shown_and_a_device_that_does_not_compute_is_a_problem(module: Callable[[str, str], None]) -> None:
    kind = "platform, device_kind, id, memory_stats = 'gpu', 'AMD MI300X', 0, lambda self: {'bytes_limit': 8 * 10**9}"
    module("jax", f"class Device:\n    {kind}\ndef devices(): return [Device()]\n")
    device, jax = doctor.check_jax()
    assert device == doctor.Check("JAX device", "0: gpu (AMD MI300X), 8.0 GB for JAX")
    assert re.match("does not compute: AttributeError: .*'numpy'", jax.text)
    assert jax.advice


def test_a_flax_that_does_not_fit_is_a_problem(module: Callable[[str, str], None]) -> None:
    module("flax", "raise AttributeError('jax has no such thing')")
    check = machines.about("JAX", doctor.check_jax())
    assert "starts, but Flax fails to import: AttributeError: jax has no such thing" in check.text
    assert re.match(r"pip install --force-reinstall 'flax.*!=0\.12\.9", check.advice or "")


def test_a_platform_that_jax_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "nosuch")
    (check,) = doctor.check_jax()
    assert "Unable to initialize backend 'nosuch'" in check.text
    assert "without JAX_PLATFORMS=nosuch" in (check.advice or "")


def test_the_cache_directory_and_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache/hipgpt_jax/compiled"
    assert doctor.check_cache() == doctor.Check("compile cache", f"{path}: not created yet")
    path.mkdir(parents=True)
    for name in ("a.xla", "b.program", "of another program"):
        (path / name).write_bytes(bytes(750_000))
    assert doctor.check_cache() == doctor.Check("compile cache", f"{path}: 2 programs, 1.5 MB")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    assert doctor.check_cache().text == f"{tmp_path / 'own/hipgpt_jax'}: not created yet"
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("name", ["cache", "cache/hipgpt_jax", "cache/hipgpt_jax/compiled"])
def test_a_cache_that_another_user_can_write_is_a_problem(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name).chmod(0o777)
    check = doctor.check_cache()
    assert check.text.startswith(f"other users can write to {tmp_path / name} and ")
    assert f"chmod go-w {tmp_path / name}" in check.text
    assert check.advice


def test_a_cache_that_cannot_be_made_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch(mode=0o755)
    for own in (tmp_path / "file", tmp_path / "file/below", "gs://bucket/cache"):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(own))
        assert "export JAX_COMPILATION_CACHE_DIR=" in (doctor.check_cache().advice or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run-name", "nosuch"), "run 'nosuch' not found .*Runs: shakespeare"),
        (("--run-name", "../x"), "directory of a run not found: ../x"),
        (("--frobnicate",), "unknown flag --frobnicate: "),
        (("more",), "unexpected argument 'more'"),
        (("--deep", "--noverify"), "--deep .* and --noverify .*: give one of them"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    call: Callable[..., programs.Result], arguments: tuple[str, ...], message: str
) -> None:
    result = call(*arguments)
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(f"doctor: error: .*{message}.*\n", result.err)


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    line = " ".join(["PATH=/bin:/usr/bin; exec", *programs.command("doctor"), "| head -c 1"])
    done = subprocess.run(
        ["/bin/bash", "-c", line], env=programs.environment(), capture_output=True, text=True, timeout=120
    )
    assert len(done.stdout) == 1
    assert done.stderr == ""
