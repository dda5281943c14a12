"""Contents and origin of a run's ``tokens.bin``."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastjsonschema

from hipgpt_jax import files
from hipgpt_jax.text import corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and origin of ``tokens.bin``; stored as ``data.json`` and in every config.

    Attributes:
        sources: The files of the text, in order.
        text_field: Key of the text in their JSON lines; None if none of them holds such.
        documents: Documents in them that hold text.
        text_bytes: Bytes of that text in UTF-8; each invalid sequence of bytes is a U+FFFD, of 3 bytes.
        eos_id: Id that follows each document; None if there is only one.
        tokenizer_sha256: Digest of the ready-made tokenizer; None if one was learned.
        requested_vocab_size: Vocabulary requested.
        vocab_size: Vocabulary learned; smaller where the text has too few distinct pairs.
        sample_bytes: Bytes of the training split, spread evenly, that it was learned from; 0 for a ready-made one.
        token_bytes: Width of an id in ``tokens.bin``, little-endian: 2 or 4.
        tokens_sha256: Digest of ``tokens.bin``.
        train_tokens: Ids of the training split, first in the file.
        validation_tokens: Ids of the validation split, the last tenth of the text's bytes.
        scored_bytes: Bytes of the validation split's text after its first token, which nothing predicts: for nats per
            byte.
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
        """What to call the text: its file, or the first one and how many more."""
        first, *more = (source.name for source in self.sources)
        return f"{first} and {len(more)} more" if more else first

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads ``data.json``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a manifest of this version.
        """
        value = files.read_json(path)
        try:
            _validator()(value)
        except fastjsonschema.JsonSchemaValueException as error:
            raise ValueError(
                f"{path} is not a data manifest: {error.message}. Prepare it again with --reset"
            ) from error
        value["sources"] = tuple(corpus.Source(**source) for source in value["sources"])
        found = cls(**value)
        if found.eos_id is not None and found.eos_id >= found.vocab_size:
            raise ValueError(f"{path}: eos_id {found.eos_id} is not below vocab_size {found.vocab_size}")
        return found


_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_SCHEMA = _object(
    {
        "sources": {
            "type": "array",
            "minItems": 1,
            "items": _object({"name": {"type": "string", "minLength": 1}, "bytes": _COUNT, "sha256": _DIGEST}),
        },
        "text_field": {"type": ["string", "null"]},
        "documents": _COUNT,
        "text_bytes": _COUNT,
        "eos_id": {"type": ["integer", "null"], "minimum": 0},
        "tokenizer_sha256": {"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"},
        "requested_vocab_size": _COUNT,
        "vocab_size": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "sample_bytes": _COUNT,
        "token_bytes": {"type": "integer", "enum": [2, 4]},
        "tokens_sha256": _DIGEST,
        "train_tokens": _COUNT,
        "validation_tokens": _COUNT,
        "scored_bytes": _COUNT,
    }
)


@functools.cache
def _validator() -> Callable[[Any], Any]:
    return fastjsonschema.compile(_SCHEMA)
