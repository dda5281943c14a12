"""Records and their schema."""

import dataclasses
import inspect
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
import records
from hypothesis import strategies as st

from hipgpt_jax import json_files
from hipgpt_jax.records import provenance, record, writer
from hipgpt_jax.report import page

SCHEMA = json.loads(record.SCHEMA_FILE.read_text())
PARTS = {
    "settings": record.Settings,
    "run": record.Run,
    "numerics": record.Numerics,
    "versions": provenance.Versions,
    "timings": record.Timings,
}


def line_of(**changes: Any) -> dict[str, Any]:
    return json.loads(records.make_record().to_json()) | changes


def test_schema_is_valid_and_accepts_records() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for made in (records.make_record(), records.babble(40, 1), records.with_tokens("a", "\u2028", "é")):
        assert list(jsonschema.Draft7Validator(SCHEMA).iter_errors(json.loads(made.to_json()))) == []


def test_schema_dataclasses_and_docstrings_have_the_same_fields() -> None:
    properties = SCHEMA["properties"]
    assert properties.keys() - {"schema", "contract"} == {field.name for field in dataclasses.fields(record.Record)}
    for name, part in {**PARTS, "": record.Record}.items():
        fields = {field.name for field in dataclasses.fields(part)}
        if name:
            assert properties[name]["properties"].keys() == fields
        assert all(f"\n    {field}: " in (inspect.getdoc(part) or "") for field in fields)
    objects = [SCHEMA, *(properties[name] for name in PARTS)]
    optional = {"mesh"}  # absent from records of one device
    assert all(set(one["required"]) == one["properties"].keys() - optional for one in objects)
    assert not any(one["additionalProperties"] for one in objects)


def test_parse_inverts_to_json() -> None:
    nasty = '\n\r\t"\\\u2028\u0000</script>😀'
    biased = dataclasses.replace(records.SETTINGS, logit_bias=((3, -0.5), (9, 2.0)), ban=(0,), allow=(3, 9), rule="a b")
    for made in (
        records.make_record(prompt=nasty, text=nasty),
        records.make_record(settings=biased),
        records.babble(40, 1),
        records.with_tokens(),
    ):
        line = made.to_json()
        assert "\n" not in line
        assert record.parse(line.encode(), "it") == made


def test_to_json_refuses_numbers_that_are_not_finite() -> None:
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            records.make_record(logprobs=(number, -1.0)).to_json()


def test_read_skips_a_torn_last_line(tmp_path: Path) -> None:
    made = [records.make_record(sample=i) for i in range(3)]
    lines = "".join(one.to_json() + "\n" for one in made)
    path = tmp_path / "a.jsonl"
    for cut in (0, 1, 2, 500, len(made[2].to_json().encode())):
        path.write_bytes(lines.encode()[: len(lines.encode()) - cut])
        assert list(record.read(path)) == made[: 3 if cut < 2 else 2]  # a missing line feed alone does no harm
    with pytest.raises(FileNotFoundError, match="record file not found"):
        list(record.read(tmp_path / "none.jsonl"))


def test_read_refuses_directories_pipes_and_endless_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is a directory: give a record file in it"):
        list(record.read(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe or a device, and records are read more than once"):
        list(record.read(tmp_path / "pipe"))
    path = tmp_path / "a.jsonl"
    path.write_text(records.make_record().to_json() + "\n")
    size = path.stat().st_size
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", size - 1)
    for read in (lambda: list(record.read(path)), lambda: writer.RecordFile(path)):
        with pytest.raises(ValueError, match=r"a\.jsonl line 1 is longer than 0 MiB"):
            read()
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "it line 1 is not JSON"),
        (b"3", "it line 1 is not a record: it has no schema number"),
        (b"{}", "it line 1 is not a record: it has no schema number"),
        (b"\xff", "it line 1 is not JSON"),
        (b"[" * 100_000, "it line 1 is not JSON"),
        (
            records.make_record().to_json().replace('"leads":[0.25', '"leads":[NaN'),
            "is not JSON: NaN is not a JSON number",
        ),
        (
            records.make_record().to_json().replace('"seed":7', '"seed":9,"seed":7'),
            "is not JSON: key 'seed' appears twice",
        ),
        (records.make_record().to_json().replace('"sample":0', '"sample":1e400'), "1e400 is too large for float64"),
        (records.make_record().to_json().replace('"sample":0', '"sample":0.0'), "record.sample must be integer"),
        (json.dumps(line_of(ids=[1.0, 2])), r"record.ids\[0\] must be integer"),
        (
            json.dumps(line_of(settings=line_of()["settings"] | {"window": 32.0})),
            "record.settings.window must be integer",
        ),
        (json.dumps(line_of(schema=True)), "is not a record: it has no schema number"),
        (json.dumps(line_of(schema=1.0)), "is not a record: it has no schema number"),
        (json.dumps(line_of(contract=True)), "has contract True: this version reads contract 2"),
        (json.dumps(line_of(contract=1.0)), "has contract 1.0: this version reads contract 2"),
        (json.dumps(line_of(logprobs=[-1e300, -1])), r"record.logprobs\[0\] must be bigger than or equal to -3.4"),
        (
            json.dumps(line_of(schema=1, contract=1)),
            r"line 1 was made by contract 1: this version replays contract 2\. Use .* wrote it \(0\.1\.0\)",
        ),
        (json.dumps({"schema": 1}), r"line 1 was made by contract 1.* wrote it \(unknown\)"),
        (b'{"schema":2,}', "is not JSON: [^\n]* at column 1[23]$"),
        (json.dumps(line_of(sample=2**32)), "record.sample must be smaller than or equal to 4294967295"),
        (json.dumps(line_of(schema=3)), r"has schema 3: this version reads schema 2.*wrote it \(0.1.0\)"),
        (json.dumps(line_of(contract=3)), r"has contract 3: this version reads contract 2"),
        (json.dumps({"schema": 9}), r"has schema 9.*wrote it \(unknown\)"),
        (json.dumps(line_of(ids=[1, 2, 3])), "it has 3 ids and 2 tokens"),
        (json.dumps(line_of(leads=[1.0])), "it has 2 ids and 1 leads"),
        (json.dumps(line_of(kept=[1, 2, 3])), "it has 2 ids and 3 kept"),
        (json.dumps(line_of(kept=[0, 2])), r"record.kept\[0\] must be bigger than or equal to 1"),
        (json.dumps(line_of(kept_mass=[1, 1.01])), r"record.kept_mass\[1\] must be smaller than or equal to 1"),
        (json.dumps(line_of(sampled_logprobs=[0.1, 0])), r"record.sampled_logprobs\[0\] must be smaller than"),
        (json.dumps(line_of(leads=[-0.1, 0])), r"record.leads\[0\] must be bigger than or equal to 0"),
        (json.dumps(line_of(cuts=[1, 1e39])), r"record.cuts\[1\] must be smaller than or equal to 3.4"),
        (json.dumps(line_of(top_logprobs=[[]])), "it has 2 ids and 1 top_logprobs"),
        (json.dumps(line_of(ids=[1, "x"])), r"is not a valid record: record.ids\[1\] must be integer"),
        (json.dumps(line_of(seed=-1)), "record.seed must be bigger than or equal to 0"),
        (json.dumps(line_of(extra=1)), "not a valid record: record has an unknown field 'extra'$"),
        (json.dumps(line_of(**{"x" * 10**5: 1})), "record has an unknown field 'x{10,99}\\.\\.\\.x{10,30}'$"),
        (json.dumps(line_of(schema=[["y" * 10**5]])), "is not a record: it has no schema number"),
        (json.dumps(line_of(contract="y" * 10**5)), "has contract 'y{10,99}\\.\\.\\.y{10,30}'"),
        (json.dumps({k: v for k, v in line_of().items() if k != "run"}), "not a valid record: record has no 'run'$"),
        (json.dumps(line_of(run=line_of()["run"] | {"weights_sha256": "x"})), "record.run.weights_sha256 must match"),
    ],
)
def test_read_reports_the_line_and_the_reason_of_an_invalid_record(
    tmp_path: Path, line: str | bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((line.encode() if isinstance(line, str) else line) + b"\n")
    with pytest.raises(ValueError, match=message.replace("it line", f"{path} line")):
        list(record.read(path))


@hypothesis.given(st.integers(0, 2**32), st.binary(min_size=1, max_size=3))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_damaged_lines_raise_value_errors_or_follow_the_schema(seed: int, replacement: bytes) -> None:
    """Lines that are still accepted are checked with another implementation of JSON Schema."""
    line = bytearray(records.with_tokens("a", "b").to_json().encode())
    at = random.Random(seed).randrange(len(line))
    line[at : at + len(replacement)] = replacement
    try:
        found = record.parse(bytes(line), "it")
    except ValueError:
        return
    assert list(jsonschema.Draft7Validator(SCHEMA).iter_errors(json.loads(found.to_json()))) == []


def test_mutated_records_are_refused_in_one_line_or_rendered() -> None:
    value = json.loads(records.babble(4, 1, prompt_ids=(3, 4)).to_json())
    refused = []
    for seed in range(800):
        try:
            found = record.parse(records.mutated(value, random.Random(seed)), "it")
        except ValueError as error:
            refused.append(str(error))
        else:
            assert "</html>" in page.render([found], "title")
    assert 300 < len(refused) < 700
    assert [message for message in refused if not re.fullmatch("it .{,250}", message)] == []


def test_read_accepts_blank_lines_a_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = records.make_record().to_json().encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\n \t\n\n")
    assert list(record.read(path)) == [records.make_record()] * 2
    assert [line.number for line in record.lines(path)] == [1, 3]


def test_arguments_have_no_directories() -> None:
    argv = ["/home/ann/bin/x", "--run-name", "r", "--flagfile=/home/ann/a.flags", "--output", "../ann/o.jsonl"]
    argv += [
        "--run-dir",
        "/home/ann/run/",
        "a\udcff",
        "--prompt",
        "either/or /imagine",
        "--data-path=~ann/t.txt",
        "/home/ann/f",
    ]
    kept = ("hipgpt-x", "--run-name", "r", "--flagfile=a.flags", "--output", "o.jsonl", "--run-dir", "run", "a\ufffd")
    kept += ("--prompt", "either/or imagine", "--data-path=t.txt", "f")
    assert provenance.arguments("hipgpt-x", argv) == kept


def test_arguments_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert provenance.arguments("hipgpt-x", ["x", "--output", "../b/c.jsonl"]) == ("hipgpt-x", "--output", "c.jsonl")
