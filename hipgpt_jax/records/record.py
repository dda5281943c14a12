"""The record of a sample: one line of JSON that says what was made, of what, how and by what.

``record.schema.json`` beside this file is its JSON Schema; a line is written and read by it.
"""

import dataclasses
import functools
import itertools
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastjsonschema

from hipgpt_jax import files
from hipgpt_jax.records import provenance

SCHEMA = 1
CONTRACT = 1
MAX_LINE_BYTES = 1 << 28  # a record of a prompt of 10 MB has 28 MB
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that was asked for, resolved: no default is left out.

    Attributes:
        num_tokens: New tokens at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Candidates kept; 0 keeps all.
        top_p: Share of the probability kept; 1 keeps all.
        repetition_penalty: Penalty on tokens in the prompt and the output; 1 is none.
        eos_id: Token that ends the sample; -1 for none.
        stop: Strings that end the sample.
        window: Tokens the model saw at most, ``W``.
        window_stride: Tokens dropped at a time once the window was full.
        overflow: What happened then: ``roll``, ``stop`` or ``error``.
        top_logprobs: Alternatives recorded with each token.
    """

    num_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    eos_id: int
    stop: tuple[str, ...]
    window: int
    window_stride: int
    overflow: str
    top_logprobs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run that the sample was drawn from.

    Attributes:
        name: Name of the run.
        step: Training step of the weights.
        weights_sha256: Digest of the ``.bin`` file.
        tokenizer_sha256: Digest of ``tokenizer.json``.
        config_sha256: Digest of the step's config file.
    """

    name: str
    step: int
    weights_sha256: str
    tokenizer_sha256: str
    config_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
    """What the arithmetic was done by; the same tokens are promised where these are the same.

    Attributes:
        platform: As JAX names it: ``cpu``, ``gpu``, ``cuda`` or ``rocm``.
        device_kind: As JAX names it.
        machine: Architecture of the processor.
        processor: Its model name.
        instruction_sets: Its vector extensions. The last bits of a log-probability depend on them.
        cores: CPU cores that the process could use.
        dtype: Type of the arithmetic.
        attention: Implementation of a prompt's attention, ``xla`` or ``cudnn``.
        decode_width: Rows decoded side by side, ``--batch_size``.
        xla_flags: ``XLA_FLAGS``, paths cut to their last name.
        environment: Settings of JAX and of GPU libraries that can change a number and are not at their defaults.
    """

    platform: str
    device_kind: str
    machine: str
    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    dtype: str
    attention: str
    decode_width: int
    xla_flags: str
    environment: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock seconds.

    Attributes:
        load: From the program's start to the loaded model.
        first_token: From the sample's start to its first token; None where it has none.
        total: From the sample's start to its end.
    """

    load: float
    first_token: float | None
    total: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    r"""One sample. Lists of numbers have an element for each id of ``ids``.

    Attributes:
        id: Of the prompt: the one given with it, else a digest of it.
        sample: Index among the samples of the prompt, from 0.
        seed: Of the random numbers, with the prompt's ids and the sample's index.
        prompt: The prompt's text.
        prompt_ids: All of its ids.
        prompt_dropped: How many of the first of them were beyond the window and not read.
        ids: The ids drawn, in order; the end token and those of a stop string too.
        tokens: The text that each id completed. A character spread over ids stands with the last of
            them, the end token has none.
        text: The text made: ``tokens`` joined, cut before the stop string.
        finish_reason: ``length`` (of ``num_tokens``, or of the window), ``eos``, ``stop`` or ``error``.
        stop: The stop string found, or None.
        error: Why the sample could not be made or finished, or None.
        logprobs: Log-probability of each id in nats: of the untruncated distribution at temperature 1,
            before penalty, top-k and top-p.
        ranks: Place of each id in that distribution's order; 1 is the likeliest.
        margins: How far the uniform number was from the nearest boundary that would have changed the
            token, or ``top_p`` from where a nucleus of a candidate more or fewer would have; in [0, 1],
            where 1 is the value if nothing would have. At temperature 0, the gap of the two best logits.
        gaps: How far the token's logit, after the penalty, was from that of its nearer neighbour in the
            order of candidates, with which it would have changed places.
        top_logprobs: For each id, the likeliest tokens at its place as (id, log-probability, text), or
            None where none were asked for. Bytes that are no text by themselves are written ``\xNN``.
        settings: What was asked for.
        run: What the sample was drawn from.
        numerics: What the arithmetic was done by.
        versions: Versions of program and libraries.
        argv: The command line, paths cut to their last name; empty from Python.
        started: When the program started, in UTC, ISO 8601.
        timings: How long it took.
    """

    id: str
    sample: int
    seed: int
    prompt: str
    prompt_ids: tuple[int, ...]
    prompt_dropped: int
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str
    finish_reason: str
    stop: str | None
    error: str | None
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    margins: tuple[float, ...]
    gaps: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float, str], ...], ...] | None
    settings: Settings
    run: Run
    numerics: Numerics
    versions: provenance.Versions
    argv: tuple[str, ...]
    started: str
    timings: Timings

    def to_json(self) -> str:
        """Returns the record as one line of JSON, without its line end."""
        value: dict[str, Any] = {"schema": SCHEMA, "contract": CONTRACT}
        for field in dataclasses.fields(self):
            part = getattr(self, field.name)
            value[field.name] = vars(part) if field.name in _PARTS else part
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


_PARTS: dict[str, type] = {
    "settings": Settings,
    "run": Run,
    "numerics": Numerics,
    "versions": provenance.Versions,
    "timings": Timings,
}


def read(path: Path) -> Iterator[Record]:
    """Yields the records of a file; ``lines`` says which lines are skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a record of this schema and contract; the message has its number.
    """
    for number, line in lines(path):
        yield parse(line, f"{path} line {number}")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file with their numbers, from 1.

    Blank lines are skipped, and so is a last line without its line feed, which a kill has cut short.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a directory, a pipe or a device, or a line is longer than ``MAX_LINE_BYTES``.
    """
    if not path.exists():
        raise FileNotFoundError(f"record file not found: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give a record file in it")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, and records are read more than once: write them to a file")
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path} line {number} is longer than {MAX_LINE_BYTES >> 20} MiB, the limit for a record"
                )
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield number, line


def parse(line: bytes, place: str) -> Record:
    """Reads a record.

    Args:
        line: One line of a record file.
        place: Name of the line, with which the message of an error begins.

    Raises:
        ValueError: It is not a record of this schema and contract.
    """
    value = parse_object(line, place)
    try:
        _validate()(value)
    except fastjsonschema.JsonSchemaValueException as error:
        raise ValueError(f"{place} is not a whole record: {_violation(error)}") from error
    del value["schema"], value["contract"]
    lengths = {name: len(value[name]) for name in ("tokens", "logprobs", "ranks", "margins", "gaps")}
    if value["top_logprobs"] is not None:
        lengths["top_logprobs"] = len(value["top_logprobs"])
    for name, length in lengths.items():
        if length != len(value["ids"]):
            raise ValueError(f"{place} is not a whole record: it has {len(value['ids'])} ids and {length} {name}")
    for name, part in _PARTS.items():
        value[name] = part(**{key: _frozen(one) for key, one in value[name].items()})
    return Record(**{name: _frozen(one) for name, one in value.items()})


def parse_object(line: bytes, place: str) -> dict[str, Any]:
    """Reads the JSON object of a record's line; raises ValueError where it has another schema or contract."""
    try:
        value = files.parse_json(line.strip())
    except ValueError as error:
        # A line is always line 1 of itself, which beside its number in the file would confuse.
        raise ValueError(f"{place} is not JSON: {str(error).replace(' line 1 ', ' ')}") from error
    if not isinstance(value, dict) or type(value.get("schema")) is not int:
        raise ValueError(f"{place} is not a record: it has no schema number")
    for key, own in (("schema", SCHEMA), ("contract", CONTRACT)):
        if type(value.get(key)) is not int or value[key] != own:
            versions = value.get("versions")
            made_by = versions.get("hipgpt_jax") if isinstance(versions, dict) else None
            raise ValueError(
                f"{place} has {key} {_shown(value.get(key))}: this version reads {key} {own}. Use the version of "
                f"hipgpt_jax that wrote it ({_shown(made_by)[1:-1] if isinstance(made_by, str) else 'unknown'})"
            )
    return value


def _violation(error: fastjsonschema.JsonSchemaValueException) -> str:
    """Returns the violation of the schema in a few words, without the values at fault, which may be long."""
    name = (error.name or "data").replace("data", "record", 1)
    if error.rule == "required":
        missing = next(key for key in error.rule_definition or () if key not in (error.value or {}))
        return f"{name} has no {missing!r}"
    if error.rule == "additionalProperties":
        known = (error.definition or {}).get("properties", {})
        return f"{name} has an unknown field {_shown(next(key for key in error.value or () if key not in known))}"
    return error.message.replace("data", "record", 1)


def _shown(value: Any) -> str:
    """Returns the ``repr`` of a value from a file, at most about 40 characters of it."""
    return _SHORT.repr(value)


def is_torn(path: Path) -> bool:
    """Returns whether the last line of a file of at least one byte lacks its end."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


@functools.cache
def _validate() -> Any:
    return fastjsonschema.compile(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
