"""Manifest ``data.json`` of a run's ``tokens.bin``. It needs no NumPy, so ``hipgpt-doctor`` can read it without."""

import dataclasses
from pathlib import Path
from typing import Any

from hipgpt_jax import json_files
from hipgpt_jax.text import corpus

TOKENIZER_NAME = "tokenizer.json"
TOKENS_NAME = "tokens.bin"
MANIFEST_NAME = "data.json"

_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_SOURCE_PROPERTIES = {"name": {"type": "string", "minLength": 1}, "bytes": _COUNT, "sha256": _SHA256}
_PROPERTIES: dict[str, Any] = {
    "sources": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": _SOURCE_PROPERTIES,
            "required": list(_SOURCE_PROPERTIES),
            "additionalProperties": False,
        },
    },
    "text_field": {"type": ["string", "null"]},
    "documents": _COUNT,
    "text_bytes": _COUNT,
    "eos_id": {"type": ["integer", "null"], "minimum": 0},
    "tokenizer_sha256": _SHA256 | {"type": ["string", "null"]},
    "requested_vocab_size": _COUNT,
    "vocab_size": {"type": "integer", "minimum": 1, "maximum": 2**31},
    "sample_bytes": _COUNT,
    "token_bytes": {"type": "integer", "enum": [2, 4]},
    "tokens_sha256": _SHA256,
    "train_tokens": _COUNT,
    "validation_tokens": _COUNT,
    "scored_bytes": _COUNT,
}
_SCHEMA = json_files.Schema(
    "data manifest",
    {
        "type": "object",
        "properties": _PROPERTIES,
        "required": list(_PROPERTIES),
        "additionalProperties": False,
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and origin of ``tokens.bin``; stored as ``data.json`` and in the config of each checkpoint.

    Attributes:
        sources: The text files, in order.
        text_field: Key or column of the text in JSON lines and tables; None if no source is such a file.
        documents: Number of documents that are not empty.
        text_bytes: Bytes of their text in UTF-8; each invalid byte sequence counts as U+FFFD, 3 bytes.
        eos_id: Id that follows each document; None for a single document.
        tokenizer_sha256: Digest of the ready-made tokenizer; None if the tokenizer was learned.
        requested_vocab_size: Vocabulary size requested.
        vocab_size: Actual vocabulary size; smaller if the text has too few distinct pairs.
        sample_bytes: Bytes of the training split that the tokenizer was learned from; 0 if it was ready-made.
        token_bytes: Width of an id in ``tokens.bin``, little-endian: 2 or 4.
        tokens_sha256: Digest of ``tokens.bin``.
        train_tokens: Ids in the training split, the first part of the file.
        validation_tokens: Ids in the validation split, the last tenth of the text.
        scored_bytes: Bytes of validation text after the first token, which is never predicted. Nats per byte divide
            by it.
    """

    sources: tuple[corpus.Source, ...]
    text_field: str | None
    documents: int
    text_bytes: int
    eos_id: int | None
    tokenizer_sha256: str | None
    requested_vocab_size: int
    vocab_size: int
    sample_bytes: int
    token_bytes: int
    tokens_sha256: str
    train_tokens: int
    validation_tokens: int
    scored_bytes: int

    @property
    def name(self) -> str:
        """Short name of the text: its first file and the number of further ones."""
        first, *more = (source.name for source in self.sources)
        return f"{first} and {len(more)} more" if more else first

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token."""
        return self.text_bytes / (self.train_tokens + self.validation_tokens)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads ``data.json``.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a manifest.
        """
        value = json_files.read(path)
        try:
            _SCHEMA.check(value, str(path))
        except ValueError as error:
            raise ValueError(f"{error}. Prepare the data again with --reset") from error
        value["sources"] = tuple(corpus.Source(**source) for source in value["sources"])
        manifest = cls(**value)
        if manifest.eos_id is not None and manifest.eos_id >= manifest.vocab_size:
            raise ValueError(f"{path}: eos_id {manifest.eos_id} is not below vocab_size {manifest.vocab_size}")
        return manifest


def token_bytes(vocab_size: int) -> int:
    """Returns the width of an id in ``tokens.bin``: 2 bytes, or 4 for a vocabulary that needs them."""
    return 2 if vocab_size <= 1 << 16 else 4
