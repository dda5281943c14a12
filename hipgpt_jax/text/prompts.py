"""Prompts from a file: a prompt a line, or JSON lines with settings of their own."""

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hipgpt_jax import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and what it asks for in place of the defaults.

    Attributes:
        text: The text to continue.
        id: Names it in records; None takes ``digest``.
        generation: Fields of ``config.GenerationConfig`` and their values.
        sampling: Fields of ``config.SamplingConfig`` and their values.
        place: Where it stands, for messages.

    Raises:
        ValueError: The id is empty, or holds what UTF-8 cannot.
    """

    text: str
    id: str | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str | None = None

    def __post_init__(self) -> None:
        if self.id is not None:
            config.require_text("id", self.id)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that depend on the text and on what it asks for, the number of samples apart."""
        asked = {name: value for name, value in self.generation.items() if name != "num_samples"}
        words = json.dumps([self.text, asked, dict(self.sampling)], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The id, or the digest where it has none."""
        return self.digest if self.id is None else self.id


# The keys of a JSON line are the command line's flags.
_GENERATION = {name: name for name in ("seed", "num_samples", "num_tokens", "eos_id", "top_logprobs")}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "rep_penalty": "repetition_penalty"}
_KEYS = ("id", "prompt", *_GENERATION, "stop", *_SAMPLING)
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read(path: Path) -> list[Prompt]:
    """Reads the prompts of a file, in order.

    A file whose name ends in ``.jsonl``, ``.ndjson`` or ``.json`` holds a JSON object a line: ``prompt``,
    and as it pleases ``id`` and the settings that are flags of ``hipgpt-generate``. Any other file holds
    a prompt a line; a prompt with a line break in it needs the JSON form. Empty lines are passed over.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8, has no prompt, or a line is broken; the message has its number.
    """
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"prompts file not found: {path}")
    as_json = path.suffix.lower() in _JSON_SUFFIXES
    prompts: list[Prompt] = []
    numbers: dict[str, int] = {}
    for number, line in _lines(path):
        place = f"{path} line {number}"
        try:
            prompt = dataclasses.replace(_parse(line) if as_json else Prompt(text=line), place=place)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{place}: {error}") from error
        if prompt.id is not None and numbers.setdefault(prompt.id, number) != number:
            raise ValueError(f"{place}: id {prompt.id!r} is that of line {numbers[prompt.id]} too")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompt: it needs at least one line with text")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{path} is UTF-16 text: it must be UTF-8 (iconv -f UTF-16 -t UTF-8 makes it so)")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} line {number} is not UTF-8 text (byte {error.start + 1} is 0x{line[error.start]:02x}). "
                    f"If it is Latin-1, iconv -f LATIN1 -t UTF-8 converts it"
                ) from error
            if text:
                yield number, text


def _parse(line: str) -> Prompt:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that a prompt could be: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object with a prompt: got {type(value).__name__}")
    if unknown := [key for key in value if key not in _KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r}: the keys are {', '.join(_KEYS)}")
    if not isinstance(value.get("prompt"), str) or not value["prompt"]:
        raise ValueError(f"prompt must be a text of at least one character: got {value.get('prompt')!r}")
    if "id" in value:
        config.require_text("id", value["id"])
    generation = {field: value[key] for key, field in _GENERATION.items() if key in value}
    if "stop" in value:
        stop = value["stop"]
        generation["stop"] = tuple(stop) if isinstance(stop, list) else (stop,)
    sampling: dict[str, Any] = {field: _number(key, value[key]) for key, field in _SAMPLING.items() if key in value}
    config.GenerationConfig(**generation)
    config.SamplingConfig(**sampling)
    return Prompt(text=value["prompt"], id=value.get("id"), generation=generation, sampling=sampling)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value


def _number(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number: got {value!r}")
    return value if key == "top_k" else float(value)
