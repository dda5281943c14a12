"""Documents in files and directories: plain text, JSON lines or tables, uncompressed or compressed."""

import codecs
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple, NoReturn

from hipgpt_jax import compression, files, json_files
from hipgpt_jax.text import tables

MAX_LINE_BYTES = 1 << 26  # of JSON, whose objects take up to 25 times the memory of their text
_KINDS = {".jsonl": "json lines", ".ndjson": "json lines", ".csv": "csv", ".parquet": "parquet"}
_HEAD_BYTES = 512

# First bytes of files that are not UTF-8 text. UTF-32 comes first: its byte order mark begins with that of UTF-16.
_CONVERT = "it must be UTF-8. Convert it: iconv -f {0} -t UTF-8 FILE > NEW"
_UNPACK = "unpack it, and give the unpacked file or directory"
_FOREIGN_HEADS = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _CONVERT.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _CONVERT.format("UTF-16")),
    (rb"\x1f\x8b\x08", "gzip data", "give it a name that ends in .gz"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard data", "give it a name that ends in .zst"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", _UNPACK),
    (rb"\xfd7zXZ\0", "xz data", _UNPACK),
    (rb"PK\x03\x04", "a zip archive", _UNPACK),
    (rb"PAR1\x15", "Parquet data", "give it a name that ends in .parquet"),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK),
)


class Document(NamedTuple):
    """Text of one document.

    Attributes:
        stream: Bytes of the text; must be read before the next document is taken.
        bytes: Number of bytes; None for a file that is one document, which ends with the file.
        invalid_bytes: Bytes of its line or row that were not UTF-8 and were replaced.
    """

    stream: BinaryIO
    bytes: int | None
    invalid_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Format of a file, which its name determines.

    Attributes:
        kind: ``text``, a file that is one document; ``json lines`` (``.jsonl``, ``.ndjson``), with an object per line;
            ``csv`` or ``parquet``, with a row per document.
        compression: ``.gz``, ``.zst`` or empty.
    """

    kind: str
    compression: str

    @property
    def has_fields(self) -> bool:
        """Whether documents have fields, of which one is the text."""
        return self.kind != "text"

    @classmethod
    def of(cls, name: str) -> "Format":
        """Returns the format of a file name; the default is uncompressed plain text."""
        path = PurePath(name.lower())
        suffix = path.suffix if path.suffix in compression.SUFFIXES else ""
        kind = _KINDS.get(PurePath(path.name.removesuffix(suffix)).suffix, "text")
        return cls(kind=kind, compression=suffix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file of documents.

    Attributes:
        path: Path of the file.
        name: File name, or the path relative to the directory in which the file was found.
    """

    path: Path
    name: str

    @property
    def format(self) -> Format:
        """Format of the file."""
        return Format.of(self.name)

    def open(self) -> io.BufferedReader:
        """Opens the uncompressed content; reading raises ValueError if it cannot be decompressed."""
        suffix = self.format.compression
        return compression.open(self.path, suffix) if suffix else self.path.open("rb")

    def documents(self, text_field: str) -> Iterator[Document]:
        """Yields each document. A byte order mark at the head of the file is skipped.

        Args:
            text_field: Key or column of the text; a lone surrogate in the text becomes U+FFFD.

        Raises:
            ValueError: The file is not UTF-8 text, or a line or row has no text. The message has its number.
        """
        if self.format.kind == "parquet":
            yield from map(_decoded, self._rows(text_field))
            return
        with self.open() as stream:
            head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            check_head(head, self.path)
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            if self.format.kind == "json lines":
                yield from self._json_documents(stream, text_field)
            elif self.format.kind == "csv":
                lines = (line for _, line in self._lines(stream))
                yield from map(_decoded, tables.read_csv(lines, self.path, text_field, MAX_LINE_BYTES))
            else:
                yield Document(stream, None, 0)

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        advice = ". Split the document, or give it as a file of plain text"
        return files.numbered_lines(stream, self.path, MAX_LINE_BYTES, advice)

    def _rows(self, text_field: str) -> Iterator[bytes]:
        if self.format.compression:
            raise ValueError(f"{self.path} must not be compressed as a whole: unpack it")
        return tables.read_parquet(self.path, text_field)

    def _json_documents(self, stream: BinaryIO, text_field: str) -> Iterator[Document]:
        for number, line in self._lines(stream):
            if line := line.strip():
                text = line.decode("utf-8", errors="replace")
                try:
                    content = _text_of(text, text_field).encode()
                except ValueError as error:
                    raise ValueError(f"{self.path} line {number}: {error}") from error
                yield Document(io.BytesIO(content), len(content), _count_invalid(line, text))


def _decoded(content: bytes) -> Document:
    text = content.decode("utf-8", errors="replace")
    replaced = text.encode()
    return Document(io.BytesIO(replaced), len(replaced), _count_invalid(content, text))


def check_head(head: bytes, path: Path) -> None:
    """Raises ValueError if the first bytes of a file show that it is not UTF-8 text."""
    for pattern, kind, remedy in _FOREIGN_HEADS:
        if re.match(pattern, head):
            raise ValueError(f"{path} is {kind}: {remedy}")


def _count_invalid(content: bytes, text: str) -> int:
    """Returns the number of bytes that are not UTF-8; ``text`` is the decoded content, with U+FFFD for those."""
    if "\ufffd" not in text:
        return 0
    return len(content) - len(content.decode("utf-8", errors="ignore").encode())


def count_invalid(stream: BinaryIO, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yields each block of a stream, and the number of bytes found not to be UTF-8 once the block was decoded."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    block = b" "
    while block:
        pending = decoder.getstate()[0]  # an incomplete character at the end of the last block
        block = stream.read(block_bytes)
        text = decoder.decode(block, final=not block)
        decoded = pending + block
        yield block, _count_invalid(decoded[: len(decoded) - len(decoder.getstate()[0])], text)


def _text_of(line: str, field: str) -> str:
    try:
        # Only the text matters: other fields of some datasets hold NaN, or integers too long for Python.
        value = json.loads(line, object_pairs_hook=json_files.unique_keys, parse_int=float, parse_constant=float)
    except json.JSONDecodeError as error:
        hint = _JQ_HINT if line in ("{", "[", "[{") else ""
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{hint}") from error
    except RecursionError as error:
        raise ValueError("not JSON that a document could be: it is nested too deeply") from error
    if not isinstance(value, dict):
        hint = _JQ_HINT if isinstance(value, list) else ""
        raise ValueError(f"must be a JSON object with a text: got {type(value).__name__}{hint}")
    if field not in value:
        keys = files.shortened(", ".join(map(repr, value))) or "none"
        nested = ". A field inside another object cannot be named" if field.partition(".")[0] in value else ""
        raise ValueError(
            f"no field {field!r}: its fields are {keys}. Name the one with the text by --text-field{nested}"
        )
    text = value[field]
    if not isinstance(text, str):
        kind = {type(None): "null", float: "a number"}.get(type(text), type(text).__name__)
        raise ValueError(f"field {field!r} must be a text: got {kind}")
    return without_surrogates(text)


_JQ_HINT = (
    ". Each line must hold a whole object: jq -c . FILE > NEW makes it so of indented JSON, jq -c '.[]' of an array"
)


def without_surrogates(text: str) -> str:
    """Returns text with U+FFFD for lone surrogates, which a JSON escape can hold and UTF-8 cannot."""
    # UTF-16 joins the two halves of a pair, so that only lone ones are replaced.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def find(sources: Path | Sequence[Path]) -> list[File]:
    """Returns the files of documents in the given files and directories, in the given order.

    A directory stands for the files in its tree whose names end in ``.txt``, ``.jsonl``, ``.ndjson``, ``.csv`` or
    ``.parquet``, optionally followed by ``.gz`` or ``.zst``, sorted by path. Hidden files and directories are skipped.
    Links are followed; a directory that is reached twice is read once. A file that is given itself may have any name.

    Raises:
        OSError: A path does not exist, a directory cannot be read, or a link in it is broken.
        ValueError: A directory has no such file, no path is given, or a path is a pipe or a device.
    """
    sources = [sources] if isinstance(sources, Path) else sources
    if not sources:
        raise ValueError("no data file is given. Give a text file with --data-path")
    return [file for source in sources for file in _find(source)]


def _find(source: Path) -> list[File]:
    if source.is_file():
        return [File(path=source, name=source.name)]
    if not source.exists():
        raise FileNotFoundError(f"data file not found: {source}. Give a text file or a directory with --data-path")
    if not source.is_dir():
        _refuse_special(source)
    found = [File(path=source / name, name=name) for name in sorted(_walk(str(source)))]
    if not found:
        raise ValueError(
            f"{source} holds no data files: a directory's are those that end in .txt, .jsonl, .ndjson, .csv or "
            f".parquet, with .gz or .zst after it or without. Name a file itself with --data-path where it is called "
            f"otherwise"
        )
    return found


def _walk(top: str) -> Iterator[str]:
    """Yields the path below ``top`` of each data file."""
    # Links are followed last, so that a directory that is also reached through a link keeps its own name.
    entered: set[tuple[int, int]] = set()
    roots = [top]
    while roots:
        roots.sort(key=lambda root: f"{root}/", reverse=True)
        for folder, folders, names in os.walk(roots.pop(), onerror=_refuse_unreadable):
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in entered:
                folders.clear()
                continue
            entered.add((state.st_dev, state.st_ino))
            folders[:] = [name for name in folders if not name.startswith(".")]
            roots += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            for name in names:
                path = os.path.join(folder, name)
                if not name.startswith(".") and _is_data_file(path):
                    yield os.path.relpath(path, top)


def _is_data_file(path: str) -> bool:
    try:
        os.stat(path)  # even of another name: a broken link might have been a directory of texts
    except OSError as error:
        _refuse_unreadable(error)
    name = os.path.basename(path).lower()
    if not name.removesuffix(Format.of(name).compression).endswith((".txt", *_KINDS)):
        return False
    if not os.path.isfile(path):
        _refuse_special(path)
    return True


def _refuse_unreadable(error: OSError) -> NoReturn:
    path = str(error.filename)
    link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
    raise type(error)(f"{path}{link} cannot be read: {error.strerror}. Make it readable, or move it away") from error


def _refuse_special(path: Path | str) -> NoReturn:
    raise ValueError(
        f"{path} is a pipe or a device, and text is read more than once: write it to a file, and give that"
    )
