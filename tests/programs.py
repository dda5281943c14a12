"""Runs the package's programs as a user does: in processes of their own, or quickly in this one."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compiled
import pytest

from hipgpt_jax.cli import doctor, evaluate, generate, inspect, plot, replay, train

CACHE = "JAX_COMPILATION_CACHE_DIR"
MAINS: dict[str, Callable[[], None]] = {
    "doctor": doctor.main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "inspect": inspect.main,
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
    """What a program left behind."""

    code: int
    out: str
    err: str


def command(name: str, *arguments: str) -> list[str]:
    """Returns the command line of a program in a process of its own."""
    return [sys.executable, "-m", f"hipgpt_jax.cli.{name}", *arguments]


def environment(cache: Path | None = None, platforms: str = "cpu") -> dict[str, str]:
    """Returns the environment of a program.

    Args:
        cache: The user's cache directory; without one, compiled programs are kept between test runs.
        platforms: The platforms among which JAX chooses; all for an empty string.
    """
    own = {CACHE: str(compiled.DIRECTORY)} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    return {**os.environ, "JAX_PLATFORMS": platforms, **own}


def spawn(name: str, *arguments: str, cwd: Path, cache: Path | None = None, platforms: str = "cpu") -> Result:
    """Runs a program in a process of its own, with ``environment(cache, platforms)``."""
    env = environment(cache, platforms)
    done = subprocess.run(command(name, *arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


def call(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Result:
    """Runs a program in this process; what it compiles is kept between test runs."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name not in ("doctor", "inspect", "plot"):
        monkeypatch.setenv(CACHE, str(compiled.DIRECTORY))
    code = 0
    try:
        MAINS[name]()
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)
