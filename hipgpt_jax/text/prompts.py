"""Prompts and files of them: one per line, or JSON lines with settings of their own."""

import array
import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hipgpt_jax import config, files
from hipgpt_jax.text import documents

if TYPE_CHECKING:
    import numpy as np

MAX_LINE_BYTES = 16 << 20  # tokenizing a prompt takes about 200 times its size in memory

_ENCODER = json.JSONEncoder(sort_keys=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Text to continue, and settings that take precedence over the defaults.

    Attributes:
        text: The text to continue.
        id: Names the prompt in records; None takes ``digest``.
        generation: Fields of ``config.GenerationConfig`` and their values.
        sampling: Fields of ``config.SamplingConfig`` and their values.
        place: File and line, for messages.

    Raises:
        TypeError: The text is not a string, or a setting is unknown.
        ValueError: The id is empty or not valid Unicode, or the value of a setting is out of its range.
    """

    text: str
    id: str | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a string: got {config.shortened(self.text)}")
        if self.id is not None and not _is_plain(self.id):
            config.require_text("id", self.id)
        if self.generation:
            object.__setattr__(self, "generation", _validated("generation", self.generation, config.GENERATION_RULES))
        if self.sampling:
            object.__setattr__(self, "sampling", _validated("sampling", self.sampling, config.SAMPLING_RULES))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that depend on the text and all settings except the number of samples."""
        words = "{}, {}"
        if self.generation or self.sampling:
            asked = {name: value for name, value in self.generation.items() if name != "num_samples"}
            words = _ENCODER.encode([asked, dict(self.sampling)])[1:-1]
        return hashlib.sha256(f"[{_ENCODER.encode(self.text)}, {words}]".encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The id, or the digest of a prompt without one."""
        return self.digest if self.id is None else self.id


def _is_plain(text: object) -> bool:
    """Returns whether text is of printable ASCII, which most ids are; a slow check of each character is needed else."""
    return isinstance(text, str) and text.isascii() and text.isprintable() and text != ""


def _validated(field: str, values: Mapping[str, Any], rules: config.Rules) -> dict[str, Any]:
    """Returns settings as their rules return them."""
    if type(values) is not dict and not isinstance(values, Mapping):
        raise TypeError(f"{field} must be a mapping of settings to values: got {config.shortened(values)}")
    if unknown := [name for name in values if name not in rules]:
        raise TypeError(f"{field} has no setting {unknown[0]!r}: the settings are {', '.join(rules)}")
    return {name: rules[name](value) for name, value in values.items()}


# The keys of a JSON line are the command line's flags; the names that records use are accepted too.
_GENERATION = ("seed", "num_samples", "num_tokens", "eos_id", "top_logprobs", "stop")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "rep_penalty": "repetition_penalty"}
_ALIASES = {"temperature": "temp", "repetition_penalty": "rep_penalty", "rep-penalty": "rep_penalty"}
_KEYS = ("id", "prompt", *_GENERATION, *_SAMPLING)
_ACCEPTED = {*_KEYS, *_ALIASES}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class File:
    """The prompts of a file, in order, read again at each iteration and never held all at once.

    A file whose name ends in ``.jsonl``, ``.ndjson`` or ``.json`` holds one JSON object per line: ``prompt``,
    and optionally ``id`` and the settings that are flags of ``hipgpt-generate``; lines of white space are skipped.
    Any other file holds one prompt per line; a prompt with a line break in it needs the JSON form, and empty lines
    are skipped. A name may end in ``.gz`` or ``.zst`` in addition.

    A pipe can be read only once, so it is copied to a temporary file first. It has no name to go by: it holds JSON
    lines if its first line is an object with a prompt.

    Iterating raises ValueError where a line is broken, and the message has its number.

    Attributes:
        path: The file; ``stdin`` where it is that.
        hint: A sentence for the user where the file may not be what its name says, or None.
    """

    def __init__(self, path: Path, stream: BinaryIO | None = None) -> None:
        """Opens the file and looks at its beginning.

        Args:
            path: The file.
            stream: Read instead of the file, to its end.

        Raises:
            FileNotFoundError: There is no such file.
            IsADirectoryError: It is a directory.
            ValueError: It is not UTF-8.
        """
        self.path = path
        self.hint: str | None = None
        self._spool: BinaryIO | None = None
        if stream is not None:
            self._spool = _spooled(stream)
        elif not path.exists():
            raise FileNotFoundError(f"prompts file not found: {path}")
        elif path.is_dir():
            raise IsADirectoryError(f"prompts file {path} is a directory: give a file in it")
        elif not path.is_file():
            with path.open("rb") as pipe:
                self._spool = _spooled(pipe)
        if self._spool:
            weakref.finalize(self, self._spool.close)
        self._state = None if self._spool else _state(path)
        packing = "" if self._spool else documents.Format.of(path.name).compression
        self._is_json = path.name.lower().removesuffix(packing).endswith(_JSON_SUFFIXES)
        with self._open() as file:
            _require_utf8(file.read(4096), path)
        if not self._is_json and self._begins_with_object():
            self._is_json = self._spool is not None
            self.hint = (
                f"{path}: read as JSON lines, as its first line is an object with a prompt"
                if self._is_json
                else f"{path}: its first line is a JSON object, but each line is read as a prompt in plain text: "
                f"the name of a file of JSON lines must end in .jsonl"
            )

    def __iter__(self) -> Iterator[Prompt]:
        is_empty = True
        for number, line in self._lines():
            place = f"{self.path} line {number}"
            try:
                prompt = _parse(line, place) if self._is_json else Prompt(text=line, place=place)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            is_empty = False
            yield prompt
        if is_empty:
            raise ValueError(f"{self.path} has no prompt: it needs at least one line with text")

    def _open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        if self._spool:
            self._spool.seek(0)
            return contextlib.nullcontext(self._spool)
        if _state(self.path) != self._state:
            raise ValueError(f"{self.path} was changed while it was being read: run the command again")
        return documents.File(path=self.path, name=self.path.name).open()

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yields the lines that are not empty, and their numbers from 1."""
        with self._open() as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    most = f"{MAX_LINE_BYTES >> 20} MiB"
                    raise ValueError(
                        f"{self.path} line {number} is longer than {most}, the most that a prompt may have"
                    )
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self.path} line {number} is not UTF-8 text (byte {error.start + 1} is "
                        f"0x{line[error.start]:02x}). If it is Latin-1, iconv -f LATIN1 -t UTF-8 converts it"
                    ) from error
                if text and not (self._is_json and text.isspace()):
                    yield number, text

    def _begins_with_object(self) -> bool:
        try:
            _, line = next(self._lines(), (0, ""))
            value = files.parse_json(line)
        except ValueError:
            return False
        return isinstance(value, dict) and "prompt" in value


class Names:
    """Names of prompts, in 16 bytes each: which of them repeat, and whether one stands for two different prompts.

    Names are compared by 64 bits of their hashes: two of 10^6 are taken for equal with probability 3e-8.
    """

    def __init__(self) -> None:
        self._names, self._is_given = array.array("q"), bytearray()

    def add(self, prompt: Prompt) -> None:
        """Adds the name of the next prompt."""
        self._is_given.append(prompt.id is not None)
        self._names.append(hash(prompt.name))

    def groups(self) -> "tuple[np.ndarray, np.ndarray]":
        """Returns the indices of the prompts, those of equal names together in order, and where each name begins."""
        import numpy as np

        names = np.array(self._names, np.int64)
        order = np.argsort(names, kind="stable")
        return order, np.flatnonzero(np.append(True, names[order[1:]] != names[order[:-1]]))[: len(names)]

    def require_distinct(self, several: Iterable[Prompt]) -> None:
        """Raises ValueError where an id stands for two different prompts, or is given twice in one file.

        Args:
            several: The prompts that were added, to be read again for the message.
        """
        import numpy as np

        order, _ = self.groups()
        names, is_given = np.array(self._names, np.int64)[order], np.frombuffer(self._is_given, bool)[order]
        suspect = (names[1:] == names[:-1]) & (is_given[1:] | is_given[:-1])
        pairs = [(int(order[place]), int(order[place + 1])) for place in np.flatnonzero(suspect)]
        indices = {index for pair in pairs for index in pair}
        found = {index: prompt for index, prompt in enumerate(several) if index in indices} if pairs else {}
        for first, second in sorted(pairs, key=max):
            one, other = found[first], found[second]
            is_again = other.place is not None and other.id is not None and one.id is not None
            if is_again or one.digest != other.digest:
                before = f"prompt {first + 1}" if one.place is None else f"line {one.place.rpartition(' ')[2]}"
                again = other.place or f"prompt {second + 1}"
                raise ValueError(f"{again}: id {config.shortened(other.name)} is that of {before} too")


def read(path: Path) -> list[Prompt]:
    """Returns the prompts of a file, in order; ``File`` has the format and the errors."""
    several = list(File(path))
    require_distinct(several)
    return several


def require_distinct(several: Sequence[Prompt]) -> None:
    """Raises ValueError where prompts have one id, as ``Names.require_distinct`` does."""
    names = Names()
    for prompt in several:
        names.add(prompt)
    names.require_distinct(several)


def _spooled(stream: BinaryIO) -> BinaryIO:
    """Copies a stream to a file without a name, which vanishes with the process."""
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    spool = os.fdopen(descriptor, "w+b")
    shutil.copyfileobj(stream, spool, 1 << 20)
    return spool


def _state(path: Path) -> tuple[int, ...]:
    """Returns what changes when a file is replaced or written to."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _require_utf8(head: bytes, path: Path) -> None:
    """Raises ValueError where a file begins like UTF-16 or UTF-32 text, with a byte order mark or without."""
    # Half or more of the bytes of Latin letters in UTF-16 are NUL, all of them at odd or all at even places.
    most = max((part.count(0) for part in (head[::2], head[1::2])), default=0)
    bits = 32 if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else 16
    if bits == 32 or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or most > len(head) / 4:
        name = f"UTF-{bits}"
        raise ValueError(f"{path} is {name} text: it must be UTF-8 (iconv -f {name} -t UTF-8 makes it so)")


def _parse(line: str, place: str) -> Prompt:
    try:
        value = files.parse_json(line)
    except ValueError as error:
        cause = error.__cause__
        reason = f"{cause.msg} at column {cause.colno}" if isinstance(cause, json.JSONDecodeError) else str(error)
        raise ValueError(f"not JSON: {reason}. Each line must be one whole JSON object") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"must be a JSON object with a prompt: got {kind}. Each line must be one whole JSON object")
    for key in value:
        if key not in _ACCEPTED:
            raise ValueError(f"unknown key {config.shortened(key)}: the keys are {', '.join(_KEYS)}")
    text, name = value.get("prompt"), value.get("id", "")
    if not isinstance(text, str) or not text:
        raise ValueError(f"prompt must be a text of at least one character: got {config.shortened(text)}")
    if (
        not text.isascii()
    ):  # an escape may stand for half of a surrogate pair, which is no text: U+FFFD, as in documents
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if not _is_plain(name) and "id" in value:
        config.require_text("id", name)
    if len(value) == ("id" in value) + 1:
        return Prompt(text=text, id=name or None, place=place)
    if not _ALIASES.keys().isdisjoint(value):
        value = _without_aliases(value)
    if value.get("seed") == -1:
        raise ValueError("seed must be an integer of at least 0: -1, which draws a seed, is for the flag --seed")
    generation = {field: value[field] for field in _GENERATION if field in value}
    sampling = {field: _number(key, value[key]) for key, field in _SAMPLING.items() if key in value}
    return Prompt(text=text, id=name or None, generation=generation, sampling=sampling, place=place)


def _without_aliases(value: dict[str, Any]) -> dict[str, Any]:
    """Returns an object with each alias replaced by its key."""
    renamed: dict[str, Any] = {}
    for key, part in value.items():
        own = _ALIASES.get(key, key)
        if own in renamed:
            raise ValueError(f"{own} is given twice, once under another name: {', '.join(value)}")
        renamed[own] = part
    return renamed


def _number(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number: got {config.shortened(value)}")
    return float(value) if isinstance(value, float) else value  # that of strict JSON is a type of its own
