"""What a run's ids were made from."""

import dataclasses
from pathlib import Path
from typing import Any

from hipgpt_jax import files
from hipgpt_jax.text import corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``tokens.bin`` holds and where it came from; stored as ``data.json`` and in every config.

    Attributes:
        sources: The files of the text, in order.
        text_field: Key of the text in their JSON lines; None where none of them holds such.
        documents: Documents in them that hold text.
        text_bytes: Bytes of that text, uncompressed.
        eos_id: Id that follows each document; None where there is one document only.
        tokenizer_sha256: Digest of the ready-made tokenizer; None where one was learned.
        requested_vocab_size: Vocabulary asked for.
        vocab_size: Vocabulary learned; smaller where the text has too few distinct pairs.
        sample_bytes: Bytes of the training split, spread evenly, that it was learned from; 0 for a ready-made one.
        token_bytes: Width of an id in ``tokens.bin``, little-endian: 2 or 4.
        train_tokens: Ids of the training split, first in the file.
        validation_tokens: Ids of the validation split, the last tenth of the text's bytes.
        validation_bytes: Bytes of text in the validation split, for bits a byte.
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
    train_tokens: int
    validation_tokens: int
    validation_bytes: int

    @property
    def name(self) -> str:
        """What to call the text: its file, or the first one and how many more."""
        first, *more = (source.name for source in self.sources)
        return f"{first} and {len(more)} more" if more else first

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads ``data.json``, as this version writes it or as 0.1 did, for one text file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no manifest.
        """
        value = _from_old(files.read_json(path))
        names = [field.name for field in dataclasses.fields(cls)]
        if value.keys() != set(names):
            raise ValueError(f"{path} is not a data manifest: it must hold exactly {names}")
        optional = {"text_field": str, "eos_id": int, "tokenizer_sha256": str}
        for name in names[1:]:
            kind = optional.get(name, int)
            if type(value[name]) is not kind and (name not in optional or value[name] is not None):
                raise ValueError(f"{path} must hold {name} of type {kind.__name__}: got {value[name]!r}")
        value["sources"] = _sources(path, value["sources"])
        return cls(**value)


def _from_old(value: dict[str, Any]) -> dict[str, Any]:
    """Gives the manifest of one text file, as it was before there could be several, the keys it has now."""
    old = {"source": "name", "source_bytes": "bytes", "source_sha256": "sha256"}
    if not old.keys() <= value.keys():
        return value
    size, validation = value["source_bytes"], value.get("validation_bytes")
    return {
        "sources": [{new: value[name] for name, new in old.items()}],
        "text_field": None,
        "documents": 1,
        "text_bytes": size,
        "eos_id": None,
        "tokenizer_sha256": None,
        "sample_bytes": size - validation if type(size) is int is type(validation) else None,
        **{name: part for name, part in value.items() if name not in old},
    }


def _sources(path: Path, value: Any) -> tuple[corpus.Source, ...]:
    kinds = {"name": str, "bytes": int, "sha256": str}
    parts = value if isinstance(value, list) else []
    if not parts or not all(
        isinstance(part, dict) and {key: type(found) for key, found in part.items()} == kinds for part in parts
    ):
        raise ValueError(f"{path} must hold sources, each with its name, bytes and sha256: got {value!r}")
    return tuple(corpus.Source(**part) for part in parts)
