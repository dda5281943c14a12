"""Record files: appending, resuming and overwriting."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import records
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax.records import record, writer


@pytest.fixture(params=["a.jsonl", "a.jsonl.zst"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A path of a record file in each of its two forms."""
    return tmp_path / request.param


def fill(path: Path, *made: record.Record, **how: Any) -> writer.RecordFile:
    out = writer.RecordFile(path, **how)
    for one in made:
        out.append(one)
    out.close()
    return out


def fingerprints(made: record.Record) -> tuple[writer.Fingerprint, writer.Fingerprint]:
    own = writer.prompt_fingerprint(made.prompt, made.prompt_ids, made.seed, vars(made.settings))
    return own, writer.shared_fingerprint(made.settings, made.run, made.numerics)


def samples_in(path: Path) -> list[int]:
    return [one.sample for one in record.read(path)]


def test_appended_samples_are_found_when_the_file_is_opened_again(path: Path) -> None:
    first = [records.make_record(sample=i) for i in range(2)]
    assert len(fill(path, *first).finished) == 0
    again = fill(path, records.make_record(sample=2, id="q"))
    found = again.finished
    assert (len(found), list(found.missing("p1", range(3))), list(found.missing("q", range(2)))) == (2, [2], [0, 1])
    assert list(record.read(path)) == [*first, records.make_record(sample=2, id="q")]


def test_overwriting_happens_at_the_first_record(path: Path) -> None:
    fill(path, records.make_record(sample=0))
    fill(path, overwrite=True)
    assert samples_in(path) == [0]
    fill(path, records.make_record(sample=5), records.make_record(sample=6), overwrite=True)
    assert samples_in(path) == [5, 6]


def test_a_new_file_without_a_record_is_removed(path: Path) -> None:
    fill(path)
    assert not path.exists()


def test_overwriting_keeps_the_old_records_if_the_new_one_is_invalid(path: Path) -> None:
    fill(path, records.make_record(sample=0))
    out = writer.RecordFile(path, overwrite=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        out.append(records.make_record(logprobs=(float("nan"), -1.0)))
    out.close()
    assert samples_in(path) == [0]


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    link, target = tmp_path / "link.jsonl", tmp_path / "target.jsonl"
    link.symlink_to("target.jsonl")
    fill(link)
    assert link.is_symlink()
    assert not target.exists()
    fill(link, records.make_record())
    assert samples_in(target) == [0]
    assert link.is_symlink()


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, records.make_record(sample=0), records.make_record(sample=1))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start + 1, len(whole), 97):
        path.write_bytes(whole[:cut])
        out = fill(path, records.make_record(sample=1))
        assert (len(out.finished), list(out.finished.missing("p1", range(2))), out.dropped) == (1, [1], cut - start)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("notes of mine", "line 1 is not a record: use another --output"),
        ("notes of mine\n", "line 1 is not JSON"),
        ("{}\n", "line 1 is not a record: it has no schema number"),
        (records.make_record().to_json() + "\nand a note", "line 2 is not a record: use another --output"),
        ((records.make_record().to_json() + "\n") * 2, "line 2 repeats sample 0 of p1"),
        (records.make_record().to_json().replace('"schema":2', '"schema":3') + "\n", "has schema 3"),
        ('{"schema":1}', "line 1 was made by contract 1: this version replays contract 2"),
        ('{"schema":2}', "line 1 has contract None"),
        ('{"schema":2,"contract":2}\n', "line 1 is not a valid record: record has no 'id'"),
        (records.make_record().to_json().replace('"sample":0', '"sample":[]') + "\n", "line 1 is not a valid record"),
    ],
)
def test_other_files_are_refused_and_unchanged(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        writer.RecordFile(path)
    assert path.read_text() == content


@pytest.mark.parametrize("name", ["none/a.jsonl", "."])
def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"--output .* cannot be written: (No such file|Is a directory)"):
        writer.RecordFile(tmp_path / name)


def test_a_file_has_one_writer_at_a_time(path: Path) -> None:
    out = writer.RecordFile(path)
    with pytest.raises(ValueError, match="is being written by another process"):
        writer.RecordFile(path)
    out.append(records.make_record())
    out.close()
    assert samples_in(path) == [0]


def test_other_settings_are_refused_by_name(path: Path) -> None:
    fill(path, records.make_record())
    out = writer.RecordFile(path)
    own, shared = fingerprints(records.make_record())
    assert not out.finished.differs("p1", writer._key(own)), "reads the file again for each prompt"
    out.check_prompt("p1", own)
    out.check_prompt("another", {**own, "seed": 8})
    out.check_shared(shared)
    said = "made by other settings: {} .* in sample 0 of p1, .* now"
    for name, other in {
        "seed": 8,
        "temperature": 0.5,
        "stop": ["x"],
        "prompt": "Not to be",
        "prompt_ids": (5,),
    }.items():
        with pytest.raises(ValueError, match=said.format(name)):
            out.check_prompt("p1", {**own, name: other})
    changes = {"window": 9, "weights": "0" * 64, "batch_size": 2, "environment": ["jax_enable_x64=True"]}
    for name, other in changes.items():
        with pytest.raises(ValueError, match=said.format(name)):
            out.check_shared({**shared, name: other})
    out.close()


def test_fingerprints_cover_all_settings_and_numerics() -> None:
    value = json.loads(records.make_record().to_json())
    own, shared = fingerprints(records.make_record())
    known = {*own, *shared}
    assert known >= set(value["settings"])
    assert known >= set(value["numerics"]) - {"machine", "processor", "instruction_sets", "cores"}


def test_a_prompt_with_records_of_several_settings_is_refused(path: Path) -> None:
    fill(path, records.make_record(sample=0), records.make_record(sample=1, seed=8))
    out = writer.RecordFile(path)
    assert out.seeds == {7, 8}
    with pytest.raises(ValueError, match="other settings: seed 8 in sample 1 of p1, 7 now"):
        out.check_prompt("p1", fingerprints(records.make_record())[0])
    out.close()


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 300)), unique=True, max_size=60),
    st.integers(0, 320),
    st.integers(0, 320),
    st.integers(1, 7),
    st.integers(1, 20),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_samples_are_a_set_in_any_order(
    added: list[tuple[str, int]], first: int, end: int, step: int, unsorted: int
) -> None:
    with mock.patch.object(writer, "_UNSORTED", unsorted):
        found, wanted = writer.Samples(), range(first, end, step)
        for name, sample in added:
            found.add(name, sample, "basis")
    assert (len(found), found.repeated()) == (len(added), None)
    for name in "abc":
        own = {sample for one, sample in added if one == name}
        assert (name in found) == bool(own)
        assert list(found.missing(name, wanted)) == [sample for sample in wanted if sample not in own]
        assert found.count(name, wanted) == len(own & set(wanted))
        assert not found.differs(name, "basis")
        assert found.differs(name, "another") == bool(own)


@given(st.lists(st.integers(0, 9), min_size=11, max_size=30), st.integers(1, 20))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_a_sample_added_twice_is_found(added: list[int], unsorted: int) -> None:
    with mock.patch.object(writer, "_UNSORTED", unsorted):
        found = writer.Samples()
        for sample in added:
            found.add("a", sample, "basis")
    repeated = found.repeated()
    assert repeated is not None
    assert repeated[0] == hash("a")
    assert added.count(repeated[1]) > 1


@pytest.mark.slow
def test_finished_samples_take_little_memory() -> None:
    tracemalloc.start()
    found = writer.Samples()
    for sample in range(100_000):
        found.add("in order", sample, "basis")
    for sample in range(99_999, -1, -1):
        found.add("backwards", sample, "basis")
    assert next(found.missing("in order", range(10**9))) == 100_000  # by arithmetic, not by counting
    assert tracemalloc.get_traced_memory()[0] < 100_000  # a set of the keys alone took 156 bytes per sample
    for prompt in range(100_000):
        found.add(str(prompt), 0, "basis")
    assert "7" in found
    assert tracemalloc.get_traced_memory()[0] < 4_000_000  # a list of ranges per prompt took 300 bytes per prompt
    tracemalloc.stop()


def test_overwriting_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    for content in ("all of my work\n", '{"prompt":"ROMEO:"}\n', '{"schema":1}', " "):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"--overwrite replaces files of records, and .* does not begin with one"):
            writer.RecordFile(path, overwrite=True)
        assert path.read_text() == content
    path.write_text("")
    fill(path, records.make_record(), overwrite=True)
    assert samples_in(path) == [0]


@pytest.mark.parametrize("content", ['{"schema":', "{", '{"schema":1,"contr', "no record"])
def test_a_torn_line_that_may_not_be_a_record_is_not_cut(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1 is not a record: use another --output"):
        writer.RecordFile(path)
    assert path.read_text() == content


def test_a_last_line_without_its_line_feed_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, records.make_record(sample=0))
    path.write_bytes(path.read_bytes().rstrip())
    out = fill(path, records.make_record(sample=1))
    assert (len(out.finished), out.dropped) == (1, 0)
    assert samples_in(path) == [0, 1]


def test_a_full_disk_leaves_complete_lines(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk: the system writes a part of the line, then fails."""
    path = tmp_path / "a.jsonl"
    line = len(records.make_record().to_json()) + 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    out = writer.RecordFile(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * line // 2, before[1]))
        out.append(records.make_record(sample=0))
        out.append(records.make_record(sample=1))
        with pytest.raises(OSError, match=r"no room for sample 2 of p1 .*The file is whole"):
            out.append(records.make_record(sample=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        out.close()
    assert path.stat().st_size == 2 * line
    assert samples_in(path) == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_devices_can_be_written() -> None:
    out = writer.RecordFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        out.append(records.make_record())
    out.close()
    fill(Path("/dev/null"), records.make_record(), records.make_record())


def test_a_closed_pipe_is_an_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", "import sys; open(sys.argv[1]).read(10)", str(pipe)]
    with subprocess.Popen(command) as reader:
        out = writer.RecordFile(pipe)
        with pytest.raises(BrokenPipeError):
            [out.append(records.make_record()) for _ in range(1000)]
        out.close()
        reader.wait(timeout=60)


def test_a_pipe_gets_every_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    made = [records.babble(400, seed) for seed in range(5)]
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read(), end='')", str(pipe)], stdout=subprocess.PIPE
    ) as reader:
        fill(pipe, *made)
        text, _ = reader.communicate(timeout=60)
    assert [record.parse(line, "it") for line in text.splitlines()] == made


def frames_of(content: bytes) -> list[bytes]:
    """Returns the frames of a compressed file."""
    frames = []
    while content:
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        unpacker.decompress(content)
        content, whole = unpacker.unused_data, content
        frames.append(whole[: len(whole) - len(content)])
    return frames


def test_a_torn_last_frame_is_dropped_wherever_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "a.jsonl.zst", [records.babble(3, i, sample=i) for i in range(6)]
    monkeypatch.setattr(writer, "_FRAME_BYTES", 2 * len(made[0].to_json()) - 100)
    fill(path, *made)
    whole = path.read_bytes()
    ends = [0, *itertools.accumulate(map(len, frames_of(whole)))]
    assert len(ends) == 5  # the first record is a frame, and so are each two others
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(end for end in ends if end <= cut)
        samples = (0, 1, 3, 5, 6)[ends.index(kept)]
        assert samples_in(path) == [*range(samples)]
        if cut % 7 and cut not in ends:
            continue
        out = fill(path, *made[samples:])
        assert (len(out.finished), out.dropped) == (samples, cut - kept)
        assert list(record.read(path)) == made


def test_buffered_records_are_appended_each_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "a.jsonl.zst", 100.0
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    out = writer.RecordFile(path)
    found = []
    for sample, now in enumerate((100.0, 100.5, 100.9, 101.1, 101.2)):  # noqa: B007
        out.append(records.make_record(sample=sample))
        found.append(samples_in(path))
    assert found == [[0], [0], [0], [0, 1, 2, 3], [0, 1, 2, 3]]
    out.flush_if_due()
    assert samples_in(path) == [0, 1, 2, 3]
    now = 102.1
    out.flush_if_due()
    assert samples_in(path) == [0, 1, 2, 3, 4]
    out.close()
    assert len(frames_of(path.read_bytes())) == 3


def test_frames_of_other_programs_are_read_and_continued(tmp_path: Path) -> None:
    path, made = tmp_path / "a.jsonl.zst", [records.make_record(sample=i) for i in range(3)]
    lines = "".join(one.to_json() + "\n" for one in made[:2]).encode()
    stream = zstandard.ZstdCompressor(level=19).compressobj()
    parts = [stream.compress(lines[:1000]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    parts += [stream.compress(lines[1000:-1]), stream.flush()]
    path.write_bytes(b"\x50\x2a\x4d\x18\x03\0\0\0abc" + b"".join(parts))  # a skippable frame; no last line feed
    assert fill(path, made[2]).dropped == 0
    assert list(record.read(path)) == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes of mine", "is damaged or not a Zstandard file: no frame begins at byte 0. Restore it, or use another"),
        (zstandard.compress(b"notes of mine\n"), "line 1 is not JSON"),
        (zstandard.compress(b"notes of mine"), "line 1 is not a record"),
        (zstandard.compress(random.Random(0).randbytes(300_000))[:-5], "line 1 is not a record"),
        (
            zstandard.compress(b'{"schema":2,"contract":2,"id"'),
            "line 1 is incomplete, in a whole frame: unpack the file",
        ),
        (zstandard.compress(records.make_record().to_json().encode()) + b"(\xb5/x", "no frame begins at byte"),
    ],
)
def test_other_compressed_files_are_refused_and_unchanged(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        writer.RecordFile(path)
    assert path.read_bytes() == content
    path.rename(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="line 1 is not"):
        writer.RecordFile(tmp_path / "a.jsonl")


def test_a_full_disk_leaves_complete_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    monkeypatch.setattr(writer, "_FRAME_BYTES", 1)
    fill(path, records.babble(100, 0, sample=0))
    size = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(writer, "_FRAME_BYTES", 1 << 20)
    monkeypatch.setattr(writer, "_SECONDS_PER_FRAME", 1000)
    out = writer.RecordFile(path)
    out._flushed = time.monotonic()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
        out.append(records.babble(100, 1, sample=1))
        out.append(records.babble(100, 2, sample=2))
        with pytest.raises(OSError, match=r"no room for sample 1 of p1 .*The file is whole"):
            out.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.stat().st_size == size
    assert samples_in(path) == [0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(out._file)
