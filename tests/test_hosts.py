"""Several processes over loopback, as on several hosts: equal losses, restarts, and the end of a job that lost one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import programs
import pytest

from hipgpt_jax import processes
from hipgpt_jax.runs import directory, states
from hipgpt_jax.text import dataset

TINY = (
    *("--data-path", "text.txt", "--vocab-size", "300", "--warmup-steps", "2", "--ckpt-every", "10"),
    *("--dim", "16", "--heads", "2", "--ff", "32", "--layers", "1", "--seq", "16", "--log-every", "1", "--batch", "8"),
    *("--device", "cpu"),
)
SHORT = (*TINY, "--steps", "20")
LONG = (*TINY, "--steps", "100000", "--ckpt-every", "50", "--keep-last", "2")


class Job:
    """Processes of ``hipgpt-train`` that were started at once, with two CPU devices each."""

    def __init__(self, work: Path, *each: Sequence[str], command: Callable[..., list[str]] = programs.command) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.started = [
            subprocess.Popen(
                command(
                    "train",
                    *(*flags, "--coordinator", address),
                    *("--num_processes", str(len(each)), "--process_id", str(number)),
                ),
                cwd=work,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, flags in enumerate(each)
        ]

    def end(self) -> list[programs.Result]:
        """Waits for all processes."""
        try:
            outputs = [process.communicate(timeout=900) for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        return [
            programs.Result(process.returncode, *output) for process, output in zip(self.started, outputs, strict=True)
        ]

    def wait_for_step(self, run: Path, step: int) -> None:
        """Waits until a step is logged."""
        until = time.monotonic() + 600
        while not (run / "metrics.jsonl").exists() or max(losses_of(run), default=0) < step:
            assert all(process.poll() is None for process in self.started), self.end()
            assert time.monotonic() < until
            time.sleep(0.05)


def environment() -> dict[str, str]:
    return {**programs.environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def losses_of(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def errors_of(result: programs.Result) -> list[str]:
    """Returns the lines of stderr, except notes before the end and gloo's."""
    return [line for line in result.err.splitlines() if not re.match(r"\[Gloo\]|set jax_|run \w+ on|the compile", line)]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(programs.TEXT)
    return tmp_path


@pytest.mark.slow
def test_several_processes_train_as_one(work: Path) -> None:
    one = programs.spawn("train", *SHORT, "--run-name", "one", cwd=work)
    assert one.code == 0, one.err
    expected = losses_of(work / "checkpoints/one")
    for number, shape in ((4, "data=8"), (4, "data=2,fsdp=4"), (4, "fsdp=4,model=2")):
        name = f"{number}-{shape}"
        ended = Job(work, *[(*SHORT, "--run-name", name, "--mesh", shape)] * number).end()
        assert [result.code for result in ended] == [0] * number, ended
        found = states.verify_states(work / "checkpoints" / name)
        assert [(state.step, state.fault) for state in found] == [(10, None), (20, None)]
        first, *others = (result.out for result in ended)
        assert all(line.startswith("[Step ") for line in first.splitlines()), "gloo's lines are not text"
        assert first.count("Loss") == 20
        assert not any(others), "only the first process prints"
        losses = losses_of(work / "checkpoints" / name)
        assert losses.keys() == expected.keys()
        np.testing.assert_allclose([*losses.values()], [*expected.values()], atol=1e-5)


@pytest.mark.slow
def test_run_restarts_on_other_numbers_of_processes(work: Path) -> None:
    """SIGTERM in one process stops all after the same step, and 4, 2, 1 and 4 processes continue one run."""
    flags = (*TINY, "--steps", "300", "--ckpt-every", "100")
    one = programs.spawn("train", *flags, "--run-name", "one", cwd=work)
    assert one.code == 0, one.err
    run, reached = work / "checkpoints/many", [0]
    for number, shape in ((4, "data=2,fsdp=4"), (2, "data=4"), (1, "model=2"), (4, "fsdp=4,model=2")):
        more = ("--run-name", "many", "--mesh", shape, *(["--resume"] if reached[-1] else []))
        job = Job(work, *[(*flags, *more)] * number)
        if len(reached) < 4:
            job.wait_for_step(run, reached[-1] + 10)
            job.started[-1].send_signal(signal.SIGTERM)
        ended = job.end()
        assert [result.code for result in ended] == [0] * number, ended
        reached.append(max(losses_of(run)))
    assert reached == sorted(set(reached))
    assert reached[3] < reached[4] == 300
    expected, found = losses_of(work / "checkpoints/one"), losses_of(run)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([*found.values()], [*expected.values()], atol=1e-3)
    np.testing.assert_allclose([*found.values()][:20], [*expected.values()][:20], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim", "seconds"), [(4, 2, processes.HEARTBEAT_SECONDS + 30), (2, 0, 50)])
def test_killed_process_ends_the_others_with_one_line(work: Path, number: int, victim: int, seconds: float) -> None:
    flags = (*LONG, "--run-name", "killed")
    job = Job(work, *[flags] * number)
    run = work / "checkpoints/killed"
    job.wait_for_step(run, 60)
    job.started[victim].kill()
    killed = time.monotonic()
    ended = job.end()
    assert time.monotonic() - killed < seconds
    for index, result in enumerate(ended):
        if index == victim:
            continue
        assert result.code == 1
        assert len(errors_of(result)) == 1, result.err
        assert errors_of(result)[0].startswith("train: error: ")
        assert "another process of the job ended or did not answer" in errors_of(result)[0]
    assert [state.fault for state in states.verify_states(run) if state.fault] == []
    reached = directory.read_checkpoint("killed", directory=run)
    reached.verify()
    assert reached.step >= 50
    job = Job(work, *[(*flags, "--resume")] * (number // 2))
    job.wait_for_step(run, reached.step + 60)
    job.started[0].send_signal(signal.SIGTERM)
    assert [result.code for result in job.end()] == [0] * (number // 2)


@pytest.mark.slow
def test_failed_process_ends_the_others(work: Path) -> None:
    """Process 0 alone writes files, so it alone fails; JAX would let it wait for the others for five minutes."""
    job = Job(work, *[(*LONG, "--run-name", "moved")] * 2)
    job.wait_for_step(work / "checkpoints/moved", 20)
    (work / "checkpoints/moved").rename(work / "elsewhere")
    failed = time.monotonic()
    ended = job.end()
    assert time.monotonic() - failed < processes.SHUTDOWN_SECONDS + 30
    assert [result.code for result in ended] == [1, 1]
    assert [len(errors_of(result)) for result in ended] == [1, 1], ended
    assert "checkpoints/moved was moved, renamed or deleted" in ended[0].err
    assert "because another process of the job ended" in ended[1].err


@pytest.mark.slow
def test_processes_with_invalid_flags_fail_alike(work: Path) -> None:
    flags = (*SHORT, "--run-name", "two")
    for each, message in (
        ((flags, (*flags, "--lr", "0.5")), "the flags of processes 0 and 1 differ: lr 0.001 and 0.5"),
        ([(*flags, "--mesh", "data=2")] * 2, "the mesh of 2 processes must use all their 4 devices: got data=2,"),
        ([(*flags, "--mesh", "data=8")] * 2, "mesh data=8 needs 8 devices: JAX has 4"),
        ([(*flags, "--batch", "6")] * 2, "the mesh of 2 processes must use all their 4 devices: got data=2,"),
    ):
        ended = Job(work, *each).end()
        assert [result.code for result in ended] == [1, 1]
        assert all(message in result.err for result in ended), ended
        assert [len(errors_of(result)) for result in ended] == [1, 1], ended
        assert not (work / "checkpoints").exists()


PATIENT = "import hipgpt_jax.cli.train as t; t.processes.CONNECT_SECONDS = 3; t.main()"


@pytest.mark.slow
@pytest.mark.parametrize("process_id", [0, 1])
def test_processes_that_do_not_connect_fail(work: Path, process_id: int) -> None:
    flags = f"--run-name a --coordinator 127.0.0.1:9 --num_processes 2 --process_id {process_id}".split()
    words = [sys.executable, "-c", PATIENT, *TINY, *flags]
    done = subprocess.run(words, cwd=work, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    (line,) = errors_of(programs.Result(done.returncode, done.stdout, done.stderr))
    assert "the processes of the job did not all connect within 3 s: process 0 must be reachable at 127.0.0.1:9" in line


# Records the positions of the training split and the windows of the validation split that a process reads.
RECORDING = """
import atexit, json, os, sys
import hipgpt_jax.cli.train as train
import numpy as np
from hipgpt_jax.text import dataset

class Recorded(np.memmap):
    def __getitem__(self, key):
        if isinstance(key, np.ndarray):
            rows.extend(key[:, 0].tolist())
        elif isinstance(key, slice) and None not in (key.start, key.stop):
            starts.append(int(key.start))
        return super().__getitem__(key)

starts, rows, verified = [], [], []
dataset.np.memmap = Recorded
verify = dataset._verify
dataset._verify = lambda *given: [verified.append(1), verify(*given)]
report = lambda: open(f"read{sys.argv[-1]}.json", "w").write(json.dumps([starts, rows, len(verified)]))
atexit.register(report)
train.main()
"""


@pytest.mark.slow
def test_process_reads_only_its_rows(work: Path) -> None:
    flags = (*SHORT, "--run-name", "read", "--mesh", "data=8", "--eval-batches", "1", "--ckpt-every", "0")
    job = Job(work, *[flags] * 4, command=lambda name, *words: [sys.executable, "-c", RECORDING, *words])
    ended = job.end()
    assert [result.code for result in ended] == [0] * 4, ended
    data = dataset.Dataset(work / "checkpoints/read")
    words = [np.random.Philox(key=[0, step]).random_raw(8) % (len(data.train) - 16) for step in range(20)]
    for number in range(4):
        starts, rows, verified = json.loads((work / f"read{number}.json").read_text())
        assert starts == [int(start) for step in words for start in step[2 * number : 2 * number + 2]]
        assert sorted(rows) == sorted(16 * row + shift for row in (2 * number, 2 * number + 1) for shift in (0, 1))
        assert verified == (number == 0), "process 0 alone reads the whole file"


# Starts the tasks of a step with the variables that Slurm sets and JAX reads.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]]
shift
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait $pid || code=1; done
exit ${code:-0}
"""


@pytest.mark.slow
def test_slurm_script_trains_and_resumes(work: Path) -> None:
    tools = work / "tools"
    tools.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("hipgpt-train", f'#!/bin/sh\nexec {sys.executable} -m hipgpt_jax.cli.train "$@"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = Path(__file__).parents[1] / "docs" / "examples" / "slurm" / "train.sbatch"
    own = {"RUN": "jobs", "SLURM_STEP_NODELIST": "localhost", "PATH": f"{tools}:{os.environ['PATH']}"}
    for tasks, mesh, steps in (("2", "data=4", ("--steps", "20")), ("1", "fsdp=2", ("--extend", "--steps", "24"))):
        # The port follows from the number of the job.
        env = {**environment(), **own, "SLURM_JOB_ID": str(os.getpid() + int(tasks)), "SLURM_NTASKS": tasks}
        words = ["bash", str(script), *TINY, *steps, "--mesh", mesh]
        done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert max(losses_of(work / "checkpoints/jobs")) == int(steps[-1])


def test_failed_exchange_is_reported_as_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.distributed.initialize", lambda *given, **more: None)
    monkeypatch.setattr(processes, "_exit_on_abort", lambda *given: None)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    for error, message in (
        (
            RuntimeError("UNKNOWN: Gloo AllGather failed: closed"),
            r"^another process of the job ended .* AllGather failed",
        ),
        (ValueError("--lr is wrong"), "^--lr is wrong$"),
    ):
        joined = processes.joined("a:1", 2, 0, device="cpu", log=print, report=print)
        with pytest.raises((RuntimeError, ValueError), match=message), joined:
            raise error
