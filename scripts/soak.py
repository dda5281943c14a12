"""Kills training or generation at random moments, resumes it each time, and compares it with an uninterrupted one.

``python scripts/soak.py training`` starts two trainers of one run at once each time, one of which must be refused. It
ends with exit code 0 if after every kill ``latest`` names whole files whose training state is intact, and the killed
run ends with the weights and the metrics of the other. ``python scripts/soak.py generation`` does if the killed record
file ends with the samples of the other, each once and whole.
"""

import argparse
import json
import os
import random
import shlex
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
_START_SECONDS = 10  # within which a second trainer is refused, on a busy machine too


def main(subject: str, kills: int, seed: int) -> None:
    """Runs the soak of a subject in a temporary directory."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        sys.exit(not {"training": _training, "generation": _generation}[subject](kills, draw))


def _training(kills: int, draw: random.Random) -> bool:
    """Returns whether the killed run ended as the whole one did."""
    words = _TEXT.split()
    Path("text.txt").write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(900)))
    subprocess.run(_command("whole"), check=True, stdout=subprocess.DEVNULL)
    opened = 0
    for kill in range(kills):
        _kill_both(kill, draw.uniform(1, 14))
        if (directory.CHECKPOINTS / "killed" / directory.LATEST_CONFIG).exists():
            directory.read_checkpoint("killed").verify()
            states.find_intact(directory.CHECKPOINTS / "killed")
            opened += 1
    subprocess.run(_command("killed", begun=_is_begun()), check=True, stdout=subprocess.DEVNULL)
    same = _result("killed") == _result("whole")
    print(f"{kills} kills, {opened} left a checkpoint that opens; the end is {'the same' if same else 'ANOTHER'}")
    return same


def _generation(kills: int, draw: random.Random) -> bool:
    """Returns whether the killed record file holds what the whole one does, line for line but for the clock."""
    flags = "--run-name shakespeare --prompts_file prompts.txt --num_samples 40 --num_tokens 60 --batch_size 4"
    command = [sys.executable, "-m", "hipgpt_jax.cli.generate", *flags.split(), "--device", "cpu", "--output"]
    Path("prompts.txt").write_text("".join(f"{word}:\n" for word in sorted(set(_TEXT.split()))))
    subprocess.run([*command, "whole.jsonl"], check=True, stderr=subprocess.DEVNULL)
    left = []
    for target in sorted(draw.sample(range(1, len(_samples(Path("whole.jsonl")))), kills)):
        process = subprocess.Popen([*command, "killed.jsonl"], stderr=subprocess.DEVNULL)
        while process.poll() is None and _count_lines(Path("killed.jsonl")) < target:
            time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.wait()
        lines = Path("killed.jsonl").read_bytes().splitlines(keepends=True) if Path("killed.jsonl").exists() else []
        left.append(len(lines))
        list(map(json.loads, lines[:-1]))  # at most the last line is torn
    subprocess.run([*command, "killed.jsonl"], check=True, stderr=subprocess.DEVNULL)
    found, expected = (_samples(Path(name)) for name in ("killed.jsonl", "whole.jsonl"))
    same, interrupted = sorted(found) == sorted(expected), sum(0 < number < len(expected) for number in left)
    print(f"{kills} kills, {interrupted} of them amid the records; the end is {'the same' if same else 'ANOTHER'}")
    return same and interrupted > 0


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _samples(path: Path) -> list[str]:
    """Returns the records of a file without what differs from one command to the next."""
    values = map(json.loads, path.read_text().splitlines())
    own = ("timings", "started", "argv")
    return [json.dumps({name: part for name, part in value.items() if name not in own}) for value in values]


def _kill_both(number: int, seconds: float) -> None:
    """Starts two trainers of the run at once, and kills them after some seconds; exits where both trained, or none."""
    command = _command("killed", begun=_is_begun())
    pair = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(seconds)
    codes = [process.poll() for process in pair]
    for process in pair:
        process.kill()
    errors = [process.communicate()[1] for process in pair]
    refused = ["is being trained by" in error for error in errors]
    if all(refused) or any(code not in (None, 0) and not was for code, was in zip(codes, refused, strict=True)):
        sys.exit(f"soak: error: the run did not go on after kill {number}: exit codes {codes}, {errors}")
    if codes == [None, None] and seconds > _START_SECONDS:
        sys.exit(f"soak: error: of two trainers at once none was refused in {seconds:.1f} s, before kill {number}")


def _is_begun() -> bool:
    return (directory.CHECKPOINTS / "killed" / directory.SETTINGS_NAME).is_file()


def _command(run: str, *, begun: bool = False) -> list[str]:
    more = ["--resume"] if begun else []
    return [sys.executable, "-m", "hipgpt_jax.cli.train", *_FLAGS, "--run-name", run, *more]


def _result(run: str) -> tuple[bytes, list[dict[str, float]]]:
    """The weights of the last step, and the metrics without what only the clock decides."""
    where = directory.CHECKPOINTS / run
    lines = map(json.loads, (where / directory.METRICS_NAME).read_text().splitlines())
    told = [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines]
    return (where / directory.LATEST_CHECKPOINT).read_bytes(), told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("training", "generation"))
    parser.add_argument("--kills", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    options = parser.parse_args()
    main(options.subject, options.kills, options.seed)
