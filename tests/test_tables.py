"""Texts of CSV and Parquet files arrive as they were written, or as an error with their location."""

import csv
import io
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hipgpt_jax.text import corpus, documents

SETTINGS = settings(deadline=None, derandomize=True, database=None)
TEXTS = st.lists(st.text(st.characters(codec="utf-8")), max_size=5)


def read(path: Path, field: str = "text") -> list[bytes]:
    return [document.stream.read() for file in documents.find(path) for document in file.documents(field)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def csv_of(texts: list[str], **options: Any) -> bytes:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, **options)
    writer.writerows([("id", "text"), *enumerate(texts)])
    return lines.getvalue().encode()


@SETTINGS
@given(texts=TEXTS, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), end=st.sampled_from(["\n", "\r\n"]))
@example(texts=['two\nlines, a "quote"\r\n', "", "\x1c\u2028\0"], quoting=csv.QUOTE_MINIMAL, end="\n")
def test_a_row_of_csv_is_a_document(folder: Path, texts: list[str], quoting: Any, end: str) -> None:
    path = folder / "a.csv"
    path.write_bytes(csv_of(texts, quoting=quoting, lineterminator=end))
    assert read(path) == [text.encode() for text in texts]


@SETTINGS
@given(texts=TEXTS, large=st.booleans(), rows=st.integers(1, 3))
def test_a_row_of_parquet_is_a_document(folder: Path, texts: list[str], large: bool, rows: int) -> None:
    kind = pyarrow.large_string() if large else pyarrow.string()
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, kind)})
    parquet.write_table(table, folder / "a.parquet", row_group_size=rows)
    assert read(folder / "a.parquet") == [text.encode() for text in texts]


def test_invalid_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text\ncaf\xe9\n"\xff,\xed\xa0\x80"\n')
    array = pyarrow.array([b"caf\xe9"]).cast(pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(1, array.buffers()[1], array.buffers()[2])
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "b.parquet")
    assert [one.decode() for one in read(tmp_path)] == ["caf\ufffd", "\ufffd,\ufffd\ufffd\ufffd", "caf\ufffd"]
    (note,) = corpus.Corpus(tmp_path).notes
    assert note.startswith("6 bytes (the first in ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'text': its columns are none"),
        (b"id,body\n1,a\n", r"has no column 'text': its columns are 'id', 'body'\. Name the one with --text-field"),
        (b"text,text\n1,a\n", "has several columns 'text'"),
        (b"id,text\n1,a\n\n2\n", "line 4: 1 values for 2 columns"),
        (b'id,text\n1,"a"b\n', "line 2: not CSV: "),
        (b'id,text\n1,"a\n\n', "line 3: not CSV: unexpected end of data"),
        (b"text\na\rb\n", "line 2: not CSV: new-line character seen in unquoted field"),
        (b"\xff\xfea\0", "is UTF-16 text: it must be UTF-8"),
        (b"PAR1\x15", r"is Parquet data: give it a name that ends in \.parquet"),
    ],
)
def test_a_broken_csv_file_is_named_with_line_and_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {message}"):
        read(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "has no column 'text': its columns are 'body'"),
        ({"text": [1]}, ": column 'text' must be of texts: got int64"),
        ({"text": ["a", None]}, " row 2: column 'text' must be a text: got null"),
    ],
)
def test_a_parquet_file_without_texts_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.parquet")


@SETTINGS
@given(change=st.binary(min_size=1, max_size=60), position=st.integers(0, 2000), keeps=st.booleans())
@example(change=b"\0", position=0, keeps=False)
def test_damaged_parquet_is_one_line(folder: Path, change: bytes, position: int, keeps: bool) -> None:
    path = folder / "damaged.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"] * 9}), path)
    content = path.read_bytes()
    position %= len(content)
    path.write_bytes(content[:position] + change + (content[position + len(change) :] if keeps else b""))
    message = f"{path} is intact"
    try:
        read(path)
    except ValueError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_packed_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.parquet\.gz must not be compressed as a whole: unpack it"):
        read(tmp_path)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow .*: pip install -e '\.\[parquet\]'"):
        read(tmp_path)


def test_a_long_value_of_csv_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.csv").write_text('text\n"' + "a\n" * 60 + '"\n')
    with pytest.raises(ValueError, match=r"a\.csv line \d+: not CSV: field larger than field limit \(100\)"):
        read(tmp_path)
