"""Test helpers: run the command-line programs in a subprocess or, faster, in this process."""

import dataclasses
import json
import keyword
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compiled
import pytest
import safetensors.numpy

from hipgpt_jax import files
from hipgpt_jax.cli import doctor, evaluate, export, generate, import_, inspect, plot, records, replay, train

# The model sizes of the committed run, so the programs of all runs named ``tiny`` are compiled once.
TINY_SIZES = "--vocab-size 300 --dim 24 --heads 2 --ff 48 --layers 2 --seq 32"
TINY = Path(__file__).parent / "data" / "tiny"
CACHE = "JAX_COMPILATION_CACHE_DIR"
MAINS: dict[str, Callable[[], None]] = {
    "doctor": doctor.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "generate": generate.main,
    "import": import_.main,
    "inspect": inspect.main,
    "records": records.main,
    "plot": plot.main,
    "replay": replay.main,
    "train": train.main,
}

_LINES = ("the king and his fool went up to see", "what a queen would say of all that they had lost in war")
WORDS = " ".join(_LINES).split(" ")
TEXT = "".join(
    f"{WORDS[i * 7 % 21].upper()}:\n{' '.join(WORDS[(i * j + j) % 21] for j in range(3, 17))},\nmy lord {i}.\n\n"
    for i in range(600)
)


@dataclasses.dataclass(frozen=True)
class Result:
    """Exit status, stdout and stderr of a program."""

    code: int
    out: str
    err: str


def command(name: str, *arguments: str) -> list[str]:
    """Returns the command line that runs a program in a subprocess."""
    module = f"{name}_" if keyword.iskeyword(name) else name
    return [sys.executable, "-m", f"hipgpt_jax.cli.{module}", *arguments]


def environment(cache: Path | None = None, platforms: str = "cpu") -> dict[str, str]:
    """Returns the environment of a program.

    Args:
        cache: The user's cache directory; by default, compiled programs are cached between test runs.
        platforms: The platforms JAX may use; all for an empty string.
    """
    own = {CACHE: str(compiled.DIRECTORY)} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    return {**os.environ, "JAX_PLATFORMS": platforms, **own}


def spawn(name: str, *arguments: str, cwd: Path, cache: Path | None = None, platforms: str = "cpu") -> Result:
    """Runs a program in a subprocess with ``environment(cache, platforms)``."""
    env = environment(cache, platforms)
    done = subprocess.run(command(name, *arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


def call(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Result:
    """Runs a program in this process; compiled programs are cached between test runs."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name not in ("doctor", "export", "import", "inspect", "plot", "records"):
        monkeypatch.setenv(CACHE, str(compiled.DIRECTORY))
    code = 0
    try:
        MAINS[name]()
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def copy_tiny(directory: Path, name: str = "tiny", step: int = 600, scale: float = 1.0) -> None:
    """Copies the committed run ``tiny`` to a run directory, or adds a step to one.

    Args:
        directory: The run's directory, which may exist; the new step becomes its latest.
        name: The run's name.
        step: The number of the step.
        scale: A factor applied to all weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY / "tokenizer.json", directory)
    weights = directory / f"{name}_step{step}.bin"
    tensors = safetensors.numpy.load_file(TINY / "tiny_step600.bin")
    safetensors.numpy.save_file({path: scale * value for path, value in tensors.items()}, weights)
    config = json.loads((TINY / "tiny_step600_config.json").read_text())
    config["checkpoint"] |= {"latest": weights.name, "step": step, "sha256": files.sha256(weights)}
    path = directory / f"{name}_step{step}_config.json"
    path.write_text(json.dumps(config))
    (directory / "latest_config.json").unlink(missing_ok=True)
    (directory / "latest_config.json").symlink_to(path.name)
