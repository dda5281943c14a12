"""The run inside the package, and the flagfiles that make it and the others."""

import json
from pathlib import Path

import programs
import pytest

from hipgpt_jax.cli import arguments, train_flags
from hipgpt_jax.runs import directory

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.flags"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without ``checkpoints/``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_shipped_run_is_whole_small_and_good(elsewhere: Path) -> None:
    checkpoint = directory.read_checkpoint("shakespeare")
    checkpoint.verify()
    assert checkpoint.directory == directory.SHIPPED / "shakespeare"
    assert sum(path.stat().st_size for path in checkpoint.directory.iterdir()) <= 8_000_000
    lines = [json.loads(line) for line in (checkpoint.directory / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_nats_per_byte" in line][-1]
    assert last["step"] == checkpoint.step
    assert last["validation_nats_per_byte"] <= 1.50


def test_a_run_of_the_same_name_comes_first_even_before_its_first_checkpoint(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "checkpoints/shakespeare").mkdir(parents=True)
    arguments = ("--prompt", "hi", "--run-name", "shakespeare")
    result = programs.call("generate", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert result.code == 1
    assert "has no whole checkpoint yet" in result.err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_flagfile_loads_and_is_headed_by_its_command_time_and_loss(path: Path) -> None:
    arguments.parse(train_flags.FLAGS, [f"--flagfile={path}"])
    train_flags.train_config()
    assert train_flags.FLAGS["run-name"].value == path.stem
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"./scripts/run_train.sh --flagfile=configs/{path.name}" in head
    assert "validation loss" in head
    assert any(words in head for words in ("minutes", "seconds"))


def test_the_shipped_run_was_trained_with_its_flagfile(elsewhere: Path) -> None:
    (path,) = [path for path in CONFIGS if path.stem == "shakespeare"]
    arguments.parse(train_flags.FLAGS, [f"--flagfile={path}"])
    wanted = train_flags.train_config()
    recorded = json.loads((directory.SHIPPED / "shakespeare/latest_config.json").read_text())["training"]
    assert recorded["min_lr"] == wanted.final_learning_rate
    assert all(recorded[key] == getattr(wanted, key) for key in recorded if key != "min_lr")
