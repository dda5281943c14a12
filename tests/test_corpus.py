"""A text read in pieces is the text, and its tokens are the text's tokens."""

import tracemalloc
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hipgpt_jax.text import corpus, tokenizer

SETTINGS = settings(deadline=None, derandomize=True, database=None)

# Blanks as both Python and the tokenizer's regex see them: a carriage return and a line feed, an
# ideographic space, a line separator, next line.
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \t ", "\u3000", "\u2028", "\x85", "\xa0", "\v\f"]
WORDS = ["a", "be", "king", "it's", "1602", "!?", "don't.", "naïve", "要生存", "🙂", "x=1;", "'", "\u200b", "\ufffd"]
# Words and blanks alternate, so a chunk that can hold a blank, a word and a blank holds a place to cut.
MIXTURES = st.lists(st.tuples(st.sampled_from(BLANKS), st.sampled_from(WORDS)), min_size=1).map(
    lambda pairs: "".join(blank + word for blank, word in pairs)
)
LONGEST = max(len(word.encode()) for word in WORDS) + 2 * max(len(blank.encode()) for blank in BLANKS)
SEPARATED = "ab!\x1c!\x1c cd!\x1c " * 200
DATA_URI = "see  the  image  " + "iVBORw0KGgoAAAANSUhEUgAA" * 400 + "  here  "

VOCABULARY = tokenizer.Tokenizer.train(
    [" ".join(WORDS * 9), *("".join(f"{word}{blank}" * 4 for word in WORDS) for blank in BLANKS), SEPARATED, DATA_URI],
    600,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus") / "text.txt"


def tokens_of_pieces(path: Path, chunk_bytes: int) -> list[int]:
    pieces = corpus.read_text(path, chunk_bytes=chunk_bytes)
    return [token_id for piece in pieces for token_id in VOCABULARY.encode(piece)]


@SETTINGS
@given(
    content=st.binary() | st.text().map(str.encode) | MIXTURES.map(str.encode),
    chunk_bytes=st.integers(1, 40),
    ends=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
@example(content=b"\r\n\n\r\xf0\x9f\x98\x80\xf0\x9f\x98", chunk_bytes=1, ends=(0, 50))
@example(content=b"a b c " * 20, chunk_bytes=7, ends=(3, 44))
@example(content=b"", chunk_bytes=7, ends=(0, 0))
def test_pieces_joined_are_the_bytes_between_the_offsets(
    source: Path, content: bytes, chunk_bytes: int, ends: tuple[int, int]
) -> None:
    source.write_bytes(content)
    whole = list(corpus.read_text(source, chunk_bytes=chunk_bytes))
    assert "".join(whole) == content.decode("utf-8", "replace")
    assert "" not in whole
    start, stop = sorted(min(end, len(content)) for end in ends)
    part = corpus.read_text(source, start, stop, chunk_bytes=chunk_bytes)
    assert "".join(part) == content[start:stop].decode("utf-8", "replace")


@SETTINGS
@given(text=MIXTURES, spare=st.integers(0, 40))
@example(text="be  king \n\n  be " * 20, spare=0)
def test_tokens_of_the_pieces_are_the_tokens_of_the_whole(source: Path, text: str, spare: int) -> None:
    """Each chunk is long enough to hold a whole word and the blanks around it, so a cut can be found."""
    source.write_bytes(text.encode())
    assert tokens_of_pieces(source, LONGEST + spare) == VOCABULARY.encode(text)


def test_a_chunk_is_cut_where_a_word_ends_even_far_from_its_end(source: Path) -> None:
    source.write_bytes(DATA_URI.encode())
    chunk_bytes = len(DATA_URI) - 100
    pieces = list(corpus.read_text(source, chunk_bytes=chunk_bytes))
    assert len(pieces) == 2
    assert tokens_of_pieces(source, chunk_bytes) == VOCABULARY.encode(DATA_URI)


@pytest.mark.parametrize("chunk_bytes", [16, 50, 64, 100])
def test_a_control_character_that_only_python_calls_blank_is_no_place_to_cut(source: Path, chunk_bytes: int) -> None:
    r"""``"\x1c".isspace()``, but to the tokenizer's regex the separators \x1c to \x1f are visible."""
    source.write_bytes(SEPARATED.encode())
    assert tokens_of_pieces(source, chunk_bytes) == VOCABULARY.encode(SEPARATED)


def test_a_vocabulary_does_not_depend_on_the_chunks(source: Path) -> None:
    text = "".join(blank + word for word in WORDS * 3 for blank in BLANKS)
    source.write_bytes(text.encode())
    whole = tokenizer.Tokenizer.train([text], 400).to_json()
    for chunk_bytes in (LONGEST, 100, 1000, 1 << 20):
        pieces = list(corpus.read_text(source, chunk_bytes=chunk_bytes))
        assert len(pieces) > 1 or chunk_bytes == 1 << 20
        assert tokenizer.Tokenizer.train(pieces, 400).to_json() == whole


@pytest.mark.parametrize("pattern", ["to be or not ", "x", " ", "要生存", "a " + "b" * 9000], ids=lambda text: text[:6])
def test_memory_does_not_grow_with_the_text(source: Path, pattern: str) -> None:
    size, chunk_bytes = 4 << 20, 1 << 14
    source.write_bytes(pattern.encode() * (size // len(pattern.encode())))
    tracemalloc.start()
    try:
        longest = max(map(len, corpus.read_text(source, chunk_bytes=chunk_bytes)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert longest <= 2 * chunk_bytes
    assert peak < size / 4


@SETTINGS
@given(text=st.text(min_size=1))
@example(text="🙂")
@example(text="é")
@example(text="🙂" * 10)
def test_the_split_never_lands_in_a_character(source: Path, text: str) -> None:
    content = text.encode()
    source.write_bytes(content)
    split = corpus.split_offset(source)
    assert content[:split].decode() + content[split:].decode() == text
    assert len(content) * 9 // 10 <= split <= len(content) * 9 // 10 + 3


@SETTINGS
@given(content=st.binary())
@example(content=b"\x80" * 100)
def test_the_split_of_any_bytes_lies_within_them(source: Path, content: bytes) -> None:
    source.write_bytes(content)
    tenths = len(content) * 9 // 10
    assert tenths <= corpus.split_offset(source) <= min(tenths + 3, len(content))


def test_the_split_of_ascii_is_exactly_nine_tenths(source: Path) -> None:
    source.write_bytes(b"x" * 1_115_394)
    assert corpus.split_offset(source) == 1_003_854


def test_blanks_are_blanks_to_the_tokenizers_regex_too() -> None:
    r"""The list above is honest: the regex ends a word before each of them, as it would not before \x1c."""
    regex = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for blank in BLANKS:
        assert regex.pre_tokenize_str(f"!?{blank}!?")[0] == ("!?", (0, 2))
