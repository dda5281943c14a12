"""Streams over gzip and Zstandard files, in bounded memory."""

import gzip
import io
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


def _read_zstandard(path: Path) -> Generator[bytes, None, None]:
    # The library's own stream_reader takes a truncated file for one that ends there.
    frame = None
    with path.open("rb") as file:
        while block := file.read(_ZSTANDARD_BLOCK_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


_READERS = {".gz": _read_gzip, ".zst": _read_zstandard}
SUFFIXES = tuple(_READERS)
