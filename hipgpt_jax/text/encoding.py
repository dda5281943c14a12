"""Text to a file of ids, by pieces."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hipgpt_jax.text import corpus, tokenizer

TOKENIZER_NAME = "tokenizer.json"
TOKENS_NAME = "tokens.bin"

# 4 MiB of text keep every core busy for half a second, and take 400 MB where every byte becomes a token; short
# documents are limited by their number, because each costs about a kilobyte while its batch is encoded.
_BATCH_BYTES = 1 << 22
_BATCH_PIECES = 1 << 13


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Summary of a ``tokens.bin``.

    Attributes:
        tokens: Ids per split.
        text_bytes: Bytes of text per split.
        sha256: Digest of the file.
    """

    tokens: tuple[int, int]
    text_bytes: tuple[int, int]
    sha256: str


def write_tokens(
    path: Path,
    vocabulary: tokenizer.Tokenizer,
    text: corpus.Corpus,
    end_id: int | None,
    progress: corpus.Progress | None = None,
) -> Encoded:
    """Encodes a corpus to a file of ids, training split first.

    Args:
        path: The file to write.
        vocabulary: The vocabulary.
        text: The documents.
        end_id: Id that follows each document; None for none.
        progress: Called with the bytes of text that are encoded.

    Raises:
        ValueError: The bytes of the ids are not those of the text: the vocabulary loses text.
    """
    tokens, text_bytes, digest = [0, 0], [0, 0], hashlib.sha256()
    with path.open("wb") as file:
        for split, (start, stop) in enumerate(((0, text.split), (text.split, text.bytes))):
            pieces = text.pieces(start, stop)
            while batch := list(_batch(pieces)):
                if progress is not None:
                    progress(min(start + text_bytes[split], stop), text.bytes, "encoding")
                ids = _ids(vocabulary, batch, end_id)
                content = ids.astype(f"<u{token_bytes(vocabulary)}").tobytes()
                digest.update(content)
                file.write(content)
                tokens[split] += len(ids)
                text_bytes[split] += sum(map(_size, batch))
    return Encoded(tokens=(tokens[0], tokens[1]), text_bytes=(text_bytes[0], text_bytes[1]), sha256=digest.hexdigest())


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
