"""Record files merged: order, duplicates, missing samples, and what cannot be merged."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import programs
import pytest
import records
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax.records import merging, record

Cell = tuple[str, int]
NAMES = ("a", "ab", "b\t", "é")


def of(cell: Cell, **changes: object) -> record.Record:
    name, sample = cell
    return records.make_record(id=name, sample=sample, prompt=f"prompt {name}", **changes)


def write(path: Path, *several: record.Record) -> Path:
    path.write_text("".join(f"{one.to_json()}\n" for one in several))
    return path


def merge(
    paths: list[Path], grid: dict[str, range] | range | None = None
) -> tuple[merging.Merger, list[record.Record], list[Cell]]:
    """Returns a merger, its records and the missing samples."""
    merger = merging.Merger(paths, paths[0].parent, grid.items() if isinstance(grid, dict) else grid)
    parts = list(merger.lines())
    lost = [(name, sample) for name, samples in (one for one in parts if isinstance(one, tuple)) for sample in samples]
    return merger, [record.parse(one, "it") for one in parts if isinstance(one, bytes)], lost


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merging")


CELLS = st.tuples(st.sampled_from(NAMES), st.integers(0, 12))


@given(st.lists(CELLS, min_size=1, max_size=30), st.randoms(use_true_random=False), st.sampled_from([1, 5000, 10**6]))
@settings(deadline=None, derandomize=True, database=None, max_examples=30)
def test_records_are_sorted_and_duplicates_dropped(
    directory: Path, cells: list[Cell], chance: random.Random, run_bytes: int
) -> None:
    files: list[list[Cell]] = [[], [], []]
    for cell in cells:
        chance.choice(files).append(cell)
    paths = [write(directory / f"{number}.jsonl", *map(of, each)) for number, each in enumerate(files)]
    with mock.patch.object(merging, "_RUN_BYTES", run_bytes):
        merger, merged, lost = merge(paths)
        _, _, gaps = merge(paths, {name: range(2, 13) for name in NAMES} | {name: range(13) for name, _ in cells})
    different = sorted(set(cells), key=lambda cell: (json.dumps(cell[0]), cell[1]))
    assert [(one.id, one.sample) for one in merged] == different
    assert merged == [of(cell) for cell in different], "unchanged"
    assert (merger.samples, merger.duplicates) == (len(different), len(cells) - len(different))
    assert merger.prompts == len({name for name, _ in cells})
    largest = {name: max(sample for other, sample in cells if other == name) for name, _ in cells}
    assert set(lost) == {(name, sample) for name, last in largest.items() for sample in range(last)} - set(cells)
    wanted = {(name, sample) for name in NAMES for sample in range(0 if name in largest else 2, 13)}
    assert (len(gaps), set(gaps)) == (len(set(gaps)), wanted - set(cells))
    assert sorted(path.name for path in directory.iterdir()) == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_equal_records_of_other_times_and_machines_are_duplicates(tmp_path: Path) -> None:
    one = of(("a", 0))
    later = dataclasses.replace(
        one,
        started="2030-01-01T00:00:00Z",
        argv=("hipgpt-generate", "--shard", "1/2"),
        numerics=dataclasses.replace(one.numerics, processor="another", cores=64),
        timings=record.Timings(load=9.0, first_token=9.0, total=9.0),
    )
    merger, merged, _ = merge([write(tmp_path / "a.jsonl", one), write(tmp_path / "b.jsonl", later)])
    assert (merged, merger.duplicates) == ([one], 1)


def test_different_records_of_a_sample_are_refused_with_both(tmp_path: Path) -> None:
    one = of(("a", 0))
    other = dataclasses.replace(one, ids=(9, *one.ids[1:]))
    paths = [write(tmp_path / "a.jsonl", of(("b", 0)), one), write(tmp_path / "b.jsonl", other)]
    with pytest.raises(
        ValueError, match=r"a\.jsonl line 2 and .*b\.jsonl line 1 are different records of sample 0 of 'a': ids \("
    ):
        merge(paths)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 8}, "seed is 7 in .*line 1 and 8 in .*line 1"),
        ({"prompt_ids": (1, 2)}, "prompt_ids is"),
        ({"settings": dataclasses.replace(records.SETTINGS, temperature=0.5)}, "temperature is 1.0 in .* and 0.5 in"),
        ({"settings": dataclasses.replace(records.SETTINGS, window=64)}, "window is 128 in .* and 64 in"),
        ({"run": dataclasses.replace(records.RUN, weights_sha256="00" * 32)}, "weights is"),
        ({"numerics": dataclasses.replace(records.NUMERICS, dtype="bfloat16")}, "dtype is 'float32' in"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, object], name: str) -> None:
    paths = [write(tmp_path / "a.jsonl", of(("a", 0))), write(tmp_path / "b.jsonl", of(("a", 1), **change))]
    with pytest.raises(ValueError, match=f"records of different settings cannot be merged: {name}"):
        merge(paths)


def test_another_contract_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", of(("a", 0)))
    path.write_text(path.read_text().replace('"contract":2', '"contract":3'))
    with pytest.raises(ValueError, match=r"a.jsonl line 1 has contract 3: this version reads contract 2"):
        merge([path])


def test_samples_beyond_the_grid_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", of(("a", 4)))
    for grid in (range(4), range(5, 9), {"a": range(4)}, {"b": range(9)}):
        with pytest.raises(ValueError, match=r"line 1 is sample 4 of 'a', which is not among the samples wanted"):
            merge([path], grid)


@pytest.fixture
def run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., programs.Result]:
    """Runs a program in this process, in a directory with the run ``tiny``."""
    (tmp_path / "checkpoints").symlink_to(tiny / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: programs.call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def values(path: str) -> list[dict[str, Any]]:
    """Returns records without times and command line, in order."""
    found = [vars(one) | {"started": "", "timings": "", "argv": ""} for one in record.read(Path(path))]
    return sorted(found, key=lambda one: (json.dumps(one["id"]), one["sample"]))


def test_shards_and_single_samples_make_the_records_of_one_command(run: Callable[..., programs.Result]) -> None:
    lines = [{"id": "x", "prompt": "the king"}, {"prompt": "a queen", "num_samples": 5}, {"id": "z", "prompt": "in"}]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("--prompts_file", "p.jsonl", "--num_samples", "2", "--first_sample", "3")
    command = ("generate", "--run-name", "tiny", "--num_tokens", "6", *asked)
    assert run(*command, "--output", "all.jsonl").code == 0
    for index in (0, 2):
        assert run(*command, "--shard", f"{index}/3", "--output", f"{index}.jsonl").code == 0
    merged = ("records", "merge", *sorted(map(str, Path().glob("[0-9].jsonl"))), "--output", "merged.jsonl", *asked)
    result = run(*merged, "--missing", "missing.jsonl")
    (number,) = (9 - len(values("merged.jsonl")),)
    assert (result.code, number > 0) == (1, True)
    assert f"merged.jsonl lacks {number} samples: missing.jsonl lists them, for hipgpt-generate --only" in result.err
    assert run(*command, "--only", "missing.jsonl", "--output", "rest.jsonl").code == 0
    result = run(*merged, "rest.jsonl", "--overwrite")
    assert (result.code, result.out, result.err) == (0, "", "merged.jsonl: 9 samples of 3 prompts\n")
    assert values("merged.jsonl") == values("all.jsonl")
    assert [one.id for one in record.read(Path("merged.jsonl"))][-2:] == ["z", "z"]
    summary = run("records", "summarize", "merged.jsonl").out.splitlines()
    assert summary[0] == "records    9 of 3 prompts, samples 3 to 7"
    assert summary[3:6] == ["seed       0", "tokens     54, 6.0 per sample (6 to 6)", "ends       9 length"]


def test_a_merged_file_may_be_compressed(run: Callable[..., programs.Result]) -> None:
    write(Path("a.jsonl"), of(("a", 1)), of(("a", 0)))
    assert run("records", "merge", "a.jsonl", "--output", "b.jsonl.zst").code == 0
    assert run("records", "merge", "b.jsonl.zst", "--output", "c.jsonl").code == 0
    packed, plain = Path("b.jsonl.zst").read_bytes(), Path("c.jsonl").read_bytes()
    assert zstandard.ZstdDecompressor().stream_reader(packed).read() == plain
    assert plain == f"{of(('a', 0)).to_json()}\n{of(('a', 1)).to_json()}\n".encode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the commands are merge and summarize: give one"),
        (("mrge", "a.jsonl"), "the commands are merge and summarize: got 'mrge'"),
        (("merge",), "merge needs record files, such as part*.jsonl"),
        (("merge", "a.jsonl"), "--output is required"),
        (("merge", "none.jsonl", "--output", "b.jsonl"), "record file not found: none.jsonl"),
        (("merge", "a.jsonl", "--output", "a.jsonl"), "--output a.jsonl exists: give another name, or --overwrite"),
        (("merge", "a.jsonl", "--output", "a.jsonl", "--overwrite"), "--output a.jsonl is one of the files to merge"),
        (("merge", "a.jsonl", "--output", "-"), "--output - must be a file, which appears when it is complete"),
        (("merge", "a.jsonl", "--output", "no/b.jsonl"), "--output no/b.jsonl cannot be written"),
        (("merge", "a.jsonl", "--output", "c.txt", "--overwrite"), "c.txt does not begin with one"),
        (("merge", "a.jsonl", "--output", "b.jsonl", "--first_sample", "1"), "--first_sample needs --num_samples"),
        (("merge", "a.jsonl", "--output", "b.jsonl", "--parse_special"), "--parse_special needs --prompts_file"),
        (
            ("merge", "a.jsonl", "--output", "b.jsonl", "--missing", "a.jsonl"),
            "a.jsonl exists and is not a list of samples",
        ),
        (("merge", "a.jsonl", "--output", "b.jsonl", "--missing", "./b.jsonl"), "b.jsonl is the --output too"),
        (("merge", "c.txt", "--output", "b.jsonl"), "c.txt line 1 is not JSON"),
        (("summarize", "a.jsonl", "--output", "b"), "--output is a flag of merge: summarize has none"),
        (("summarize", "empty.jsonl"), "no records in empty.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    run: Callable[..., programs.Result], arguments: tuple[str, ...], message: str
) -> None:
    write(Path("a.jsonl"), of(("a", 0)))
    Path("c.txt").write_text("notes\n")
    Path("empty.jsonl").touch()
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    result = run("records", *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert message in result.err
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_the_array_job_makes_a_shard_per_task(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "docs" / "examples" / "slurm" / "generate.sbatch"
    programs_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for index in (0, 63):
        environ = {**os.environ, "PATH": programs_path, "SLURM_ARRAY_TASK_ID": str(index), "SAMPLES": "80"}
        environ |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "8"}
        done = subprocess.run(["bash", script], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"shard {index}/64" in done.stderr
    first, last = (list(record.read(tmp_path / "samples" / f"part{index}.jsonl")) for index in (0, 63))
    assert {len(first), len(last)} <= {1, 2}
    (name,) = {one.id for one in first + last}
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    assert all((one.sample + digest) % 64 == 0 for one in first)
    assert all((one.sample + digest) % 64 == 63 for one in last)
