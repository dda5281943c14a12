"""Atomic files, which are written under a temporary name, flushed and renamed; strict JSON."""

import collections
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from hipgpt_jax import config

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/(?:thread-)?self)/fd/(\d{1,9})")
_MAX_NAME = 235
_MAX_DIGITS = 30  # of an integer in JSON; ours have at most 19
MAX_LINE_BYTES = 1 << 28  # of a JSON Lines file; the record of a prompt of 10 MB has 28 MB


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


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class _Float(float):
    """A number with a decimal point or an exponent, which JSON schemas would otherwise accept as an integer."""

    def is_integer(self) -> bool:
        """Returns False: ``1.0`` is not an integer."""
        return False


def parse_json(text: str | bytes) -> Any:
    """Parses JSON strictly.

    Args:
        text: One JSON value; bytes are UTF-8.

    Returns:
        The value; ``fastjsonschema`` does not accept its floats as integers.

    Raises:
        ValueError: The text is not JSON, repeats a key, is nested too deeply, or contains NaN, an infinity or a number
            beyond float64.

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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, as ``object_pairs_hook`` of ``json.loads``; raises ValueError for a repeated key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shortened(repr(key))} appears twice")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _parse_float(digits: str) -> _Float:
    value = _Float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shortened(digits, 20)} is too large for float64")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS and (number := len(digits.removeprefix("-"))) > _MAX_DIGITS:
        raise ValueError(f"the number {shortened(digits, 20)} has {number} digits: at most {_MAX_DIGITS} are allowed")
    return int(digits)


# One instance: json.loads would create one per call, which takes as long as parsing a short line.
_DECODER = json.JSONDecoder(
    object_pairs_hook=unique_keys,
    parse_constant=_refuse_constant,
    parse_float=_parse_float,
    parse_int=_parse_int,
)


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


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object: got {type(value).__name__}")
    return value


class JsonLine(NamedTuple):
    """A line of a JSON Lines file.

    Attributes:
        number: Line number, from 1.
        text: Content, including the line feed.
        is_torn: Whether this is the last line and was cut short.
    """

    number: int
    text: bytes
    is_torn: bool


def read_jsonl(path: Path, max_line_bytes: int | None = None) -> Iterator[JsonLine]:
    """Yields the lines of a JSON Lines file except blank ones.

    Writers append whole lines in one write each, so only the last line can be incomplete. It is torn if it has no line
    feed and is not valid JSON; a last line that lacks only its line feed is not torn.

    Args:
        path: Path of the file.
        max_line_bytes: Largest size of a line; ``MAX_LINE_BYTES`` if absent.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is longer than the limit.
    """
    with path.open("rb") as file:
        for number, text in numbered_lines(file, path, max_line_bytes or MAX_LINE_BYTES):
            if text.strip():
                yield JsonLine(number, text, not text.endswith(b"\n") and not _is_json(text))


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


class Schema:
    """JSON Schema of one kind of file. It is compiled on first use, which takes 5 to 50 ms."""

    def __init__(self, kind: str, definition: dict[str, Any]) -> None:
        """Stores the schema.

        Args:
            kind: Name of the kind of file in error messages.
            definition: Draft 7 schema of an object.
        """
        self._kind, self._definition = kind, definition

    @functools.cached_property
    def _validate(self) -> Any:
        import fastjsonschema

        return fastjsonschema.compile(self._definition)

    def check(self, value: Any, source: str) -> None:
        """Raises ValueError if a parsed JSON value violates the schema.

        Args:
            value: A value returned by ``parse_json``.
            source: File or line that it comes from, for the error message.
        """
        import fastjsonschema

        try:
            self._validate(value)
        except fastjsonschema.JsonSchemaValueException as error:
            raise ValueError(f"{source} is not a valid {self._kind}: {self._violation(error)}") from error

    def _violation(self, error: Any) -> str:
        """Describes a violation by the path of the field, without its value, which may be long."""
        name = (error.name or "data").replace("data", self._kind, 1)
        if error.rule == "required":
            return f"{name} has no {next(key for key in error.rule_definition if key not in error.value)!r}"
        if error.rule == "additionalProperties":
            known = error.definition.get("properties", {})
            return (
                f"{name} has an unknown field {config.shortened(next(key for key in error.value if key not in known))}"
            )
        return error.message.replace("data", self._kind, 1)


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
