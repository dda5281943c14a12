"""Parts of the samples: shards that divide them, and lists of single ones."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax.records import shards


@given(st.text(min_size=1), st.builds(range, st.integers(0, 50), st.integers(0, 2**32)), st.integers(1, 70))
@settings(deadline=None, derandomize=True, database=None)
def test_shards_divide_the_samples_of_a_prompt_evenly(name: str, samples: range, count: int) -> None:
    name = name.encode(errors="replace").decode()
    parts = [shards.Shard(index, count).part(name, samples) for index in range(count)]
    assert sum(map(len, parts)) == len(samples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    first = samples[:count]
    assert sorted(sample for part in parts for sample in part if sample in first) == list(first)
    assert all(part.step == count for part in parts)
    for sample in samples[:3]:
        (index,) = (index for index, part in enumerate(parts) if sample in part)
        assert sample in shards.Shard(index, count).part(name, range(sample, sample + 1)), (
            "whatever samples are asked for"
        )


def test_the_shard_of_a_sample_is_pinned() -> None:
    # SHA-256 of "abc" begins with ba7816bf 8f01cfea, which is 2 modulo 8.
    assert [shards.Shard(index, 8).part("abc", range(6)) for index in (2, 3, 7, 1)] == [
        range(0, 6, 8),
        range(1, 6, 8),
        range(5, 6, 8),
        range(6, 6, 8),
    ]


def test_many_prompts_are_spread_over_all_shards() -> None:
    sizes = [
        sum(len(shards.Shard(index, 8).part(f"prompt {number}", range(1))) for number in range(8000))
        for index in range(8)
    ]
    assert sum(sizes) == 8000
    assert all(abs(size - 1000) < 5 * 1000**0.5 for size in sizes)


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("0/1", {}, shards.Shard(0, 1)),
        ("7/8", {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, shards.Shard(7, 8)),
        ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, shards.Shard(1, 4)),
        ("auto", {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, shards.Shard(2, 3)),
    ],
)
def test_shards_are_read(text: str, environ: dict[str, str], expected: shards.Shard) -> None:
    assert shards.Shard.parse(text, environ) == expected


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("8/8", {}, "shard must be I/N with I from 0 to N-1: got 8/8"),
        ("0/0", {}, "shard must be I/N with I from 0 to N-1: got 0/0"),
        ("-1/8", {}, "shard must be I/N, such as 0/8, or auto: got '-1/8'"),
        ("1", {}, "shard must be I/N, such as 0/8, or auto: got '1'"),
        ("1/2/3", {}, "shard must be I/N"),
        ("١/٢", {}, "shard must be I/N"),
        ("auto", {}, "shard auto needs a job of Slurm or Open MPI: give --shard I/N, such as 0/8"),
        (
            "auto",
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3"},
            r"an array job had at first: give --shard \$SLURM_ARRAY_TASK_ID/N",
        ),
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, r"Kubernetes job's environment: give --shard \$JOB_COMPLETION_INDEX/N"),
    ],
)
def test_other_shards_are_refused(text: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shards.Shard.parse(text, environ)


def write(path: Path, *lines: object) -> shards.Cells:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return shards.Cells(path)


def line(name: str, first: int, number: int) -> dict[str, object]:
    return {"id": name, "first_sample": first, "num_samples": number}


def test_listed_samples_are_found_once(tmp_path: Path) -> None:
    cells = write(
        tmp_path / "a.jsonl", line("a", 7, 2), line("b", 0, 1), line("a", 1, 3), line("a", 2, 2), line("a", 9, 1)
    )
    assert cells.part("a", range(20)) == [range(1, 4), range(7, 10)]
    assert cells.part("a", range(3, 8)) == [range(3, 4), range(7, 8)]
    assert cells.part("c", range(20)) == []
    cells.check_all_in({"a": range(10), "b": range(1)})
    with pytest.raises(ValueError, match=r"a.jsonl lists sample 9 of 'a', which this command does not have"):
        cells.check_all_in({"a": range(9), "b": range(1)})
    with pytest.raises(ValueError, match=r"lists sample 0 of 'b'"):
        cells.check_all_in({"a": range(10)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no samples: there is nothing to generate"),
        ('{"id": "a"}\n', "line 1 is not a valid range of samples: range of samples has no 'first_sample'"),
        ('{"id": "a", "first_sample": 0, "num_samples": 0}\n', "num_samples must be bigger than or equal to 1"),
        ('{"id": "a", "first_sample": 0, "num_samples": 1, "x": 1}\n', "unknown field 'x'"),
        ("the king\n", "line 1 is not JSON"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        shards.Cells(path)
    with pytest.raises(FileNotFoundError, match=r"list of samples not found: .*b\.jsonl"):
        shards.Cells(tmp_path / "b.jsonl")
