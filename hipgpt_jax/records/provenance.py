"""The command, code and libraries that make a record, without user names or absolute paths."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hipgpt_jax import config, numerics, version

_PACKAGE = Path(__file__).parents[1]
_PATH_FLAGS = ("output", "prompts_file", "flagfile", "html", "data_path", "run_dir", "run_name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of the programs and libraries that generated a sample.

    Attributes:
        hipgpt_jax: Version of this package.
        git_commit: Commit of the checkout that the package ran from; None without a checkout.
        git_dirty: Whether the checkout had uncommitted changes of tracked files; None without a checkout.
        python: Version of Python.
        jax: Version of JAX.
        jaxlib: Version of jaxlib.
        plugin: Accelerator plugin of JAX, as ``name version``; None on a CPU.
        flax: Version of Flax.
        tokenizers: Version of tokenizers.
    """

    hipgpt_jax: str
    git_commit: str | None
    git_dirty: bool | None
    python: str
    jax: str
    jaxlib: str
    plugin: str | None
    flax: str
    tokenizers: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invocation:
    """The command that makes records.

    Attributes:
        argv: Command line, as returned by ``arguments``; empty from Python.
        started: Start of the command in UTC.
        clock: ``time.perf_counter`` at the start.
    """

    argv: tuple[str, ...] = ()
    started: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    clock: float = dataclasses.field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Returns the seconds since the program started."""
        return time.perf_counter() - self.clock


def versions(plugin: str | None) -> Versions:
    """Returns the versions, without importing the libraries."""
    commit, dirty = _git_state()
    return Versions(
        hipgpt_jax=version.__version__,
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        plugin=plugin,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "tokenizers")},
    )


def describe_rule(rule: Callable[..., Any]) -> str:
    """Returns the qualified name of a rule and the SHA-256 of its source, for records.

    Raises:
        TypeError: It is not a function.
        ValueError: Its source cannot be read.
    """
    if not inspect.isfunction(rule):
        raise TypeError(f"rule must be a function of the logits, the context and its length: got {rule!r}")
    try:
        source = inspect.getsource(rule)
    except OSError as error:
        raise ValueError(f"rule must be defined in a file, so that its source can be recorded: {error}") from error
    digest = hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()
    return f"{rule.__module__}.{rule.__qualname__} sha256:{digest}"


def arguments(program: str, argv: Sequence[str]) -> tuple[str, ...]:
    """Returns a command line with paths cut to file names.

    Args:
        program: Name of the program.
        argv: Value of ``sys.argv``.

    >>> arguments("hipgpt-generate", ["/usr/bin/x.py", "--output", "../ann/a.jsonl", "--prompts-file=/data/p.txt"])
    ('hipgpt-generate', '--output', 'a.jsonl', '--prompts-file=p.txt')
    """
    words, is_path = [program], False
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        names_path = word.startswith("-") and flag.lstrip("-").replace("-", "_") in _PATH_FLAGS
        if is_path:
            word = Path(numerics.without_home(word)).name
        elif names_path and equals:
            word = f"{flag}={Path(numerics.without_home(value)).name}"
        words.append(config.valid_text(numerics.without_directories(word)))
        is_path = names_path and not equals
    return tuple(words)


def _git_state() -> tuple[str | None, bool | None]:
    """Returns the commit of the package's checkout and whether it has uncommitted changes; None if unknown."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", root, *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
