"""Text to a file of ids, by pieces, in a way that can be cut short at any moment and gone on with."""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fastjsonschema
import numpy as np

from hipgpt_jax import files
from hipgpt_jax.text import corpus, tokenizer

TOKENIZER_NAME = "tokenizer.json"
TOKENS_NAME = "tokens.bin"
JOURNAL_NAME = "prepare.json"

# 4 MiB of text keep every core busy for half a second, and take 400 MB where every byte becomes a token; short
# documents are limited by their number, because each costs about a kilobyte while its batch is encoded.
_BATCH_BYTES = 1 << 22
_BATCH_PIECES = 1 << 13

_PAIR = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**53}, "minItems": 2, "maxItems": 2}
_SCHEMA = {
    "type": "object",
    "properties": {
        "request": {"type": "object"},
        "tokenizer_sha256": {"type": "string"},
        "pieces": _PAIR,
        "tokens": _PAIR,
        "bytes": _PAIR,
        "tokens_sha256": {"type": "string"},
    },
    "required": ["request", "tokenizer_sha256", "pieces", "tokens", "bytes", "tokens_sha256"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Journal:
    """The progress of ``tokens.bin``; stored as ``prepare.json`` until the file is complete.

    Attributes:
        request: All that the files depend on; work for another request is not continued.
        tokenizer_sha256: Digest of the vocabulary.
        pieces: Pieces encoded, per split.
        tokens: Ids written, per split.
        bytes: Bytes of text encoded, per split.
        tokens_sha256: Digest of the ids written.
    """

    request: dict[str, Any]
    tokenizer_sha256: str
    pieces: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    tokens_sha256: str = hashlib.sha256().hexdigest()

    def advanced(self, split: int, batch: list[str | None], tokens: int, digest: str) -> "Journal":
        """Returns the journal after a batch of pieces of a split that became ``tokens`` ids."""

        def added(old: tuple[int, int], number: int) -> tuple[int, int]:
            return (old[0] + number, old[1]) if split == 0 else (old[0], old[1] + number)

        return dataclasses.replace(
            self,
            pieces=added(self.pieces, len(batch)),
            tokens=added(self.tokens, tokens),
            bytes=added(self.bytes, sum(map(_size, batch))),
            tokens_sha256=digest,
        )

    def restarted(self) -> "Journal":
        """Returns the journal of the same request before any work."""
        return Journal(request=self.request, tokenizer_sha256=self.tokenizer_sha256)

    def write(self, directory: Path) -> None:
        """Replaces the journal on disk."""
        files.write_json(directory / JOURNAL_NAME, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """Reads ``prepare.json``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a journal of this version.
        """
        value = files.read_json(path)
        try:
            _validator()(value)
        except fastjsonschema.JsonSchemaValueException as error:
            raise ValueError(f"{path} is not a journal of preparing: {files.shortened(error.message)}") from error
        for name in ("pieces", "tokens", "bytes"):
            value[name] = tuple(value[name])
        return cls(**value)


@functools.cache
def _validator() -> Callable[[Any], Any]:
    return fastjsonschema.compile(_SCHEMA)


def begin(directory: Path, request: dict[str, Any], make: Callable[[], tokenizer.Tokenizer]) -> Journal:
    """Returns the journal of a directory; if it has none of this request, makes a vocabulary and a new journal."""
    try:
        old = Journal.read(directory / JOURNAL_NAME)
        if old.request == request and old.tokenizer_sha256 == files.sha256(directory / TOKENIZER_NAME):
            return old
    except (FileNotFoundError, ValueError):
        pass  # a journal that cannot be read is not continued
    (directory / JOURNAL_NAME).unlink(missing_ok=True)
    files.write_text(directory / TOKENIZER_NAME, make().to_json())
    journal = Journal(request=request, tokenizer_sha256=files.sha256(directory / TOKENIZER_NAME))
    journal.write(directory)
    return journal


def write_tokens(
    directory: Path,
    journal: Journal,
    text: corpus.Corpus,
    vocabulary: tokenizer.Tokenizer,
    *,
    end_id: int | None,
    progress: corpus.Progress | None = None,
) -> Journal:
    """Writes ``tokens.bin``, continuing from the journal; the file is the same however often the work was interrupted.

    Args:
        directory: The directory of the file and the journal.
        journal: The result of ``begin``. Where the file or the text is not the one it describes, all is written again.
        text: The documents; the training split comes first in the file.
        vocabulary: The vocabulary that ``begin`` made.
        end_id: Id that follows each document; None for none.
        progress: Called with the bytes of text that are encoded.

    Returns:
        The journal of the complete file.

    Raises:
        ValueError: The bytes of the ids are not those of the text: the vocabulary loses text.
    """
    size = sum(journal.tokens) * token_bytes(vocabulary)
    path = directory / TOKENS_NAME
    path.touch()
    with path.open("r+b") as file:
        digest = _digest(file, size)
        if file.tell() < size or digest.hexdigest() != journal.tokens_sha256:
            journal, digest, size = journal.restarted(), hashlib.sha256(), 0
        file.truncate(size)
        file.seek(size)
        for split, ends in enumerate(((0, text.split), (text.split, text.bytes))):
            pieces = text.pieces(*ends)
            if not _skip(pieces, journal, split):
                return write_tokens(directory, journal.restarted(), text, vocabulary, end_id=end_id, progress=progress)
            while batch := list(_batch(pieces)):
                if progress is not None:
                    progress(min(ends[0] + journal.bytes[split], ends[1]), text.bytes, "encoding")
                ids = _ids(vocabulary, batch, end_id)
                content = ids.astype(f"<u{token_bytes(vocabulary)}").tobytes()
                digest.update(content)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                journal = journal.advanced(split, batch, len(ids), digest.hexdigest())
                journal.write(directory)
    return journal


def _skip(pieces: Iterator[str | None], journal: Journal, split: int) -> bool:
    """Skips the pieces that are encoded; False if they are not those of the journal."""
    skipped = sum(map(_size, itertools.islice(pieces, journal.pieces[split])))
    is_cut_before_the_second = split == 0 and journal.pieces[1] and next(pieces, False) is not False
    return skipped == journal.bytes[split] and not is_cut_before_the_second


def _digest(file: BinaryIO, size: int) -> "hashlib._Hash":
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, _BATCH_BYTES))):
        digest.update(block)
        size -= len(block)
    return digest


def token_bytes(vocabulary: tokenizer.Tokenizer) -> int:
    """Returns the width of an id in ``tokens.bin``: 2, or 4 where there are too many for 2."""
    return 2 if vocabulary.vocab_size <= 1 << 16 else 4


def encode(
    vocabulary: tokenizer.Tokenizer, text: corpus.Corpus, start: int = 0, end_id: int | None = None
) -> np.ndarray:
    """Returns the ids of a text from an offset on, int32, as ``write_tokens`` would write them."""
    pieces = text.pieces(start, text.bytes)
    parts = [np.zeros(0, np.int32)]
    while batch := list(_batch(pieces)):
        parts.append(_ids(vocabulary, batch, end_id))
    return np.concatenate(parts)


def _batch(pieces: Iterator[str | None]) -> Iterator[str | None]:
    """Yields pieces until they are worth encoding together."""
    size = 0
    for piece in itertools.islice(pieces, _BATCH_PIECES):
        yield piece
        size += _size(piece)
        if size >= _BATCH_BYTES:
            return


def _ids(vocabulary: tokenizer.Tokenizer, batch: list[str | None], end_id: int | None) -> np.ndarray:
    end = np.zeros(0, np.int32) if end_id is None else np.array([end_id], np.int32)
    encoded = vocabulary.encode_batch([piece for piece in batch if piece is not None])
    parts = []
    for piece in batch:
        if piece is None:
            parts.append(end)
            continue
        parts.append(ids := np.asarray(next(encoded), np.int32))
        if vocabulary.count_bytes(ids) != _size(piece) or (end_id is not None and end_id in ids):
            raise ValueError(
                f"the tokenizer loses text: {_size(piece)} bytes became ids of {vocabulary.count_bytes(ids)} bytes, in "
                f"the text that begins {piece[:30]!r}. Use another --tokenizer-path"
            )
    return np.concatenate(parts)


def _size(piece: str | None) -> int:
    return len((piece or "").encode())
