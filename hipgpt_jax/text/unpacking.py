"""Uncompressed content of gzip and Zstandard files, in bounded memory."""

import gzip
import io
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER_BYTES = 1 << 18
_GZIP_BLOCK_BYTES = 1 << 16
# A call returns all that its input stands for, and 4 bytes of Zstandard can stand for 128 KiB: 32 MiB at most.
_ZSTANDARD_BLOCK_BYTES = 1 << 10
# The most that zstd's own command line makes, by --long=31. It is allocated as it is filled.
_MAX_WINDOW_BYTES = 1 << 31
# By a part of Zstandard's error message; any other error means that the file is damaged.
_CAUSES = {
    "too much memory": "needs a window of more than 2 GiB to be unpacked, or is damaged: unpack it with zstd -d first",
    "llocation error": "needs more memory to be unpacked than there is: unpack it with zstd -d first",
    "ictionary": "was compressed with a dictionary: unpack it with zstd -d -D DICTIONARY first",
}


def open(path: Path, suffix: str) -> io.BufferedReader:
    """Opens a compressed file.

    Args:
        path: The file.
        suffix: One of ``SUFFIXES``, the format of the file.

    Returns:
        Its uncompressed content. Reading it raises ValueError, with path and cause, where it cannot be unpacked.
    """
    return io.BufferedReader(_Unpacked(path, suffix), _BUFFER_BYTES)


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, suffix: str) -> None:
        self._path = path
        self._blocks = _UNPACK[suffix](path)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fills the buffer unless the content ends, so that a peek shows the head of the file."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view):
            if not self._rest:
                if (block := self._next()) is None:
                    break
                self._rest = memoryview(block)
            size = min(len(view) - filled, len(self._rest))
            view[filled : filled + size] = self._rest[:size]
            self._rest, filled = self._rest[size:], filled + size
        return filled

    def _next(self) -> bytes | None:
        try:
            return next(self._blocks, None)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            cause = next((text for part, text in _CAUSES.items() if part in str(error)), "is damaged or cut short")
            raise ValueError(f"{self._path} {cause}: {error}") from error

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
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


_UNPACK: dict[str, Callable[[Path], Generator[bytes, None, None]]] = {".gz": _ungzip, ".zst": _unzstandard}
SUFFIXES = tuple(_UNPACK)
