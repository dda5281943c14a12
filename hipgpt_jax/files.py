"""Atomic files, which are written under a temporary name, flushed and renamed; streams, links, lines and digests."""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/(?:thread-)?self)/fd/(\d{1,9})")
_MAX_NAME = 235
# With one slash too, to which Path reduces two. A drive letter is no scheme, and ./gs:/ is a path.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces ``path``, or is deleted if the block raises.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # a library may have created it with mode 0600
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # The temporary name means nothing to users, and Python names no file when the disk is full.
        if str(error.filename) == str(temporary) or _is_full(error):
            raise type(error)(f"{path} cannot be written: {error.strerror}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def require_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raises ValueError if a path is a URL such as ``gs://bucket/file``.

    Args:
        name: Name of the flag or the argument.
        path: Its value.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise ValueError(
            f"{name} must be a path on this machine: got the URL {shortened(text)}. Copy it to a local or shared disk, "
            f"or mount its store, and give the path there"
        )


def destination(path: Path) -> Path:
    """Returns the file that a write to ``path`` changes: the target of a link, or ``path`` itself.

    Pipes and devices are not resolved: ``/dev/stdout`` would become ``/proc/1/fd/pipe:[7]``, which does not exist.
    """
    return path if is_stream(path) else path.resolve()


def is_stream(path: Path) -> bool:
    """Returns whether ``path`` is a pipe, a device or a descriptor of this process, none of which can be replaced."""
    if descriptor(path) is not None:
        return True
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def descriptor(path: Path) -> int | None:
    """Returns the descriptor of a path such as ``/dev/stdout`` or ``/dev/fd/63``; None for other paths.

    Opening such a path again would truncate a file to which stdout is redirected, and overwrite what was printed.
    """
    if str(path) in _STANDARD:
        return _STANDARD[str(path)]
    match = _DESCRIPTOR.fullmatch(str(path))
    return int(match[1]) if match else None


@contextlib.contextmanager
def writing_stream(path: Path) -> Iterator[BinaryIO]:
    """Opens a path for which ``is_stream`` holds.

    Raises:
        OSError: It cannot be written; the message names ``path``.
    """
    try:
        number = descriptor(path)
        with path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as file:
            yield file
    except OSError as error:
        if _is_full(error) or error.errno == errno.EBADF:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Opens a text file that is replaced atomically at the end of the block, unless it raises.

    The target of a link is replaced, not the link. Devices and pipes are written to directly.

    Raises:
        OSError: It cannot be written; the message names ``path``.
    """
    if is_stream(path):
        with writing_stream(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as file:
            yield file
        return
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a directory")
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def shortened(text: str, limit: int = 200) -> str:
    """Returns text for an error message, on one line and of at most ``limit`` characters."""
    text = " ".join(text[: 2 * limit].split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def numbered_lines(stream: BinaryIO, path: Path, limit: int, advice: str = "") -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a stream with their numbers, from 1, and with their line ends.

    Args:
        stream: The stream.
        path: Name of its file, for the error message.
        limit: Largest size of a line in bytes; memory stays proportional to it.
        advice: End of the error message.

    Raises:
        ValueError: A line is longer than ``limit``.
    """
    for number in itertools.count(1):
        line = stream.readline(limit + 1)
        if len(line) > limit:
            raise ValueError(f"{path} line {number} is longer than {limit >> 20} MiB, the limit per line{advice}")
        if not line:
            return
        yield number, line


def link(path: Path, target: str) -> None:
    """Makes ``path`` a relative link to ``target``, atomically."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    _sync_directory(path.parent)


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_full(error: OSError) -> bool:
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _temporary(path: Path) -> Path:
    name = path.name
    if len(os.fsencode(name)) > _MAX_NAME:  # with the ending, it would exceed the 255 bytes of most file systems
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}.tmp")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
