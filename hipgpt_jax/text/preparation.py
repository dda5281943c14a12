"""Preparation of a run's data: learns a tokenizer, encodes a corpus and writes ``tokens.bin`` and ``data.json``."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hipgpt_jax import files, json_files
from hipgpt_jax.text import corpus, dataset, documents, manifest, tokenizer

# Learning keeps every distinct word, about 70 bytes each. In the worst case, a text of distinct words only, 64 MiB
# took 650 MiB of memory. More text would add only rare words, whose pairs are too rare to be merged.
_SAMPLE_BYTES = 1 << 27
_PROGRESS_BYTES = 1 << 20

# 4 MiB of text keep every core busy for half a second, and take 400 MB if every byte becomes a token. The number of
# pieces is limited too, because a short document costs about 1 kB while its batch is encoded.
_BATCH_BYTES = 1 << 22
_BATCH_PIECES = 1 << 13


def prepare(
    directory: Path,
    sources: Path | Sequence[Path],
    vocab_size: int,
    *,
    text_field: str = corpus.DEFAULT_TEXT_FIELD,
    tokenizer_path: Path | None = None,
    end_id: int | None = None,
    progress: corpus.Progress = corpus.ignore_progress,
    note: Callable[[str], None] = lambda line: None,
) -> dataset.Dataset:
    """Learns a tokenizer from the training split of a corpus and writes the token ids, once per directory.

    Memory does not grow with the corpus: text is read, and ids are written, in pieces. Each file is complete or absent.

    Args:
        directory: Directory of the run, which must exist.
        sources: Files and directories, as for ``documents.find``. If they hold several documents, an end token
            follows each of them; in a learned vocabulary it is the last id.
        vocab_size: Vocabulary size, at least 256, or 257 with the end token; ignored for a ready-made tokenizer.
        text_field: Key or column of the text in a file of JSON lines or a table.
        tokenizer_path: A ready-made ``tokenizer.json``; None learns a tokenizer.
        end_id: Id that follows each document, also a single one; None takes the tokenizer's end token, for several
            documents.
        progress: Receives bytes done, total bytes and the activity: reading, learning or encoding.
        note: Receives each of ``corpus.Corpus.notes``.

    Raises:
        OSError: A file does not exist or cannot be read.
        ValueError: A file is broken, there is no text, the tokenizer loses text or has no end token for several
            documents, or the directory holds data of another corpus or other settings.
    """
    if (directory / manifest.MANIFEST_NAME).is_file():
        check_same_data(
            directory, sources, vocab_size, text_field=text_field, tokenizer_path=tokenizer_path, end_id=end_id
        )
        return dataset.Dataset(directory)

    ready = None if tokenizer_path is None else tokenizer.Tokenizer.load(tokenizer_path)
    tokenizer_sha256 = None if tokenizer_path is None else files.sha256(tokenizer_path)
    text = corpus.Corpus(sources, text_field, progress)
    for line in text.notes:
        note(line)
    if ready is not None and text.documents > 1 and ready.end_id is None and end_id is None:
        raise ValueError(
            f"{tokenizer_path} has no end token ({', '.join(tokenizer.END_TOKENS)}) to separate {text.documents} "
            f"documents. Add one with add_special_tokens of the tokenizers library, or give one document"
        )
    vocabulary = ready or _learn(text, vocab_size, progress)
    if end_id is None and text.documents > 1:
        end_id = vocabulary.end_id
    files.write_text(directory / manifest.TOKENIZER_NAME, vocabulary.to_json())
    with files.replacing(directory / manifest.TOKENS_NAME) as temporary:
        train, validation, tokens_sha256 = _write_tokens(temporary, vocabulary, text, end_id, progress)
    data = manifest.Manifest(
        sources=text.sources,
        text_field=_used_text_field(text.sources, text_field),
        documents=text.documents,
        text_bytes=train.text_bytes + validation.text_bytes,
        eos_id=end_id,
        tokenizer_sha256=tokenizer_sha256,
        requested_vocab_size=vocab_size if ready is None else ready.vocab_size,
        vocab_size=vocabulary.vocab_size,
        sample_bytes=min(text.split, _SAMPLE_BYTES) if ready is None else 0,
        token_bytes=manifest.token_bytes(vocabulary.vocab_size),
        tokens_sha256=tokens_sha256,
        train_tokens=train.ids,
        validation_tokens=validation.ids,
        scored_bytes=validation.scored_bytes,
    )
    # Written last: a directory with a manifest is complete.
    json_files.write(directory / manifest.MANIFEST_NAME, dataclasses.asdict(data))
    return dataset.Dataset(directory, verify=False)


def check_same_data(
    directory: Path,
    sources: Path | Sequence[Path],
    vocab_size: int,
    *,
    text_field: str = corpus.DEFAULT_TEXT_FIELD,
    tokenizer_path: Path | None = None,
    end_id: int | None = None,
    compare_tokenizer: bool = True,
) -> None:
    """Raises ValueError with the differences if a run was prepared from another corpus or with other settings.

    The arguments are those of ``prepare``; ``vocab_size`` and ``tokenizer_path`` count only if ``compare_tokenizer``.
    """
    old = manifest.Manifest.read(directory / manifest.MANIFEST_NAME)
    new = [corpus.Source.of(file) for file in documents.find(sources)]
    differences = []
    if len(new) != len(old.sources):
        differences.append(f"--data-path gives {len(new)} files, not its {len(old.sources)}")
    for new_source, old_source in zip(new, old.sources, strict=False):
        if (new_source.format, new_source.sha256) != (old_source.format, old_source.sha256):
            differences.append(
                f"--data-path {new_source.name} (sha256 {new_source.sha256[:12]}…) is not its text "
                f"{old_source.name} ({old_source.sha256[:12]}…)"
            )
            break
    if old.text_field is not None and _used_text_field(new, text_field) not in (None, old.text_field):
        differences.append(f"--text-field {text_field} is not its {old.text_field}")
    if end_id is not None and end_id != old.eos_id:
        differences.append(f"its documents end with {old.eos_id}, not with the token {end_id}")
    if compare_tokenizer:
        differences += _compare_tokenizer(directory, old, vocab_size, tokenizer_path)
    if differences:
        raise ValueError(
            f"the run has other data: {'; '.join(differences)}. Repeat the flags that it was started with, or give "
            f"another --run-name"
        )


def _compare_tokenizer(
    directory: Path, old: manifest.Manifest, vocab_size: int, tokenizer_path: Path | None
) -> list[str]:
    if tokenizer_path is not None:
        tokenizer.require_file(tokenizer_path)
    new_sha256 = None if tokenizer_path is None else files.sha256(tokenizer_path)
    if new_sha256 != old.tokenizer_sha256:
        given = f"{tokenizer_path} (sha256 {new_sha256[:12]}…)" if new_sha256 else "to be learned"
        own = old.tokenizer_sha256 or files.sha256(directory / manifest.TOKENIZER_NAME)
        origin = "" if old.tokenizer_sha256 else ", learned from its text"
        return [f"the tokenizer {given} is not its tokenizer (sha256 {own[:12]}…{origin})"]
    if new_sha256 is None and old.requested_vocab_size != vocab_size:
        return [f"--vocab-size {vocab_size} is not its {old.requested_vocab_size}"]
    return []


def _used_text_field(sources: Sequence[corpus.Source], text_field: str) -> str | None:
    return text_field if any(source.format.has_fields for source in sources) else None


def _learn(text: corpus.Corpus, vocab_size: int, progress: corpus.Progress) -> tokenizer.Tokenizer:
    total, done, reported = min(text.split, _SAMPLE_BYTES), 0, 0

    def pieces() -> Iterator[str]:
        nonlocal done, reported
        for piece in text.sample(_SAMPLE_BYTES):
            if done >= reported:
                progress(min(done, total), total, "learning")
                reported = done + _PROGRESS_BYTES
            done += len(piece.encode())
            yield piece

    return tokenizer.Tokenizer.train(pieces(), vocab_size, has_end=text.documents > 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    ids: int
    text_bytes: int
    scored_bytes: int  # without the first token, which is never predicted


def _write_tokens(
    path: Path,
    vocabulary: tokenizer.Tokenizer,
    text: corpus.Corpus,
    end_id: int | None,
    progress: corpus.Progress,
) -> tuple[_Split, _Split, str]:
    """Writes the ids of both splits; returns the size of each, and the SHA-256 of the file."""
    dtype, digest, splits = f"<u{manifest.token_bytes(vocabulary.vocab_size)}", hashlib.sha256(), []
    with path.open("wb") as file:
        for start, stop in ((0, text.split), (text.split, text.bytes)):
            num_ids = num_bytes = first_bytes = 0
            progress(start, text.bytes, "encoding")
            for ids, size in _encode_batches(vocabulary, text.pieces(start, stop), end_id):
                if not num_ids:
                    first_bytes = vocabulary.count_bytes(ids[:1], end_id)
                num_ids, num_bytes = num_ids + len(ids), num_bytes + size
                content = ids.astype(dtype).tobytes()
                digest.update(content)
                file.write(content)
                # Invalid bytes become U+FFFD, so the text may be longer than its bytes on disk.
                progress(min(start + num_bytes, stop), text.bytes, "encoding")
            splits.append(_Split(ids=num_ids, text_bytes=num_bytes, scored_bytes=num_bytes - first_bytes))
    return splits[0], splits[1], digest.hexdigest()


def encode(
    vocabulary: tokenizer.Tokenizer, text: corpus.Corpus, start: int = 0, end_id: int | None = None
) -> np.ndarray:
    """Returns the int32 ids of a corpus from a byte offset on, the same ids as ``prepare`` writes."""
    batches = _encode_batches(vocabulary, text.pieces(start, text.bytes), end_id)
    return np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in batches)])


def _encode_batches(
    vocabulary: tokenizer.Tokenizer, pieces: Iterator[str | None], end_id: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the int32 ids of consecutive pieces, and the number of bytes that they encode."""
    while batch := list(_take_batch(pieces)):
        yield _encode_batch(vocabulary, batch, end_id), sum(map(_num_bytes, batch))


def _take_batch(pieces: Iterator[str | None]) -> Iterator[str | None]:
    """Yields pieces until they are worth encoding together."""
    size = 0
    for piece in itertools.islice(pieces, _BATCH_PIECES):
        yield piece
        size += _num_bytes(piece)
        if size >= _BATCH_BYTES:
            return


def _encode_batch(vocabulary: tokenizer.Tokenizer, batch: list[str | None], end_id: int | None) -> np.ndarray:
    end = np.array([] if end_id is None else [end_id], np.int32)
    encoded = vocabulary.encode_batch([piece for piece in batch if piece is not None])
    parts = []
    for piece in batch:
        if piece is None:
            parts.append(end)
            continue
        parts.append(ids := np.asarray(next(encoded), np.int32))
        # ``Tokenizer.load`` proves that a tokenizer is lossless; this check of the ids does not rely on the proof.
        if vocabulary.count_bytes(ids) != _num_bytes(piece) or (end_id is not None and end_id in ids):
            raise ValueError(
                f"the tokenizer loses text: {_num_bytes(piece)} bytes became ids of {vocabulary.count_bytes(ids)} "
                f"bytes, in the text that begins {piece[:30]!r}. Use another --tokenizer-path"
            )
    return np.concatenate(parts)


def _num_bytes(piece: str | None) -> int:
    return len((piece or "").encode())
