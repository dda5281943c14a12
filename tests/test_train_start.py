"""Start of ``hipgpt-train``: errors before anything is changed, stopping and resuming."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import fakes
import jax
import programs
import pytest

from hipgpt_jax.cli import arguments, train_flags, train_start
from hipgpt_jax.runs import lock, states

TINY = (
    *("--data-path", "text.txt", "--vocab-size", "256", "--warmup-steps", "2"),
    *("--dim", "16", "--heads", "2", "--ff", "32", "--layers", "1", "--seq", "16", "--mesh", "data=1"),
)
Run = Callable[..., programs.Result]


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Optax 0.2.8 itself promotes a Python float with an integer count; our own code is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a text and a run ``mine``, whose training states are no real ones."""
    run = fakes.make_run(tmp_path / "checkpoints", "mine", steps=(2, 4))
    for at in (2, 4):
        fakes.make_state(run, at)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``hipgpt-train`` in this process."""
    return lambda *arguments: programs.call("train", *TINY, *arguments, monkeypatch=monkeypatch, capsys=capsys)


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def damage(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ("--run-name", "mine"), "run 'mine' exists already: --resume continues it, --reset replaces it"),
        (None, ("--reset", "--sample-every", "1", "--sample-prompt", ""), "--sample-prompt must be a text of at least"),
        (None, ("--reset", "--sample-prompt", "the"), "--sample-prompt needs --sample-every"),
        (None, ("--reset", "--text-field", "body"), "--text-field names a field of .jsonl.* --data-path has none"),
        (None, ("--reset", "--data-path", "checkpoints/mine/metrics.jsonl"), "lies in the directory of the run"),
        (None, ("--reset", "--tokenizer-path", "checkpoints/mine/tokenizer.json"), "lies in the directory of the run"),
        (None, ("--reset", "--data-path", "checkpoints/mine"), "lies in the directory of the run"),
        (None, ("--run-name", "n" * 240), "run name of 240 bytes is too long"),
        (None, ("--run-name", "r\udcff"), "run name must be a plain name in Unicode"),
        (None, ("--run-name", "r\x9b"), "run name must be a plain name in Unicode"),
        (lambda run: shutil.rmtree(run / "train_state"), ("--resume",), "has weights of step 4 but no training state"),
        (lambda run: damage(run / "train_state/2/sha256.json") or damage(run / "train_state/4/default/d/5c1e"),
         ("--resume",), "cannot be resumed: the training state of step 4 is damaged"),
        (lambda run: (run / "thesis.txt").touch(), ("--reset",), "that no run writes, such as thesis.txt"),
        (lambda run: (run / "train_state/2/thesis.txt").touch(), ("--reset",), "such as train_state/2/thesis.txt"),
        (lambda run: (run.parent / ".mine.old").touch(), ("--reset",), r"\.mine\.old exists"),
        (lambda run: (run / "best_config.json").mkdir(), ("--resume",), "best_config.json is not a file"),
    ],
)  # fmt: skip
def test_an_error_is_found_before_anything_changes(
    run: Run, work: Path, prepare: Callable[[Path], object] | None, arguments: tuple[str, ...], message: str
) -> None:
    if prepare:
        prepare(work / "checkpoints/mine")
    (work / "checkpoints/mine/metrics.jsonl").touch()
    before = tree(work)
    result = run("--run-name", "mine", *arguments)
    assert (result.code, result.out) == (1, "")
    (line,) = (line for line in result.err.splitlines() if line.startswith("train: error: "))
    assert result.err.splitlines()[-1] == line
    assert re.search(message, line), line
    assert tree(work) == before


def test_a_run_that_is_being_trained_is_left_alone(run: Run, work: Path) -> None:
    before = tree(work)
    with lock.Lock(Path("checkpoints/mine")):
        for more in ((), ("--resume",), ("--reset",)):
            line = run("--run-name", "mine", *more).err.splitlines()[-1]
            assert line.startswith(f"train: error: run 'mine' is being trained by process {os.getpid()}: ")
    assert tree(work) == before


def test_runs_without_a_name_get_different_ones(work: Path) -> None:
    arguments.parse(train_flags.FLAGS, [])
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(train_start._lock())[0].name for _ in range(3)]
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", ["reset", "resume", "a b", "--x", "it's", "$HOME", "näme", "=", "--reset=true"])
def test_the_command_to_resume_has_the_given_flags(name: str) -> None:
    given = [
        "--run-name",
        name,
        "--reset=true",
        "--data_path=a b.txt",
        "--data-path",
        "c",
        "--noremat",
        "--lr",
        "1e-05",
    ]
    arguments.parse(train_flags.FLAGS, [*given, "--tensorboard", "--sample-prompt", "the king"])
    expected = {flag: train_flags.FLAGS[flag].value for flag in train_flags.FLAGS} | {"reset": False, "resume": True}
    words = shlex.split(train_flags.resume_command(name))
    assert words[0] == "hipgpt-train"
    arguments.parse(train_flags.FLAGS, words[1:])
    assert {flag: train_flags.FLAGS[flag].value for flag in train_flags.FLAGS} == expected


def test_the_command_to_resume_is_one_line_of_shell() -> None:
    arguments.parse(train_flags.FLAGS, ["--sample-prompt", "a\n'\\é\x1b", "--run-name", "r"])
    command = train_flags.resume_command("r")
    assert command == r"hipgpt-train --run-name r --sample-prompt $'a\n\'\\é\u001b' --resume"


def test_a_damaged_state_falls_back_to_the_older_one_and_to_the_same_bits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a bit flipped in the largest file of the newest state, after the directory was renamed."""
    shutil.copy(trained / "text.txt", tmp_path)
    path = Path(shutil.copytree(trained / "checkpoints/tiny", tmp_path / "checkpoints/moved", symlinks=True))
    monkeypatch.chdir(tmp_path)
    whole = (path / "tiny_step40.bin").read_bytes()
    largest = max(states.path_of(path, 40).rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    (path / ".tiny_step33.bin.99.tmp").touch()
    flags = "--data-path text.txt --run-name moved --steps 40 --ckpt-every 20 --log-every 10 --lr 1e-2"
    before = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    arguments = (*flags.split(), *programs.TINY_SIZES.split(), "--warmup-steps", "5", "--mesh", "data=1", "--resume")
    result = programs.call("train", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert result.code == 0, result.err
    assert f"the training state of step 40 is damaged ({largest.relative_to(tmp_path)} was changed)" in result.err
    assert (path / "moved_step40.bin").read_bytes() == whole
    assert not (path / "tiny_step40.bin").exists()
    after = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "validation_loss")
    assert [{k: line.get(k) for k in kept} for line in after] == [{k: line.get(k) for k in kept} for line in before]
    assert [state.fault for state in states.verify_states(path)] == [None, None]
    assert not list(path.rglob("*.damaged")) + list(path.rglob(".*.tmp"))


def test_a_reset_that_cannot_train_leaves_the_old_run(run: Run, work: Path) -> None:
    before = tree(work / "checkpoints/mine")
    flags = ("--run-name", "mine", "--reset", "--vocab-size", "300", "--log-every", "1")
    result = run(*flags, "--steps", "9", "--lr", "1e38", "--clip", "1e38")
    assert result.code == 1
    assert "run 'mine' is again what it was before --reset" in result.err
    assert tree(work / "checkpoints/mine") == before
    result = run(*flags, "--steps", "2", "--seed", "5")
    assert result.code == 0, result.err
    assert sorted(os.listdir(work / "checkpoints")) == ["mine"]
    assert not (work / "checkpoints/mine/mine_step4.bin").exists()


@pytest.mark.slow
def test_a_hangup_saves_the_run_and_a_closed_pipe_does_not_end_it(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from hipgpt_jax.training import metrics

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, as it should be
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    append = metrics.append

    def hang_up(path: Path, line: dict[str, float]) -> None:
        append(path, line)
        if line["step"] == 3:
            signal.raise_signal(signal.SIGHUP)

    # The training program is that of test_train_cli, which is slow to compile.
    flags = ("--run-name", "long", "--vocab-size", "300", "--steps", "12", "--dropout", "0.1", "--log-every", "1")
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "append", hang_up)
        result = run(*flags)
    assert (result.code, "stopped and saved at step 3; to resume: hipgpt-train " in result.err) == (0, True)
    assert states.find_intact(work / "checkpoints/long") == (3, [])
    reader, writer = os.pipe()
    os.close(reader)
    command = programs.command("train", *TINY, *flags, "--resume")
    done = subprocess.run(command, env=programs.environment(), stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert done.returncode == 0
    assert b"stdout: Broken pipe: continuing without it\n" in done.stderr
    assert states.find_intact(work / "checkpoints/long") == (12, [])
