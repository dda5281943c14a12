"""A corpus as token ids on disk, and the batch that a step takes from it."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hipgpt_jax import files
from hipgpt_jax.text import corpus, documents, encoding, manifest, tokenizer

TOKENIZER_NAME = encoding.TOKENIZER_NAME
TOKENS_NAME = encoding.TOKENS_NAME
MANIFEST_NAME = "data.json"

Manifest = manifest.Manifest

# Learning holds every distinct word, about 70 bytes each: in the worst text, whose words are all distinct,
# 64 MiB took 650 MiB of memory. What more text would add are rare words, which are no pairs to merge.
_SAMPLE_BYTES = 1 << 27
_TOLD_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 22


class Dataset:
    """The token ids of a run, memory-mapped.

    Attributes:
        manifest: Contents and origin of the file.
        train: Ids of the training split.
        validation: Ids of the validation split.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        """Opens the ids of a run.

        Args:
            directory: The run's directory.
            verify: Whether to compare the digest of ``tokens.bin``.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: ``data.json`` is not a manifest, or ``tokens.bin`` is not the file that it describes.
        """
        manifest_path, tokens_path = directory / MANIFEST_NAME, directory / TOKENS_NAME
        self.manifest = Manifest.read(manifest_path)
        tokens = self.manifest.train_tokens + self.manifest.validation_tokens
        if tokens_path.stat().st_size != tokens * self.manifest.token_bytes:
            raise ValueError(
                f"{tokens_path} must hold {tokens} ids of {self.manifest.token_bytes} bytes, as {MANIFEST_NAME} "
                f"says: got {tokens_path.stat().st_size} bytes. Prepare it again with --reset"
            )
        if verify:
            _verify(tokens_path, self.manifest)
        ids = np.memmap(tokens_path, dtype=f"<u{self.manifest.token_bytes}", mode="r") if tokens else np.zeros(0, "<u2")
        self.train = ids[: self.manifest.train_tokens]
        self.validation = ids[self.manifest.train_tokens :]

    def check_length(self, length: int) -> None:
        """Raises ValueError where a split is too short to predict anything from ``length`` tokens."""
        for name, ids, needed in (("training", self.train, length + 1), ("validation", self.validation, 2)):
            if len(ids) < needed:
                raise ValueError(
                    f"{self.manifest.name} is too short: its {name} split has {len(ids)} tokens and needs "
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


def _verify(path: Path, found: Manifest) -> None:
    digest, highest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            highest = max(highest, int(np.frombuffer(block, f"<u{found.token_bytes}").max()))
    if digest.hexdigest() != found.tokens_sha256:
        raise ValueError(
            f"{path} is not the file that {MANIFEST_NAME} describes: it was changed (sha256 "
            f"{digest.hexdigest()[:12]}…, expected {found.tokens_sha256[:12]}…). Restore it, or prepare it again with "
            f"--reset"
        )
    if highest >= found.vocab_size:
        raise ValueError(f"{path} has the id {highest}, beyond the vocabulary of {found.vocab_size} in {MANIFEST_NAME}")


def prepare(
    directory: Path,
    sources: Path | Sequence[Path],
    vocab_size: int,
    *,
    text_field: str = corpus.DEFAULT_TEXT_FIELD,
    tokenizer_path: Path | None = None,
    progress: corpus.Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Learns a tokenizer from the training split of a corpus and writes its token ids, once.

    Memory does not grow with the corpus: text is read, and ids are written, in pieces. Each file is complete or absent.
    The manifest is written last, so if it is there the other files are complete.

    Args:
        directory: The run's directory, which exists.
        sources: Files and directories, as ``documents.find`` takes them. Where they hold several documents,
            an end token follows each, which is the last id of a vocabulary that is learned.
        vocab_size: Ids wanted, at least 256, or 257 with the end token; a ready-made tokenizer has its own.
        text_field: Key of the text in a line of a ``.jsonl`` file.
        tokenizer_path: A ready-made ``tokenizer.json``; None learns one.
        progress: Called with bytes done, bytes in all and the activity: reading, learning, encoding.
        note: Called with each of ``corpus.Corpus.notes``.

    Raises:
        OSError: A file is not there or cannot be read.
        ValueError: A file is broken, there is no text, the tokenizer has no end token for several documents
            or loses text, or the run was prepared from another corpus or with other settings.
    """
    if (directory / MANIFEST_NAME).is_file():
        require_same(directory, sources, vocab_size, text_field=text_field, tokenizer_path=tokenizer_path)
        return Dataset(directory)

    ready = None if tokenizer_path is None else tokenizer.Tokenizer.load(tokenizer_path)
    digest = None if tokenizer_path is None else files.sha256(tokenizer_path)
    text = corpus.Corpus(sources, text_field, progress)
    for line in text.notes:
        note(line)
    if ready is not None and text.documents > 1 and ready.end_id is None:
        raise ValueError(
            f"{tokenizer_path} has no end token ({', '.join(tokenizer.END_TOKENS)}) to set {text.documents} documents "
            f"apart. Add one to it, by add_special_tokens of the tokenizers library, or give one document"
        )
    vocabulary = ready or _learn(text, vocab_size, progress)
    end_id = vocabulary.end_id if text.documents > 1 else None
    files.write_text(directory / TOKENIZER_NAME, vocabulary.to_json())
    with files.replacing(directory / TOKENS_NAME) as temporary:
        encoded = encoding.write_tokens(temporary, vocabulary, text, end_id, progress)
    width = encoding.token_bytes(vocabulary)
    first = np.fromfile(directory / TOKENS_NAME, f"<u{width}", count=1, offset=encoded.tokens[0] * width)
    made = Manifest(
        sources=text.sources,
        text_field=_text_field(text.sources, text_field),
        documents=text.documents,
        text_bytes=sum(encoded.text_bytes),
        eos_id=end_id,
        tokenizer_sha256=digest,
        requested_vocab_size=vocab_size if ready is None else ready.vocab_size,
        vocab_size=vocabulary.vocab_size,
        sample_bytes=min(text.split, _SAMPLE_BYTES) if ready is None else 0,
        token_bytes=width,
        tokens_sha256=encoded.sha256,
        train_tokens=encoded.tokens[0],
        validation_tokens=encoded.tokens[1],
        scored_bytes=encoded.text_bytes[1] - vocabulary.count_bytes(first, end_id),
    )
    files.write_json(directory / MANIFEST_NAME, dataclasses.asdict(made))
    return Dataset(directory, verify=False)


def _learn(text: corpus.Corpus, vocab_size: int, progress: corpus.Progress | None) -> tokenizer.Tokenizer:
    total, done, told = min(text.split, _SAMPLE_BYTES), 0, 0

    def pieces() -> Iterator[str]:
        nonlocal done, told
        for piece in text.sample(_SAMPLE_BYTES):
            if progress is not None and done >= told:
                progress(min(done, total), total, "learning")
                told = done + _TOLD_BYTES
            done += len(piece.encode())
            yield piece

    return tokenizer.Tokenizer.train(pieces(), vocab_size, has_end=text.documents > 1)


def _text_field(sources: Sequence[corpus.Source], text_field: str) -> str | None:
    return text_field if any(documents.Form.of(source.name).is_json_lines for source in sources) else None


def require_same(
    directory: Path,
    sources: Path | Sequence[Path],
    vocab_size: int,
    *,
    text_field: str = corpus.DEFAULT_TEXT_FIELD,
    tokenizer_path: Path | None = None,
) -> None:
    """Raises ValueError, saying what differs, where a run was prepared from another corpus or with other settings."""
    old, new = Manifest.read(directory / MANIFEST_NAME), corpus.digests(sources)
    differences = []
    if len(new) != len(old.sources):
        differences.append(f"--data-path gives {len(new)} files, not its {len(old.sources)}")
    for one, other in zip(new, old.sources, strict=False):
        if (documents.Form.of(one.name), one.sha256) != (documents.Form.of(other.name), other.sha256):
            differences.append(
                f"--data-path {one.name} (sha256 {one.sha256[:12]}…) is not its text "
                f"{other.name} ({other.sha256[:12]}…)"
            )
            break
    if _text_field(new, text_field) not in (None, old.text_field) and old.text_field is not None:
        differences.append(f"--text-field {text_field} is not its {old.text_field}")
    digest = None if tokenizer_path is None else _tokenizer_digest(tokenizer_path)
    if digest != old.tokenizer_sha256:
        here, there = (f"{sha[:12]}…" if sha else "learned" for sha in (digest, old.tokenizer_sha256))
        differences.append(f"--tokenizer-path {tokenizer_path} ({here}) is not its tokenizer ({there})")
    elif digest is None and old.requested_vocab_size != vocab_size:
        differences.append(f"--vocab-size {vocab_size} is not its {old.requested_vocab_size}")
    if differences:
        raise ValueError(
            f"the run has other data: {'; '.join(differences)}. Use --reset to start it anew, or another --run-name"
        )


def _tokenizer_digest(path: Path) -> str:
    tokenizer.require_file(path)
    return files.sha256(path)
