"""A corpus, the text of one or many documents, read in pieces that tokenize exactly as the whole would."""

import codecs
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
_MAX_NUL_SHARE = 0.01  # UTF-16 of any language with spaces and line breaks has more; text has none

# Called with what is done, what there is to do, both in bytes, and what is being done.
Progress = Callable[[int, int, str], None]

# The tokenizer's regex never joins a token across a blank that follows a visible character, so a cut
# there changes no token; a cut inside a run of blanks would. The first group runs to the last such place.
# Blanks are Unicode's white space, as in the tokenizer; Python's \s has the separators \x1c to \x1f too.
_BLANKS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_TO_LAST_BOUNDARY = re.compile(f"(.*[^{_BLANKS}])[{_BLANKS}]", re.DOTALL)


def read_text(stream: BinaryIO, size: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Yields the text of the next ``size`` bytes of ``stream``, in pieces of about ``piece_bytes``.

    The bytes are read as UTF-8; each byte sequence that is not valid becomes U+FFFD, the replacement
    character, by the Unicode standard's recommended practice. Line ends are kept as they are.
    Pieces end where no token can straddle, or, where a piece holds no such place, anywhere. (A ready-made
    tokenizer may join a visible character and the line break after it: with that one, such a token is cut
    where a piece ends.)

    Args:
        stream: Bytes, from the first one on.
        size: Bytes to read; the text ends sooner where the stream does.
        piece_bytes: Bytes read at a time; memory stays proportional to it.
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
    """A file that text came from.

    Attributes:
        name: Its name, or in a directory that was given its path from there.
        bytes: Its size on disk.
        sha256: Its digest.
    """

    name: str
    bytes: int
    sha256: str


def digests(sources: Path | Sequence[Path]) -> tuple[Source, ...]:
    """Returns what identifies the files that paths name, in order.

    Raises:
        FileNotFoundError: A path is not there.
        ValueError: A directory has no data files.
    """
    return tuple(map(_digest, documents.find(sources)))


def _digest(file: documents.File) -> Source:
    return Source(name=file.name, bytes=file.path.stat().st_size, sha256=files.sha256(file.path))


@dataclasses.dataclass
class _Count:
    """Bytes of a kind, and the first file that has some."""

    bytes: int = 0
    first: Path | None = None

    def add(self, file: documents.File, number: int) -> None:
        self.bytes += number
        self.first = self.first or (file.path if number else None)

    def __str__(self) -> str:
        return f"{self.bytes} byte{'s' * (self.bytes != 1)} (the first in {self.first})"


class Corpus:
    """The documents of several files, in order. Offsets count the uncompressed bytes of all their text.

    A document without text is passed over.

    Attributes:
        sources: The files.
        documents: Number of documents.
        bytes: Bytes of their text, uncompressed, as they are in the files.
        notes: What the user should know about the text: bytes that are not UTF-8, or a form that is not text's.
        split: Offset of the validation split, the last tenth: nine tenths of the bytes, moved on past the
            continuation bytes of a UTF-8 character so that neither side holds half of one.
    """

    def __init__(
        self,
        sources: Path | Sequence[Path],
        text_field: str = DEFAULT_TEXT_FIELD,
        progress: Progress | None = None,
    ) -> None:
        """Reads all of it once, to count and to digest.

        Args:
            sources: Files and directories, as ``documents.find`` takes them.
            text_field: Key of the text in a line of a ``.jsonl`` file.
            progress: Called with the bytes on disk that have been read.

        Raises:
            OSError: A path is not there or cannot be read.
            ValueError: A file is broken, or there is no text at all.
        """
        self._files = documents.find(sources)
        self._text_field = text_field
        self._sizes: list[int] = []
        self._invalid, self._nul = _Count(), _Count()
        self.documents = 0
        digested = []
        done, total = 0, sum(file.path.stat().st_size for file in self._files)
        for file in self._files:
            if progress is not None:
                progress(done, total, "reading")
            digested.append(_digest(file))
            self._count(file)
            done += digested[-1].bytes
        self.sources = tuple(digested)
        self.bytes = sum(self._sizes)
        if not self.bytes:
            names = ", ".join(str(file.path) for file in self._files[:3]) + ", …" * (len(self._files) > 3)
            raise ValueError(
                f"{names} {'is' if len(self._files) == 1 else 'are'} empty: 0 tokens. Give a text file with --data-path"
            )
        self.split = self._find_split()
        self.notes = tuple(self._describe())

    def _count(self, file: documents.File) -> None:
        sizes = []
        for document in file.documents(self._text_field):
            size = 0
            self._invalid.add(file, document.invalid_bytes)
            for block, invalid in documents.count_invalid(document.stream, _SCAN_BYTES):
                size += len(block)
                self._invalid.add(file, invalid)
                self._nul.add(file, block.count(0))
            sizes.append(size)
        self._sizes.append(sum(sizes))
        self.documents += sum(size > 0 for size in sizes)

    def _describe(self) -> Iterator[str]:
        if self._invalid.bytes:
            yield (
                f"{self._invalid} of the text are not UTF-8 and became U+FFFD; is the file in another encoding? "
                f"iconv -f LATIN1 -t UTF-8 FILE > NEW converts from Latin-1"
            )
        if self._nul.bytes > _MAX_NUL_SHARE * self.bytes:
            yield f"{self._nul} of the text are NUL; is the file UTF-16, or not text?"
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
        """Yields what lies between two offsets, by documents: bytes, how many to read, whether they end it."""
        place = 0
        for file, file_size in zip(self._files, self._sizes, strict=True):
            if place + file_size <= start:
                place += file_size
                continue
            for stream, own_size, _ in file.documents(self._text_field):
                size = file_size if own_size is None else own_size
                first, last = max(start, place), min(stop, place + size)
                if first < last:
                    _skip(stream, first - place)
                    yield stream, last - first, last == place + size
                place += size
                if place >= stop:
                    return

    def pieces(self, start: int, stop: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[str | None]:
        """Yields the text between two offsets, by pieces as ``read_text`` makes them, and None after each document.

        The same arguments give the same pieces.
        """
        for stream, size, is_end in self._spans(start, stop):
            yield from read_text(stream, size, piece_bytes=piece_bytes)
            if is_end:
                yield None

    def sample(self, limit: int) -> Iterator[str]:
        """Yields the training split, or where it is larger than ``limit`` bytes, pieces spread evenly over it."""
        seen = kept = 0
        for piece in self.pieces(0, self.split):
            if piece is None:
                continue
            if self.split <= limit:
                yield piece
                continue
            size = len(piece.encode())
            seen = min(seen + size, self.split)
            if (kept + size) * self.split <= limit * seen:
                kept += size
                yield piece


def _skip(stream: BinaryIO, size: int) -> None:
    if stream.seekable():
        stream.seek(size, os.SEEK_CUR)  # a byte order mark has been read
        return
    while size and (block := stream.read(min(size, PIECE_BYTES))):
        size -= len(block)
