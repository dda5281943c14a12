"""Checks of output files before the work begins."""

import os
from collections.abc import Callable
from pathlib import Path

from hipgpt_jax import files
from hipgpt_jax.cli import program

_STDOUT = Path("/dev/stdout")


def path_of(name: str) -> Path:
    """Returns the path of an output flag; ``-`` is stdout."""
    if name != "-":
        return Path(name)
    program.require_stdout("the output")
    return _STDOUT


def check(flag: str, path: Path, *, source: Path | None, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Raises an error if ``path`` cannot be written, or is a file that this program did not write.

    Pipes, devices and descriptors such as ``/dev/stdout`` are always accepted.

    Args:
        flag: The flag.
        path: Its file. The target of a link is replaced, not the link.
        source: An input file of the same command.
        kind: The kind of file, for messages.
        is_ours: Returns whether an existing file is of that kind.

    Raises:
        OSError: The directory is missing or cannot be written, or the path is a directory.
        ValueError: The file is ``source`` or of another kind.
    """
    if files.is_stream(path):
        return
    target = files.destination(path)
    parent = target.parent if path.is_symlink() else path.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"--{flag} {path} cannot be written: there is no directory {parent}")
    if target.is_dir():
        raise IsADirectoryError(f"--{flag} {path} is a directory: give the name of a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--{flag} {path} cannot be written: no permission to write to {parent}")
    if not target.exists():
        return
    if source is not None and source.exists() and source.samefile(target):
        raise ValueError(f"--{flag} {path} is an input of this command: give another name")
    if target.stat().st_size and not is_ours(target):
        raise ValueError(f"--{flag} {path} exists and is not a {kind}: give another name, or remove it first")


def begins_with(path: Path, marker: bytes) -> bool:
    """Returns whether the first 4 KiB of a file contain a marker."""
    with path.open("rb") as file:
        return marker in file.read(4096)
