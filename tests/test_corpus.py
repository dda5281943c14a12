"""Pieces of a text have the text's bytes and tokens."""

import codecs
import gzip
import hashlib
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import zstandard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hipgpt_jax.text import corpus, tokenizer

SETTINGS = settings(deadline=None, derandomize=True, database=None)

# Blanks as both Python and the tokenizer's regex see them: a carriage return and a line feed, an
# ideographic space, a line separator, next line.
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \t ", "\u3000", "\u2028", "\x85", "\xa0", "\v\f"]
WORDS = ["a", "be", "king", "it's", "1602", "!?", "don't.", "naïve", "要生存", "🙂", "x=1;", "'", "\u200b", "\ufffd"]
# Words and blanks alternate, so a piece with a blank, a word and a blank has a place to cut.
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


def read(path: Path, start: int = 0, stop: int | None = None, *, piece_bytes: int = 1 << 16) -> Iterator[str]:
    with path.open("rb") as stream:
        stream.seek(start)
        size = (path.stat().st_size if stop is None else stop) - start
        yield from corpus.read_text(stream, size, piece_bytes=piece_bytes)


def tokens_of_pieces(path: Path, piece_bytes: int) -> list[int]:
    pieces = read(path, piece_bytes=piece_bytes)
    return [token_id for piece in pieces for token_id in VOCABULARY.encode(piece)]


@SETTINGS
@given(
    content=st.binary() | st.text().map(str.encode) | MIXTURES.map(str.encode),
    piece_bytes=st.integers(1, 40),
    ends=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
@example(content=b"\r\n\n\r\xf0\x9f\x98\x80\xf0\x9f\x98", piece_bytes=1, ends=(0, 50))
@example(content=b"a b c " * 20, piece_bytes=7, ends=(3, 44))
@example(content=b"", piece_bytes=7, ends=(0, 0))
def test_joined_pieces_are_the_bytes_between_the_offsets(
    source: Path, content: bytes, piece_bytes: int, ends: tuple[int, int]
) -> None:
    source.write_bytes(content)
    whole = list(read(source, piece_bytes=piece_bytes))
    assert "".join(whole) == content.decode("utf-8", "replace")
    assert "" not in whole
    start, stop = sorted(min(end, len(content)) for end in ends)
    part = read(source, start, stop, piece_bytes=piece_bytes)
    assert "".join(part) == content[start:stop].decode("utf-8", "replace")


@SETTINGS
@given(text=MIXTURES, spare=st.integers(0, 40))
@example(text="be  king \n\n  be " * 20, spare=0)
def test_pieces_have_the_tokens_of_the_whole(source: Path, text: str, spare: int) -> None:
    """Each piece is long enough for a whole word and the blanks around it, so there is a place to cut."""
    source.write_bytes(text.encode())
    assert tokens_of_pieces(source, LONGEST + spare) == VOCABULARY.encode(text)


def test_a_piece_ends_at_a_word_boundary_far_from_its_end(source: Path) -> None:
    source.write_bytes(DATA_URI.encode())
    piece_bytes = len(DATA_URI) - 100
    pieces = list(read(source, piece_bytes=piece_bytes))
    assert len(pieces) == 2
    assert tokens_of_pieces(source, piece_bytes) == VOCABULARY.encode(DATA_URI)


@pytest.mark.parametrize("piece_bytes", [16, 50, 64, 100])
def test_no_piece_ends_at_a_separator_that_only_python_calls_blank(source: Path, piece_bytes: int) -> None:
    r"""``"\x1c".isspace()``, but to the tokenizer's regex the separators \x1c to \x1f are visible."""
    source.write_bytes(SEPARATED.encode())
    assert tokens_of_pieces(source, piece_bytes) == VOCABULARY.encode(SEPARATED)


@pytest.mark.parametrize("pattern", ["to be or not ", "x", " ", "要生存", "a " + "b" * 9000], ids=lambda text: text[:6])
def test_memory_does_not_grow_with_the_text(source: Path, pattern: str) -> None:
    size, piece_bytes = 4 << 20, 1 << 14
    source.write_bytes(pattern.encode() * (size // len(pattern.encode())))
    tracemalloc.start()
    try:
        longest = max(map(len, read(source, piece_bytes=piece_bytes)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert longest <= 2 * piece_bytes
    assert peak < size / 4


@SETTINGS
@given(text=st.text(min_size=1))
@example(text="🙂")
@example(text="é")
@example(text="🙂" * 10)
@example(text="\ufeffé")
def test_the_split_never_lands_in_a_character(source: Path, text: str) -> None:
    source.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")  # a byte order mark is not part of the corpus
    assume(text)
    content = text.encode()
    split = corpus.Corpus(source).split
    assert content[:split].decode() + content[split:].decode() == text
    assert len(content) * 9 // 10 <= split <= len(content) * 9 // 10 + 3


@SETTINGS
@given(content=st.binary(min_size=1).filter(lambda content: not content.startswith(codecs.BOM_UTF8)))
@example(content=b"\x80" * 100)
def test_the_split_of_any_bytes_lies_within_them(source: Path, content: bytes) -> None:
    source.write_bytes(content)
    tenths = len(content) * 9 // 10
    assert tenths <= corpus.Corpus(source).split <= min(tenths + 3, len(content))


def test_the_split_of_ascii_is_exactly_nine_tenths(source: Path) -> None:
    source.write_bytes(b"x" * 1_115_394)
    assert corpus.Corpus(source).split == 1_003_854


def test_blanks_are_blanks_to_the_tokenizers_regex_too() -> None:
    r"""Checks ``BLANKS``: the regex ends a word before each of them, but not before \x1c."""
    regex = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for blank in BLANKS:
        assert regex.pre_tokenize_str(f"!?{blank}!?")[0] == ("!?", (0, 2))


PARTS = st.lists(st.text(max_size=12) | MIXTURES, min_size=1, max_size=8)


def write_parts(folder: Path, parts: list[str], forms: list[str]) -> list[Path]:
    """Writes each part as a file of its own, or as one or two lines of JSON."""
    paths = []
    for number, part in enumerate(parts):
        path = folder / f"{number}{forms[number % len(forms)]}"
        content = part.encode()
        if ".jsonl" in path.name:
            content = b"".join(json.dumps({"text": line}).encode() + b"\n\n" for line in (part, "", part))
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(content))
        paths.append(path)
    return paths


@SETTINGS
@given(
    parts=PARTS,
    forms=st.lists(st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.zst", ".md.zst", ".jsonl.gz"]), min_size=1),
    piece_bytes=st.integers(1, 40),
)
@example(parts=["🙂"], forms=[".txt.zst"], piece_bytes=40)
@example(parts=["", "a", "", "🙂" * 9, ""], forms=[".txt", ".jsonl"], piece_bytes=3)
def test_documents_come_in_order_and_split_in_two(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], forms: list[str], piece_bytes: int
) -> None:
    paths = write_parts(tmp_path_factory.mktemp("parts"), parts, forms)
    texts = [
        text for part, path in zip(parts, paths, strict=True) for text in [part] * (1 + (".jsonl" in path.name)) if text
    ]
    content = "".join(texts).encode()
    if not content:
        with pytest.raises(ValueError, match=r"0\.\S+.* (is|are) empty: 0 tokens"):
            corpus.Corpus(paths)
        return
    found = corpus.Corpus(paths)
    assert (found.documents, found.bytes) == (len(texts), len(content))
    content[: found.split].decode()
    assert len(content) * 9 // 10 <= found.split <= len(content) * 9 // 10 + 3
    pieces = list(found.pieces(0, found.bytes, piece_bytes=piece_bytes))
    assert [list(group) for is_end, group in itertools.groupby(pieces, lambda piece: piece is None) if is_end] == [
        [None] for _ in texts
    ]
    documents = "".join("\0END\0" if piece is None else piece for piece in pieces).split("\0END\0")
    assert documents == [*texts, ""]
    halves = [list(found.pieces(*ends)) for ends in ((0, found.split), (found.split, found.bytes))]
    assert ["".join(piece or "" for piece in half).encode() for half in halves] == [
        content[: found.split],
        content[found.split :],
    ]
    assert sum(half.count(None) for half in halves) == len(texts)
    assert not halves[1] or halves[1][0] is not None, "an end belongs to the side of its document's last byte"


def test_a_sample_is_spread_evenly_within_the_limit(source: Path) -> None:
    source.write_text("".join(f"{number:09} " for number in range(200_000)))
    text = corpus.Corpus(source)
    whole = "".join(text.sample(1 << 30))
    assert whole == source.read_text()[: text.split]
    numbers = [int(word) for piece in text.sample(400_000) for word in piece.split() if len(word) == 9]
    assert 400_000 - 2 * corpus.PIECE_BYTES < 10 * len(numbers) <= 400_000
    for quarter in range(4):
        share = sum(quarter * 45_000 <= number < (quarter + 1) * 45_000 for number in numbers)
        assert 0.5 < share / (len(numbers) / 4) < 1.5


def test_a_sample_of_invalid_bytes_keeps_the_limit(source: Path) -> None:
    source.write_bytes(b"\xff " * 500_000)
    assert 0 < sum(len(piece.encode()) for piece in corpus.Corpus(source).sample(300_000)) <= 300_000


def test_reading_reports_progress_and_sources(source: Path, tmp_path: Path) -> None:
    source.write_text("abc")
    (tmp_path / "second.txt").write_text("defgh")
    reports: list[tuple[int, int, str]] = []
    found = corpus.Corpus([source, tmp_path / "second.txt"], progress=lambda *report: reports.append(report))
    assert reports == [(0, 8, "reading"), (3, 8, "reading")]
    assert [(one.name, one.bytes) for one in found.sources] == [("text.txt", 3), ("second.txt", 5)]
    assert found.sources[0].sha256 == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "notes"),
    [
        ("a.txt", "naïve \ufffd 🙂".encode(), []),
        (
            "a.txt",
            b"caf\xe9 \xe9\n" * 9,
            ["18 bytes (the first in {path}) of the text are not UTF-8 and became U+FFFD"],
        ),
        ("a.txt", "🙂".encode()[:3], ["3 bytes (the first in {path}) of the text are not UTF-8"]),
        ("a.txt", b"a\xff", ["1 byte (the first in {path}) of the text are not UTF-8"]),
        ("a.jsonl", b'{"text": "caf\xe9"}', ["1 byte (the first in {path}) of the text are not UTF-8"]),
        (
            "a.txt",
            "to be".encode("utf-16-le"),
            ["5 bytes (the first in {path}) of the text are NUL; is the file UTF-16"],
        ),
        ("a.txt", b"\0" + b"a" * 99, []),
        ("a.json", b'[{"text": "a"}]', ["{path} is read as plain text, braces and escapes included"]),
    ],
)
def test_notes_warn_about_unusual_text(tmp_path: Path, name: str, content: bytes, notes: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    found = corpus.Corpus(tmp_path / name).notes
    assert len(found) == len(notes)
    for note, expected in zip(found, notes, strict=True):
        assert note.startswith(expected.format(path=tmp_path / name))


def test_a_byte_order_mark_is_skipped(source: Path) -> None:
    source.write_bytes(b"\xef\xbb\xbfto be or not to be")
    text = corpus.Corpus(source)
    assert (text.bytes, text.split) == (18, 16)
    assert [list(text.pieces(*ends)) for ends in ((0, 16), (16, 18))] == [["to be or not to "], ["be", None]]
    source.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match="is empty: 0 tokens"):
        corpus.Corpus(source)
