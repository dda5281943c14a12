"""Measures ``hipgpt-generate`` with many samples: speed, size, peak memory, and the time to resume after ``kill -9``.

``python scripts/million.py --generated 100000 --finished 1000000`` generates 10^4 and 10^5 samples of 20 tokens in
processes of their own, and resumes files that hold a million samples already, of one prompt and of a million prompts.
Their lines are those of generated samples with other ids, indices and prompts, which is all that resuming looks at.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard

from hipgpt_jax import compression, json_files
from hipgpt_jax.records import record
from hipgpt_jax.text import prompts, tokenizer

_TINY = Path(__file__).parents[1] / "tests/data/tiny"
_COMMAND = [sys.executable, "-m", "hipgpt_jax.cli.generate", f"--run-name={_TINY}", "--num_tokens=20"]
_FLAGS = ["--batch_size=64", "--device=cpu"]
_LEFT = 640  # samples left to generate in a file of finished ones


def main(generated: int, finished: int) -> None:
    """Prints one line per measurement."""
    with tempfile.TemporaryDirectory(dir=".") as work:
        os.chdir(work)
        for name in ("one.jsonl", "many.jsonl.zst") if generated else ():
            for number in (generated // 10, generated):
                _generate(name, number)
            _resume_killed(name, generated)
        for name in ("one.jsonl", "one.jsonl.zst", "many.jsonl", "many.jsonl.zst") if finished else ():
            _resume_finished(name, finished)


def _command(name: str, number: int) -> list[str]:
    """Returns the command for samples of one prompt, or for one sample of each of many prompts."""
    if name.startswith("one"):
        Path("one.txt").write_text(_text(0) + "\n")
        return [*_COMMAND, *_FLAGS, "--prompts_file=one.txt", f"--num_samples={number}", f"--output={name}"]
    with Path("many.txt").open("w") as file:
        file.writelines(_text(index) + "\n" for index in range(number))
    return [*_COMMAND, *_FLAGS, "--prompts_file=many.txt", f"--output={name}"]


def _text(index: int) -> str:
    return f"the king {index}"


def _run(command: list[str], name: str, killed_at: int | None = None) -> tuple[float, float, int]:
    """Runs a command; returns the seconds to its first new record and in all, and its peak memory in bytes."""
    path, began, first = Path(name), time.perf_counter(), 0.0
    before = path.stat().st_size if path.exists() else 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            size = path.stat().st_size if path.exists() else 0
            first = first or (time.perf_counter() - began if size > before else 0.0)
            if killed_at is not None and size >= killed_at:
                process.kill()
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode != (0 if killed_at is None else -9):
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return first, time.perf_counter() - began, ended[2].ru_maxrss * 1024


def _generate(name: str, number: int) -> None:
    Path(name).unlink(missing_ok=True)
    first, total, peak = _run(_command(name, number), name)
    size = Path(name).stat().st_size / number
    rate = number / (total - first)
    line = f"{number} samples: first after {first:.1f} s, {rate:.0f}/s, {size:.0f} bytes each, {_mb(peak)}"
    print(f"{name}: {line}", flush=True)


def _resume_killed(name: str, number: int) -> None:
    """Kills a command at half of its file and resumes it; the file must end with each sample once."""
    size, command = Path(name).stat().st_size, _command(name, number)
    Path(name).unlink()
    _run(command, name, killed_at=size // 2)
    kept = sum(not line.is_torn for line in json_files.read_lines(Path(name)))
    first, total, peak = _run(command, name)
    samples = [(one["id"], one["sample"]) for one in map(json.loads, _lines(name))]
    assert len(samples) == len(set(samples)) == number
    print(
        f"{name}: killed at {kept} samples: first new after {first:.1f} s, all after {total:.1f} s, {_mb(peak)}",
        flush=True,
    )


def _resume_finished(name: str, number: int) -> None:
    """Resumes a file with a number of finished samples."""
    source = Path(name.replace(".", "-source.", 1))
    _run(_command(source.name, 1000), source.name)
    command = _command(name, number + _LEFT)
    size = _replicate(source, Path(name), number)
    first, total, peak = _run(command, name)
    assert sum(1 for _ in _lines(name)) == number + _LEFT
    print(
        f"{name}: {number} samples in {size / 1e6:.0f} MB of lines, {Path(name).stat().st_size / 1e6:.0f} MB on disk, "
        f"and {_LEFT} new ones: first new after {first:.1f} s, all after {total:.1f} s, {_mb(peak)}",
        flush=True,
    )
    source.unlink()
    Path(name).unlink()


def _replicate(source: Path, target: Path, number: int) -> int:
    """Writes the lines of a file again and again as samples of other indices or prompts; returns their size."""
    vocabulary = tokenizer.Tokenizer.load(_TINY / "tokenizer.json")
    tails = [line.partition(b',"prompt_dropped":')[2] for line in _lines(source.name)]
    of_one = next(record.read(source))
    total = 0
    with zstandard.open(target, "wb") if compression.is_zstandard(target) else target.open("wb") as file:
        for index in range(number):
            prompt = _text(index if target.name.startswith("many") else 0)
            sample = 0 if target.name.startswith("many") else index
            head = {"schema": 2, "contract": 2, "id": prompts.Prompt(text=prompt).digest, "sample": sample}
            head |= {"seed": of_one.seed, "prompt": prompt, "prompt_ids": vocabulary.encode(prompt)}
            begin = json.dumps(head, separators=(",", ":"))[:-1].encode()
            total += file.write(begin + b',"prompt_dropped":' + tails[index % len(tails)])
    return total


def _lines(name: str) -> Iterator[bytes]:
    return (line.text for line in json_files.read_lines(Path(name)))


def _mb(size: float) -> str:
    return f"peak {size / 1e6:.0f} MB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=int, default=100_000, help="samples to generate; 0 skips this")
    parser.add_argument("--finished", type=int, default=1_000_000, help="samples in resumed files; 0 skips this")
    arguments = parser.parse_args()
    main(arguments.generated, arguments.finished)
