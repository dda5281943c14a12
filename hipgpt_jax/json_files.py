"""Strict JSON, files of JSON and JSON Lines, and their schemas."""

import collections
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hipgpt_jax import compression, config, files

MAX_LINE_BYTES = 1 << 28  # of a JSON Lines file; the record of a prompt of 10 MB has 28 MB
_MAX_DIGITS = 31  # of an integer; ours have at most 19, and tokenizer_config.json of transformers has int(1e30)


class _Float(float):
    """A number with a decimal point or an exponent, which JSON schemas would otherwise accept as an integer."""

    def is_integer(self) -> bool:
        """Returns False: ``1.0`` is not an integer."""
        return False


def parse(text: str | bytes) -> Any:
    """Parses JSON strictly.

    Args:
        text: One JSON value; bytes are UTF-8.

    Returns:
        The value; ``fastjsonschema`` does not accept its floats as integers.

    Raises:
        ValueError: The text is not JSON, repeats a key, is nested too deeply, or contains NaN, an infinity or a number
            beyond float64.

    >>> parse('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' appears twice
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno} "  # confusing beside the number of a line of a file
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, as ``object_pairs_hook`` of ``json.loads``; raises ValueError for a repeated key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {files.shortened(repr(key))} appears twice")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _parse_float(digits: str) -> _Float:
    value = _Float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {files.shortened(digits, 20)} is too large for float64")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS and (number := len(digits.removeprefix("-"))) > _MAX_DIGITS:
        raise ValueError(
            f"the number {files.shortened(digits, 20)} has {number} digits: at most {_MAX_DIGITS} are allowed"
        )
    return int(digits)


# One instance: json.loads would create one per call, which takes as long as parsing a short line.
_DECODER = json.JSONDecoder(
    object_pairs_hook=unique_keys,
    parse_constant=_refuse_constant,
    parse_float=_parse_float,
    parse_int=_parse_int,
)


def read(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a JSON object.
    """
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object: got {type(value).__name__}")
    return value


def write(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    files.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Line(NamedTuple):
    """A line of a JSON Lines file.

    Attributes:
        number: Line number, from 1.
        text: Content, including the line feed.
        is_torn: Whether this is the last line and was cut short.
    """

    number: int
    text: bytes
    is_torn: bool


def read_lines(path: Path, max_line_bytes: int | None = None) -> Iterator[Line]:
    """Yields the lines of a JSON Lines file except blank ones.

    Writers append whole lines in one write each, so only the last line can be incomplete. It is torn if it has no line
    feed and is not valid JSON; a last line that lacks only its line feed is not torn. A file whose name ends in
    ``.zst`` is decompressed. Whole lines are appended to it in whole frames; a last frame that was cut short is a torn
    line without content.

    Args:
        path: Path of the file.
        max_line_bytes: Largest size of a line; ``MAX_LINE_BYTES`` if absent.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is longer than the limit, or the file cannot be decompressed.
    """
    is_packed, number = compression.is_zstandard(path), 0
    total = path.stat().st_size  # another process may append to the file meanwhile
    size = compression.size_of_whole_frames(path) if is_packed else total
    with compression.open_frames(path, size) if is_packed else path.open("rb") as file:
        for number, text in files.numbered_lines(file, path, max_line_bytes or MAX_LINE_BYTES):
            if text.strip():
                yield Line(number, text, not text.endswith(b"\n") and not _is_json(text))
    if size < total:
        yield Line(number + 1, b"", is_torn=True)


def _is_json(text: bytes) -> bool:
    try:
        parse(text)
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
            value: A value returned by ``parse``.
            source: File or line that it comes from, for the error message.
        """
        import fastjsonschema

        try:
            self._validate(value)
        except fastjsonschema.JsonSchemaValueException as error:
            raise ValueError(f"{source} is not a valid {self._kind}: {self._violation(error)}") from error

    def parse(self, text: bytes, source: str) -> dict[str, Any]:
        """Parses and checks a line of a JSON Lines file.

        Raises:
            ValueError: The text is not JSON or violates the schema. The message begins with ``source``.
        """
        try:
            value = parse(text.strip())
        except ValueError as error:
            raise ValueError(f"{source} is not JSON: {error}") from error
        self.check(value, source)
        return value

    def read(self, path: Path) -> dict[str, Any]:
        """Reads and checks a JSON object; raises the errors of ``read`` and ``check``."""
        value = read(path)
        self.check(value, str(path))
        return value

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
