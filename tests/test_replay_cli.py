"""``hipgpt-replay``: verdicts on records, and messages about those that cannot be replayed."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest

from hipgpt_jax.cli import replay
from hipgpt_jax.records import record

Run = Callable[..., programs.Result]


FLAGS = "--run-name tiny --prompts_file p.jsonl --num_samples 2 --batch_size 2 --num_tokens 40 --output a.jsonl"
PROMPTS = [
    {"id": "first", "prompt": "the king"},
    {"id": "second", "prompt": "a queen would say", "temp": 0.0},
    {"id": "third", "prompt": "in war", "top_k": 0, "top_p": 1.0, "stop": ["873."], "num_tokens": 100},
]


@pytest.fixture
def call(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., programs.Result]:
    """Runs a program in this process, in a directory with a copy of the run ``tiny``."""
    shutil.copytree(tiny / "checkpoints/tiny", tmp_path / "checkpoints/tiny", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: programs.call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def made(call: Run, tiny: Path) -> list[dict[str, Any]]:
    """Records in ``a.jsonl``: three prompts, two samples each, at a width of two, far beyond the window."""
    kept = tiny / "replayed.jsonl"
    write("p.jsonl", PROMPTS)
    if kept.exists():
        shutil.copy(kept, "a.jsonl")
    else:
        assert call("generate", *FLAGS.split()).code == 0
        shutil.copy("a.jsonl", kept)
    return [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]


def write(name: str, values: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return name


def test_records_are_reproduced(call: Run, made: list[dict[str, Any]]) -> None:
    result = call("replay", "a.jsonl")
    assert result.code == 0
    lines = result.out.splitlines()
    names = [f"identical  {one['id']} sample {one['sample']}: {len(one['ids'])} tokens" for one in made]
    unexercised = "not exercised: seed, top_k, top_p (2 records), stop (1 record)"
    assert lines == [*names, unexercised, "6 of 6 identical, log-probabilities equal to the bit"]
    chosen = call("replay", "--ids", "third,first", "--records", "a.jsonl", "--device", "cpu")
    summary = ["not exercised: stop (1 record)", lines[-1].replace("6", "4")]
    assert (chosen.code, chosen.out.splitlines()) == (0, [*names[:2], *names[4:], *summary])


@pytest.mark.slow
def test_bfloat16_is_recorded_and_reproduced(call: Run) -> None:
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


def test_the_order_of_records_does_not_matter(call: Run, made: list[dict[str, Any]]) -> None:
    assert call("replay", write("b.jsonl", [made[i] for i in (4, 0, 4, 5, 2, 3, 1)])).code == 0


@pytest.mark.slow
def test_another_batch_size_is_listed_as_a_change(call: Run, made: list[dict[str, Any]]) -> None:
    result = call("replay", "a.jsonl", "--batch_size", "1")
    assert "changed    batch_size: 2 in the record, 1 now" in result.out
    assert re.search(r"\d of 6 identical.*, log-probabilities within \d\.\de-0[567]", result.out)


def test_invariant_records_take_any_batch_size_and_are_replayed_by_any(call: Run) -> None:
    flags = ("generate", "--run-name", "tiny", "--prompt", "king", "--num_tokens", "6", "--numerics", "invariant")
    assert call(*flags, "--num_samples", "2", "--output", "a.jsonl").code == 0
    assert call(*flags, "--num_samples", "4", "--output", "a.jsonl", "--batch_size", "3").code == 0
    records = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [one["numerics"]["batch_size"] for one in records] == [None] * 4
    fast = call(*flags[:-2], "--num_samples", "5", "--output", "a.jsonl")
    assert "other settings: batch_size 'invariant' in sample 0 of" in fast.err
    replayed = call("replay", "a.jsonl", "--batch_size", "1")
    assert replayed.code == 0
    assert replayed.out.splitlines()[-1] == "4 of 4 identical, log-probabilities equal to the bit"
    assert "changed" not in replayed.out


@pytest.mark.parametrize("own", [None, 0.0])
def test_the_first_difference_is_shown(call: Run, made: list[dict[str, Any]], own: float | None) -> None:
    """The verdict does not believe the record's lead and cut, nor does the line show them."""
    one = made[0]
    other = (one["ids"][7] + 1) % 300
    changed = {**one, "ids": [*one["ids"][:7], other, *one["ids"][8:]]}
    for name in () if own is None else ("leads", "cuts"):
        changed[name] = [*one[name][:7], own, *one[name][8:]]
    result = call("replay", write("b.jsonl", [changed, made[1]]))
    assert result.code == 1
    first, second, summary = result.out.splitlines()
    assert first.startswith(f"differs    first sample 0: token 7 is {other} '")
    assert first.endswith(
        f" now; lead {one['leads'][7]:.2g}, cut {one['cuts'][7]:.2g}: more than floating-point error explains"
    )
    assert f" in the record, {one['ids'][7]} '" in first
    assert second.startswith("identical  first sample 1")
    assert summary == ("1 of 2 identical, 1 differ (0 within floating-point error), log-probabilities equal to the bit")


def test_an_end_that_differs_is_shown(call: Run, made: list[dict[str, Any]]) -> None:
    lists = ("ids", "tokens", *record.STATISTICS[:-1])
    short = {**made[0], **{name: made[0][name][:7] for name in lists}}
    result = call("replay", write("b.jsonl", [short]))
    assert result.code == 1
    assert "token 7 is the end (length) in the record" in result.out


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x"}, "prompt"),
    ({"text": "x", "stop": "x"}, "text and stop"),
    ({"tokens": "!"}, "tokens"),
    ({"prompt_dropped": 7}, "prompt_dropped"),
    ({"error": "it failed"}, "error"),
    ({"ranks": 900}, "ranks (at token 39: 900 in the record, {ranks} now)"),
    (
        {"leads": 0.123, "logprobs": -50.5},
        "logprobs (at token 39: -50.5 in the record, {logprobs:.9g} now) and leads (at token 39: 0.123 in the "
        "record, {leads:.9g} now)",
    ),
]


def test_a_field_that_was_changed_is_not_identical(call: Run, made: list[dict[str, Any]]) -> None:
    one = made[0]
    changed = [
        one | {name: [*one[name][:-1], new] if isinstance(one[name], list) else new for name, new in fields.items()}
        for fields, _ in CHANGES
    ]
    result = call("replay", write("b.jsonl", changed))
    assert result.code == 1
    last = {name: one[name][-1] for name in ("ranks", "leads", "logprobs")}
    for (_, message), line in zip(CHANGES, result.out.splitlines(), strict=False):
        expected = f"its ids are the same, but not its {message.format(**last)}: was it changed?"
        assert line == f"differs    first sample 0: {expected}"
    assert result.out.splitlines()[-1].startswith("0 of 7 identical, 7 differ")


def test_an_invalid_line_affects_no_other(call: Run, made: list[dict[str, Any]]) -> None:
    """Including one that is valid in the schema but not in the engine."""
    lines = [json.dumps(one) for one in made[:3]]
    settings = json.dumps(made[1]["settings"])
    lines[1:1] = [
        "{",
        lines[0].replace('"seed": 0', '"seed": 999, "seed": 0'),
        lines[0].replace('"ids": [', '"ids": [1.0, '),
        lines[0].replace('"batch_size": 2', '"batch_size": 65536'),
        lines[0].replace(settings, settings.replace('"window": 32', '"window": 32.0')),
        lines[0].replace(settings, settings.replace('"window": 32', '"window": 99')),
        "",
    ]
    Path("b.jsonl").write_text("\n".join(lines) + "\n")
    result = call("replay", "b.jsonl")
    assert (result.code, result.err.count("error")) == (2, 0)
    expected = [
        "identical  first sample 0: 40 tokens",
        "skipped    line 2: it is not JSON: Expecting property name enclosed in double quotes at column 2",
        "skipped    line 3: it is not JSON: key 'seed' appears twice",
        "skipped    line 4: it is not a valid record: record.ids[0] must be integer",
        "skipped    first sample 0: batch_size must be at most 4096 to be replayed: got 65536. Choose another "
        "batch_size for the replay",
        "skipped    line 6: it is not a valid record: record.settings.window must be integer",
        "skipped    first sample 0: window must be at most the run's own 32 (its learned positions): got 99",
        "identical  first sample 1: 40 tokens",
        "identical  second sample 0: 40 tokens",
    ]
    assert result.out.splitlines()[:9] == expected
    assert result.out.splitlines()[-1].startswith("3 of 9 identical, 6 skipped")
    chosen = call("replay", "b.jsonl", "--ids", "second").out.splitlines()
    assert [line.split(":")[0] for line in chosen[:4]] == [f"skipped    line {n}" for n in (2, 3, 4, 6)]
    assert chosen[4] == expected[-1]


def test_text_of_a_record_is_escaped(call: Run, made: list[dict[str, Any]]) -> None:
    nasty = "\x1b[2K\r\nidentical  forged\x9b\ud800\u202e"
    values = [
        made[0] | {"id": nasty},
        made[1] | {"id": "x" * 5000, "error": nasty},
        made[2] | {"id": nasty, "run": {**made[2]["run"], "name": nasty}},
        made[3] | {"versions": {**made[3]["versions"], "flax": nasty}, "ids": [5, *made[3]["ids"][1:]]},
    ]
    result = call("replay", write("b.jsonl", values))
    assert result.code == 1
    lines = result.out.split("\n")
    assert all(line.isprintable() for line in lines)
    escaped = r"\x1b[2K\r\nidentical  forged\x9b\ud800\u202e"
    assert lines[0] == f"identical  {escaped} sample 0: 40 tokens"
    assert lines[1].startswith(f"differs    {'x' * 77}... sample 1: its ids are the same, but not its error")
    assert lines[2].startswith(f"skipped    {escaped} sample 0: ")
    assert lines[3].startswith("differs    second sample 1: token 0 is 5 ")
    assert f"changed    flax: {escaped} in the record" in result.out


def test_a_repeated_error_is_identical(call: Run, made: list[dict[str, Any]]) -> None:
    from hipgpt_jax import files

    (config,) = Path("checkpoints/tiny").glob("*_step600_config.json")
    (weights,) = Path("checkpoints/tiny").glob("*_step600.bin")
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # NaN
    weights.write_bytes(data)
    before = made[0]["run"]["weights_sha256"]
    config.write_text(config.read_text().replace(before, files.sha256(weights)))
    flags = "--run-name tiny --prompt king --num_tokens 5 --output e.jsonl"
    assert call("generate", *flags.split()).code == 1
    (one,) = [json.loads(line) for line in Path("e.jsonl").read_text().splitlines()]
    assert one["finish_reason"] == "error"
    other = one | {"error": "another"}
    result = call("replay", write("b.jsonl", [one, other]))
    assert result.code == 1
    first, second = result.out.splitlines()[:2]
    assert first.startswith(f"identical  {one['id']} sample 0: 0 tokens, then the same error: the model's logits are")
    assert second.endswith("its ids are the same, but not its error: was it changed?")


def test_another_config_is_listed_as_a_change(call: Run, made: list[dict[str, Any]]) -> None:
    other = {**made[0], "run": {**made[0]["run"], "config_sha256": "0" * 64}}
    result = call("replay", write("b.jsonl", [other]))
    assert result.code == 0
    assert f"changed    config_sha256: {'0' * 64} in the record" in result.out
    assert f"changed    config_sha256: {'0' * 64} in the record" in call("replay", "b.jsonl", "--forced").out


def test_a_torn_last_line_is_noted(call: Run, made: list[dict[str, Any]]) -> None:
    path = Path(write("b.jsonl", made[:2]))
    path.write_bytes(path.read_bytes()[:-2])
    result = call("replay", "b.jsonl")
    assert "b.jsonl: skipped an incomplete last line" in result.err
    assert result.out.splitlines()[-1].startswith("1 of 1 identical")


def test_other_files_are_skipped_with_both_digests(call: Run, made: list[dict[str, Any]]) -> None:
    for key in ("weights", "tokenizer"):
        other = {**made[0], "run": {**made[0]["run"], f"{key}_sha256": "0" * 64}}
        result = call("replay", write("b.jsonl", [other, made[1]]))
        assert result.code == 2
        digest = made[0]["run"][f"{key}_sha256"]
        assert f"skipped    first sample 0: other {key}: sha256 {'0' * 64} in the record, {digest} in " in result.out
        assert result.out.splitlines()[1].startswith("identical  first sample 1")


def test_a_missing_or_damaged_run_is_skipped_and_a_moved_one_is_found(call: Run, made: list[dict[str, Any]]) -> None:
    Path("backup").mkdir()
    Path("checkpoints/tiny").rename("backup/moved")
    result = call("replay", "a.jsonl")
    assert result.code == 2
    assert result.out.count("skipped    ") == 6
    assert "run 'tiny' not found" in result.out
    assert call("replay", "a.jsonl", "--run-dir", "backup/moved").code == 0
    weights = Path("backup/moved/tiny_step600.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    result = call("replay", "a.jsonl", "--run-dir", "backup/moved")
    assert result.code == 2
    assert "tiny_step600.bin is not the file that the config" in result.out
    assert "6 skipped" in result.out.splitlines()[-1]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_ids": []}, "the prompt is empty"),
    ({"prompt_ids": [300]}, "the prompt's ids must be"),
    ({"settings": {"repetition_penalty": 1e9}}, "repetition_penalty must be"),
    ({"settings": {"window": 33}}, "window must be at most the run's own 32"),
    ({"settings": {"eos_id": 300}}, "eos_id must be -1 or below"),
    ({"run": {"name": "../x"}}, "must be a plain name"),
    ({"ids": [99999, *[1] * 39]}, "it has ids beyond the vocabulary's size 300"),
    ({"run": {"step": 9}}, "run 'tiny' has no step 9. Steps: 20, 600"),
]


def test_a_record_that_cannot_be_replayed_is_skipped(call: Run, made: list[dict[str, Any]]) -> None:
    one = made[0]
    changed = [
        one | {name: one[name] | new if isinstance(new, dict) else new for name, new in change.items()}
        for change, _ in REFUSED
    ]
    result = call("replay", write("b.jsonl", [*changed, made[1]]))
    assert result.code == 2
    *lines, served, summary = result.out.splitlines()
    for (_, message), line in zip(REFUSED, lines, strict=True):
        assert re.search(f"skipped    first sample 0: .*{message}", line)
    assert served.startswith("identical  first sample 1")
    assert "8 skipped" in summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--records is required"),
        (("none.jsonl",), "record file not found: none.jsonl"),
        (("a.jsonl", "b.jsonl"), "unexpected argument 'b.jsonl'"),
        (("a.jsonl", "--ids", "x"), "a.jsonl has no record of the id 'x'. Ids: first, second, third"),
        (("p.jsonl",), "p.jsonl line 1 is not a record"),
        (("a.jsonl", "--ids", ""), "--ids is empty"),
        (("empty.jsonl",), "empty.jsonl has no records"),
        (("a.jsonl", "--frob", "x"), "unknown flag --frob: "),
        (("a.jsonl", "--device", "tpu"), "--device must be one of"),
        (("a.jsonl", "--batch_size", "0"), "--batch_size must be a positive integer: got '0'"),
        (("a.jsonl", "--batch_size", "2", "--forced"), "--forced generates nothing, so --batch_size does not affect"),
    ],
)
def test_a_mistake_is_exit_code_2(
    call: Run, made: list[dict[str, Any]], arguments: tuple[str, ...], message: str
) -> None:
    Path("empty.jsonl").write_text("")
    result = call("replay", *arguments)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(f"replay: error: .*{message}.*", result.err.splitlines()[-1])


STATEMENT = re.compile(
    r"(\d+) of (\d+) tokens unexplained, (\d+) differ within floating-point error: at 95 % confidence, fewer than "
    r"(\S+) in 100,000 are unexplained; largest log-probability error (\S+)(; \d+ records skipped)?"
)


def screened(call: Run, *arguments: str) -> tuple[int, list[str], tuple[str, ...]]:
    """Returns the exit code, the lines and the parts of the final statement."""
    result = call("replay", *arguments, "--forced")
    *lines, last = result.out.splitlines()
    found = STATEMENT.fullmatch(last)
    assert found, last
    return result.code, lines, found.groups()


def test_forced_replay_draws_every_token_again(call: Run, made: list[dict[str, Any]]) -> None:
    code, lines, (unexplained, tokens, _, limit, error, skipped) = screened(call, "a.jsonl")
    total = sum(len(one["ids"]) for one in made)
    assert lines == [
        *(
            f"agrees     {one['id']} sample {one['sample']}: {len(one['ids'])} of {len(one['ids'])} tokens"
            for one in made
        ),
        "not exercised: seed, top_k, top_p (2 records), stop (1 record)",
    ]
    assert (code, unexplained, int(tokens), skipped) == (0, "0", total, None)
    assert float(limit.replace(",", "")) == pytest.approx(100_000 * (1 - 0.05 ** (1 / total)), rel=1e-2)
    assert 0 <= float(error) < 1e-4
    assert screened(call, "a.jsonl", "--ids", "second")[2][1] == str(len(made[2]["ids"]) + len(made[3]["ids"]))


FORGED: list[tuple[dict[str, Any], str]] = [
    ({"ids": 7}, "token 39 is 7 '"),
    ({"settings": {"temperature": 1.3}}, "; not its sampled_logprobs (at token "),
    ({"seed": 5}, "more than floating-point error explains"),
    ({"logprobs": -50.5}, "; not its logprobs (at token 39: -50.5 in the record, {logprobs:.3g}"),
    ({"sampled_logprobs": -9.5}, "; not its sampled_logprobs (at token 39: -9.5 in the record, "),
    ({"ranks": 299}, "; not its ranks (at token 39: 299 in the record, {ranks} now): was it changed?"),
    ({"text": "x"}, "40 of 40 tokens; not its text: was it changed?"),
    ({"finish_reason": "eos"}, "40 of 40 tokens; not its finish_reason: was it changed?"),
]


def test_forced_replay_finds_what_was_changed(call: Run, made: list[dict[str, Any]]) -> None:
    one = made[0]
    last = {name: one[name][-1] for name in ("logprobs", "ranks")}

    def forge(name: str, new: Any) -> Any:
        return (
            one[name] | new if isinstance(new, dict) else [*one[name][:-1], new] if isinstance(one[name], list) else new
        )

    forged = [one | {name: forge(name, new) for name, new in change.items()} for change, _ in FORGED]
    code, lines, (unexplained, *_) = screened(call, write("b.jsonl", [*forged, made[1]]))
    assert code == 1
    assert int(unexplained) > 40
    for (_, message), line in zip(FORGED, lines, strict=False):
        assert line.startswith("differs    first sample 0: ")
        assert message.format(**last) in line
    assert lines[-1].startswith("agrees     first sample 1: 40 of 40")
    assert lines[2].count("; token ") == 3
    assert re.search(r"; and \d+ more", lines[2])


def test_forced_replay_skips_what_it_cannot_replay(call: Run, made: list[dict[str, Any]]) -> None:
    """Records of contract 1 and of a rule are refused by name; a record without tokens agrees."""
    lists = {name: [] for name in ("ids", "tokens", *record.STATISTICS[:-1])}
    empty = {**made[0], **lists, "text": "", "settings": made[0]["settings"] | {"num_tokens": 0}}
    ruled = {**made[0], "settings": made[0]["settings"] | {"rule": "a.f sha256:00"}}
    failed = {**made[0], "finish_reason": "error", "error": "it failed"}
    values = [empty, {**made[0], "schema": 1, "contract": 1}, ruled, failed, made[0] | {"prompt_ids": []}]
    code, lines, groups = screened(call, write("b.jsonl", [*values, made[1]]))
    assert code == 2
    assert lines == [
        "agrees     first sample 0: 0 of 0 tokens",
        "skipped    line 2: it was made by contract 1: this version replays contract 2. Use the version of hipgpt_jax "
        f"that wrote it ({made[0]['versions']['hipgpt_jax']})",
        "skipped    first sample 0: it follows the rule a.f sha256:00, and this run no rule: replay it in Python, by "
        "run.with_rule",
        "skipped    first sample 0: it ended with an error, which only an exact replay repeats",
        "skipped    first sample 0: the prompt is empty: it must hold at least one token",
        "agrees     first sample 1: 40 of 40 tokens",
        "not exercised: window, window_stride, overflow (1 record)",
    ]
    assert groups[-1] == "; 4 records skipped"
    code, lines, _ = screened(call, write("b.jsonl", [*values, made[0] | {"text": "x"}]))
    assert (code, lines[-2].split(" ")[0]) == (1, "differs")
    exact = call("replay", write("b.jsonl", [ruled, made[1]]))
    assert exact.code == 2
    assert exact.out.splitlines()[0] == lines[2]


def test_forced_replay_without_tokens_or_records(call: Run, made: list[dict[str, Any]]) -> None:
    other = {**made[0], "run": {**made[0]["run"], "weights_sha256": "0" * 64}}
    result = call("replay", write("b.jsonl", [other]), "--forced")
    assert (result.code, result.out.splitlines()[-1]) == (2, "0 of 1 agree, 1 skipped")
    Path("empty.jsonl").write_text("")
    result = call("replay", "empty.jsonl", "--forced")
    assert (result.code, result.out, result.err.splitlines()[-1]) == (
        2,
        "",
        "replay: error: empty.jsonl has no records",
    )


@pytest.mark.parametrize(("seen", "number"), [(0, 1), (0, 300), (1, 300), (7, 2000), (300, 300), (299, 300)])
def test_the_largest_share_is_the_one_of_clopper_and_pearson(seen: int, number: int) -> None:
    """At most ``seen`` of ``number`` are seen with a probability of 5 % if the share is that large."""
    share = replay._largest_share(seen, number)
    if seen == number:
        assert share == 1
        return
    assert replay._largest_share(1000 * seen, 1000 * number) < share  # within a moment
    tail = sum(math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(seen + 1))
    assert tail == pytest.approx(0.05, rel=1e-6)


def test_the_reader_finds_all_records(call: Run, made: list[dict[str, Any]]) -> None:
    """The reader of the tests and of the program are the same; the file was written by another path."""
    assert [one.id for one in record.read(Path("a.jsonl"))] == [one["id"] for one in made]
