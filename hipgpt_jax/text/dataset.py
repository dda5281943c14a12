"""A corpus as token ids on disk, and the batch that a step takes from it."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hipgpt_jax import files
from hipgpt_jax.text import corpus, tokenizer

TOKENIZER_NAME = "tokenizer.json"
TOKENS_NAME = "tokens.bin"
MANIFEST_NAME = "data.json"

# 64 pieces of 64 KiB keep every core busy and 4 MiB of text in memory.
_PIECE_BYTES = 1 << 16
_PIECES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``tokens.bin`` holds and where it came from; stored as ``data.json`` and in every config.

    Attributes:
        source: Name of the text file, without its directory.
        source_bytes: Its size.
        source_sha256: Its digest.
        requested_vocab_size: Vocabulary asked for.
        vocab_size: Vocabulary learned; smaller where the text has too few distinct pairs.
        token_bytes: Width of an id in ``tokens.bin``, little-endian: 2 or 4.
        train_tokens: Ids of the training split, first in the file.
        validation_tokens: Ids of the validation split, the last tenth of the text's bytes.
        validation_bytes: Bytes of text in the validation split, for bits a byte.
    """

    source: str
    source_bytes: int
    source_sha256: str
    requested_vocab_size: int
    vocab_size: int
    token_bytes: int
    train_tokens: int
    validation_tokens: int
    validation_bytes: int


class Dataset:
    """The token ids of a run, memory-mapped.

    Attributes:
        manifest: What the file holds.
        train: Ids of the training split.
        validation: Ids of the validation split.
    """

    def __init__(self, directory: Path) -> None:
        manifest_path, tokens_path = directory / MANIFEST_NAME, directory / TOKENS_NAME
        self.manifest = _parse_manifest(manifest_path)
        tokens = self.manifest.train_tokens + self.manifest.validation_tokens
        if tokens_path.stat().st_size != tokens * self.manifest.token_bytes:
            raise ValueError(
                f"{tokens_path} must hold {tokens} ids of {self.manifest.token_bytes} bytes, as {MANIFEST_NAME} "
                f"says: got {tokens_path.stat().st_size} bytes. Prepare it again with --reset"
            )
        ids = np.memmap(tokens_path, dtype=f"<u{self.manifest.token_bytes}", mode="r")
        self.train = ids[: self.manifest.train_tokens]
        self.validation = ids[self.manifest.train_tokens :]

    def check_length(self, length: int) -> None:
        """Raises ValueError where a split is too short to predict anything from ``length`` tokens."""
        for name, ids, needed in (("training", self.train, length + 1), ("validation", self.validation, 2)):
            if len(ids) < needed:
                raise ValueError(
                    f"{self.manifest.source} is too short: its {name} split has {len(ids)} tokens and needs "
                    f"{needed}. Use more text, or a shorter --seq"
                )

    def batch_at(self, step: int, *, seed: int, batch_size: int, length: int) -> np.ndarray:
        """Returns the training batch of a step, a pure function of its arguments.

        Windows start at uniformly drawn positions, with replacement. The draws are raw words of the
        Philox counter generator, whose stream NumPy fixes for good.

        Args:
            step: The step, from 0.
            seed: Of the data order.
            batch_size: Rows, ``B``.
            length: Tokens that are predicted in a row, ``T``.

        Returns:
            int32 ids ``[B, T + 1]``: inputs are ``[:, :-1]``, targets ``[:, 1:]``.
        """
        starts = len(self.train) - length
        words = np.random.Philox(key=[seed, step]).random_raw(batch_size)
        return np.stack([self.train[start : start + length + 1] for start in words % starts]).astype(np.int32)


def prepare(directory: Path, source: Path, vocab_size: int) -> Dataset:
    """Learns a tokenizer from the training split of ``source`` and writes its token ids, once.

    Memory does not grow with the corpus: text is read, and ids are written, by pieces. The manifest
    is written last, so its presence says that the other files are whole.

    Args:
        directory: The run's directory, which exists.
        source: A text file.
        vocab_size: Ids wanted, at least 256.

    Raises:
        FileNotFoundError: There is no such text file.
        ValueError: It is empty, or the run was prepared from another text or vocabulary.
    """
    _require_text(source)
    if (directory / MANIFEST_NAME).is_file():
        require_same(directory, source, vocab_size)
        return Dataset(directory)

    split = corpus.split_offset(source)
    vocabulary = tokenizer.Tokenizer.train(corpus.read_text(source, 0, split), vocab_size)
    files.write_text(directory / TOKENIZER_NAME, vocabulary.to_json())
    token_bytes = 2 if vocabulary.vocab_size <= 1 << 16 else 4
    with files.replacing(directory / TOKENS_NAME) as temporary, temporary.open("wb") as file:
        counts = [
            _append_tokens(file, _encoded(vocabulary, source, *span), token_bytes)
            for span in ((0, split), (split, None))
        ]
    manifest = Manifest(
        source=source.name,
        source_bytes=source.stat().st_size,
        source_sha256=files.sha256(source),
        requested_vocab_size=vocab_size,
        vocab_size=vocabulary.vocab_size,
        token_bytes=token_bytes,
        train_tokens=counts[0],
        validation_tokens=counts[1],
        validation_bytes=source.stat().st_size - split,
    )
    files.write_json(directory / MANIFEST_NAME, dataclasses.asdict(manifest))
    return Dataset(directory)


def _require_text(source: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"data file not found: {source}. Give a text file with --data-path")
    if source.stat().st_size == 0:
        raise ValueError(f"{source} is empty: 0 tokens to train on. Give a text file with --data-path")


def encode(vocabulary: tokenizer.Tokenizer, source: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Returns the ids of a text file between two byte offsets, int32, as ``prepare`` would write them."""
    pieces = _encoded(vocabulary, source, start, stop)
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in pieces)])


def _encoded(vocabulary: tokenizer.Tokenizer, source: Path, start: int, stop: int | None) -> Iterator[list[int]]:
    pieces = corpus.read_text(source, start, stop, chunk_bytes=_PIECE_BYTES)
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        yield from vocabulary.encode_batch(batch)


def _append_tokens(file: BinaryIO, encoded: Iterator[list[int]], token_bytes: int) -> int:
    count = 0
    for ids in encoded:
        file.write(np.asarray(ids, dtype=f"<u{token_bytes}").tobytes())
        count += len(ids)
    return count


def _parse_manifest(path: Path) -> Manifest:
    value = files.read_json(path)
    fields = dataclasses.fields(Manifest)
    if value.keys() != {field.name for field in fields}:
        raise ValueError(f"{path} is not a data manifest: it must hold exactly {[field.name for field in fields]}")
    for field in fields:
        if type(value[field.name]) is not field.type:
            raise ValueError(f"{path} must hold {field.name} of type {field.type}: got {value[field.name]!r}")
    return Manifest(**value)


def require_same(directory: Path, source: Path, vocab_size: int) -> None:
    """Raises ValueError, saying what differs, where a run was prepared from another text or vocabulary."""
    _require_text(source)
    old, digest = _parse_manifest(directory / MANIFEST_NAME), files.sha256(source)
    differences = []
    if old.source_sha256 != digest:
        differences.append(
            f"--data-path {source} (sha256 {digest[:12]}…) is not its text {old.source} ({old.source_sha256[:12]}…)"
        )
    if old.requested_vocab_size != vocab_size:
        differences.append(f"--vocab-size {vocab_size} is not its {old.requested_vocab_size}")
    if differences:
        raise ValueError(
            f"the run has other data: {'; '.join(differences)}. Use --reset to start it anew, or another --run-name"
        )
