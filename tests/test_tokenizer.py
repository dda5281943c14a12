"""Tests of the tokenizer: lossless round trips, deterministic training, streaming, and refused files."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hipgpt_jax.text import tokenizer

SETTINGS = settings(deadline=None, derandomize=True, database=None)

TEXT = (
    "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n\n"
    "\tThe slings and arrows\r\nof 1602, it's naïve — 要生存 还是毁灭 👩‍👩‍👧 🙂🙂 \x00\x1c\x1f!\n"
) * 6
BYTES = tokenizer.Tokenizer.train([TEXT], 256)
MERGED = tokenizer.Tokenizer.train([TEXT], 330)
BOTH = pytest.mark.parametrize("vocabulary", [BYTES, MERGED], ids=["bytes", "merged"])

# All of Unicode, half of it from what the merges were learned on, so that merged tokens are common.
ANY_TEXT = st.text() | st.lists(st.sampled_from(TEXT) | st.characters(codec="utf-8")).map("".join)
ANY_IDS = st.lists(st.integers(0, 255) | st.integers(0, MERGED.vocab_size - 1))


@BOTH
@SETTINGS
@given(text=ANY_TEXT)
@example(text="")
@example(text="🙂 \r\n\n \t\x00\x1b[0m\x85\xa0\u2028 '’s 's'S")
@example(text=TEXT)
def test_decoding_restores_any_text(vocabulary: tokenizer.Tokenizer, text: str) -> None:
    assert vocabulary.decode(vocabulary.encode(text)) == text


@BOTH
@SETTINGS
@given(ids=ANY_IDS)
def test_decode_equals_the_library(vocabulary: tokenizer.Tokenizer, ids: list[int]) -> None:
    ids = [token_id % vocabulary.vocab_size for token_id in ids]
    assert vocabulary.decode(ids) == tokenizers.Tokenizer.from_str(vocabulary.to_json()).decode(ids)


@SETTINGS
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_encode_batch_equals_encode(texts: list[str]) -> None:
    assert list(MERGED.encode_batch(texts)) == [MERGED.encode(text) for text in texts]


@SETTINGS
@given(content=st.binary())
@example(content="€".encode())
def test_256_ids_are_plain_bytes(content: bytes) -> None:
    assert {BYTES.decode_bytes([token_id]) for token_id in range(256)} == {bytes([byte]) for byte in range(256)}
    text = content.decode("utf-8", "replace")
    assert [BYTES.decode_bytes([token_id]) for token_id in BYTES.encode(text)] == [
        bytes([byte]) for byte in text.encode()
    ]
    assert BYTES.vocab_size == 256


def test_a_larger_vocabulary_shortens_the_text() -> None:
    assert MERGED.vocab_size == 330
    assert len(MERGED.encode(TEXT)) < len(BYTES.encode(TEXT)) / 2


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary() -> None:
    assert tokenizer.Tokenizer.train(["aaab"], 5000).vocab_size == 256 + len(["aa", "ab", "aaab"])


@pytest.mark.parametrize("size", [255, 1, 0, -1])
def test_fewer_ids_than_bytes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must be at least 256 .*: got {size}$"):
        tokenizer.Tokenizer.train([TEXT], size)


def test_training_is_the_same_in_every_process_and_on_any_number_of_cores() -> None:
    program = """
import hashlib, sys
from hipgpt_jax.text import tokenizer
text = sys.stdin.buffer.read().decode()
print(hashlib.sha256(tokenizer.Tokenizer.train([text], 330).to_json().encode()).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=TEXT.encode(),
            stdout=subprocess.PIPE,
            check=True,
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": cores},
        ).stdout.strip()
        for seed, cores in (("1", "1"), ("2", "2"), ("3", "7"))
    }
    assert digests == {hashlib.sha256(MERGED.to_json().encode()).hexdigest().encode()}


@SETTINGS
@given(cuts=st.lists(st.integers(0, 1000), max_size=20))
def test_training_is_independent_of_how_the_text_is_split(cuts: list[int]) -> None:
    places = [match.end() for match in re.finditer(r"\S(?= )", TEXT)]
    ends = sorted({places[cut % len(places)] for cut in cuts} | {len(TEXT)})
    pieces = [TEXT[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == TEXT
    assert tokenizer.Tokenizer.train(pieces, 330).to_json() == MERGED.to_json()


@SETTINGS
@given(
    content=st.binary() | st.lists(st.sampled_from([b"a", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80"])).map(b"".join)
)
@example(content=b"caf\xe9")
@example(content=b"\xed\xa0\x80")
def test_command_line_bytes_decode_like_a_file(content: bytes) -> None:
    smuggled, plain = content.decode("utf-8", "surrogateescape"), content.decode("utf-8", "replace")
    assert MERGED.encode(smuggled) == MERGED.encode(plain)
    assert MERGED.decode(MERGED.encode(smuggled)) == plain


@pytest.mark.parametrize("code", [0xD800, 0xDBFF, 0xDC00, 0xDC7F, 0xDC80, 0xDCFF, 0xDD00, 0xDFFF])
def test_a_lone_surrogate_becomes_the_replacement_character(code: int) -> None:
    assert MERGED.decode(MERGED.encode(f"é{chr(code)}é")) == "é\ufffdé"
    assert list(MERGED.encode_batch([f"é{chr(code)}é"])) == [MERGED.encode("é\ufffdé")]


@SETTINGS
@given(text=st.text(st.characters(exclude_categories=())))
def test_invalid_unicode_is_encoded_as_valid_text(text: str) -> None:
    read = MERGED.decode(MERGED.encode(text))
    assert MERGED.decode(MERGED.encode(read)) == read
    assert [char for char in read if char != "\ufffd"] == [char for char in text if _is_scalar(char)] or (
        any(0xDC80 <= ord(char) <= 0xDCFF for char in text)
    )


def _is_scalar(char: str) -> bool:
    return char != "\ufffd" and not 0xD800 <= ord(char) <= 0xDFFF


@BOTH
@SETTINGS
@given(ids=ANY_IDS)
@example(ids=BYTES.encode("🙂")[:3])
def test_joined_stream_pieces_equal_the_decoded_text(vocabulary: tokenizer.Tokenizer, ids: list[int]) -> None:
    ids = [token_id % vocabulary.vocab_size for token_id in ids]
    stream = vocabulary.decoder()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == vocabulary.decode(ids)


@BOTH
@SETTINGS
@given(text=ANY_TEXT)
def test_a_stream_emits_each_character_once_complete(vocabulary: tokenizer.Tokenizer, text: str) -> None:
    ids = vocabulary.encode(text)
    stream, shown = vocabulary.decoder(), ""
    for count, token_id in enumerate(ids, start=1):
        shown += stream.push(token_id)
        assert shown == vocabulary.decode_bytes(ids[:count]).decode("utf-8", "ignore")
    assert stream.finish() == ""
    assert shown == text


def test_streams_are_independent() -> None:
    first, second = BYTES.decoder(), BYTES.decoder()
    head, *rest = BYTES.encode("é")
    assert first.push(head) == ""
    assert second.push(BYTES.encode("a")[0]) == "a"
    assert first.push(rest[0]) == "é"


def test_a_token_outside_the_byte_alphabet_is_its_own_text() -> None:
    """A tokenizer trained by other software may contain such tokens: added ones, or ones with a space."""
    value = json.loads(BYTES.to_json())
    value["model"]["vocab"]["to be"] = 256
    backend = tokenizers.Tokenizer.from_str(json.dumps(value))
    backend.add_tokens(["éé"])
    vocabulary = tokenizer.Tokenizer(backend)
    assert vocabulary.decode([256]) == backend.decode([256]) == "to be"
    assert vocabulary.encode("néé")[1:] == [257]
    assert vocabulary.decode(vocabulary.encode("néé")) == "néé"


@SETTINGS
@given(text=ANY_TEXT)
def test_the_file_is_in_the_librarys_own_format(text: str) -> None:
    assert tokenizers.Tokenizer.from_str(MERGED.to_json()).encode(text).ids == MERGED.encode(text)


def test_load_restores_a_saved_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(MERGED.to_json(), encoding="utf-8")
    loaded = tokenizer.Tokenizer.load(path)
    assert loaded.to_json() == MERGED.to_json()
    assert loaded.encode(TEXT) == MERGED.encode(TEXT)
    assert loaded.vocab_size == 330


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b'"tokenizer"',
        b'{"model": {"vocab_size": 256}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}}',
        MERGED.to_json().encode()[:-100],
        MERGED.to_json().encode()[:100],
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a tokenizer.json")):
        tokenizer.Tokenizer.load(path)


@pytest.mark.parametrize("name", ["nosuch.json", "."])
def test_a_missing_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"tokenizer not found: {tmp_path / name}")):
        tokenizer.Tokenizer.load(tmp_path / name)


ENDED = tokenizer.Tokenizer.train([TEXT], 330, has_end=True)
SPECIAL = st.sampled_from([*tokenizer.END_TOKENS, "<|endof", "text|>", " ", "\n", "a"])


def test_the_end_token_is_the_last_id() -> None:
    assert (ENDED.vocab_size, ENDED.end_id) == (330, 329)
    assert (MERGED.end_id, BYTES.end_id) == (None, None)
    assert ENDED.encode(TEXT) == tokenizer.Tokenizer.train([TEXT], 329).encode(TEXT)
    assert tokenizer.Tokenizer.train(["aaab"], 5000, has_end=True).end_id == 256 + len(["aa", "ab", "aaab"])
    assert ENDED.show(329) == "<|endoftext|>"


def test_an_end_token_needs_an_id_beside_the_bytes() -> None:
    assert tokenizer.Tokenizer.train([TEXT], 257, has_end=True).end_id == 256
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*the end of a document\): got 256$"):
        tokenizer.Tokenizer.train([TEXT], 256, has_end=True)


@SETTINGS
@given(parts=st.lists(ANY_TEXT | SPECIAL))
@example(parts=["<|endoftext|>"])
@example(parts=["to be<|endoftext|>or </s><eos>", "<|endoftext|>"])
def test_text_that_spells_the_end_token_is_text(parts: list[str]) -> None:
    text = "".join(parts)
    loaded = tokenizer.Tokenizer(tokenizers.Tokenizer.from_str(ENDED.to_json()))
    for vocabulary in (ENDED, loaded):
        ids = vocabulary.encode(text)
        assert vocabulary.end_id not in ids
        assert list(vocabulary.encode_batch([text, text])) == [ids, ids]
        assert vocabulary.decode(ids) == text


def byte_level(**settings: Any) -> tokenizers.Tokenizer:
    """Returns a vocabulary as other software writes it: bytes, some merges, and GPT-2's end token."""
    backend = tokenizers.Tokenizer.from_str(MERGED.to_json())
    backend.add_special_tokens(["<|endoftext|>"])
    for name, value in settings.items():
        setattr(backend, name, value)
    return backend


def sequence(*others: Any) -> tokenizers.Tokenizer:
    """Returns a vocabulary with further pre-tokenizers before the byte-level one."""
    steps = [*others, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)] if others else []
    return byte_level(pre_tokenizer=tokenizers.pre_tokenizers.Sequence(steps))


def word_piece() -> tokenizers.Tokenizer:
    words = {word: number for number, word in enumerate(["[UNK]", "[SEP]", "the", "king", "##s"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return backend


def test_a_third_party_tokenizer_round_trips_text(tmp_path: Path) -> None:
    backend = byte_level(
        post_processor=tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 330)]
        )
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.add_tokens(["King's"])
    backend.save(str(tmp_path / "ready.json"))
    ready = tokenizer.Tokenizer.load(tmp_path / "ready.json")
    assert ready.end_id == 330
    assert ready.encode("King's") == [331]
    assert ready.encode(TEXT) == MERGED.encode(TEXT)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (word_piece(), "its model is 'WordPiece', which cannot represent every byte"),
        (byte_level(normalizer=tokenizers.normalizers.NFC()), "its normalizer, NFC, changes text"),
        (byte_level(normalizer=tokenizers.normalizers.Replace("  ", " ")), "its normalizer, Replace, changes text"),
        (
            byte_level(normalizer=tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase()])),
            "its normalizer, Sequence, changes text",
        ),
        (
            byte_level(pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "adds a blank in front of text",
        ),
        (byte_level(pre_tokenizer=tokenizers.pre_tokenizers.Metaspace()), "Metaspace, must be ByteLevel or hold it"),
        (byte_level(pre_tokenizer=tokenizers.pre_tokenizers.Whitespace()), "Whitespace, must be ByteLevel or hold it"),
        (sequence(tokenizers.pre_tokenizers.Whitespace()), "Whitespace, is not known to keep text"),
        (sequence(tokenizers.pre_tokenizers.Split(" ", "removed")), "Split, removes text: behavior must be one of"),
        (sequence(tokenizers.pre_tokenizers.Punctuation("removed")), "Punctuation, removes text"),
        (sequence(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)), "must be ByteLevel or hold it once"),
        (sequence(), "must be ByteLevel or hold it once"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path, backend: tokenizers.Tokenizer, reason: str) -> None:
    path = tmp_path / "ready.json"
    backend.save(str(path))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} does not keep text as it is: .*{reason}"):
        tokenizer.Tokenizer.load(path)


def edited(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Writes ``byte_level`` with an edit that the library's classes cannot produce, and returns the path."""
    value = json.loads(byte_level().to_str())
    edit(value)
    (tmp_path / "ready.json").write_text(json.dumps(value))
    return tmp_path / "ready.json"


def added(content: str, **settings: Any) -> Callable[[dict[str, Any]], Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return lambda value: value["added_tokens"].append({"id": 331, "content": content} | flags | settings)


def without_byte(value: dict[str, Any]) -> None:
    """Renames the token of byte 0xd0, a lead byte of Cyrillic letters."""
    vocab = value["model"]["vocab"]
    vocab["unused"] = vocab.pop("Ð")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda value: value["model"].update(dropout=0.5), r"model\.dropout is 0\.5.*Set it to null"),
        (lambda value: value["model"].update(dropout=1e-9), r"model\.dropout is 1e-09"),
        (without_byte, r"1 of the 256 bytes have no token in model\.vocab, the first is 0xd0"),
        (added("KING", lstrip=True), "added token 'KING' has lstrip or rstrip set"),
        (added("KING", rstrip=True), "added token 'KING' has lstrip or rstrip set"),
        (added("é"), "added token 'é' is also the byte-level token of other bytes"),
        (added("é", special=True), "added token 'é' is also the byte-level token of other bytes"),
        (lambda value: value["model"].update(continuing_subword_prefix="##"), r"continuing_subword_prefix is '##'"),
        (lambda value: value["model"].update(end_of_word_suffix="</w>"), r"end_of_word_suffix is '</w>'"),
        (lambda value: value["model"].update(type="Unigram"), "its model is 'Unigram'"),
        (lambda value: value.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}), ""),
    ],
)
def test_a_setting_that_loses_text_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """None of them makes the library panic, which would bypass Python's stderr with a backtrace."""
    path = edited(tmp_path, edit)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} does not keep text as it is: .*{reason}"):
        tokenizer.Tokenizer.load(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda value: value["model"]["vocab"].update(zz=value["model"]["vocab"]["a"]), "got 64 for 'zz'"),
        (lambda value: value["model"]["vocab"].update(zz=2**32 - 1), "got 4294967295 for 'zz'"),
        (lambda value: value["model"]["vocab"].update(zz=331.0), "got 331.0 for 'zz'"),
        (lambda value: value["model"]["vocab"].update(zz=True), "got True for 'zz'"),
        (
            lambda value: value["model"]["merges"].append(["a", "nothing"]),
            "the token 'nothing', which model.vocab lacks",
        ),
        (lambda value: value["model"]["merges"].append(["é", "ÿ"]), "the token 'éÿ', which model.vocab lacks"),
        (lambda value: value["model"]["merges"].append(["a"]), "each of model.merges must be two tokens: got an array"),
        (lambda value: value["model"]["merges"].append("ab"), "each of model.merges must be two tokens: got 'ab'"),
        (lambda value: value["model"]["merges"].append(7), "each of model.merges must be two tokens: got 7"),
        (lambda value: value["model"].update(merges=None), "merges must be an array: got null"),
        (lambda value: value.update(added_tokens=[5]), "each of added_tokens must be an object: got 5"),
        (added(""), "added_tokens must have a content each, none of them twice: got ''"),
        (lambda value: added("ab")(value) or added("ab")(value), "none of them twice: got 'ab'"),
        (lambda value: value.update(pre_tokenizer={"type": "Sequence"}), "pretokenizers must be an array: got null"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], reason: str) -> None:
    """With a repeated id, or one past a gap, the library silently keeps the token it read last."""
    path = edited(tmp_path, edit)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not a tokenizer.json .*{re.escape(reason)}"):
        tokenizer.Tokenizer.load(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value["model"].pop("type"),
        lambda value: value["model"].update(merges=[" ".join(merge) for merge in value["model"]["merges"]]),
        lambda value: value["model"].update(dropout=0.0, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        lambda value: value["model"].update(continuing_subword_prefix="", end_of_word_suffix=""),
        lambda value: value["model"].update(ignore_merges=True),
        lambda value: value.update(normalizer={"type": "Sequence", "normalizers": []}),
        added("king", single_word=True),
        added("<mask>", special=True, lstrip=True),
        lambda value: value.update(truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst"}),
        lambda value: value.update(post_processor=template("B")),
        lambda value: value.update(post_processor=template()),
        lambda value: value.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": False},
                    {"type": "Split", "pattern": {"Regex": r"\s+|a*"}, "behavior": "Contiguous", "invert": True},
                    {"type": "Digits", "individual_digits": True},
                    value["pre_tokenizer"] | {"use_regex": False},
                    {"type": "Punctuation", "behavior": "Isolated"},
                ],
            }
        ),
    ],
)
def test_a_lossless_setting_is_accepted(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    vocabulary = tokenizer.Tokenizer.load(edited(tmp_path, edit))
    text = TEXT + "<mask> a king,king 123 <unk>" + "".join(map(chr, range(0x500)))
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert list(vocabulary.encode_batch([text])) == [vocabulary.encode(text)]
    assert capfd.readouterr().err == ""


def template(*sequences: str) -> dict[str, Any]:
    """Returns a post-processor template. Without sequence ``A`` it drops the text; ``B`` makes the library panic."""
    parts = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
    both = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": parts, "pair": both, "special_tokens": {}}


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value["added_tokens"][0].update(special=False),
        lambda value: (
            value["model"].update(
                vocab=value["model"]["vocab"] | {"</": 330, "s>": 331, "</s>": 332},
                merges=[*value["model"]["merges"], ["<", "/"], ["s", ">"], ["</", "s>"]],
            )
            or value.update(added_tokens=[])
        ),
    ],
    ids=["not special", "merged"],
)
def test_an_end_token_that_text_can_spell_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ValueError, match=r"ready.json takes the text '(<\|endoftext\|>|</s>)' for its end token"):
        tokenizer.Tokenizer.load(edited(tmp_path, edit))


@pytest.mark.parametrize("name", tokenizer.END_TOKENS)
def test_an_end_token_is_found_by_name(name: str) -> None:
    backend = tokenizers.Tokenizer.from_str(MERGED.to_json())
    backend.add_special_tokens(["<pad>", name])
    assert tokenizer.Tokenizer(backend).end_id == 331


@SETTINGS
@given(parts=st.lists(st.sampled_from(["<|end", "<|endoftext|>", "<|end|>", "<|", "|>", "the king", " ", "né", "\n"])))
def test_special_tokens_are_parsed_as_by_the_library(parts: list[str]) -> None:
    backend = tokenizers.Tokenizer.from_str(MERGED.to_json())
    backend.add_special_tokens(["<|endoftext|>", "<|end|>", "<|endoftext|>the"])
    vocabulary = tokenizer.Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))
    text = "".join(parts)
    assert vocabulary.encode(text, parse_special=True) == backend.encode(text, add_special_tokens=False).ids
    assert vocabulary.decode(vocabulary.encode(text, parse_special=True)) == text
    assert MERGED.encode(text, parse_special=True) == MERGED.encode(text)
