"""Headers of records: the fields that a resumed command compares, parsed faster than whole records."""

import functools
import json
import re
from typing import NamedTuple

from hipgpt_jax import config, json_files
from hipgpt_jax.records import record


class Header(NamedTuple):
    """The fields of a record that a resumed command needs; the others are not checked.

    Attributes have the meaning of those of ``record.Record``.
    """

    id: str
    sample: int
    seed: int
    prompt: str
    prompt_ids: tuple[int, ...]
    settings: record.Settings
    run: record.Run
    numerics: record.Numerics


def parse(line: bytes, source: str) -> Header:
    """Parses the header of a line of a record file.

    Args:
        line: The line.
        source: Name of the line, for error messages.

    Raises:
        ValueError: The line is not a record of this schema and contract.
    """
    return _parse_written(line) or _parse_any(line, source)


def _parse_any(line: bytes, source: str) -> Header:
    value = record.parse_object(line, source)
    _schema(Header._fields).check(value, source)
    return Header(**{name: record.part(name, value[name]) for name in Header._fields})


def _parse_written(line: bytes) -> Header | None:
    """Parses a line in the form of ``Record.to_json``; returns None for any other, even if it is valid.

    Keys, their order and the structure are checked exactly. Of the numbers per token, only the characters are.
    """
    # A record of 20 tokens, 3.2 kB, takes 25 µs. The strict parser, which calls Python for each number, takes 260.
    try:
        match = _written_line().fullmatch(line.decode())
    except UnicodeDecodeError:
        return None
    if match is None:
        return None
    name, sample, seed, prompt, prompt_ids, shared = match.groups()
    parts, own = _shared_parts(shared), (int(sample), int(seed))
    if parts is None or name == '""' or max(own) > config.MAX_SEED:
        return None
    return Header(json.loads(name), *own, *_prompt(prompt, prompt_ids), *parts)


@functools.cache
def _written_line() -> re.Pattern[str]:
    """Returns the pattern of a written line; its groups are what a header is made of."""
    # Quantifiers are possessive, so that a line that does not match is refused at once.
    plain = r'[^"\\\x00-\x1f]*+'
    text = rf'"{plain}(?:\\(?:["\\/bfnrt]|u00[01][0-9a-f]){plain})*+"'  # Python escapes no other characters
    texts = rf"\[(?:{text}(?:,{text})*+)?+\]"
    integer = r"(?:0|[1-9][0-9]{0,9}+)"
    integers = rf"\[(?:{integer}(?:,{integer})*+)?+\]"
    number = r"-?+[0-9]++(?:\.[0-9]++)?+(?:e[-+][0-9]++)?+"
    alternatives = rf"\[(?:\[{integer},{number},{text}\],?+)*+\]"
    values = {
        "schema": str(record.SCHEMA),
        "contract": str(record.CONTRACT),
        "id": f"({text})",
        "sample": f"({integer})",
        "seed": f"({integer})",
        "prompt": f"({text})",
        "prompt_ids": f"({integers})",
        "prompt_dropped": integer,
        "ids": integers,
        "tokens": texts,
        "text": text,
        "finish_reason": text,
        "stop": f"(?:null|{text})",
        "error": f"(?:null|{text})",
        **dict.fromkeys(record.STATISTICS, r"\[[-+.,e0-9]*+\]"),
        "top_logprobs": rf"(?:null|\[(?:{alternatives},?+)*+\])",
    }
    own = ",".join(f'"{name}":{value}' for name, value in values.items())
    timings = rf'\{{"load":{number},"first_token":(?:null|{number}),"total":{number}\}}'
    return re.compile(rf'\{{{own},("settings":.*),"timings":{timings}\}}\n?+')


@functools.lru_cache(maxsize=16)  # one of them may be of many megabytes
def _prompt(text: str, ids: str) -> tuple[str, tuple[int, ...]]:
    return json.loads(text), tuple(json.loads(ids))


@functools.lru_cache(maxsize=256)
def _shared_parts(fields: str) -> tuple[record.Settings, record.Run, record.Numerics] | None:
    """Parses the fields from ``settings`` to ``started``, which are equal in most records of a command."""
    names = ("settings", "run", "numerics")
    try:
        value = json_files.parse(f"{{{fields}}}")
        _schema(names).check(value, "")
    except ValueError:
        return None
    if [*value] != [*names, "versions", "argv", "started"]:
        return None
    settings, run, numerics = (record.part(name, value[name]) for name in names)
    return settings, run, numerics


@functools.cache
def _schema(names: tuple[str, ...]) -> json_files.Schema:
    """Returns the schema of a part of a record: that of a record, without its other fields."""
    whole = json.loads(record.SCHEMA_FILE.read_text(encoding="utf-8"))
    fields = {name: whole["properties"][name] for name in names}
    return json_files.Schema("record", {"type": "object", "properties": fields, "required": list(fields)})
