"""Soak test: kills training or generation at random times, resumes it, and compares it with an uninterrupted run.

``python scripts/soak.py training`` starts two trainers of the same run each time, one of which must be refused. The
exit code is 0 if after every kill the latest checkpoint and a training state are intact, and if the resumed run ends
with the weights and metrics of the uninterrupted one. ``python scripts/soak.py generation`` exits with 0 if the resumed
record file has the same samples as the uninterrupted one, each exactly once. ``python scripts/soak.py hosts`` trains in
several processes, kills one of them at a random moment and resumes on another number of processes and another mesh. It
exits with 0 if the other processes end with one line, the checkpoints are intact after every kill, and the run
completes with the last loss of one process within rounding.
"""

import argparse
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hipgpt_jax.runs import directory, states

_FLAGS = shlex.split(
    "--data-path text.txt --vocab-size 300 --dim 32 --heads 2 --ff 64 --layers 2 --seq 32 --steps 4000 --ckpt-every 7 "
    "--eval-every 50 --log-every 5 --dropout 0.1 --eval-batches 2 --keep-last 3 --device cpu"
)
_TEXT = "the king and his fool went up to see what a queen would say of all that they had lost"
_CLOCK = ("milliseconds", "tokens_per_second")
_HOSTS_FLAGS = [*_FLAGS, *shlex.split("--batch 8 --steps 600 --ckpt-every 40 --dropout 0 --eval-every 0")]
# Per number of processes, of two devices each, the meshes to choose from.
_MESHES = {1: ("data=2", "model=2"), 2: ("data=4", "fsdp=2,model=2"), 4: ("data=8", "data=2,fsdp=4")}
_HOSTS_TOLERANCE = 0.02  # nats per token at the last step; rounding grows to more in between
_START_SECONDS = 10  # upper limit for refusing a second trainer, on a busy machine too


def main(subject: str, kills: int, seed: int) -> None:
    """Runs the soak test of training or generation in a temporary directory and exits."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        sys.exit(not {"training": _training, "generation": _generation, "hosts": _hosts}[subject](kills, rng))


def _training(kills: int, rng: random.Random) -> bool:
    """Returns whether the killed run ended like the uninterrupted one."""
    _write_text(rng)
    subprocess.run(_command("whole"), check=True, stdout=subprocess.DEVNULL)
    intact = 0
    for kill in range(kills):
        _kill_both(kill, rng.uniform(1, 14))
        if (directory.CHECKPOINTS / "killed" / directory.LATEST_CONFIG).exists():
            directory.read_checkpoint("killed").verify()
            states.find_intact(directory.CHECKPOINTS / "killed")
            intact += 1
    subprocess.run(_command("killed", resume=_is_started()), check=True, stdout=subprocess.DEVNULL)
    same = _result("killed") == _result("whole")
    print(f"{kills} kills, {intact} left an intact checkpoint; the results {'are equal' if same else 'DIFFER'}")
    return same


def _hosts(kills: int, rng: random.Random) -> bool:
    """Returns whether a run that lost a process ``kills`` times completed with the losses of one process."""
    _write_text(rng)
    _complete(_start_job("whole", 1, "data=2"))
    expected, slowest, intact, number = _losses("whole"), 0.0, 0, 1
    for kill in range(kills):
        number = rng.choice([other for other in _MESHES if other > 1 and other != number])
        job = _start_job("killed", number, rng.choice(_MESHES[number]))
        before = max(_losses("killed"), default=0)
        # Once it trains, and early enough that it never completes before the last kill.
        target = before + rng.randrange(1, (max(expected) - before) // (kills - kill))
        while max(_losses("killed"), default=0) < target and all(process.poll() is None for process in job):
            time.sleep(0.05)
        rng.choice(job).kill()
        killed = time.monotonic()
        errors = _wait(job)
        slowest = max(slowest, time.monotonic() - killed)
        if sum(error.count("another process of the job ended") == 1 for error in errors) != number - 1:
            sys.exit(f"soak: error: not every process ended with one line after kill {kill}: {errors}")
        if (directory.CHECKPOINTS / "killed" / directory.LATEST_CONFIG).exists():
            directory.read_checkpoint("killed").verify()
            states.find_intact(directory.CHECKPOINTS / "killed")
            intact += 1
    _complete(_start_job("killed", 1, "model=2"))
    found = _losses("killed")
    last = max(expected)
    if found.keys() != expected.keys():
        print(f"the run has other steps than in one process: its last is {max(found, default=0)}, not {last}")
        return False
    largest = max(abs(found[step] - expected[step]) for step in expected)
    print(
        f"{kills} kills, {intact} left an intact checkpoint; the other processes ended within {slowest:.1f} s; loss at "
        f"step {last}: {found[last]:.4f}, in one process {expected[last]:.4f}; largest difference {largest:.2g}"
    )
    return abs(found[last] - expected[last]) < _HOSTS_TOLERANCE


def _generation(kills: int, rng: random.Random) -> bool:
    """Returns whether the killed record file has the records of the uninterrupted one, ignoring times."""
    flags = "--run-name shakespeare --prompts_file prompts.txt --num_samples 40 --num_tokens 60 --batch_size 4"
    command = [sys.executable, "-m", "hipgpt_jax.cli.generate", *flags.split(), "--device", "cpu", "--output"]
    Path("prompts.txt").write_text("".join(f"{word}:\n" for word in sorted(set(_TEXT.split()))))
    subprocess.run([*command, "whole.jsonl"], check=True, stderr=subprocess.DEVNULL)
    line_counts = []
    for target in sorted(rng.sample(range(1, len(_samples(Path("whole.jsonl")))), kills)):
        process = subprocess.Popen([*command, "killed.jsonl"], stderr=subprocess.DEVNULL)
        while process.poll() is None and _count_lines(Path("killed.jsonl")) < target:
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.wait()
        lines = Path("killed.jsonl").read_bytes().splitlines(keepends=True) if Path("killed.jsonl").exists() else []
        line_counts.append(len(lines))
        list(map(json.loads, lines[:-1]))  # only the last line may be truncated
    subprocess.run([*command, "killed.jsonl"], check=True, stderr=subprocess.DEVNULL)
    found, expected = (_samples(Path(name)) for name in ("killed.jsonl", "whole.jsonl"))
    same, interrupted = sorted(found) == sorted(expected), sum(0 < count < len(expected) for count in line_counts)
    print(f"{kills} kills, {interrupted} of them within the records; the results {'are equal' if same else 'DIFFER'}")
    return same and interrupted > 0


def _write_text(rng: random.Random) -> None:
    words = _TEXT.split()
    Path("text.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(900)))


def _start_job(run: str, number: int, mesh: str) -> list["subprocess.Popen[str]"]:
    """Starts the processes of a job, which train a run or resume it, with two CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    resuming = ["--resume"] if (directory.CHECKPOINTS / run / directory.SETTINGS_NAME).is_file() else []
    command = [sys.executable, "-m", "hipgpt_jax.cli.train", *_HOSTS_FLAGS, "--run-name", run, *resuming]
    command += ["--mesh", mesh, "--coordinator", address, "--num_processes", str(number), "--process_id"]
    return [
        subprocess.Popen(
            [*command, str(process)],
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(number)
    ]


def _wait(job: list["subprocess.Popen[str]"]) -> list[str]:
    """Waits for the processes of a job and returns what they wrote to stderr."""
    return [process.communicate()[1] for process in job]


def _complete(job: list["subprocess.Popen[str]"]) -> None:
    """Waits for a job; exits if a process failed."""
    errors = _wait(job)
    if any(process.returncode for process in job):
        sys.exit(f"soak: error: a job that was not killed failed: {errors}")


def _losses(run: str) -> dict[int, float]:
    """Returns the training loss of each logged step; the last line of a running job may be cut short."""
    path = directory.CHECKPOINTS / run / directory.METRICS_NAME
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _samples(path: Path) -> list[str]:
    """Returns the records of a file without the fields that differ between commands."""
    values = map(json.loads, path.read_text().splitlines())
    volatile = ("timings", "started", "argv")
    return [json.dumps({name: field for name, field in value.items() if name not in volatile}) for value in values]


def _kill_both(number: int, seconds: float) -> None:
    """Starts two trainers of the run and kills them after ``seconds``; exits if both or neither trained."""
    command = _command("killed", resume=_is_started())
    pair = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(seconds)
    codes = [process.poll() for process in pair]
    for process in pair:
        process.kill()
    errors = [process.communicate()[1] for process in pair]
    refused = ["is being trained by" in error for error in errors]
    if all(refused) or any(code not in (None, 0) and not refusal for code, refusal in zip(codes, refused, strict=True)):
        sys.exit(f"soak: error: the run did not resume after kill {number}: exit codes {codes}, {errors}")
    if codes == [None, None] and seconds > _START_SECONDS:
        sys.exit(
            f"soak: error: neither of two concurrent trainers was refused within {seconds:.1f} s, before kill {number}"
        )


def _is_started() -> bool:
    return (directory.CHECKPOINTS / "killed" / directory.SETTINGS_NAME).is_file()


def _command(run: str, *, resume: bool = False) -> list[str]:
    resuming = ["--resume"] if resume else []
    return [sys.executable, "-m", "hipgpt_jax.cli.train", *_FLAGS, "--run-name", run, *resuming]


def _result(run: str) -> tuple[bytes, list[dict[str, float]]]:
    """Returns the final weights, and the metrics without their times."""
    folder = directory.CHECKPOINTS / run
    lines = map(json.loads, (folder / directory.METRICS_NAME).read_text().splitlines())
    metrics = [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines]
    return (folder / directory.LATEST_CHECKPOINT).read_bytes(), metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("training", "generation", "hosts"))
    parser.add_argument("--kills", type=int, default=20, help="number of kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (%(default)s)")
    options = parser.parse_args()
    main(options.subject, options.kills, options.seed)
