"""Names of files that programs write, checked before the work begins."""

import os
from collections.abc import Callable
from pathlib import Path

from hipgpt_jax import files
from hipgpt_jax.cli import program

_STDOUT = Path("/dev/stdout")


def path_of(name: str) -> Path:
    """Returns the path that an output flag names; ``-`` is stdout."""
    if name != "-":
        return Path(name)
    program.require_stdout("what is written to it")
    return _STDOUT


def check(flag: str, path: Path, *, source: Path | None, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Raises an error if writing ``path`` cannot succeed, or would destroy what this program did not write.

    Pipes, devices and descriptors such as ``/dev/stdout`` are always accepted.

    Args:
        flag: The flag that names the file.
        path: The file. If it is a link, its target is the file that would be replaced.
        source: A file that the same command reads.
        kind: The kind of file that is written, for messages.
        is_ours: Whether an existing file is one of that kind.

    Raises:
        OSError: The directory is missing or cannot be written, or the path is a directory.
        ValueError: The file is ``source``, or of another kind.
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
        raise ValueError(f"--{flag} {path} exists and is no {kind}: give another name, or remove it first")


def begins_with(path: Path, marker: bytes) -> bool:
    """Returns whether a marker is in the first 4 KiB of a file."""
    with path.open("rb") as file:
        return marker in file.read(4096)
