"""Strict JSON: what is read, what is refused, and the errors."""

import contextlib
import json
import re
from pathlib import Path

import fastjsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hipgpt_jax import json_files

SETTINGS = settings(deadline=None, derandomize=True, database=None)

LARGEST = 10**30 - 1  # the longest numbers that are read
KEYS = st.text(max_size=5)
JSON = st.dictionaries(
    KEYS,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-LARGEST, LARGEST)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "scratch.json"


@settings(SETTINGS, max_examples=25)  # each flushes to disk twice
@given(value=JSON)
@example(value={"": -LARGEST})
def test_json_round_trips(scratch: Path, value: dict[str, object]) -> None:
    json_files.write(scratch, value)
    assert json_files.read(scratch) == value


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b'{"a": 1} {"b": 2}', "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"\x80\x04\x95", "is not UTF-8"),
        (b"[1, 2]", "must be a JSON object: got list"),
        (b"null", "must be a JSON object: got NoneType"),
        (b'"model"', "must be a JSON object: got str"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", "is not JSON", id="digits"),
        pytest.param(b'{"a":' * 100_000, "is not JSON", id="depth"),
        (b'{"a": 1e400}', "is not JSON: the number 1e400 is too large for float64"),
        (b'{"a": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "is not JSON: key 'c' appears twice"),
    ],
)
def test_an_invalid_json_object_is_an_error_with_its_path(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} {text}")):
        json_files.read(path)


@SETTINGS
@given(content=st.binary())
def test_foreign_bytes_are_an_object_or_a_value_error(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert isinstance(json_files.read(scratch), dict)


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nosuch.json"))):
        json_files.read(tmp_path / "nosuch.json")


def test_a_schema_does_not_accept_a_float_as_integer() -> None:
    is_integer = fastjsonschema.compile({"type": "integer"})
    assert is_integer(json_files.parse("3")) == 3
    with pytest.raises(fastjsonschema.JsonSchemaValueException):
        is_integer(json_files.parse("3.0"))


def test_lines_are_read_with_their_numbers_and_only_a_torn_one_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for end, last in ((b"", []), (b'{"b":2}', [(4, False)]), (b'{"b":', [(4, True)]), (b"x\n", [(4, False)])):
        path.write_bytes(b'{"a":1}\n\n \t\r\n' + end)
        assert [(line.number, line.is_torn) for line in json_files.read_lines(path)] == [(1, False), *last]
    path.write_bytes(b"1" * 100)
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 is longer than 0 MiB"):
        list(json_files.read_lines(path, 99))
    with pytest.raises(FileNotFoundError):
        list(json_files.read_lines(tmp_path / "none"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"n": 1.0}, r"^a\.json is not a valid thing: thing\.n must be integer$"),
        ({}, "thing has no 'n'$"),
        ({"n": 1, "x" * 10**5: 2}, r"thing has an unknown field 'x+\.\.\.x+'$"),
        ([], "thing must be object$"),
    ],
)
def test_a_violation_of_a_schema_is_named_by_its_field(value: object, message: str) -> None:
    schema = json_files.Schema(
        "thing",
        {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}, "additionalProperties": False},
    )
    schema.check({"n": 1}, "a.json")
    with pytest.raises(ValueError, match=message):
        schema.check(json_files.parse(json.dumps(value)), "a.json")
