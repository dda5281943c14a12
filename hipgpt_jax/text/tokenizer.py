"""Byte-level BPE tokenizer, lossless on any text, and its streaming detokenizer."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hipgpt_jax import config, files, json_files
from hipgpt_jax.text import lossless

MIN_VOCAB_SIZE = 256
# Names of the end-of-document token in common tokenizers. The first one is also that of GPT-2 and of ours.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")

_BLOCK_IDS = 1 << 20
_SPECIAL = {"id": 0, "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
_NOT_OURS = "is not a tokenizer.json of the tokenizers library"


class Tokenizer:
    """Byte-level BPE vocabulary; ``decode(encode(text)) == text`` for any text.

    Text that spells a special token, such as the end token, is encoded like any other text. Text that is not valid
    Unicode, which a command line can hold, is read like a file: each invalid sequence becomes U+FFFD.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # as ordinary text
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._bytes: list[bytes] = [b""] * backend.get_vocab_size()
        for token, token_id in backend.get_vocab().items():
            self._bytes[token_id] = token.encode() if token_id in added else lossless.token_bytes(token)
        self._lengths = np.array([len(token) for token in self._bytes])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, has_end: bool = False) -> "Tokenizer":
        """Learns a vocabulary. The same texts and size give the same ids.

        Args:
            texts: Pieces of the text, as yielded by ``corpus.read_text``.
            vocab_size: Number of ids, at least 256 (plain bytes), or 257 with an end token. A text with too few
                distinct pairs gives fewer.
            has_end: Whether the last id is an end token.

        References:
            Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016,
            https://arxiv.org/abs/1508.07909
        """
        if vocab_size < MIN_VOCAB_SIZE + has_end:
            meaning = "one id for each byte, and one for the end of a document" if has_end else "one id for each byte"
            raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE + has_end} ({meaning}): got {vocab_size}")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - has_end,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        if has_end:
            backend.add_special_tokens([tokenizers.AddedToken(END_TOKENS[0], special=True, normalized=False)])
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a ``tokenizer.json`` of the tokenizers library and verifies that it is lossless.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a tokenizer, the tokenizer loses or changes text, or its ids are random.
        """
        require_file(path)
        try:
            value = json_files.parse(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} {_NOT_OURS}: {error}") from error
        return cls.from_value(value, path)

    @classmethod
    def from_value(cls, value: Any, path: Path, special: Iterable[str] = ()) -> "Tokenizer":
        """Returns the tokenizer of a parsed ``tokenizer.json``; raises the errors of ``load``.

        Args:
            value: The parsed file.
            path: The file, for error messages.
            special: Special tokens to add if the file lacks them.
        """
        try:
            value = lossless.validated(value)
            known = [token["content"] for token in value["added_tokens"]]
            if new := [{**_SPECIAL, "content": text} for text in dict.fromkeys(special) if text not in known]:
                value = lossless.validated({**value, "added_tokens": [*value["added_tokens"], *new]})
            vocabulary = cls(_build(value))
        except lossless.LossError as error:
            raise ValueError(f"{path} does not keep text as it is: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} {_NOT_OURS}: {error}") from error
        vocabulary._check_end(path, value)
        return vocabulary

    def _check_end(self, path: Path, value: dict[str, Any]) -> None:
        """Raises ValueError if text could be encoded as the end token."""
        token = next((token for token in END_TOKENS if self._backend.token_to_id(token) is not None), None)
        if token is None:
            return
        added = {token["content"] for token in value["added_tokens"] if token.get("special") is not True}
        merged = {"".join(pair) for pair in value["model"]["merges"]}
        if token in added or self.end_id in self.encode(token) or token in merged:
            raise ValueError(f"{path} takes the text {token!r} for its end token: that one must be a special token")

    def to_json(self) -> str:
        """Returns the content of a ``tokenizer.json`` of the tokenizers library."""
        return self._backend.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, ``V``."""
        return len(self._bytes)

    @property
    def end_id(self) -> int | None:
        """Id of the first of ``END_TOKENS`` in the vocabulary; None if there is none."""
        ids = (self._backend.token_to_id(token) for token in END_TOKENS)
        return next((token_id for token_id in ids if token_id is not None), None)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, by their texts."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: The text.
            parse_special: Whether text that spells a special token is that token; otherwise it is ordinary text.
        """
        if not (parse_special and self.special_tokens):
            return self._backend.encode(config.valid_text(text), add_special_tokens=False).ids
        special = self.special_tokens
        longest_first = sorted(special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", config.valid_text(text))
        return [token for part in parts for token in ([special[part]] if part in special else self.encode(part))]

    def id_of(self, text: str) -> int:
        """Returns the id of a text that is one token; raises ValueError for any other."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, {', '.join(map(str, ids))}")
        return ids[0]

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yields the ids of each text, encoded on all cores."""
        valid = [config.valid_text(text) for text in texts]
        for encoding in self._backend.encode_batch_fast(valid, add_special_tokens=False):
            yield encoding.ids

    def count_bytes(self, ids: np.ndarray, end_id: int | None = None) -> int:
        """Returns the number of bytes of text that ids stand for; the end token ``end_id`` counts as none."""
        # In blocks, because the lengths are int64 and a corpus has many more ids than a block.
        blocks = (ids[first : first + _BLOCK_IDS] for first in range(0, len(ids), _BLOCK_IDS))
        ends = 0 if end_id is None else int(np.count_nonzero(ids == end_id)) * len(self._bytes[end_id])
        return sum(int(self._lengths[block].sum()) for block in blocks) - ends

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids, which may be invalid UTF-8."""
        return b"".join(self._bytes[token_id] for token_id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def show(self, token_id: int) -> str:
        r"""Returns the text of one token, with ``\xNN`` for bytes that are invalid UTF-8 on their own."""
        return self._bytes[token_id].decode("utf-8", errors="backslashreplace")

    def decoder(self) -> "StreamDecoder":
        """Returns a streaming decoder."""
        return StreamDecoder(self)


def require_file(path: Path) -> None:
    """Raises FileNotFoundError if a path is not a regular file."""
    if not path.is_file():
        why = " (it is not a regular file)" if path.exists() else ""
        raise FileNotFoundError(f"tokenizer not found: {path}{why}")


def _build(value: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(value))
    except Exception as error:  # the library raises plain Exception, for a bad merge or regular expression too
        raise ValueError(files.shortened(str(error))) from error


class StreamDecoder:
    """Streaming detokenizer that never emits half a character.

    The pieces returned by ``push`` and ``finish``, joined, equal ``Tokenizer.decode`` of all ids. A character that
    spans several tokens appears with the last of them. (``tokenizers.decoders.DecodeStream`` drops an unfinished
    character at the end, so its pieces do not add up to the whole.)

    >>> vocabulary = Tokenizer.train([], 256)
    >>> decoder = vocabulary.decoder()
    >>> [decoder.push(token_id) for token_id in vocabulary.encode("né")], decoder.finish()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the text completed by a token, which may be empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """Returns U+FFFD for an unfinished character at the end, or nothing."""
        return self._utf8.decode(b"", final=True)
