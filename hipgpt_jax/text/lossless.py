"""Validation of a ``tokenizer.json``: accepts byte-level BPE whose configuration proves that it is lossless.

Encoding a sample of text proves nothing, because any of 1.1 million characters or any added token may be lost. The
configuration is a proof: a byte-level pre-tokenizer maps every byte to a character, each of those characters is a
token, and no other part may change text or act at random.
"""

from typing import Any

from hipgpt_jax import files

ALPHABET_SIZE = 256
_LOSSLESS_SPLITS = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")  # all but Removed
_REMEDY = "Use a byte-level BPE tokenizer with no normalizer and no added blank, such as GPT-2's"


def _byte_of_char() -> dict[str, int]:
    """Returns the byte of each character of GPT-2's alphabet, which has a printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(ALPHABET_SIZE) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def token_bytes(token: str) -> bytes:
    """Returns the bytes of a token; a token with characters outside the byte alphabet stands for its own text."""
    try:
        return bytes(BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


class LossError(ValueError):
    """A tokenizer that would lose or change text, or is random."""


def validated(value: Any) -> dict[str, Any]:
    """Returns the parts of a parsed ``tokenizer.json`` that turn text into ids, if they are lossless.

    All other parts are dropped, which leaves them at the defaults of the tokenizers library: none. Truncation, padding
    and the post-processor add or remove tokens, and some of their settings make the library panic.

    Raises:
        LossError: Some text would not be restored from its ids, or the ids are random.
        ValueError: The value is not a tokenizer.
    """
    _require(isinstance(value, dict), "it must hold a JSON object", value)
    model, added = value.get("model"), value.get("added_tokens") or []
    _require(isinstance(model, dict), "it must hold an object named model", model)
    _require(isinstance(added, list), "added_tokens must be an array", added)
    kind = model.get("type", "BPE")  # GPT-2's own file has no type
    if kind != "BPE":
        raise LossError(f"its model is {_short(kind)}, which cannot represent every byte. {_REMEDY}")
    _check_vocabulary(model)
    merges = [_merge(merge, model["vocab"]) for merge in model["merges"]]
    _check_model(model)
    _check_added(added, model["vocab"])
    _check_normalizer(value.get("normalizer"))
    _check_pre_tokenizer(value.get("pre_tokenizer"))
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": value["pre_tokenizer"],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": model["vocab"],
            "merges": merges,
            "ignore_merges": model.get("ignore_merges") is True,
        },
    }


def _check_vocabulary(model: dict[str, Any]) -> None:
    vocab: Any = model.get("vocab")
    _require(isinstance(vocab, dict), "model.vocab must be an object of tokens and ids", vocab)
    _require(isinstance(model.get("merges"), list), "model.merges must be an array", model.get("merges"))
    used = set()
    for token, token_id in vocab.items():
        # With a repeated id, or an added token in a gap, the library decodes an id as the token that it saw last.
        if type(token_id) is not int or not 0 <= token_id < len(vocab) or token_id in used:
            raise ValueError(
                f"model.vocab must number its {len(vocab)} tokens from 0 without a gap or a repeated id: "
                f"got {_short(token_id)} for {_short(token)}"
            )
        used.add(token_id)
    if missing := [byte for char, byte in BYTE_OF_CHAR.items() if char not in vocab]:
        raise LossError(
            f"{len(missing)} of the {ALPHABET_SIZE} bytes have no token in model.vocab, the first is "
            f"0x{missing[0]:02x}. {_REMEDY}"
        )


def _merge(merge: Any, vocab: dict[str, int]) -> list[str]:
    """Returns the two tokens of a merge, which older files write as one string. Unknown ones make the library panic."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
        raise ValueError(f"each of model.merges must be two tokens: got {_short(merge)}")
    if missing := [token for token in (*pair, "".join(pair)) if token not in vocab]:
        raise ValueError(f"model.merges has the token {_short(missing[0])}, which model.vocab lacks")
    return pair


def _check_model(model: dict[str, Any]) -> None:
    dropout = model.get("dropout")
    if dropout is not None and dropout != 0:
        raise LossError(
            f"model.dropout is {_short(dropout)}, so equal texts get other ids each time. Set it to null in the file"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name) not in (None, ""):
            raise LossError(f"model.{name} is {_short(model[name])}, which byte-level tokens do not have. {_REMEDY}")


def _check_added(added: list[Any], vocab: dict[str, int]) -> None:
    seen = set()
    for token in added:
        _require(isinstance(token, dict), "each of added_tokens must be an object", token)
        content = token.get("content")
        if not isinstance(content, str) or not content or content in seen:
            raise ValueError(f"added_tokens must have a content each, none of them twice: got {_short(content)}")
        seen.add(content)
        # Special tokens are never searched for in text, so their stripping has no effect.
        if token.get("special") is not True and (token.get("lstrip") or token.get("rstrip")):
            raise LossError(
                f"added token {_short(content)} has lstrip or rstrip set, which removes the blanks beside it. "
                f"Set both to false in the file"
            )
        if content in vocab and all(char in BYTE_OF_CHAR for char in content) and not content.isascii():
            raise LossError(
                f"added token {_short(content)} is also the byte-level token of other bytes in model.vocab. "
                f"Remove it from added_tokens"
            )


def _check_normalizer(value: Any) -> None:
    if value is None or (isinstance(value, dict) and value.get("type") == "Sequence" and not value.get("normalizers")):
        return
    raise LossError(f"its normalizer, {_type(value)}, changes text. {_REMEDY}")


def _check_pre_tokenizer(value: Any) -> None:
    """Accepts one byte-level step among steps that only split text."""
    parts: Any = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        parts = value.get("pretokenizers")
        _require(isinstance(parts, list), "pre_tokenizer.pretokenizers must be an array", parts)
    kinds = [_type(part) for part in parts]
    if kinds.count("ByteLevel") != 1:
        raise LossError(f"its pre_tokenizer, {_type(value)}, must be ByteLevel or hold it once. {_REMEDY}")
    for kind, part in zip(kinds, parts, strict=True):
        if kind == "ByteLevel" and part.get("add_prefix_space") is not False:
            raise LossError(
                f"its pre_tokenizer adds a blank in front of text: add_prefix_space is not false. {_REMEDY}"
            )
        if kind in ("Split", "Punctuation") and part.get("behavior", "Isolated") not in _LOSSLESS_SPLITS:
            raise LossError(
                f"its pre_tokenizer, {kind}, removes text: behavior must be one of {', '.join(_LOSSLESS_SPLITS)}"
            )
        if kind not in ("ByteLevel", "Split", "Punctuation", "Digits"):
            raise LossError(f"its pre_tokenizer, {kind}, is not known to keep text as it is. {_REMEDY}")


def _require(condition: bool, text: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{text}: got {_short(got)}")


def _type(value: Any) -> str:
    return _short(value.get("type")).strip("'") if isinstance(value, dict) else _short(value)


def _short(value: Any) -> str:
    """Returns a bounded description; the value may be as large as the file."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    return "null" if value is None else files.shortened(repr(value), 40)
