"""Streams over gzip and Zstandard files, in bounded memory."""

import gzip
import io
import os
import sys
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER_BYTES = 1 << 18
_GZIP_BLOCK_BYTES = 1 << 16
# One call decompresses all of its input. 4 bytes of Zstandard can expand to 128 KiB, 1 KiB to 32 MiB.
_ZSTANDARD_BLOCK_BYTES = 1 << 10
# The largest window of the zstd command, by --long=31. It is allocated as it is filled.
_MAX_WINDOW_BYTES = 1 << 31
# Causes by a part of Zstandard's error message. Any other error means that the file is damaged.
_CAUSES = {
    "too much memory": "needs a window of more than 2 GiB to be unpacked, or is damaged: unpack it with zstd -d first",
    "llocation error": "needs more memory to be unpacked than there is: unpack it with zstd -d first",
    "ictionary": "was compressed with a dictionary: unpack it with zstd -d -D DICTIONARY first",
}


def open(path: Path, suffix: str) -> io.BufferedReader:
    """Opens the uncompressed content of a file.

    Args:
        path: The file.
        suffix: Compression format, one of ``SUFFIXES``.

    Returns:
        A stream. Reading it raises ValueError with path and cause if the file cannot be decompressed.
    """
    return io.BufferedReader(_Stream(path, _READERS[suffix](path)), _BUFFER_BYTES)


def is_zstandard(path: Path) -> bool:
    """Returns whether the name of a file is that of a Zstandard file."""
    return path.suffix.lower() == ".zst"


def open_frames(path: Path, size: int) -> io.BufferedReader:
    """Opens the uncompressed content of the first ``size`` bytes of a Zstandard file, which are whole frames."""
    return io.BufferedReader(_Stream(path, _read_zstandard(path, size)), _BUFFER_BYTES)


def head(path: Path, count: int) -> bytes:
    """Returns the first ``count`` bytes of the content of a Zstandard file, or as many as can be decompressed."""
    content = b""
    try:
        for block in _read_zstandard(path):
            content += block
            if len(content) >= count:
                break
    except (EOFError, zstandard.ZstdError):
        pass
    return content[:count]


def size_of_whole_frames(path: Path) -> int:
    """Returns the size of a Zstandard file without a last frame that was cut short. Nothing is decompressed.

    Raises:
        ValueError: Something in the file is not a frame.

    References:
        Collet and Kucherawy, `Zstandard Compression <https://www.rfc-editor.org/rfc/rfc8878#section-3>`_, 2021.
    """
    with path.open("rb", buffering=0) as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        while end < size:
            start, end = end, _end_of_frame(file.fileno(), end)
            if end < 0:
                problem = f"is damaged or not a Zstandard file: no frame begins at byte {start}"
                raise ValueError(f"{path} {problem}. Restore it, or use another file")
            if end > size:
                return start
        return size


def _end_of_frame(file: int, start: int) -> int:
    """Returns the position after a frame, which is beyond the file if the frame is cut short; -1 if it is none."""
    beyond = sys.maxsize
    head = os.pread(file, 8, start)
    magic, flags = head[:4], head[4:5]
    if magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5:  # content of another program, to be skipped
        return start + 8 + int.from_bytes(head[4:], "little") if len(head) == 8 else beyond
    if not zstandard.FRAME_HEADER.startswith(magic):
        return -1
    if not flags:
        return beyond
    is_single, has_checksum = flags[0] >> 5 & 1, flags[0] >> 2 & 1
    sizes = 1 - is_single, (0, 1, 2, 4)[flags[0] & 3], (is_single, 2, 4, 8)[flags[0] >> 6]
    position, is_last = start + 5 + sum(sizes), False
    while not is_last:
        header = os.pread(file, 3, position)
        if len(header) < 3:
            return beyond
        block = int.from_bytes(header, "little")
        is_last, kind, length = block & 1, block >> 1 & 3, block >> 3
        if kind == 3:
            return -1
        position += 3 + (1 if kind == 1 else length)  # 1: one byte, repeated
    return position + 4 * has_checksum


class _Stream(io.RawIOBase):
    """Readable stream over a generator of blocks."""

    def __init__(self, path: Path, blocks: Generator[bytes, None, None]) -> None:
        self._path, self._blocks, self._rest = path, blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fills the buffer, except at the end of the content, so that ``peek`` shows the head of the file."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (self._rest or self._read_block()):
            part, self._rest = self._rest[: len(view) - filled], self._rest[len(view) - filled :]
            view[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def _read_block(self) -> bool:
        """Reads the next block that is not empty; returns whether there is one."""
        try:
            self._rest = next(filter(None, self._blocks), b"")
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            cause = next((text for part, text in _CAUSES.items() if part in str(error)), "is damaged or cut short")
            raise ValueError(f"{self._path} {cause}: {error}") from error
        return bool(self._rest)

    def close(self) -> None:
        self._blocks.close()
        super().close()


def _read_gzip(path: Path) -> Generator[bytes, None, None]:
    with gzip.open(path) as file:
        while block := file.read(_GZIP_BLOCK_BYTES):
            yield block


def _read_zstandard(path: Path, size: int = sys.maxsize) -> Generator[bytes, None, None]:
    # The library's own stream_reader takes a truncated file for one that ends there.
    frame = None
    with path.open("rb") as file:
        while block := file.read(min(_ZSTANDARD_BLOCK_BYTES, size)):
            size -= len(block)
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


_READERS = {".gz": _read_gzip, ".zst": _read_zstandard}
SUFFIXES = tuple(_READERS)
