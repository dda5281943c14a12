"""``hipgpt-replay``: records made anew, and what is said where they cannot be."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import records

from hipgpt_jax.generation import replay
from hipgpt_jax.runs import record

Run = Callable[..., programs.Result]


@pytest.fixture
def call(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., programs.Result]:
    """Runs a program in this process, in a directory with a copy of the trained run."""
    shutil.copytree(trained / "checkpoints/tiny", tmp_path / "checkpoints/tiny", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))
    return lambda *arguments: programs.call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def made(call: Run) -> list[dict[str, Any]]:
    """Records in ``a.jsonl``: three prompts, two samples each, at a width of two, far beyond the window."""
    lines = [
        {"id": "first", "prompt": "the king"},
        {"id": "second", "prompt": "a queen would say", "temp": 0.0},
        {"id": "third", "prompt": "in war", "top_k": 0, "top_p": 1.0, "stop": ["lord"], "num_tokens": 100},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = "--run-name tiny --prompts_file p.jsonl --num_samples 2 --batch_size 2 --num_tokens 40 --output a.jsonl"
    assert call("generate", *flags.split()).code == 0
    return [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]


def write(name: str, values: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return name


def test_what_was_made_is_made_again(call: Run, made: list[dict[str, Any]]) -> None:
    result = call("replay", "a.jsonl")
    assert result.code == 0
    lines = result.out.splitlines()
    names = [f"identical  {one['id']} sample {one['sample']}: {len(one['ids'])} tokens" for one in made]
    assert lines == [*names, "6 of 6 identical, log-probabilities equal to the bit"]
    chosen = call("replay", "--ids", "third,first", "--records", "a.jsonl", "--device", "cpu")
    assert (chosen.code, chosen.out.splitlines()) == (0, [*names[:2], *names[4:], lines[-1].replace("6", "4")])


@pytest.mark.slow
def test_bfloat16_is_on_the_record_and_made_again(call: Run) -> None:
    flags = "--run-name tiny --prompt king --num_samples 3 --num_tokens 40 --dtype bfloat16 --output a.jsonl"
    assert call("generate", *flags.split()).code == 0
    made = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert {(one["numerics"]["dtype"], one["numerics"]["attention"]) for one in made} == {("bfloat16", "xla")}
    assert call("replay", "a.jsonl").out.splitlines()[-1] == "3 of 3 identical, log-probabilities equal to the bit"
    logprob = made[0]["logprobs"][0]
    assert call("generate", *flags.replace("bfloat16", "float32").split(), "--overwrite").code == 0
    exact = json.loads(Path("a.jsonl").read_text().splitlines()[0])
    assert exact["numerics"]["dtype"] == "float32"
    assert exact["ids"][0] != made[0]["ids"][0] or 0 < abs(exact["logprobs"][0] - logprob) < 0.05


def test_order_and_company_do_not_matter(call: Run, made: list[dict[str, Any]]) -> None:
    assert call("replay", write("b.jsonl", [made[i] for i in (4, 0, 4, 5, 2, 3, 1)])).code == 0


@pytest.mark.slow
def test_another_width_is_counted_and_said(call: Run, made: list[dict[str, Any]]) -> None:
    result = call("replay", "a.jsonl", "--batch_size", "1")
    assert "changed    decode_width: 2 in the record, 1 now" in result.out
    assert re.search(r"\d of 6 identical.*, log-probabilities within \d\.\de-0[567]", result.out)


@pytest.mark.parametrize(
    ("margin", "rounding", "verdict"),
    [({}, 0, "more than floating-point error explains"), ({7: 0.0}, 1, "within floating-point error")],
)
def test_the_first_difference_is_shown(
    call: Run, made: list[dict[str, Any]], margin: dict[int, float], rounding: int, verdict: str
) -> None:
    """The record's margin judges it."""
    one = made[0]
    other = (one["ids"][7] + 1) % 300
    changed = {**one, "ids": [*one["ids"][:7], other, *one["ids"][8:]]}
    changed["margins"] = [margin.get(place, own) for place, own in enumerate(one["margins"])]
    result = call("replay", write("b.jsonl", [changed, made[1]]))
    assert result.code == 1
    first, second, summary = result.out.splitlines()
    assert re.fullmatch(
        rf"differs    first sample 0: token 7 is {other} '.*' in the record, {one['ids'][7]} '.*' now; "
        rf"margin [\d.e-]+, gap [\d.e-]+: {verdict}",
        first,
    )
    assert second.startswith("identical  first sample 1")
    assert summary.startswith(f"1 of 2 identical, 1 differ ({rounding} within floating-point error), log")


def test_an_end_that_differs_is_shown(call: Run, made: list[dict[str, Any]]) -> None:
    lists = ("ids", "tokens", "logprobs", "ranks", "margins", "gaps")
    short = {**made[0], **{name: made[0][name][:7] for name in lists}}
    result = call("replay", write("b.jsonl", [short]))
    assert result.code == 1
    assert "token 7 is the end (length) in the record" in result.out


@pytest.mark.parametrize(
    "field", ["prompt", "text", "tokens", "stop", "prompt_dropped", "ranks", "margins", "logprobs"]
)
def test_a_text_that_was_changed_is_not_identical(call: Run, made: list[dict[str, Any]], field: str) -> None:
    others = {"tokens": "!", "ranks": 900, "margins": 0.123, "logprobs": -50.0}
    other: Any = [*made[0][field][:-1], others[field]] if field in others else "something else"
    if field == "prompt_dropped":
        other = 7
    result = call("replay", write("b.jsonl", [{**made[0], field: other}]))
    assert result.code == 1
    assert f"its ids are the same, but not its {field}" in result.out


def test_another_config_is_said(call: Run, made: list[dict[str, Any]]) -> None:
    other = {**made[0], "run": {**made[0]["run"], "config_sha256": "0" * 64}}
    result = call("replay", write("b.jsonl", [other]))
    assert result.code == 0
    assert f"changed    config_sha256: {'0' * 64} in the record" in result.out


def test_a_torn_last_line_is_said(call: Run, made: list[dict[str, Any]]) -> None:
    path = Path(write("b.jsonl", made[:2]))
    path.write_bytes(path.read_bytes()[:-1])
    result = call("replay", "b.jsonl")
    assert "b.jsonl: the last line was cut short and is passed over" in result.err
    assert result.out.splitlines()[-1].startswith("1 of 1 identical")


def test_a_difference_within_rounding_is_told_apart() -> None:
    recorded = records.make_record(ids=(1, 2), margins=(0.3, 1e-6), gaps=(3.0, 0.5))
    found = dataclasses.replace(recorded, ids=(1, 3), logprobs=(-0.6931, -2.0))
    result = replay.compare(recorded, found)
    assert result.difference is not None
    assert (result.difference.place, result.difference.recorded, result.difference.found) == (1, 2, 3)
    assert result.difference.is_rounding
    assert result.logprob_error == pytest.approx(abs(recorded.logprobs[0] + 0.6931))
    for margins, gaps, is_rounding in (((1, 0.1), (1, 1e-5), True), ((1, 0.1), (1, 0.1), False)):
        one = dataclasses.replace(recorded, margins=margins, gaps=gaps)
        difference = replay.compare(one, found).difference
        assert difference is not None
        assert difference.is_rounding == is_rounding
    assert replay.compare(recorded, recorded).difference is None


def test_other_files_are_told_with_both_digests(call: Run, made: list[dict[str, Any]]) -> None:
    for key in ("weights", "tokenizer"):
        other = {**made[0], "run": {**made[0]["run"], f"{key}_sha256": "0" * 64}}
        result = call("replay", write("b.jsonl", [other, made[1]]))
        assert result.code == 2
        digest = made[0]["run"][f"{key}_sha256"]
        assert f"not tried  first sample 0: other {key}: sha256 {'0' * 64} in the record, {digest} in " in result.out
        assert result.out.splitlines()[1].startswith("identical  first sample 1")


def test_a_run_that_is_gone_or_damaged_is_told_and_one_elsewhere_is_found(
    call: Run, made: list[dict[str, Any]]
) -> None:
    Path("backup").mkdir()
    Path("checkpoints/tiny").rename("backup/moved")
    result = call("replay", "a.jsonl")
    assert result.code == 2
    assert result.out.count("not tried") == 6
    assert "run 'tiny' not found" in result.out
    assert call("replay", "a.jsonl", "--run-dir", "backup/moved").code == 0
    weights = Path("backup/moved/tiny_step40.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    result = call("replay", "a.jsonl", "--run-dir", "backup/moved")
    assert result.code == 2
    assert "tiny_step40.bin is not the file that the config" in result.out
    assert "6 could not be tried" in result.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [300]}, "the prompt's ids must be"),
        ({"settings": {"repetition_penalty": 1e9}}, "rep_penalty must be"),
        ({"settings": {"window": 33}}, "max_seq_len must be at most the run's own 32"),
        ({"settings": {"eos_id": 300}}, "eos_id must be -1 or below"),
        ({"run": {"name": "../x"}}, "must be a plain name"),
        ({"ids": [99999, *[1] * 39]}, "it has ids beyond the vocabulary's size 300"),
        ({"run": {"step": 9}}, "run 'tiny' has no step 9. Steps: 20, 40"),
    ],
)
def test_a_record_that_cannot_be_served_is_told(
    call: Run, made: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    one = {**made[0], **{k: {**made[0][k], **v} if isinstance(v, dict) else v for k, v in change.items()}}
    result = call("replay", write("b.jsonl", [one, made[1]]))
    assert result.code == 2
    assert re.search(f"not tried  first sample 0: .*{message}", result.out)
    assert "identical  first sample 1" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--records is required"),
        (("none.jsonl",), "record file not found: none.jsonl"),
        (("a.jsonl", "b.jsonl"), "unexpected argument 'b.jsonl'"),
        (("a.jsonl", "--ids", "x"), "a.jsonl has no record of the id 'x'. Ids: first, second, third"),
        (("p.jsonl",), "p.jsonl line 1 is not a record"),
        (("a.jsonl", "--ids", ""), "--ids names no id"),
        (("empty.jsonl",), "empty.jsonl holds no record"),
        (("a.jsonl", "--frob", "x"), "Unknown command line flag 'frob'"),
        (("a.jsonl", "--device", "tpu"), "device must be one of"),
    ],
)
def test_what_could_not_be_tried_is_exit_code_2(
    call: Run, made: list[dict[str, Any]], arguments: tuple[str, ...], message: str
) -> None:
    Path("empty.jsonl").write_text("")
    result = call("replay", *arguments)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(f"replay: error: .*{message}.*", result.err.splitlines()[-1])


def test_every_record_of_the_file_is_one(call: Run, made: list[dict[str, Any]]) -> None:
    """The reader of the tests and of the program are the same; the file was written by another path."""
    assert [one.id for one in record.read(Path("a.jsonl"))] == [one["id"] for one in made]
