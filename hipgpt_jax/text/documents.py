"""Documents from files and directories: plain text or JSON lines, each as it is or compressed."""

import codecs
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_GZIP_BLOCK_BYTES = 1 << 16
# A few bytes of Zstandard can stand for 128 KiB, and a call gives all that its input stands for.
_ZSTANDARD_BLOCK_BYTES = 1 << 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a file holds text, as the suffixes of its name say.

    Attributes:
        is_json_lines: Whether it holds a JSON object a line, ``.jsonl``, a document each; else it is one document.
        packing: ``.gz``, ``.zst`` or nothing.
    """

    is_json_lines: bool
    packing: str

    @classmethod
    def of(cls, name: str) -> "Form":
        """Returns the form of a file of this name; a name that says nothing is plain text."""
        path = PurePath(name.lower())
        packing = path.suffix if path.suffix in _UNPACK else ""
        return cls(is_json_lines=path.name.removesuffix(packing).endswith(".jsonl"), packing=packing)


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

    def open(self) -> BinaryIO:
        """Opens what the file holds, unpacked; a file that cannot be unpacked raises ValueError as it is read."""
        if self.form.packing:
            return io.BufferedReader(_Unpacked(self.path, self.form.packing), 1 << 18)
        return self.path.open("rb")

    def documents(self, text_field: str) -> Iterator[tuple[BinaryIO, int | None]]:
        """Yields each document: its bytes, to be read before the next one is taken, and their number.

        The number is None for a file that is one document, which ends where the file does.

        Args:
            text_field: Key of the text in a JSON object; a lone surrogate in it becomes U+FFFD.

        Raises:
            ValueError: A line is not a JSON object with such a text; the message has its number.
        """
        with self.open() as stream:
            if not self.form.is_json_lines:
                yield stream, None
                return
            for number, line in enumerate(stream, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    try:
                        content = _text(line, text_field)
                    except ValueError as error:
                        raise ValueError(f"{self.path} line {number}: {error}") from error
                    yield io.BytesIO(content), len(content)


def _text(line: bytes, field: str) -> bytes:
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that a document could be: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object with a text: got {type(value).__name__}")
    if field not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise ValueError(f"no field {field!r}: its fields are {keys}. Name the one with the text by --text-field")
    if not isinstance(value[field], str):
        raise ValueError(f"field {field!r} must be a text: got {type(value[field]).__name__}")
    # UTF-16 tells a lone surrogate from half of a pair.
    return value[field].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def find(sources: Path | Sequence[Path]) -> list[File]:
    """Returns the files of documents that paths name, in the order given.

    A directory stands for the files in it and below it whose names end in ``.txt`` or ``.jsonl``, with
    ``.gz`` or ``.zst`` after it or without, in the order of their paths. Hidden ones are passed over. A
    file that is named itself may have any name.

    Raises:
        FileNotFoundError: A path is not there.
        ValueError: A directory has no such file, or no path is given.
    """
    sources = [sources] if isinstance(sources, Path) else sources
    if not sources:
        raise ValueError("no data file is given. Give a text file with --data-path")
    return [file for source in sources for file in _find(source)]


def _find(source: Path) -> list[File]:
    if source.is_file():
        return [File(path=source, name=source.name)]
    if not source.is_dir():
        raise FileNotFoundError(f"data file not found: {source}. Give a text file or a directory with --data-path")
    places = sorted((path.relative_to(source).as_posix(), path) for path in source.rglob("*"))
    found = [File(path=path, name=name) for name, path in places if _is_wanted(name) and path.is_file()]
    if not found:
        raise ValueError(
            f"{source} holds no data files: a directory's are those that end in .txt or .jsonl, with .gz or .zst after "
            f"it or without. Name a file itself with --data-path where it is called otherwise"
        )
    return found


def _is_wanted(name: str) -> bool:
    path = PurePath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.name.lower().removesuffix(Form.of(name).packing).endswith((".txt", ".jsonl"))


class _Unpacked(io.RawIOBase):
    """What a compressed file holds; a file that is damaged or cut short is named in a ValueError."""

    def __init__(self, path: Path, packing: str) -> None:
        self._path = path
        self._blocks = _UNPACK[packing](path)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        try:
            while not self._rest and (block := next(self._blocks, None)) is not None:
                self._rest = memoryview(block)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise ValueError(f"{self._path} is damaged or cut short: {error}") from error
        size = min(memoryview(buffer).nbytes, len(self._rest))
        memoryview(buffer)[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._blocks.close()
        super().close()


def _ungzip(path: Path) -> Generator[bytes, None, None]:
    with gzip.open(path) as file:
        while block := file.read(_GZIP_BLOCK_BYTES):
            yield block


def _unzstandard(path: Path) -> Generator[bytes, None, None]:
    # Not the library's stream_reader, to which a file that was cut short is one that ends there.
    frame = None
    with path.open("rb") as file:
        while block := file.read(_ZSTANDARD_BLOCK_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


_UNPACK: dict[str, Callable[[Path], Generator[bytes, None, None]]] = {".gz": _ungzip, ".zst": _unzstandard}
