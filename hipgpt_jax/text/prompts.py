"""Prompts, and files of prompts: plain text, or JSON lines with settings per prompt."""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hipgpt_jax import config, files, json_files
from hipgpt_jax.text import documents

MAX_LINE_BYTES = 16 << 20  # tokenizing a prompt takes about 200 times its size in memory

_HEAD_BYTES = 4096
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# Keys of a JSON line, and the setting that each sets: the names in records, and those of the flags.
_SETTINGS = {
    **{name: name for name in (*config.GENERATION_RULES, *config.SAMPLING_RULES)},
    **{"temp": "temperature", "rep_penalty": "repetition_penalty", "rep-penalty": "repetition_penalty"},
}
_ENCODER = json.JSONEncoder(sort_keys=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Text or token ids to continue, and settings that override the defaults.

    Attributes:
        text: The text to continue; empty begins a document, after the run's end token.
        ids: Token ids to continue instead of a text, kept as a tuple; None for none.
        parse_special: Whether text that spells a special token is read as that token, and not as ordinary text.
        id: Name of the prompt in records; the default is ``digest``.
        generation: Values of fields of ``config.GenerationConfig``.
        sampling: Values of fields of ``config.SamplingConfig``.
        location: File and line, for messages.

    Raises:
        TypeError: The text is not a string, or a setting is unknown.
        ValueError: There are both a text and ids, there are no ids, one is not an integer of at least 0, the id is
            empty or not valid Unicode, or a setting is out of range.
    """

    text: str = ""
    ids: Sequence[int] | None = None
    parse_special: bool = False
    id: str | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    location: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a string: got {config.shortened(self.text)}")
        if self.ids is not None:
            if self.text:
                raise ValueError("a prompt has a text or ids, not both")
            object.__setattr__(self, "ids", _valid_ids(self.ids))
        if self.id is not None:
            config.require_text("id", self.id)
        # Most prompts of a large file have no settings, so the common case skips the validation.
        if self.generation:
            object.__setattr__(self, "generation", _validated("generation", self.generation, config.GENERATION_RULES))
        if self.sampling:
            object.__setattr__(self, "sampling", _validated("sampling", self.sampling, config.SAMPLING_RULES))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a hash of the text or ids, and of all settings except the numbering of samples."""
        # The hash of the JSON array. For a prompt without settings, encoding the text alone takes 3 µs instead of 7.
        settings = "{}, {}"
        if self.generation or self.sampling:
            generation = {name: value for name, value in self.generation.items() if name not in config.NUMBERING}
            settings = _ENCODER.encode([generation, dict(self.sampling)])[1:-1]
        text = self.text if self.ids is None else {"ids": self.ids}
        text = {"parse_special": text} if self.parse_special and self.ids is None else text
        return hashlib.sha256(f"[{_ENCODER.encode(text)}, {settings}]".encode()).hexdigest()[:16]

    def samples(self, default: range) -> range:
        """Returns the indices of the samples; ``default`` are those of a prompt without a number of its own."""
        if not config.NUMBERING & self.generation.keys():
            return default
        first = self.generation.get("first_sample", default.start)
        return range(first, first + self.generation.get("num_samples", len(default)))

    @property
    def name(self) -> str:
        """The id, or the digest of a prompt without an id."""
        return self.digest if self.id is None else self.id


def parse_ids(text: str) -> tuple[int, ...]:
    """Returns the ids in a text such as ``1,2,3``.

    Raises:
        ValueError: It is not a list of integers of at least 0, separated by commas.
    """
    try:
        return _valid_ids([int(word) for word in text.split(",")])
    except ValueError as error:
        raise ValueError(
            f"must be token ids separated by commas, such as 1,2,3: got {config.shortened(text)}"
        ) from error


def _valid_ids(ids: object) -> tuple[int, ...]:
    values = getattr(ids, "tolist", lambda: ids)()  # of an array
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"ids must be a list of at least one token id: got {config.shortened(values)}")
    return tuple(config.require_int("ids", value, 0, "each is a token id") for value in values)


def _validated(field: str, values: Mapping[str, Any], rules: config.Rules) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{field} must be a mapping of settings to values: got {config.shortened(values)}")
    if unknown := [name for name in values if name not in rules]:
        raise TypeError(f"{field} has no setting {unknown[0]!r}: the settings are {', '.join(rules)}")
    return {name: rules[name](value) for name, value in values.items()}


class PromptFile:
    """Prompts of a file, in order. Each iteration reads the file again, so memory does not grow with it.

    A file whose name ends in ``.jsonl``, ``.ndjson`` or ``.json`` holds one JSON object per line: ``prompt`` or
    ``prompt_ids``, and optionally ``id``, ``parse_special`` and the settings that are flags of ``hipgpt-generate``. Any
    other file holds one prompt per line; a prompt that is empty or has a line break needs the JSON form. Blank lines of
    JSON and empty lines of text are skipped. The name may end in ``.gz`` or ``.zst`` in addition.

    A pipe can be read only once, so it is copied to a temporary file. Without a name to go by, it holds JSON lines if
    its first line is an object with a prompt.

    Iterating raises ValueError with the number of the line if a line is broken.

    Attributes:
        path: Path of the file; ``stdin`` for standard input.
        hint: A sentence for the user if the format may not be the expected one; otherwise None.
    """

    def __init__(self, path: Path, stream: BinaryIO | None = None, *, parse_special: bool = False) -> None:
        """Opens the file and reads its head.

        Args:
            path: Path of the file.
            stream: Stream to read, to its end, instead of the file.
            parse_special: Default of ``Prompt.parse_special``.

        Raises:
            FileNotFoundError: The file does not exist.
            IsADirectoryError: It is a directory.
            ValueError: It is not UTF-8.
        """
        self.path = path
        self._parse_special = parse_special
        self.hint: str | None = None
        self._copy: BinaryIO | None = None
        if stream is not None:
            self._copy = _copied(stream)
        elif not path.exists():
            raise FileNotFoundError(f"prompts file not found: {path}")
        elif path.is_dir():
            raise IsADirectoryError(f"prompts file {path} is a directory: give a file in it")
        elif not path.is_file():
            with path.open("rb") as pipe:
                self._copy = _copied(pipe)
        if self._copy:
            weakref.finalize(self, self._copy.close)
        self._state = None if self._copy else _state(path)
        suffix = "" if self._copy else documents.Format.of(path.name).compression
        self._is_json = path.name.lower().removesuffix(suffix).endswith(_JSON_SUFFIXES)
        with self._open() as file:
            _check_encoding(file.read(_HEAD_BYTES), path)
        if not self._is_json and self._begins_with_object():
            self._is_json = self._copy is not None
            self.hint = (
                f"{path}: read as JSON lines, as its first line is an object with a prompt"
                if self._is_json
                else f"{path}: its first line is a JSON object, but each line is read as a prompt in plain text: "
                f"the name of a file of JSON lines must end in .jsonl"
            )

    def __iter__(self) -> Iterator[Prompt]:
        is_empty = True
        for location, line in self._lines():
            try:
                if self._is_json:
                    yield _parse(line, location, self._parse_special)
                else:
                    yield Prompt(text=line, parse_special=self._parse_special, location=location)
            except ValueError as error:
                raise ValueError(f"{location}: {error}") from error
            is_empty = False
        if is_empty:
            raise ValueError(f"{self.path} has no prompt: it needs at least one line with text")

    def _open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        if self._copy:
            self._copy.seek(0)
            return contextlib.nullcontext(self._copy)
        if _state(self.path) != self._state:
            raise ValueError(f"{self.path} was changed while it was being read: run the command again")
        return documents.File(path=self.path, name=self.path.name).open()

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Yields the location and the text of each line that is not skipped."""
        with self._open() as file:
            for number, line in files.numbered_lines(file, self.path, MAX_LINE_BYTES):
                location = f"{self.path} line {number}"
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{location} is not UTF-8 text (byte {error.start + 1} is 0x{line[error.start]:02x}). If it "
                        f"is Latin-1, iconv -f LATIN1 -t UTF-8 converts it"
                    ) from error
                if text and not (self._is_json and text.isspace()):
                    yield location, text

    def _begins_with_object(self) -> bool:
        try:
            _, line = next(self._lines(), ("", ""))
            value = json_files.parse(line)
        except ValueError:
            return False
        return isinstance(value, dict) and not value.keys().isdisjoint(("prompt", "prompt_ids"))


def _copied(stream: BinaryIO) -> BinaryIO:
    """Copies a stream to an unlinked file, which vanishes with the process."""
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    copy = os.fdopen(descriptor, "w+b")
    shutil.copyfileobj(stream, copy, 1 << 20)
    return copy


def _state(path: Path) -> tuple[int, ...]:
    """Returns values of which one changes if a file is replaced or written."""
    state = os.stat(path)
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _check_encoding(head: bytes, path: Path) -> None:
    """Raises ValueError if a file is not UTF-8 text, such as UTF-16 with or without a byte order mark."""
    documents.check_head(head, path)
    # In UTF-16, half of the bytes of Latin letters are NUL, all at odd or all at even offsets.
    if max(head[::2].count(0), head[1::2].count(0)) > len(head) / 4:
        raise ValueError(f"{path} is UTF-16 text: it must be UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")


def _parse(line: str, location: str, parse_special: bool) -> Prompt:
    """Reads a JSON line; ``parse_special`` is a default."""
    try:
        value = json_files.parse(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}. Each line must be one whole JSON object") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"must be a JSON object with a prompt: got {kind}. Each line must be one whole JSON object")
    if "id" in value:
        config.require_text("id", value["id"])
    text, name, ids = (value.pop(key, None) for key in ("prompt", "id", "prompt_ids"))
    parse_special = value.pop("parse_special", parse_special)
    settings: dict[str, Any] = {}
    for key, setting in value.items():
        if key not in _SETTINGS:
            known = ", ".join(["id", "prompt", "prompt_ids", "parse_special", *_SETTINGS])
            raise ValueError(f"unknown key {config.shortened(key)}: the keys are {known}")
        if _SETTINGS[key] in settings:
            raise ValueError(f"{_SETTINGS[key]} is given twice, under two names: {', '.join(value)}")
        settings[_SETTINGS[key]] = setting
    if (text is None) == (ids is None):
        raise ValueError("a line needs either prompt, a text, or prompt_ids, a list of token ids")
    if not isinstance(text, str | None):
        raise ValueError(f"prompt must be a text: got {config.shortened(text)}")
    if not isinstance(parse_special, bool):
        raise ValueError(f"parse_special must be true or false: got {config.shortened(parse_special)}")
    text = text or ""
    if settings.get("seed") == -1:
        raise ValueError("seed must be an integer of at least 0: -1, which draws a seed, is for the flag --seed")
    return Prompt(
        text=text if text.isascii() else documents.without_surrogates(text),
        ids=ids,
        parse_special=parse_special,
        id=name,
        generation={name: value for name, value in settings.items() if name in config.GENERATION_RULES},
        sampling={name: value for name, value in settings.items() if name in config.SAMPLING_RULES},
        location=location,
    )
