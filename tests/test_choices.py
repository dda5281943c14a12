"""Distribution of the next token, and texts that may follow a prompt, from Python and by ``hipgpt-evaluate``."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import hypothesis
import numpy as np
import programs
import pytest
from hypothesis import strategies as st

import hipgpt_jax
from hipgpt_jax import config
from hipgpt_jax.cli import choices
from hipgpt_jax.runs import loading

QUESTION = {"id": "q", "prompt": "the king", "choices": [" and", " his fool", "q"]}
Evaluate = Callable[..., programs.Result]


@pytest.fixture(scope="module")
def run(tiny: Path) -> hipgpt_jax.Run:
    return hipgpt_jax.load_run("tiny", where=tiny / "checkpoints/tiny")


@pytest.fixture
def evaluate(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs ``hipgpt-evaluate`` in this process, in the working directory of the committed run."""
    monkeypatch.chdir(tiny)
    return lambda *more: programs.call("evaluate", "--run-name", "tiny", *more, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0}, {"top_k": 0, "top_p": 1.0}, {"top_k": 0, "min_p": 0.1, "ban": ["t"], "temperature": 0.5}],
)
def test_the_next_token_has_the_statistics_of_its_record(run: hipgpt_jax.Run, settings: dict[str, Any]) -> None:
    found = run.next_token("the king", **settings)
    assert sorted(found.ids.tolist()) == list(range(300))
    assert (np.diff(found.logprobs) <= 0).all()
    assert np.exp(found.logprobs).sum() == pytest.approx(1, abs=1e-5)
    assert np.exp(found.sampled_logprobs).sum() == pytest.approx(1, abs=1e-5)
    for sample in run.generate("the king", num_tokens=1, num_samples=4, **settings):
        place = found.ids.tolist().index(sample.ids[0])
        assert (place + 1, found.tokens[place]) == (sample.ranks[0], sample.tokens[0])
        assert found.logprobs[place] == pytest.approx(sample.logprobs[0], abs=2e-5)
        assert found.sampled_logprobs[place] == pytest.approx(sample.sampled_logprobs[0], abs=2e-5)
        assert np.isfinite(found.sampled_logprobs).sum() == sample.kept[0]
    banned = [found.sampled_logprobs[found.tokens.index(token)] for token in settings.get("ban", [])]
    assert banned == [-np.inf] * len(banned)


def test_a_prompt_beyond_the_window_is_cut(run: hipgpt_jax.Run) -> None:
    long = "the king and his fool " * 9
    (sample,) = run.generate(long, num_tokens=3)
    found = run.next_token(long)
    assert found.logprobs[sample.ranks[0] - 1] == pytest.approx(sample.logprobs[0], abs=2e-5)
    (scored,) = run.score_choices(hipgpt_jax.Prompt(ids=sample.prompt_ids), [sample.text])
    assert scored.ids == sample.ids
    assert scored.logprob == pytest.approx(sum(sample.logprobs), abs=1e-4)


def test_a_choice_has_the_probability_of_its_tokens(run: hipgpt_jax.Run) -> None:
    scores = run.score_choices("the king", iter([" and", " né", "q"]))
    assert [one.text for one in scores] == [" and", " né", "q"]
    for one in scores:
        prompt, expected = run.files.vocabulary.encode("the king"), 0.0
        for token in one.ids:
            found = run.next_token(hipgpt_jax.Prompt(ids=prompt))
            expected += float(found.logprobs[found.ids == token][0])
            prompt = [*prompt, token]
        assert one.logprob == pytest.approx(expected, abs=1e-4)
        assert (one.per_token, one.per_byte) == (one.logprob / len(one.ids), one.logprob / len(one.text.encode()))


def test_wrong_arguments_are_refused(run: hipgpt_jax.Run) -> None:
    wrong: list[Any] = ["ab", 3, [1], [["a"]], None]
    for value in wrong:
        with pytest.raises(TypeError, match="choices must be several texts"):
            run.score_choices("a", value)
    for empty in ([], ["a", ""]):
        with pytest.raises(ValueError, match="choices must be texts of at least one character"):
            run.score_choices("a", empty)
    with pytest.raises(TypeError, match="unknown keyword 'num_tokens'"):
        run.next_token("a", num_tokens=3)
    with pytest.raises(ValueError, match="the prompt is empty"):
        run.next_token("")


def test_a_file_of_choices_is_scored(run: hipgpt_jax.Run, evaluate: Evaluate, tmp_path: Path) -> None:
    path, out = tmp_path / "c.jsonl", str(tmp_path / "out.jsonl")
    path.write_text(f'{json.dumps(QUESTION)}\n\n{{"prompt_ids": [83], "choices": ["a", "b"]}}\n')
    result = evaluate("--choices", str(path), "--output", out)
    assert result.code == 0, result.err
    first, second = map(json.loads, Path(out).read_text().splitlines())
    expected = run.score_choices("the king", QUESTION["choices"])
    assert [one["logprob"] for one in first["choices"]] == [one.logprob for one in expected]
    logprobs = [one.logprob for one in expected]
    assert first["best"]["logprob"] == logprobs.index(max(logprobs))
    assert (first["id"], first["prompt"], second["prompt_ids"]) == ("q", "the king", [83])
    assert first["run"]["name"] == "tiny"
    assert "q: 3 choices; * marks the best of a column\n" in result.out
    assert len(re.findall(r"^ +-\d+\.\d{4}\*? +-\d+\.\d{4}\*? +-\d+\.\d{4}\*? +'", result.out, re.MULTILINE)) == 5
    assert evaluate("--choices", str(path), "--output", out, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, (), "choices file not found: c.jsonl"),
        ("", (), "c.jsonl has no choices"),
        ("[1", (), "c.jsonl line 1 is not JSON: "),
        ('{"prompt": "a", "choices": ["b"]}', (), "choices must contain at least 2 items"),
        ('{"prompt": "a", "choices": ["b", ""]}', (), r"c.jsonl line 1 .*choices\[1\] must be longer"),
        ('{"choices": ["b", "c"]}', (), "c.jsonl line 1 needs either prompt, a text, or prompt_ids"),
        ('\n{"prompt": "", "choices": ["b", "c"]}', (), "c.jsonl line 2: the prompt is empty"),
        (
            '{"prompt_ids": [300], "choices": ["b", "c"]}',
            (),
            "line 1: prompt_ids must be below the .* size 300: got 300",
        ),
        ('{"prompt_ids": [], "choices": ["b", "c"]}', (), "line 1: ids must be a list of at least one token id"),
        (json.dumps(QUESTION), ("--prompt", "a"), "--prompt excludes --choices"),
        (json.dumps(QUESTION), ("--stride", "3"), "--stride excludes --choices"),
        (json.dumps(QUESTION), ("--output", "c.jsonl", "--overwrite"), "--output c.jsonl is an input"),
    ],
)
def test_a_mistake_is_one_line(
    evaluate: Evaluate, content: str | None, arguments: tuple[str, ...], message: str
) -> None:
    Path("c.jsonl").unlink(missing_ok=True)
    if content is not None:
        Path("c.jsonl").write_text(content)
    result = evaluate("--choices", "c.jsonl", *arguments)
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(f"evaluate: error: .*{message}.*\n", result.err)


@fakes.examples(50)
@hypothesis.given(data=st.data())
def test_a_damaged_file_gives_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = json.dumps(QUESTION).encode()
    at = data.draw(st.integers(0, len(whole)))
    odd = data.draw(st.sampled_from([b"", b"null", b"1e999", b"\\ud800", b"\xff", b"\0", b"{", b'"', b"[]", b"\n"]))
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(whole[:at] + odd + whole[at + data.draw(st.integers(0, 9)) :])
    source = loading.open_run("shakespeare", None, config.DecodingConfig())
    message, found = "", []
    try:
        found = choices.read(path, source)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert all(len(question.choices) > 1 for question in found)
