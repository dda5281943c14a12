"""Corpus of one or many documents, read in pieces whose tokens are exactly those of the whole text."""

import codecs
import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from hipgpt_jax import files
from hipgpt_jax.text import documents

PIECE_BYTES = 1 << 16
DEFAULT_TEXT_FIELD = "text"

_SCAN_BYTES = 1 << 20
_MAX_NUL_SHARE = 0.01  # exceeded by UTF-16 of any language with spaces and line breaks; text has no NUL

# Receives bytes done, total bytes and the activity.
Progress = Callable[[int, int, str], None]


def ignore_progress(done: int, total: int, activity: str) -> None:
    """Reports no progress."""


# The tokenizer's regex never joins a token across a blank that follows a visible character, so a cut there changes no
# token; a cut inside a run of blanks would. The first group extends to the last such place. Blanks are Unicode's white
# space, as in the tokenizer; Python's \s also has the separators \x1c to \x1f.
_BLANKS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_TO_LAST_BOUNDARY = re.compile(f"(.*[^{_BLANKS}])[{_BLANKS}]", re.DOTALL)


def read_text(stream: BinaryIO, size: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Yields the text of the next ``size`` bytes of a stream in pieces of about ``piece_bytes``.

    The bytes are read as UTF-8. Each invalid sequence becomes U+FFFD, by the Unicode standard's recommended practice.
    Line ends are kept. Pieces end where no token can straddle, or anywhere if a piece has no such place. (A ready-made
    tokenizer may join a visible character and the line break after it. Such a token is cut at the end of a piece.)

    Args:
        stream: Stream of bytes.
        size: Bytes to read; the text ends sooner if the stream does.
        piece_bytes: Bytes per read; memory stays proportional to it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    while size > 0 and (block := stream.read(min(piece_bytes, size))):
        size -= len(block)
        text = held + decoder.decode(block, final=size <= 0)
        boundary = _TO_LAST_BOUNDARY.match(text) if size > 0 else None
        cut = boundary.end(1) if boundary else len(text)
        held = text[cut:]
        if cut:
            yield text[:cut]
    if held := held + decoder.decode(b"", final=True):
        yield held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Identity of a text file.

    Attributes:
        name: File name, or the path relative to the directory in which the file was found.
        bytes: Size on disk.
        sha256: Digest of the file.
    """

    name: str
    bytes: int
    sha256: str

    @property
    def format(self) -> documents.Format:
        """Format of the file."""
        return documents.Format.of(self.name)

    @classmethod
    def of(cls, file: documents.File) -> "Source":
        """Returns the identity of a file, which is read whole."""
        return cls(name=file.name, bytes=file.path.stat().st_size, sha256=files.sha256(file.path))


class Corpus:
    """Non-empty documents of several files, in order. Offsets count the uncompressed bytes of their text.

    Attributes:
        sources: Identities of the files.
        documents: Number of documents.
        bytes: Bytes of their text, before invalid bytes are replaced.
        notes: Warnings about the text for the user, such as bytes that are not UTF-8.
        split: Offset of the validation split, the last tenth. It is moved past the continuation bytes of a UTF-8
            character, so that neither split has half a character.
    """

    def __init__(
        self,
        sources: Path | Sequence[Path],
        text_field: str = DEFAULT_TEXT_FIELD,
        progress: Progress = ignore_progress,
    ) -> None:
        """Reads all files once, to count and to digest.

        Args:
            sources: Files and directories, as for ``documents.find``.
            text_field: Key or column of the text in a file of JSON lines or a table.
            progress: Receives the bytes on disk that have been read.

        Raises:
            OSError: A path does not exist or cannot be read.
            ValueError: A file is broken, or there is no text.
        """
        self._files = documents.find(sources)
        self._text_field = text_field
        self._sizes: list[int] = []
        self._invalid: collections.Counter[Path] = collections.Counter()
        self._nul: collections.Counter[Path] = collections.Counter()
        self.documents = 0
        sources_read: list[Source] = []
        done, total = 0, sum(file.path.stat().st_size for file in self._files)
        for file in self._files:
            progress(done, total, "reading")
            sources_read.append(Source.of(file))
            self._scan(file)
            done += sources_read[-1].bytes
        self.sources = tuple(sources_read)
        self.bytes = sum(self._sizes)
        if not self.bytes:
            names = ", ".join(str(file.path) for file in self._files[:3]) + ", …" * (len(self._files) > 3)
            raise ValueError(
                f"{names} {'is' if len(self._files) == 1 else 'are'} empty: 0 tokens. Give a text file with --data-path"
            )
        self.split = self._find_split()
        self.notes = tuple(self._describe())

    def _scan(self, file: documents.File) -> None:
        """Counts documents, bytes, invalid bytes and NULs of a file."""
        file_size = 0
        for document in file.documents(self._text_field):
            size = 0
            self._invalid[file.path] += document.invalid_bytes
            for block, invalid in documents.count_invalid(document.stream, _SCAN_BYTES):
                size += len(block)
                self._invalid[file.path] += invalid
                self._nul[file.path] += block.count(0)
            file_size += size
            self.documents += size > 0
        self._sizes.append(file_size)

    def _describe(self) -> Iterator[str]:
        if self._invalid.total():
            yield (
                f"{_describe_count(self._invalid)} of the text are not UTF-8 and became U+FFFD; is the file in another "
                f"encoding? iconv -f LATIN1 -t UTF-8 FILE > NEW converts from Latin-1"
            )
        if self._nul.total() > _MAX_NUL_SHARE * self.bytes:
            yield f"{_describe_count(self._nul)} of the text are NUL; is the file UTF-16, or not text?"
        names = [str(file.path) for file in self._files if file.name.lower().endswith(".json")]
        if names:
            yield (
                f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} is read as plain text, braces and "
                f"escapes included; a file of one JSON object per line must be named .jsonl"
            )

    def _find_split(self) -> int:
        offset = self.bytes * 9 // 10
        for stream, size, _ in self._spans(offset, self.bytes):
            for byte in stream.read(min(3, size)):
                if byte & 0xC0 != 0x80:
                    break
                offset += 1
            break
        return offset

    def _spans(self, start: int, stop: int) -> Iterator[tuple[BinaryIO, int, bool]]:
        """Yields the part of each document between two offsets.

        Each is a stream, the number of bytes to read from it, and whether they end the document.
        """
        offset = 0
        for file, file_size in zip(self._files, self._sizes, strict=True):
            if offset + file_size <= start:
                offset += file_size
                continue
            for stream, document_size, _ in file.documents(self._text_field):
                size = file_size if document_size is None else document_size
                first, last = max(start, offset), min(stop, offset + size)
                if first < last:
                    _skip(stream, first - offset)
                    yield stream, last - first, last == offset + size
                offset += size
                if offset >= stop:
                    return

    def pieces(self, start: int, stop: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[str | None]:
        """Yields the text between two offsets in pieces, as ``read_text`` does, and None after each document."""
        for stream, size, is_end in self._spans(start, stop):
            yield from read_text(stream, size, piece_bytes=piece_bytes)
            if is_end:
                yield None

    def sample(self, limit: int) -> Iterator[str]:
        """Yields the training split or, if it is larger than ``limit`` bytes, pieces spread evenly over it."""
        seen = kept = 0
        for piece in self.pieces(0, self.split):
            if piece is None:
                continue
            if self.split <= limit:
                yield piece
                continue
            size = len(piece.encode())
            seen = min(seen + size, self.split)  # U+FFFD may be longer than the bytes that it replaces
            if (kept + size) * self.split <= limit * seen:
                kept += size
                yield piece


def _describe_count(counts: collections.Counter[Path]) -> str:
    number, first = counts.total(), next(path for path, count in counts.items() if count)
    return f"{number} byte{'s' * (number != 1)} (the first in {first})"


def _skip(stream: BinaryIO, size: int) -> None:
    if stream.seekable():
        stream.seek(size, os.SEEK_CUR)  # relative, because a byte order mark may have been read
        return
    while size and (block := stream.read(min(size, PIECE_BYTES))):
        size -= len(block)
