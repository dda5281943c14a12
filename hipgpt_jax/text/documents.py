"""Documents from files and directories: plain text or JSON lines, uncompressed or compressed."""

import codecs
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from hipgpt_jax import files
from hipgpt_jax.text import unpacking

MAX_LINE_BYTES = 1 << 26  # of JSON, whose objects take up to 25 times the memory of their text
_JSON_LINES = (".jsonl", ".ndjson")
_HEAD_BYTES = 512

# Beginnings of files that are not UTF-8 text, and what to do with them. The four bytes of UTF-32 begin as UTF-16 does.
_ICONV = "it must be UTF-8. Convert it: iconv -f {0} -t UTF-8 FILE > NEW"
_UNPACK_FIRST = "unpack it, and give the unpacked file or directory"
_FOREIGN = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _ICONV.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _ICONV.format("UTF-16")),
    (rb"\x1f\x8b\x08", "gzip data", "give it a name that ends in .gz"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard data", "give it a name that ends in .zst"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", _UNPACK_FIRST),
    (rb"\xfd7zXZ\0", "xz data", _UNPACK_FIRST),
    (rb"PK\x03\x04", "a zip archive", _UNPACK_FIRST),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK_FIRST),
)


class Document(NamedTuple):
    """The text of one document.

    Attributes:
        stream: Its bytes, to be read before the next document is taken.
        bytes: Their number; None for a file that is one document, which ends where the file does.
        invalid_bytes: Bytes of its JSON line that were not UTF-8 and were replaced.
    """

    stream: BinaryIO
    bytes: int | None
    invalid_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a file holds text, as the suffixes of its name say.

    Attributes:
        is_json_lines: Whether each of its lines is a JSON object with a document (``.jsonl``, ``.ndjson``); else the
            file is one document.
        packing: ``.gz``, ``.zst`` or nothing.
    """

    is_json_lines: bool
    packing: str

    @classmethod
    def of(cls, name: str) -> "Form":
        """Returns the form of a file of this name; a name that says nothing is plain text."""
        path = PurePath(name.lower())
        packing = path.suffix if path.suffix in unpacking.SUFFIXES else ""
        return cls(is_json_lines=path.name.removesuffix(packing).endswith(_JSON_LINES), packing=packing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file of documents.

    Attributes:
        path: Where it is.
        name: Its name, or in a directory that was given its path from there.
    """

    path: Path
    name: str

    @property
    def form(self) -> Form:
        """How it holds text."""
        return Form.of(self.name)

    def open(self) -> io.BufferedReader:
        """Opens the uncompressed content, which raises ValueError as it is read where it cannot be unpacked."""
        return unpacking.open(self.path, self.form.packing) if self.form.packing else self.path.open("rb")

    def documents(self, text_field: str) -> Iterator[Document]:
        """Yields each document. A byte order mark at the head of the file is not part of the text.

        Args:
            text_field: Key of the text in a JSON object; a lone surrogate in it becomes U+FFFD.

        Raises:
            ValueError: The file is not text, or a line is not a JSON object with such a text; the message has its
                number.
        """
        with self.open() as stream:
            head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            for pattern, kind, remedy in _FOREIGN:
                if re.match(pattern, head):
                    raise ValueError(f"{self.path} is {kind}: {remedy}")
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            if self.form.is_json_lines:
                yield from self._lines(stream, text_field)
            else:
                yield Document(stream, None, 0)

    def _lines(self, stream: BinaryIO, text_field: str) -> Iterator[Document]:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"it is longer than {MAX_LINE_BYTES >> 20} MiB, the limit for a line of JSON. Split the "
                        f"document, or give it as a file of plain text"
                    )
                if line := line.strip():
                    text = line.decode("utf-8", errors="replace")
                    content = _text(text, text_field)
                    yield Document(io.BytesIO(content), len(content), _count_invalid(line, text))
            except ValueError as error:
                raise ValueError(f"{self.path} line {number}: {error}") from error


def _count_invalid(content: bytes, text: str) -> int:
    if "\ufffd" not in text:
        return 0
    return len(content) - len(content.decode("utf-8", errors="ignore").encode())


def count_invalid(stream: BinaryIO, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yields each block of a stream, and the number of bytes that are not UTF-8 among those decoded with it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    block = b" "
    while block:
        pending = decoder.getstate()[0]
        block = stream.read(block_bytes)
        text = decoder.decode(block, final=not block)
        decoded = pending + block
        yield block, _count_invalid(decoded[: len(decoded) - len(decoder.getstate()[0])], text)


def _text(line: str, field: str) -> bytes:
    try:
        # Numbers are not looked at; some datasets hold NaN, or integers too long for Python.
        value = json.loads(line, object_pairs_hook=files.unique_keys, parse_int=float, parse_constant=float)
    except json.JSONDecodeError as error:
        hint = _HINT if line in ("{", "[", "[{") else ""
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{hint}") from error
    except RecursionError as error:
        raise ValueError("not JSON that a document could be: it is nested too deeply") from error
    if not isinstance(value, dict):
        hint = _HINT if isinstance(value, list) else ""
        raise ValueError(f"must be a JSON object with a text: got {type(value).__name__}{hint}")
    if field not in value:
        keys = files.shortened(", ".join(map(repr, value))) or "none"
        inside = ". A field inside another object cannot be named" if field.partition(".")[0] in value else ""
        raise ValueError(
            f"no field {field!r}: its fields are {keys}. Name the one with the text by --text-field{inside}"
        )
    if not isinstance(value[field], str):
        kind = type(value[field])
        raise ValueError(f"field {field!r} must be a text: got {_KINDS.get(kind, kind.__name__)}")
    # UTF-16 tells a lone surrogate from half of a pair.
    return value[field].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


_HINT = ". Each line must hold a whole object: jq -c . FILE > NEW makes it so of indented JSON, jq -c '.[]' of an array"

_KINDS = {type(None): "null", float: "a number"}


def find(sources: Path | Sequence[Path]) -> list[File]:
    """Returns the files of documents that paths name, in the order given.

    A directory stands for the files in it and below it whose names end in ``.txt``, ``.jsonl`` or ``.ndjson``, with
    ``.gz`` or ``.zst`` after it or without, in the order of their paths. Hidden ones are passed over. Links are
    followed; a directory that is reached twice is read once. A file that is named itself may have any name.

    Raises:
        OSError: A path is not there, a directory cannot be read, or a link in it leads nowhere.
        ValueError: A directory has no such file, no path is given, or a path is a pipe or a device.
    """
    sources = [sources] if isinstance(sources, Path) else sources
    if not sources:
        raise ValueError("no data file is given. Give a text file with --data-path")
    return [file for source in sources for file in _find(source)]


def _find(source: Path) -> list[File]:
    if source.is_file():
        return [File(path=source, name=source.name)]
    if source.exists() and not source.is_dir():
        raise ValueError(_not_regular(source))
    if not source.is_dir():
        raise FileNotFoundError(f"data file not found: {source}. Give a text file or a directory with --data-path")
    found = [File(path=Path(path), name=name) for name, path in sorted(_walk(source))]
    if not found:
        raise ValueError(
            f"{source} holds no data files: a directory's are those that end in .txt, .jsonl or .ndjson, with .gz or "
            f".zst after it or without. Name a file itself with --data-path where it is called otherwise"
        )
    return found


def _walk(top: Path) -> Iterator[tuple[str, str]]:
    """Yields the name below ``top`` and the path of each data file."""
    entered: set[tuple[int, int]] = set()
    real, linked = [("", str(top))], []
    while real or linked:
        if not real:  # a directory that is also reached by a link keeps its own name
            linked.sort(reverse=True)
        prefix, directory = (real or linked).pop()
        place = os.stat(directory)
        if (place.st_dev, place.st_ino) in entered:
            continue
        entered.add((place.st_dev, place.st_ino))
        for entry in _entries(directory):
            if entry.is_dir():
                (linked if entry.is_symlink() else real).append((f"{prefix}{entry.name}/", entry.path))
            elif _is_wanted(entry.name):
                if not entry.is_file():
                    raise ValueError(_not_regular(entry.path))
                yield prefix + entry.name, entry.path


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """Returns what a directory shows; an entry that cannot be looked at might be a directory of texts."""
    path = directory
    try:
        with os.scandir(directory) as scan:
            shown = [entry for entry in scan if not entry.name.startswith(".")]
        for entry in shown:
            path = entry.path
            entry.stat()
    except OSError as error:
        link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        raise type(error)(
            f"{path}{link} cannot be read: {error.strerror}. Make it readable, or move it away"
        ) from error
    return shown


def _not_regular(path: object) -> str:
    return f"{path} is a pipe or a device, and text is read more than once: write it to a file, and give that"


def _is_wanted(name: str) -> bool:
    return name.lower().removesuffix(Form.of(name).packing).endswith((".txt", *_JSON_LINES))
