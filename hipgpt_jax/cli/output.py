"""Files of output flags: their names, checks before the work begins, and record files."""

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hipgpt_jax import compression, files
from hipgpt_jax.cli import program

if TYPE_CHECKING:
    from hipgpt_jax.records import writer

_STDOUT = Path("/dev/stdout")
_NAMES_OF_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


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


@contextlib.contextmanager
def open_records(
    name: str | None, *, overwrite: bool, inputs: Iterable[str | None]
) -> "Iterator[writer.RecordFile | TextIO | None]":
    """Opens the file of ``--output``.

    Args:
        name: The flag's value.
        overwrite: Whether to replace existing records.
        inputs: Input files of the same command; the output must be none of them.

    Yields:
        A record file, stdout if ``name`` is ``-`` or another name of stdout, or None if it is None.
    """
    if name is None or is_stdout(name):
        yield None if name is None else sys.stdout
        return
    for path in filter(None, inputs):
        if os.path.exists(name) and os.path.exists(path) and os.path.samefile(name, path):
            raise ValueError(f"--output {name} is an input of this command: give another name")
    from hipgpt_jax.records import writer  # imports NumPy, which hipgpt-inspect does not need

    out = writer.RecordFile(Path(name), overwrite=overwrite)
    try:
        if out.dropped:
            kind = "frame" if compression.is_zstandard(out.path) else "line"
            program.note(f"{name}: dropped an incomplete last {kind} of {out.dropped} bytes, left by a killed command")
        yield out
    finally:
        out.close()


def is_stdout(name: str) -> bool:
    """Returns whether a file name means stdout; raises ValueError for a file to which stdout is redirected."""
    if name in _NAMES_OF_STDOUT:
        return True
    try:
        target, stdout = os.stat(name), os.fstat(1)
    except (OSError, ValueError):
        return False
    if not os.path.samestat(target, stdout) or stat.S_ISCHR(target.st_mode):
        return False
    if stat.S_ISREG(target.st_mode):
        raise ValueError(f"--output {name} is the file to which stdout is redirected: give another, or --output -")
    return True
