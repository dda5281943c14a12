"""Text to a file of ids, by pieces, in a way that can be cut short at any moment and gone on with."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hipgpt_jax import files
from hipgpt_jax.text import corpus, tokenizer

TOKENIZER_NAME = "tokenizer.json"
TOKENS_NAME = "tokens.bin"
JOURNAL_NAME = "prepare.json"

# 4 MiB of text keep every core busy for half a second; short documents are limited by their number,
# as each costs about a kilobyte while its batch is encoded.
_BATCH_CHARS = 1 << 22
_BATCH_PIECES = 1 << 13


@dataclasses.dataclass(frozen=True, kw_only=True)
class Journal:
    """How far ``tokens.bin`` has come; stored as ``prepare.json`` until it is whole.

    Attributes:
        request: All that the files depend on; work for another request is not gone on with.
        tokenizer_sha256: Digest of the vocabulary that was learned.
        pieces: Pieces encoded, of each split.
        tokens: Ids written, of each split.
    """

    request: dict[str, Any]
    tokenizer_sha256: str
    pieces: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)

    def advanced(self, split: int, pieces: int, tokens: int) -> "Journal":
        """Returns the journal after more pieces and ids of a split."""
        if split == 0:
            return dataclasses.replace(self, pieces=(self.pieces[0] + pieces, 0), tokens=(self.tokens[0] + tokens, 0))
        return dataclasses.replace(
            self,
            pieces=(self.pieces[0], self.pieces[1] + pieces),
            tokens=(self.tokens[0], self.tokens[1] + tokens),
        )

    def write(self, directory: Path) -> None:
        """Replaces the journal on disk."""
        files.write_json(directory / JOURNAL_NAME, dataclasses.asdict(self))


def begin(directory: Path, request: dict[str, Any], make: Callable[[], tokenizer.Tokenizer]) -> Journal:
    """Returns the journal of a directory, or where it has none of this request, makes a vocabulary and a new one."""
    try:
        old = files.read_json(directory / JOURNAL_NAME)
        digest = files.sha256(directory / TOKENIZER_NAME)
    except (FileNotFoundError, ValueError):
        old, digest = {}, ""
    if old.get("request") == request and old.get("tokenizer_sha256") == digest:
        return Journal(
            request=request, tokenizer_sha256=digest, pieces=tuple(old["pieces"]), tokens=tuple(old["tokens"])
        )
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
) -> tuple[int, int]:
    """Writes ``tokens.bin`` from where the journal says on; the file is the same however often it was cut short.

    Args:
        directory: Where the file and the journal are.
        journal: What ``begin`` returned.
        text: The documents; the training split comes first in the file.
        vocabulary: What ``begin`` made.
        end_id: Id that follows each document; None for none.
        progress: Told of the bytes of text that are encoded.

    Returns:
        Ids of the training split and of the validation split.
    """
    width = token_bytes(vocabulary)
    path = directory / TOKENS_NAME
    path.touch()
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) < sum(journal.tokens) * width:
            journal = dataclasses.replace(journal, pieces=(0, 0), tokens=(0, 0))
        file.truncate(sum(journal.tokens) * width)
        file.seek(0, os.SEEK_END)
        for split in (0, 1):
            if split or not journal.pieces[1]:
                for latest in _append(file, journal, text, split, vocabulary, end_id, progress):
                    latest.write(directory)
                    journal = latest
    return journal.tokens


def _append(
    file: BinaryIO,
    journal: Journal,
    text: corpus.Corpus,
    split: int,
    vocabulary: tokenizer.Tokenizer,
    end_id: int | None,
    progress: corpus.Progress | None,
) -> Iterator[Journal]:
    """Writes the ids of a split, and yields the journal of what is on disk."""
    width = token_bytes(vocabulary)
    start, stop = ((0, text.split), (text.split, text.bytes))[split]
    pieces = text.pieces(start, stop)
    place = start + sum(map(_size, itertools.islice(pieces, journal.pieces[split])))
    while batch := list(_batch(pieces)):
        if progress is not None:
            progress(min(place, stop), text.bytes, "encoding")
        ids = _ids(vocabulary, batch, end_id)
        file.write(ids.astype(f"<u{width}").tobytes())
        file.flush()
        os.fsync(file.fileno())
        place += sum(map(_size, batch))
        yield (journal := journal.advanced(split, len(batch), len(ids)))


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
    length = 0
    for piece in itertools.islice(pieces, _BATCH_PIECES):
        yield piece
        length += len(piece or "")
        if length >= _BATCH_CHARS:
            return


def _ids(vocabulary: tokenizer.Tokenizer, batch: list[str | None], end_id: int | None) -> np.ndarray:
    end = [] if end_id is None else [end_id]
    encoded = vocabulary.encode_batch([piece for piece in batch if piece is not None])
    ids: list[int] = []
    for piece in batch:
        ids += end if piece is None else next(encoded)
    return np.asarray(ids, np.int32)


def _size(piece: str | None) -> int:
    return len((piece or "").encode())
