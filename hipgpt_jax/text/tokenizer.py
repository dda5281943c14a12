"""Byte-level BPE: text to ids and back without loss, whole or as a stream."""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hipgpt_jax import config, files
from hipgpt_jax.text import lossless

MIN_VOCAB_SIZE = 256
# The token after a document, by the names that tokenizers give it; the first one is ours and GPT-2's.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


_BLOCK_IDS = 1 << 20


def _token_bytes(token: str) -> bytes:
    """Bytes that a token stands for; a token outside the byte alphabet stands for its own text."""
    try:
        return bytes(lossless.BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


class Tokenizer:
    """A byte-level BPE vocabulary; ``decode(encode(text)) == text`` for any text.

    Text is text: where it spells a special token, such as the end token, it is encoded as any other.
    Text that is not valid Unicode (a command line can hold such) is read as if each bad sequence
    were U+FFFD, the rule by which files are read too.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # that is, as the text they are, not as themselves
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._bytes: list[bytes] = [b""] * backend.get_vocab_size()
        for token, token_id in backend.get_vocab().items():
            self._bytes[token_id] = token.encode() if token_id in added else _token_bytes(token)
        self._lengths_V = np.array([len(token) for token in self._bytes])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, has_end: bool = False) -> "Tokenizer":
        """Learns a vocabulary; the same texts and size give the same ids.

        Args:
            texts: The text, in pieces as ``corpus.read_text`` yields them.
            vocab_size: Ids wanted, at least 256, 257 with an end token; without it, 256 is plain bytes.
                A text with too few distinct pairs gives fewer.
            has_end: Whether the last one of the ids is an end token.

        References:
            Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016.
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
        """Reads a ``tokenizer.json`` of the tokenizers library and verifies that it loses no text.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a tokenizer, or one that loses or changes text, or whose ids depend on chance.
        """
        require_file(path)
        try:
            value = lossless.validated(files.parse_json(path.read_text(encoding="utf-8")))
            backend = _build(value)
        except lossless.LossError as error:
            raise ValueError(f"{path} does not keep text as it is: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
        vocabulary = cls(backend)
        vocabulary._check_end(path, value)
        return vocabulary

    def _check_end(self, path: Path, value: dict[str, Any]) -> None:
        """Raises ValueError where text could be encoded as the end token."""
        token = next((token for token in END_TOKENS if self._backend.token_to_id(token) == self.end_id), "")
        added = {one["content"] for one in value["added_tokens"] if one.get("special") is not True}
        merged = {"".join(pair) for pair in value["model"]["merges"]}
        if token and (token in added or self.end_id in self.encode(token) or token in merged):
            raise ValueError(f"{path} takes the text {token!r} for its end token: that one must be a special token")

    def to_json(self) -> str:
        """Returns the content of a ``tokenizer.json``, the tokenizers library's own format."""
        return self._backend.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._bytes)

    @property
    def end_id(self) -> int | None:
        """Id of the end token, the first of ``END_TOKENS`` that the vocabulary has; None where it has none."""
        ids = (self._backend.token_to_id(token) for token in END_TOKENS)
        return next((token_id for token_id in ids if token_id is not None), None)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ``text``; no token is added."""
        return self._backend.encode(config.valid_text(text), add_special_tokens=False).ids

    def count_bytes(self, ids: np.ndarray, end_id: int | None = None) -> int:
        """Returns the number of bytes that ``ids`` stand for; ``end_id``, the end of a document, stands for none."""
        blocks = (ids[first : first + _BLOCK_IDS] for first in range(0, len(ids), _BLOCK_IDS))  # lengths are int64
        ends = 0 if end_id is None else int(np.count_nonzero(ids == end_id)) * len(self._bytes[end_id])
        return sum(int(self._lengths_V[block].sum()) for block in blocks) - ends

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yields the ids of each text, encoded on all cores."""
        for encoding in self._backend.encode_batch_fast(
            [config.valid_text(text) for text in texts], add_special_tokens=False
        ):
            yield encoding.ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ``ids``, which need not be valid UTF-8."""
        return b"".join(self._bytes[token_id] for token_id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids``; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def show(self, token_id: int) -> str:
        r"""Returns the text of a token alone; bytes that are no text by themselves are written ``\xNN``."""
        return self._bytes[token_id].decode("utf-8", errors="backslashreplace")

    def decoder(self) -> "StreamDecoder":
        """Returns a decoder that takes ids one at a time."""
        return StreamDecoder(self)


def require_file(path: Path) -> None:
    """Raises FileNotFoundError where a path cannot be a tokenizer."""
    if not path.is_file():
        why = " (it is not a regular file)" if path.exists() else ""
        raise FileNotFoundError(f"tokenizer not found: {path}{why}")


def _build(value: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(value))
    except Exception as error:  # the library raises Exception itself, for a bad merge or regular expression too
        raise ValueError(files.shortened(str(error))) from error


class StreamDecoder:
    """Text as ids come, never half a character.

    The pieces that ``push`` returns, and the one that ``finish`` returns, joined, equal
    ``Tokenizer.decode`` of all the ids. A character whose bytes are spread over several tokens
    appears whole with the last of them. (``tokenizers.decoders.DecodeStream`` drops an unfinished
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
        """Returns the text that ``token_id`` completes, which may be empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """Returns what an unfinished character at the end becomes: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)
