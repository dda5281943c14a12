"""The record of a sample: one line of JSON with the sample, the settings, and the programs and files it depends on.

``record.schema.json`` is its JSON Schema.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax import config, json_files
from hipgpt_jax.records import provenance

SCHEMA = 2
CONTRACT = 2
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
STATISTICS = ("logprobs", "ranks", "sampled_logprobs", "kept", "kept_mass", "leads", "cuts", "top_logprobs")
_PER_TOKEN = ("tokens", *STATISTICS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a sample, with defaults resolved.

    Attributes:
        num_tokens: Maximum number of new tokens.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_k: Number of candidates kept; 0 keeps all.
        top_p: Probability mass kept; 1 keeps all.
        repetition_penalty: Divisor or factor of the logits of tokens that occurred; 1 is neutral.
        min_p: Probability kept, relative to the most likely token's; 0 keeps all.
        frequency_penalty: Subtracted from a token's logit per occurrence.
        presence_penalty: Subtracted once from the logit of a token that occurred.
        penalty_scope: Text whose tokens the penalties count: ``all`` or ``output``.
        no_repeat_ngram: Length of the sequences of tokens that are not repeated; 0 allows all.
        logit_bias: Ids, each with a number that is added to its logit.
        ban: Ids that are never sampled.
        allow: The only ids that may be sampled; empty allows all.
        rule: Name and digest of the caller's own function of the logits; None for none.
        eos_id: Token that ends the sample; -1 for none.
        stop: Strings that end the sample.
        min_tokens: Number of tokens before which the sample does not end.
        window: Maximum number of tokens that the model sees, ``W``.
        window_stride: Tokens dropped at a time once the window is full.
        overflow: Rule for a full window: ``roll``, ``stop`` or ``error``.
        top_logprobs: Number of alternatives recorded per token.
    """

    num_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    penalty_scope: str
    no_repeat_ngram: int
    logit_bias: tuple[tuple[int, float], ...]
    ban: tuple[int, ...]
    allow: tuple[int, ...]
    rule: str | None
    eos_id: int
    stop: tuple[str, ...]
    min_tokens: int
    window: int
    window_stride: int
    overflow: str
    top_logprobs: int

    @classmethod
    def of(
        cls,
        decoding: config.DecodingConfig,
        generation: config.GenerationConfig,
        sampling: config.SamplingConfig,
        window: int,
        rule: str | None = None,
    ) -> "Settings":
        """Returns the settings in three configurations, with the window that ``decoding`` resolves to, and a rule."""
        values = {**vars(decoding), **vars(generation), **vars(sampling), "window": window, "rule": rule}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})

    def configs(self) -> tuple[config.DecodingConfig, config.GenerationConfig, config.SamplingConfig]:
        """Returns the configurations with these settings; fields that settings do not have keep their defaults.

        Raises:
            ValueError: A value is out of range.
        """

        def values(kind: type) -> dict[str, Any]:
            names = {field.name for field in dataclasses.fields(kind)}
            return {name: value for name, value in vars(self).items() if name in names}

        return (
            config.DecodingConfig(**values(config.DecodingConfig)),
            config.GenerationConfig(**values(config.GenerationConfig)),
            config.SamplingConfig(**values(config.SamplingConfig)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run that generated the sample.

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
    """Hardware and settings that affect the arithmetic. Where they are equal, so are the tokens.

    Attributes:
        platform: JAX platform: ``cpu``, ``gpu``, ``cuda`` or ``rocm``.
        device_kind: Device name given by JAX.
        machine: Processor architecture.
        processor: Processor model.
        instruction_sets: Vector extensions; the last bits of a log-probability depend on them.
        cores: CPU cores available to the process.
        dtype: Type of the arithmetic.
        attention: Implementation of attention over the prompt, ``xla`` or ``cudnn``.
        batch_size: Slots of the decode step, ``--batch_size``; None if the arithmetic is invariant to it.
        xla_flags: ``XLA_FLAGS``, with paths cut to file names.
        environment: Settings of JAX and of GPU libraries that can change a number, if not at their defaults.
        mesh: Devices that share the model, ``model=N``; None, and absent from the JSON, for one device.
    """

    platform: str
    device_kind: str
    machine: str
    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    dtype: str
    attention: str
    batch_size: int | None
    xla_flags: str
    environment: tuple[str, ...]
    mesh: str | None = None

    def fields(self) -> dict[str, Any]:
        """Returns the fields of the JSON."""
        return {name: value for name, value in vars(self).items() if name != "mesh" or value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock times in seconds.

    Attributes:
        load: From program start until the model is loaded.
        first_token: From the sample's start to its first token; None without tokens.
        total: From the sample's start to its end.
    """

    load: float
    first_token: float | None
    total: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    r"""A sample and everything needed to generate it again. Per-token lists have one element per id of ``ids``.

    Attributes:
        id: Id of the prompt: the one given with it, or a digest of it.
        sample: Index among the samples of the prompt, from 0.
        seed: Seed of the random numbers.
        prompt: Text of the prompt.
        prompt_ids: Token ids of the prompt.
        prompt_dropped: Number of leading prompt ids beyond the window, which the model did not see.
        ids: Generated token ids in order, including the end token and the tokens of a stop string.
        tokens: Text completed by each id. A character of several tokens belongs to the last of them; the end token
            has no text.
        text: Generated text: ``tokens`` joined, cut before the stop string.
        finish_reason: ``length`` (``num_tokens`` or the window is exhausted), ``eos``, ``stop`` or ``error``.
        stop: Stop string found, or None.
        error: Reason for which the sample could not be finished, or None.
        logprobs: Log-probability of each id in nats, in the model's own distribution: at temperature 1, before bias,
            bans, penalties and cuts.
        ranks: Rank of each id in that distribution; 1 is the most likely.
        sampled_logprobs: Log-probability of each id under the sampling settings: its chance of being sampled.
        kept: Number of candidates that each id was sampled from, after bans and cuts.
        kept_mass: Probability of those candidates before the cuts, after the penalties and the temperature (at
            temperature 0, a temperature of 1).
        leads: How far logits must move apart for another of those candidates to be sampled. At temperature 0, the
            difference of the two largest logits. 3.4028235e+38 without another candidate.
        cuts: How far logits must move apart for the id to be cut, or for a candidate that was cut to be kept.
            3.4028235e+38 if neither can happen.
        top_logprobs: Most likely tokens at each position as (id, log-probability, text), or None if not requested.
            Bytes that are not text by themselves are written ``\xNN``.
        settings: Settings of the sample.
        run: The run that generated it.
        numerics: Hardware and settings that affect the arithmetic.
        versions: Versions of the program and its libraries.
        argv: Command line, with paths cut to file names; empty from Python.
        started: Start of the program in UTC, ISO 8601.
        timings: Times in seconds.
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
    sampled_logprobs: tuple[float, ...]
    kept: tuple[int, ...]
    kept_mass: tuple[float, ...]
    leads: tuple[float, ...]
    cuts: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float, str], ...], ...] | None
    settings: Settings
    run: Run
    numerics: Numerics
    versions: provenance.Versions
    argv: tuple[str, ...]
    started: str
    timings: Timings

    def __repr__(self) -> str:
        tokens = f"{len(self.ids)} tokens, {self.finish_reason}"
        return f"<Record {config.shortened(self.id)} sample {self.sample}, {tokens}: {config.shortened(self.text)}>"

    def to_json(self) -> str:
        """Returns the record as one line of JSON, without a line feed."""
        value: dict[str, Any] = {"schema": SCHEMA, "contract": CONTRACT}
        value |= {name: vars(part) if name in _PARTS else part for name, part in vars(self).items()}
        value["numerics"] = self.numerics.fields()
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


_PARTS: dict[str, type] = {
    "settings": Settings,
    "run": Run,
    "numerics": Numerics,
    "versions": provenance.Versions,
    "timings": Timings,
}


def shortest(values: Iterable[Any]) -> tuple[float, ...]:
    """Returns NumPy's float32 numbers as floats with the fewest decimal digits that identify them."""
    return tuple(map(float, map(str, values)))


def read(path: Path) -> Iterator[Record]:
    """Yields the records of a file, except a torn last line.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not a record of this schema and contract.
    """
    for line in lines(path):
        if not line.is_torn:
            yield parse(line.text, f"{path} line {line.number}")


def lines(path: Path) -> Iterator[json_files.Line]:
    """Yields the lines of a record file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The path is not a regular file, or a line is too long.
    """
    if not path.exists():
        raise FileNotFoundError(f"record file not found: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give a record file in it")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, and records are read more than once: write them to a file")
    yield from json_files.read_lines(path)


def parse(line: bytes, source: str) -> Record:
    """Parses a line of a record file.

    Args:
        line: The line.
        source: Name of the line, for error messages.

    Raises:
        ValueError: The line is not a record of this schema and contract.
    """
    value = parse_object(line, source)
    _schema().check(value, source)
    del value["schema"], value["contract"]
    for name in _PER_TOKEN:
        if value[name] is not None and len(value[name]) != len(value["ids"]):
            raise ValueError(
                f"{source} is not a valid record: it has {len(value['ids'])} ids and {len(value[name])} {name}"
            )
    return Record(**{name: part(name, item) for name, item in value.items()})


def parse_object(line: bytes, source: str) -> dict[str, Any]:
    """Parses a line as the JSON object of a record of this schema and contract."""
    try:
        value = json_files.parse(line.strip())
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(value, dict) or type(value.get("schema")) is not int:
        raise ValueError(f"{source} is not a record: it has no schema number")
    _check_version(value, source)
    return value


def _check_version(value: dict[str, Any], source: str) -> None:
    """Raises ValueError if a record has another schema or contract."""
    for key, expected in (("schema", SCHEMA), ("contract", CONTRACT)):
        if type(value.get(key)) is not int or value[key] != expected:
            versions = value.get("versions")
            writer = versions.get("hipgpt_jax") if isinstance(versions, dict) else None
            writer = config.shortened(writer)[1:-1] if isinstance(writer, str) else "unknown"
            found = config.shortened(value.get(key))
            if value["schema"] == 1:
                problem = f"was made by contract 1: this version replays contract {CONTRACT}"
            else:
                problem = f"has {key} {found}: this version reads {key} {expected}"
            raise ValueError(f"{source} {problem}. Use the version of hipgpt_jax that wrote it ({writer})")


@functools.cache
def _schema() -> json_files.Schema:
    return json_files.Schema("record", json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def part(name: str, value: Any) -> Any:
    """Returns a field's value as it is in a ``Record``."""
    part = _PARTS.get(name)
    return part(**{key: _frozen(item) for key, item in value.items()}) if part else _frozen(value)


def _frozen(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(map(_frozen, value)) if value and isinstance(value[0], list) else tuple(value)
