"""``hipgpt-doctor`` on runs: which are whole, and what to do about those that are not."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import machines
import programs
import pytest

from hipgpt_jax import compilation, disk_cache, doctor
from hipgpt_jax.runs import directory


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.make_bare(tmp_path, monkeypatch)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., programs.Result]:
    """Runs ``hipgpt-doctor`` in this process."""
    return lambda *arguments: programs.call("doctor", *arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def tiny(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to be damaged."""
    target = tmp_path / "checkpoints" / "tiny"
    shutil.copytree(trained / "checkpoints/tiny", target, symlinks=True)
    return target


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_whole_run_is_one_line(tiny: Path) -> None:
    (check,) = doctor.check_runs("tiny")
    assert check == doctor.Check("run", "tiny: 2 steps, latest 40, intact, digests checked; in checkpoints/tiny")
    assert [check.topic for check in doctor.check_runs()] == ["checkpoints", "run", "run"]


def test_a_damaged_latest_step_is_named_with_the_step_to_take(tiny: Path, call: Callable[..., programs.Result]) -> None:
    cut(tiny / "tiny_step40.bin")
    result = call("--run-name", "tiny")
    assert result.code == 1
    assert re.search(
        r"PROBLEM run +tiny: step 40, the latest, is damaged: .*tiny_step40\.bin is not the file", result.out
    )
    assert re.search(r"\n +-> Restore the file; until then, use --step 20\n\n1 problem\n$", result.out)
    cut(tiny / "tiny_step20.bin")
    latest, older = doctor.check_runs("tiny")
    assert latest.advice == "Restore the file, or train again: hipgpt-train --run-name tiny --reset ..."
    assert "tiny: step 20 is damaged" in older.text


def test_a_damaged_older_step_can_be_given_up_as_advised(tiny: Path) -> None:
    cut(tiny / "tiny_step20.bin")
    (check,) = doctor.check_runs("tiny")
    words = (check.advice or "").partition("rm ")[2].split()
    assert words == ["checkpoints/tiny/tiny_step20_config.json", "checkpoints/tiny/tiny_step20.bin"]
    for word in words:
        Path(word).unlink()
    assert [check.advice for check in doctor.check_runs("tiny")] == [None]


def test_a_config_that_cannot_be_read_is_one_problem(tiny: Path) -> None:
    cut(tiny / "tiny_step40_config.json")
    (check,) = doctor.check_runs("tiny")
    assert "latest_config.json is not JSON" in check.text
    assert check.advice == "Restore the file; until then, use --step 20"


def test_noverify_sees_only_what_is_missing(
    tiny: Path, call: Callable[..., programs.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cut(tiny / "tiny_step40.bin")
    result = call("--run-name=tiny", "--noverify")
    assert result.code == 0
    assert "2 steps, latest 40, complete, digests not checked" in result.out
    (tiny / "tiny_step40.bin").unlink()
    result = call("--run-name=tiny", "--noverify")
    assert result.code == 1
    assert re.search(r"PROBLEM .*step 40, .* damaged: .*tiny_step40\.bin is missing", result.out)


@pytest.mark.parametrize("name", ["latest_config.json", "latest_checkpoint.bin"])
def test_a_dangling_link_is_repaired_by_the_command_advised(tiny: Path, name: str) -> None:
    (tiny / name).unlink()
    (tiny / name).symlink_to("tiny_step60.bin")
    (check,) = doctor.check_runs("tiny")
    assert f"{name} points to tiny_step60.bin, which does not exist" in check.text
    subprocess.run(["/bin/sh", "-c", f"PATH=/bin:/usr/bin; {check.advice}"], check=True)
    assert [check.advice for check in doctor.check_runs("tiny")] == [None]


def test_runs_without_a_checkpoint_are_listed_and_no_problem(tiny: Path) -> None:
    for path in (*tiny.glob("*.bin"), *tiny.glob("*_config.json")):
        path.unlink()
    (tiny.parent / "empty").mkdir()
    (tiny.parent / "notes.txt").touch()
    empty, shakespeare, begun = list(doctor.check_runs())[1:]
    assert "empty: a directory without a checkpoint" in empty.text
    assert shakespeare.text.startswith("shakespeare: ")
    assert begun.text == "tiny: started, no complete checkpoint yet; --resume continues it"
    assert machines.problems((empty, shakespeare, begun)) == []


def test_the_packages_own_run_is_restored_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(directory.SHIPPED, tmp_path / "shipped")
    monkeypatch.setattr(directory, "SHIPPED", tmp_path / "shipped")
    cut(tmp_path / "shipped/shakespeare/shakespeare_step2000.bin")
    assert "git checkout" in (machines.problems(doctor.check_runs())[0].advice or "")


def test_deep_reads_the_cache_and_the_training_files(
    tiny: Path, tmp_path: Path, call: Callable[..., programs.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cache = compilation.cache_in(disk_cache.safe_directory(tmp_path / "cache/hipgpt_jax/compiled"))
    names = [f"jit_steps{compilation.EXECUTABLE}", f"steps{compilation.PROGRAM}"]
    for name in names:
        cache.put(name, bytes(100))
    compiled, tokens, trained_states = doctor.check_files()
    assert trained_states.text == "tiny: states of step 20, 40, digests checked"
    assert compiled == doctor.Check("compile cache", "2 programs, digests checked")
    assert re.fullmatch(r"tiny: 0\.\d MB, digest checked", tokens.text)
    assert tokens.advice is None
    assert [check.topic for check in doctor.check_files("shakespeare")] == ["compile cache"]
    for name in names:
        flip(cache.directory / name, 8 * 90)
    flip(tiny / "tokens.bin", 8 * 90)
    (tokens,) = (check for check in doctor.check_files("tiny") if check.topic == "tokens.bin")
    assert re.search(r"tokens\.bin was changed: its sha256 is \w{12}\.\.\., not", tokens.text)
    cut(tiny / "tokens.bin")
    result = call("--deep", "--run-name", "tiny")
    assert (result.code, result.err) == (1, "")
    advice = re.findall(r"PROBLEM (?:compile cache|tokens\.bin) .*\n +-> (.*)", result.out)
    assert advice == [f"rm {cache.directory / name}" for name in names] + [
        "Restore the file, or prepare the text again: hipgpt-train --run-name tiny --reset ..."
    ]
    assert sorted(path.name for path in cache.directory.iterdir()) == names, "nothing is removed"


def test_names_cannot_forge_a_line_or_move_the_cursor(
    tiny: Path, call: Callable[..., programs.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "\x1b[2K\n  ok      JAX device        0: gpu")
    (tiny / "latest_config.json").unlink()
    (tiny / "latest_config.json").symlink_to("\x1b]0;title\x07.json")
    result = call("--run-name", "tiny", "--noverify")
    assert r"XLA_FLAGS=\x1b[2K ok JAX device 0: gpu" in result.out
    assert r"points to \x1b]0;title\x07.json" in result.out
    assert "\x1b" not in result.out


def test_deep_names_a_damaged_training_state_and_what_resume_does(tiny: Path) -> None:
    path = tiny / "train_state/40/default/_METADATA"
    cut(path)
    *_, damaged, whole = doctor.check_files("tiny")
    assert (
        damaged.text == f"tiny: the state of step 40 is damaged: checkpoints/tiny/{path.relative_to(tiny)} was changed"
    )
    assert damaged.advice == "Restore it from a copy, or continue with --resume from step 20"
    assert whole.text == "tiny: state of step 20, digests checked"
    cut(tiny / "train_state/20/default/_METADATA")
    found = [check for check in doctor.check_files("tiny") if check.topic == "train_state"]
    assert [check.advice for check in found] == [
        "Restore it from a copy, or train again: hipgpt-train --run-name tiny --reset ..."
    ] * 2
    for step in (20, 40):
        (tiny / f"train_state/{step}/sha256.json").unlink()
    found = [check for check in doctor.check_files("tiny") if check.topic == "train_state"]
    assert ["is damaged: no sha256.json: its save was cut short" in check.text for check in found] == [True, True]
