"""Files and directories give the documents that are in them, or say what is wrong and where."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hipgpt_jax.text import documents

SETTINGS = settings(deadline=None, derandomize=True, database=None)
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path: Path, text_field: str = "text") -> list[bytes]:
    (file,) = documents.find(path)
    return [stream.read() for stream, _ in file.documents(text_field)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@pytest.mark.parametrize("packing", PACKED)
@SETTINGS
@given(content=st.binary(), frames=st.integers(1, 3))
@example(content=b"\n\r\n\xff" * 300_000, frames=2)
def test_a_text_file_is_one_document_byte_for_byte(folder: Path, packing: str, content: bytes, frames: int) -> None:
    """A .gz or .zst may be several, one after the other, as ``cat`` and ``pzstd`` make them."""
    path = folder / f"text.txt{packing}"
    path.write_bytes(PACKED[packing](content) * frames)
    assert read(path) == [content * frames]


@pytest.mark.parametrize("packing", PACKED)
@SETTINGS
@given(
    texts=st.lists(st.text(), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n"]),
    is_ascii=st.booleans(),
    bom=st.booleans(),
)
@example(texts=["one\nline\u2028\x85", "🙂"], end="\n", is_ascii=False, bom=True)
@example(texts=["x" * 500_000, ""], end="\n", is_ascii=True, bom=False)
def test_each_json_line_is_a_document(
    folder: Path, packing: str, texts: list[str], end: str, is_ascii: bool, bom: bool
) -> None:
    lines = [json.dumps({"id": 1, "body": text, "text": None}, ensure_ascii=is_ascii) + end for text in texts]
    path = folder / f"lines.JSONL{packing}"
    path.write_bytes(PACKED[packing]((("\ufeff" if bom else "") + "".join(lines)).encode()))
    assert read(path, "body") == [text.encode() for text in texts]


def test_the_length_that_is_told_is_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "né"}')
    (tmp_path / "b.txt").write_text("né")
    lengths = [size for file in documents.find(tmp_path) for _, size in file.documents("text")]
    assert lengths == [3, None]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (rb'{"text": "a\ud83d\ude42b"}', "a🙂b"),
        (rb'{"text": "a\ud83db"}', "a\ufffdb"),
        (rb'{"text": "\udcc3\udca9"}', "\ufffd\ufffd"),
        (b'{"text": "caf\xe9"}', "caf\ufffd"),
    ],
)
def test_what_is_no_unicode_text_becomes_the_replacement_character(tmp_path: Path, line: bytes, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read(tmp_path / "a.jsonl") == [text.encode()]


@pytest.mark.parametrize(
    ("name", "is_json_lines", "packing"),
    [
        ("a", False, ""),
        ("a.txt", False, ""),
        ("a.md", False, ""),
        ("a.jsonl", True, ""),
        ("A.JSONL.GZ", True, ".gz"),
        ("a.jsonl.zst", True, ".zst"),
        ("a.jsonl.txt", False, ""),
        ("a.json", False, ""),
        ("b.jsonl/a.gz", False, ".gz"),
        (".gz", False, ""),
    ],
)
def test_the_name_says_the_form(name: str, is_json_lines: bool, packing: str) -> None:
    assert documents.Form.of(name) == documents.Form(is_json_lines=is_json_lines, packing=packing)


def test_a_directory_stands_for_its_data_files_in_order(tmp_path: Path) -> None:
    wanted = ["B.TXT", "a.txt", "a/b.jsonl", "a/c.txt.gz", "b.jsonl.zst"]
    others = [
        ".a.txt",
        ".git/a.txt",
        "a/.b/c.txt",
        "README",
        "a.md",
        "a.gz",
        "a.txt.bak",
        "d.txt/none",
        ".txt",
        "x.json",
    ]
    for name in [*others, *wanted]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = documents.find(tmp_path)
    assert [file.name for file in found] == wanted
    assert [file.path for file in found] == [tmp_path / name for name in wanted]


def test_paths_keep_their_order_and_a_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("z", ".hidden", "folder/a.txt"):
        (tmp_path / name).write_text("x")
    found = documents.find([tmp_path / "z", tmp_path / "folder", tmp_path / ".hidden", tmp_path / "z"])
    assert [file.name for file in found] == ["z", "a.txt", ".hidden", "z"]


def test_a_directory_without_data_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no data files: a directory's are those")):
        documents.find([tmp_path])


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=re.escape(f"data file not found: {tmp_path / 'b.txt'}. ")):
        documents.find([tmp_path / "a.txt", tmp_path / "b.txt"])


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no data file is given\. Give a text file with --data-path"):
        documents.find([])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("to be", "not JSON: Expecting value at column 1"),
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        ("[" * 200_000, "nested too deeply"),
        ('{"text": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ('["text"]', "must be a JSON object with a text: got list"),
        ('{"body": "a", "id": 3}', "no field 'text': its fields are 'body', 'id'. Name the one .* by --text-field"),
        ("{}", "no field 'text': its fields are none"),
        ('{"text": ["a"]}', "field 'text' must be a text: got list"),
        ('{"text": null}', "field 'text' must be a text: got NoneType"),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("packing", PACKED)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, packing: str, line: str, message: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKED[packing](f'{{"text": "one"}}\n\n{line}\n'.encode()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} line 3: .*{message}"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
@SETTINGS
@given(cut=st.integers(1, 10_000), change=st.sampled_from(["cut", "garbage", "plain", "tail"]))
def test_a_compressed_file_that_is_damaged_or_cut_short_is_named(
    folder: Path, name: str, cut: int, change: str
) -> None:
    path = folder / name
    content = b"".join(json.dumps({"text": f"{number * number}"}).encode() + b"\n" for number in range(3000))
    packed = PACKED[path.suffix](content)
    path.write_bytes(
        {
            "cut": packed[: 1 + cut % (len(packed) - 1)],
            "garbage": packed[: cut % len(packed)] + b"\xff\x00\xff" * 40,
            "plain": content,
            "tail": packed + b"more of it",
        }[change]
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is damaged or cut short: "):
        read(path)
