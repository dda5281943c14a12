"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed."""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_MAX_DIGITS = 30  # of an integer in JSON; none of ours has more than 19


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name; the file written there becomes ``path``, or vanishes if the block raises."""
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # a library may have made it for its user alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def destination(path: Path) -> Path:
    """Returns the file that a write to ``path`` changes: the target of a link, else ``path`` itself.

    A pipe or a device keeps its name: ``/dev/stdout`` resolves to ``/proc/1/fd/pipe:[7]``, which is no path.
    """
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return path
    return path.resolve()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Opens a text file that becomes whole or stays what it was; a link's target is written, not the link.

    A device or a pipe is written to as it is.

    Raises:
        OSError: It cannot be written; the message has its name.
    """
    target = destination(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a directory")
    if target.exists() and not target.is_file():
        with target.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8 in one atomic replacement."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON in one atomic replacement."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class _Float(float):
    """A number written with a point or an exponent, which JSON schemas would otherwise accept as an integer."""

    def is_integer(self) -> bool:
        """Returns False: ``1.0`` is no integer."""
        return False


def parse_json(text: str | bytes) -> Any:
    """Parses JSON strictly.

    Args:
        text: One JSON value; bytes are UTF-8.

    Returns:
        The value. ``fastjsonschema`` does not accept its floats as integers.

    Raises:
        ValueError: The text is not JSON, repeats a key, is nested too deeply, or holds NaN, an infinity or a number
            that float64 cannot represent.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' appears twice
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _parse_float(digits: str) -> _Float:
    value = _Float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {_shortened(digits)} is too large for float64")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {_shortened(digits)} has {len(digits)} digits: at most {_MAX_DIGITS} are allowed")
    return int(digits)


# Made once: json.loads would make one per call, which takes as long as parsing a short line.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_constant=_refuse_constant,
    parse_float=_parse_float,
    parse_int=_parse_int,
)


def _shortened(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:17]}..."


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}")
    return value


def link(path: Path, target: str) -> None:
    """Makes ``path`` a relative link to ``target``, replacing an older link in one step."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    _sync_directory(path.parent)


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
