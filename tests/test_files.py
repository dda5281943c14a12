"""Files are whole or absent, whatever happens while they are written."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import files

SETTINGS = settings(deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "scratch.json"


def test_replacing_leaves_the_new_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old, and longer")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old, and longer"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", ["old", None])
def test_replacing_keeps_the_old_file_when_the_block_raises(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)

    def write_half() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if old is None else ["file"])
    assert old is None or path.read_text() == old


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    program = f"""
import os, pathlib
from hipgpt_jax import files, json_files
with files.replacing(pathlib.Path({str(path)!r})) as temporary:
    temporary.write_text("half of the n")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_the_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    flushed: list[tuple[int, str]] = []
    flush = os.fsync

    def record(descriptor: int) -> None:
        flush(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, path.read_text()))

    monkeypatch.setattr(files.os, "fsync", record)
    files.write_text(path, "new")
    assert flushed == [(path.stat().st_ino, "old"), (tmp_path.stat().st_ino, "new")]


def test_a_link_is_relative_so_a_moved_directory_still_opens(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "step1").write_text("one")
    files.link(here / "latest", "step1")
    assert (here / "latest").readlink() == Path("step1")
    here.rename(there)
    assert (there / "latest").read_text() == "one"
    assert sorted(entry.name for entry in there.iterdir()) == ["latest", "step1"]


def test_a_link_replaces_one_that_names_nothing_and_a_killed_process_link(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("gone")
    (tmp_path / f".latest.{os.getpid()}.tmp").symlink_to("gone too")
    (tmp_path / "step1").write_text("one")
    files.link(tmp_path / "latest", "step1")
    assert (tmp_path / "latest").read_text() == "one"


def test_a_reader_never_finds_the_link_missing(tmp_path: Path) -> None:
    names = ("step1", "step2")
    for name in names:
        (tmp_path / name).write_text(name)
    latest = tmp_path / "latest"
    files.link(latest, "step1")
    seen: set[str] = set()
    failures: list[OSError] = []
    stopped = threading.Event()

    def read() -> None:
        while not stopped.is_set():
            try:
                seen.add(latest.read_text())
            except OSError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for swap in range(400):
        files.link(latest, names[swap % 2])
    stopped.set()
    reader.join()
    assert failures == []
    assert seen == set(names)


@SETTINGS
@given(content=st.binary())
def test_sha256_is_the_digest_of_the_content(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    assert files.sha256(scratch) == hashlib.sha256(content).hexdigest()


def test_an_output_may_be_a_pipe_named_by_a_descriptor() -> None:
    reading, writing = os.pipe()
    with files.writing(Path(f"/dev/fd/{writing}")) as file:
        file.write("text")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "text"


def test_a_descriptor_is_written_at_its_position(tmp_path: Path) -> None:
    """Opened by name, a file that stdout was redirected to would be truncated."""
    with open(tmp_path / "out", "wb") as out:
        out.write(b"before ")
        out.flush()
        for name in (f"/dev/fd/{out.fileno()}", f"/proc/self/fd/{out.fileno()}"):
            assert files.is_stream(Path(name))
            assert files.destination(Path(name)) == Path(name)
            with files.writing(Path(name)) as file:
                file.write("é ")
        out.write(b"after")
    assert (tmp_path / "out").read_text() == "before é é after"
    with (
        pytest.raises(OSError, match="/dev/fd/999 cannot be written: Bad file descriptor"),
        files.writing(Path("/dev/fd/999")),
    ):
        pass


def test_a_full_disk_is_an_error_with_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="/dev/full cannot be written: No space left on device"),
        files.writing(Path("/dev/full")) as file,
    ):
        file.write("a")

    def fail(error: OSError) -> None:
        with files.replacing(tmp_path / "a"):
            raise error

    with pytest.raises(OSError, match=r"^\S+/a cannot be written: No space left on device$"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such: 'b'$"):
        fail(FileNotFoundError(errno.ENOENT, "No such", "b"))
    with pytest.raises(FileNotFoundError, match="none/a cannot be written: No such file"):
        files.write_text(tmp_path / "none" / "a", "")


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127, "b" * 236):
        files.write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert len(list(tmp_path.iterdir())) == 3
