"""What made a record: versions, code, arguments. No environment beyond that, no user name, no absolute path."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from hipgpt_jax import config, version

_PACKAGE = Path(__file__).parents[1]
_PATH_FLAGS = ("output", "prompts_file", "flagfile", "html", "data_path", "run_dir")
# The directories of a path that is absolute, or begins at a home directory, or climbs.
_DIRECTORIES = re.compile(r"(?<![\w.])(?:\w+:/)?(?:~[\w.-]*|\.\.)?/(?:[^\s=,'\"\])/]*/)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of what the numbers depend on.

    Attributes:
        hipgpt_jax: This package.
        git_commit: Commit of the checkout it ran from; None where it did not run from one.
        git_dirty: Whether tracked files of that checkout were changed.
        python: The interpreter.
        jax: JAX.
        jaxlib: Its compiled half.
        plugin: Its accelerator plugin, as ``name version``; None on the CPU.
        flax: Flax.
        tokenizers: The tokenizers library.
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
    """Reads the versions, without importing the libraries."""
    commit, dirty = _git_state()
    return Versions(
        hipgpt_jax=version.__version__,
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        plugin=plugin,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "tokenizers")},
    )


def without_directories(text: str) -> str:
    """Returns ``text`` with each absolute path cut to its last name.

    >>> without_directories("--xla_dump_to=/home/ann/dump --xla_gpu_autotune_level=0")
    '--xla_dump_to=dump --xla_gpu_autotune_level=0'
    """
    return _DIRECTORIES.sub("", _without_home(text)).removesuffix("~")


def arguments(program: str, argv: Sequence[str]) -> tuple[str, ...]:
    """Returns a command line as a record holds it: files by their last name, so that none tells where it lay.

    >>> arguments("hipgpt-generate", ["/usr/bin/x.py", "--output", "../ann/a.jsonl", "--prompts-file=/data/p.txt"])
    ('hipgpt-generate', '--output', 'a.jsonl', '--prompts-file=p.txt')
    """
    words, is_path = [program], False
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        names_path = word.startswith("-") and flag.lstrip("-").replace("-", "_") in _PATH_FLAGS
        if is_path:
            word = Path(_without_home(word)).name
        elif names_path and equals:
            word = f"{flag}={Path(_without_home(value)).name}"
        words.append(config.valid_text(without_directories(word)))
        is_path = names_path and not equals
    return tuple(words)


def _without_home(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # HOME is unset, and the user is not in the password database
        return text
    return text.replace(home, "~") if len(home) > 1 else text


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that holds the package; Nones where git knows of none."""
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
