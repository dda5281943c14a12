"""Files and directories give their documents, or an error with its location."""

import contextlib
import functools
import gzip
import io
import json
import os
import re
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
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
    return [stream.read() for stream, *_ in file.documents(text_field)]


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


def test_a_document_has_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "né"}')
    (tmp_path / "b.txt").write_text("né")
    lengths = [size for file in documents.find(tmp_path) for _, size, _ in file.documents("text")]
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
def test_invalid_unicode_becomes_the_replacement_character(tmp_path: Path, line: bytes, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read(tmp_path / "a.jsonl") == [text.encode()]


@pytest.mark.parametrize(
    ("name", "kind", "packing"),
    [
        ("a", "text", ""),
        ("a.txt", "text", ""),
        ("a.md", "text", ""),
        ("a.jsonl", "json lines", ""),
        ("A.JSONL.GZ", "json lines", ".gz"),
        ("a.jsonl.zst", "json lines", ".zst"),
        ("a.jsonl.txt", "text", ""),
        ("a.json", "text", ""),
        ("b.jsonl/a.gz", "text", ".gz"),
        (".gz", "text", ""),
        ("a.csv.gz", "csv", ".gz"),
        ("a.PARQUET", "parquet", ""),
    ],
)
def test_the_file_name_determines_the_format(name: str, kind: str, packing: str) -> None:
    assert documents.Format.of(name) == documents.Format(kind=kind, compression=packing)


def test_a_directory_gives_its_data_files_in_order(tmp_path: Path) -> None:
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


def test_a_missing_path_is_named(tmp_path: Path) -> None:
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
        ('{"text": 1' + "0" * 5000 + "}", "field 'text' must be a text: got a number"),
        ('{"text": "a", "text": "b"}', "key 'text' appears twice"),
        ("{", r"not JSON: .*jq -c \. FILE > NEW makes it so of indented JSON"),
        ('["text"]', "must be a JSON object with a text: got list.*jq -c"),
        ('{"data": {"text": "a"}}', "no field 'text': its fields are 'data'"),
        ('{"body": "a", "id": 3}', "no field 'text': its fields are 'body', 'id'. Name the one .* by --text-field"),
        ("{}", "no field 'text': its fields are none"),
        ('{"text": ["a"]}', "field 'text' must be a text: got list"),
        ('{"text": null}', "field 'text' must be a text: got null"),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("packing", PACKED)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, packing: str, line: str, message: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKED[packing](f'{{"text": "one"}}\n\n{line}\n'.encode()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} line 3: .*{message}"):
        read(path)


_LINES = b"".join(b'{"text": "%d"}\n' % (number * number) for number in range(3000))


@functools.cache
def _packed(suffix: str) -> bytes:
    return PACKED[suffix](_LINES)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
@SETTINGS
@given(cut=st.integers(1, 10_000), change=st.sampled_from(["cut", "garbage", "plain", "tail"]))
def test_a_compressed_file_that_is_damaged_or_cut_short_is_named(
    folder: Path, name: str, cut: int, change: str
) -> None:
    path = folder / name
    packed = _packed(path.suffix)
    path.write_bytes(
        {
            "cut": packed[: 1 + cut % (len(packed) - 1)],
            "garbage": packed[: cut % len(packed)] + b"\xff\x00\xff" * 40,
            "plain": _LINES,
            "tail": packed + b"more of it",
        }[change]
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is damaged or cut short: "):
        read(path)


def test_a_dotted_field_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"data": {"text": "a"}}')
    with pytest.raises(ValueError, match=r"no field 'data\.text'.*A field inside another object cannot be named"):
        read(tmp_path / "a.jsonl", "data.text")


def test_other_fields_may_hold_any_number(tmp_path: Path) -> None:
    line = '{"id": 1' + "0" * 5000 + ', "score": NaN, "other": 1e999, "text": "a"}'
    (tmp_path / "a.ndjson").write_text(line)
    assert read(tmp_path / "a.ndjson") == [b"a"]


def test_bytes_of_a_line_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9 \xf0\x9f\x98 \xef\xbf\xbd"}\n{"text": "\\ud800"}')
    (file,) = documents.find(tmp_path / "a.jsonl")
    assert [(found.stream.read().decode(), found.invalid_bytes) for found in file.documents("text")] == [
        ("caf\ufffd \ufffd \ufffd", 4),
        ("\ufffd", 0),
    ]


@SETTINGS
@given(content=st.binary() | st.lists(st.sampled_from([b"a", b"\xc3\xa9", b"\xf0\x9f", b"\xff"])).map(b"".join))
@example(content=b"\xf0\x9f\x98")
@example(content="\ufffd".encode() + b"\xe9")
@pytest.mark.parametrize("block_bytes", [1, 2, 7, 1000])
def test_bytes_that_are_not_utf8_are_counted_over_blocks(content: bytes, block_bytes: int) -> None:
    blocks = list(documents.count_invalid(io.BytesIO(content), block_bytes))
    assert b"".join(block for block, _ in blocks) == content
    assert sum(invalid for _, invalid in blocks) == len(content) - len(content.decode("utf-8", "ignore").encode())


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one"}' if "json" in name else b"one"
    (tmp_path / name).write_bytes(PACKED[Path(name).suffix if "." in name[5:] else ""](b"\xef\xbb\xbf" + content))
    assert read(tmp_path / name) == [b"one"]


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("to be".encode("utf-16"), "is UTF-16 text: it must be UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE"),
        (b"\xfe\xff" + "to be".encode("utf-16-be"), "is UTF-16 text"),
        ("to be".encode("utf-32"), "is UTF-32 text"),
        (gzip.compress(b"to be", mtime=0), "is gzip data: give it a name that ends in .gz"),
        (zstandard.compress(b"to be"), "is Zstandard data: give it a name that ends in .zst"),
        (tar(), "is a tar archive: unpack it, and give the unpacked file or directory"),
        (b"PK\x03\x04\x14\0", "is a zip archive: unpack it"),
        (b"\xfd7zXZ\0\0", "is xz data: unpack it"),
        (b"BZh91AY&SY", "is bzip2 data: unpack it"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tar.gz", "a.zst"])
def test_a_file_that_is_not_utf8_text_is_identified(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(PACKED[Path(name).suffix if name[-3:] in (".gz", "zst") else ""](content))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path / name} {message}')}"):
        read(tmp_path / name)


def test_linked_directories_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "x.txt").write_text("x")
    top = tmp_path / "top"
    (top / "z").mkdir(parents=True)
    (top / "z" / "y.txt").write_text("y")
    (top / "a_link").symlink_to("z")
    (top / "loop").symlink_to(top)
    (top / "z" / "up").symlink_to("..")
    (top / "other").symlink_to("../elsewhere")
    (top / "other_too").symlink_to("../elsewhere")
    (top / "one.txt").symlink_to("z/y.txt")
    (top / ".hidden").symlink_to("nowhere")
    assert [file.name for file in documents.find(top)] == ["one.txt", "other/deep/x.txt", "z/y.txt"]


@pytest.mark.parametrize("name", ["broken.txt", "corpus"])
def test_a_broken_link_is_named(tmp_path: Path, name: str) -> None:
    """It might have been a directory of texts."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).symlink_to("gone")
    text = rf"^{re.escape(str(tmp_path / name))} \(a link to gone\) cannot be read: No such file or directory"
    with pytest.raises(FileNotFoundError, match=text):
        documents.find(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises(OSError, match=r"cannot be read: Too many levels"):
        documents.find(tmp_path)


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Gives up root's right to read everything, where this is root."""
    if os.geteuid():
        yield
        return
    os.seteuid(12345)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_entered_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "a.txt").write_text("a")
        locked = Path(folder) / "sub"
        locked.mkdir()
        (locked / "b.txt").write_text("b")
        locked.chmod(0)
        try:
            with another_user(), pytest.raises(PermissionError, match=f"^{locked} cannot be read: Permission denied"):
                documents.find(Path(folder))
        finally:
            locked.chmod(0o755)
        assert [file.name for file in documents.find(Path(folder))] == ["a.txt", "sub/b.txt"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    for source in (tmp_path / "p.txt", tmp_path):
        text = rf"^{re.escape(str(tmp_path / 'p.txt'))} is a pipe or a device, and text is read more than once: write"
        with pytest.raises(ValueError, match=text):
            documents.find(source)


def long_window(content: bytes, log: int = 31) -> bytes:
    settings = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # a size would shrink the window
    return packer.compress(content) + packer.flush()


def test_zstandard_of_the_longest_window_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(long_window(b"to be " * 1000))
    assert zstandard.get_frame_parameters((tmp_path / "a.txt.zst").read_bytes()).window_size == 1 << 31
    assert read(tmp_path / "a.txt.zst") == [b"to be " * 1000]


def test_unsupported_zstandard_is_distinguished_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    packed = bytearray(long_window(b"to be " * 1000))
    packed[5] += 1  # the window's size: 9/8 of 2 GiB
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"a.txt.zst needs a window of more than 2 GiB to be unpacked"):
        read(path)
    words = zstandard.train_dictionary(1000, [b"to be or not %d" % number * 9 for number in range(500)])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=words).compress(b"to be or not to be"))
    with pytest.raises(ValueError, match=r"a.txt.zst was compressed with a dictionary"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_line_beyond_the_limit_is_refused_in_bounded_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 20)
    size = 1 << 27
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](b'{"text": "one"}\n{"text": "' + bytes(size)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"line 2 is longer than 1 MiB, the limit per line. Split the document"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < size / 1.5
    finally:
        tracemalloc.stop()


def test_a_line_at_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"text": "' + b"a" * 100 + b'"}'
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", len(line))
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read(tmp_path / "a.jsonl") == [b"a" * 100]
