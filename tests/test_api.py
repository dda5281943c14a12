"""Runs from Python: what the command line does, token for token."""

import html
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import programs
import pytest

import hipgpt_jax
from hipgpt_jax import config
from hipgpt_jax.records import record
from hipgpt_jax.report import page


@pytest.fixture(scope="module")
def run(tiny: Path) -> hipgpt_jax.Run:
    return hipgpt_jax.load_run("tiny", where=tiny / "checkpoints/tiny")


def without_times(made: record.Record) -> dict:
    value = json.loads(made.to_json())
    return {key: part for key, part in value.items() if key not in ("argv", "started", "timings")}


def test_importing_the_package_imports_no_jax() -> None:
    program = (
        "import sys, hipgpt_jax; print({'jax', 'numpy', 'tokenizers'} & sys.modules.keys());"
        "hipgpt_jax.load_run; hipgpt_jax.SamplingConfig; print('jax' in sys.modules);"
        "print(all(name in dir(hipgpt_jax) for name in ('load_run', 'Run', 'Prompt', '__version__')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["set()", "False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'lode_run'"):
        getattr(hipgpt_jax, "lode_" + "run")


def test_records_are_those_of_the_command_line(
    run: hipgpt_jax.Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny)
    words = "--run-name tiny --num_samples 2 --num_tokens 40 --seed 5 --temp 0.8 --top_k 9 --top_logprobs 3 --output -"
    arguments = ("generate", *words.split(), "--prompt", "the king")
    done = programs.call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    settings = hipgpt_jax.SamplingConfig(temperature=0.8, top_k=9)
    made = run.generate("the king", settings, seed=5, num_samples=2, num_tokens=40, top_logprobs=3)
    told = [record.parse(line.encode(), "it") for line in done.out.splitlines()]
    assert [without_times(one) for one in told] == [without_times(one) for one in made]
    assert (told[0].argv[0], made[0].argv) == ("hipgpt-generate", ())


def test_runs_and_records_are_short_in_a_terminal_and_pages_in_a_notebook(
    run: hipgpt_jax.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ipython = mock.Mock()
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setitem(sys.modules, "ipykernel", ipython)
    run = hipgpt_jax.load_run("tiny", where=run.files.checkpoint.directory)
    records = run.generate("the king", num_samples=2, num_tokens=5)
    assert ipython.display.call_args.args == ({"text/plain": "compiling"},)
    (last,) = ipython.display.return_value.update.call_args.args
    assert last["text/plain"].startswith("2 samples, 10 tokens in ")
    run.generate("the king", num_tokens=1)
    assert ipython.display.call_count == 1  # nothing is shown where nothing takes time
    text = repr(records[0])
    assert text.startswith(f"<Record '{records[0].id}' sample 0, 5 tokens, length: ")
    assert len(repr(run.score(["the king"]))) < 200
    assert repr(run).startswith("<Run name tiny, step 600, parameters 0.0M, vocabulary 300, window 32, dtype float32, ")
    assert "<tr><th>name</th><td>tiny</td></tr>" in run._repr_html_()
    assert isinstance(records, list)
    for shown in (records, records[1:]):
        document = html.unescape(shown._repr_html_().partition('srcdoc="')[2].partition('" style')[0])
        assert document == page.render(shown, "2 records" if shown is records else "1 record")


def test_all_public_names_exist() -> None:
    assert [name for name in hipgpt_jax.__all__ if not hasattr(hipgpt_jax, name)] == []
    assert (Path(hipgpt_jax.__file__).parent / "py.typed").is_file()


def test_a_stream_equals_the_text_of_its_record(run: hipgpt_jax.Run) -> None:
    records = run.generate("the king", num_samples=3, num_tokens=30, stop=("\n\n",))
    for sample, expected in enumerate(records):
        stream = run.stream("the king", sample=sample, num_tokens=30, stop=("\n\n",))
        assert stream.record is None
        pieces = list(stream)
        assert "".join(pieces) == expected.text
        assert stream.record is not None
        assert (stream.record.ids, stream.record.sample) == (expected.ids, sample)


def test_a_stream_needs_no_more_samples_than_its_own(run: hipgpt_jax.Run) -> None:
    """Whatever the prompt's own number of them, and however large its index is."""
    prompt = hipgpt_jax.Prompt(text="the king", generation={"num_samples": 2})
    stream = run.stream(prompt, sample=2**32 - 1, num_tokens=3)
    assert "".join(stream)
    assert stream.record is not None
    assert stream.record.sample == 2**32 - 1


def test_prompts_may_have_settings_of_their_own(run: hipgpt_jax.Run) -> None:
    prompts = ["the king", hipgpt_jax.Prompt(text="the king", id="greedy", sampling={"temperature": 0.0})]
    plain, greedy = run.generate(prompts, num_tokens=12)
    assert (greedy.id, greedy.settings.temperature, plain.settings.temperature) == ("greedy", 0.0, 1.0)
    assert set(greedy.ranks) <= set(range(1, 10))
    assert [one.ids for one in run.records(iter(prompts), num_tokens=12)] == [plain.ids, greedy.ids]
    with pytest.raises(ValueError, match=r"prompt 2 \(.*\): the prompt is empty"):
        run.generate(["fine", ""])
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        run.generate([hipgpt_jax.Prompt(text="a", sampling={"temperature": -1.0})])


@pytest.mark.parametrize(
    ("stride", "num_tokens", "times"),
    [(1, 20, 1), (1, 60, 1), (5, 60, 1), (5, 40, 9), pytest.param(32, 60, 3, marks=pytest.mark.slow)],
)
def test_recorded_log_probabilities_add_up_to_the_score(tiny: Path, stride: int, num_tokens: int, times: int) -> None:
    """Within the window and far beyond it, and where the prompt is longer than it already."""
    decoding = config.DecodingConfig(window_stride=stride)
    run = hipgpt_jax.load_run("tiny", decoding=decoding, where=tiny / "checkpoints/tiny")
    (made,) = run.generate("the king and his fool " * times, num_tokens=num_tokens)
    (scored,) = run.score([made])
    np.testing.assert_allclose(scored.logprobs[-num_tokens:], made.logprobs, atol=2e-4)
    assert abs(scored.logprobs[-num_tokens:].sum(dtype=np.float64) - sum(made.logprobs)) < 1e-3
    assert np.mean(scored.ranks[-num_tokens:] == made.ranks) > 0.9


def test_a_score_is_the_sum_over_a_full_forward_pass(run: hipgpt_jax.Run) -> None:
    """By its definition, a pass for each token, in and beyond the window of 32; and for each stride."""
    (scored,) = run.score("the king and his fool went up to see what a queen would say of all that they had lost " * 2)
    n = len(scored.ids)
    assert n > 40
    for stride in (1, 3, 32):
        (strided,) = run.score([scored.ids], stride=stride)
        for place in (1, 2, 17, 32, 33, 34, n - 1):
            first = max(0, -((32 - place) // stride) * stride)
            (alone,) = run.score([scored.ids[first : place + 1]], stride=1)
            assert abs(alone.logprobs[-1] - strided.logprobs[place - 1]) < 1e-4
    assert "".join(scored.tokens).startswith("the king and")
    assert np.isclose(scored.score.loss, -scored.logprobs.mean(), rtol=1e-6)
    assert np.isclose(scored.score.bits_per_byte * np.log(2), scored.score.nats_per_byte)


def test_texts_that_cannot_be_scored_are_refused(run: hipgpt_jax.Run) -> None:
    wrong: list[tuple[Any, str]] = [
        ([3], "must be a text or a list of ids: got 3"),
        ([""], "at least 2 tokens"),
        ([[1]], "at least 2 tokens"),
        ([[1, 300]], "below the vocab"),
    ]
    for texts, message in wrong:
        with pytest.raises(ValueError, match=message):
            run.score(texts)
    for stride in (0, 33):
        with pytest.raises(ValueError, match=f"stride must be at least 1 .*: got {stride}"):
            run.score(
                ["the king and his fool went up to see what a queen would say of all that they had lost"] * 2, stride
            )


def test_settings_are_keywords_of_any_numeric_type(run: Any) -> None:
    settings = hipgpt_jax.SamplingConfig(temperature=0.5, top_k=20)
    (expected,) = run.generate("the king", settings, seed=3, num_tokens=8, stop=("\n",))
    (same,) = run.generate(
        "the king",
        temperature=np.float32(0.5),
        top_k=np.int64(20),
        seed=np.uint32(3),
        num_tokens=np.int8(8),
        num_samples=np.int16(1),
        stop="\n",
    )
    assert without_times(same) == without_times(expected)
    (listed,) = run.generate("the king", temperature=0.5, top_k=20, seed=3, num_tokens=8, stop=["\n"])
    assert without_times(listed) == without_times(expected)
    assert "".join(run.stream("the king", temperature=0.5, top_k=20, seed=3, num_tokens=8, stop="\n")) == same.text


PACKAGE: Any = hipgpt_jax  # whose types the calls below break on purpose
BAD_CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "bytes": (lambda run: run.generate(b"the king"), TypeError, "prompts must be a text, a Prompt or several: got b'"),
    "number": (lambda run: run.generate(["a", 3]), TypeError, "prompt 2 must be a text or a Prompt: got 3"),
    "keyword": (lambda run: run.generate("a", temp=0.5), TypeError, "unknown keyword 'temp': .*temperature"),
    "both": (
        lambda run: run.generate("a", PACKAGE.SamplingConfig(), top_k=3),
        TypeError,
        "settings and top_k are both given",
    ),
    "settings": (lambda run: run.generate("a", {"top_k": 3}), TypeError, "settings must be a SamplingConfig"),
    "settings of a score": (lambda run: run.score("the king", settings={}), TypeError, "settings must be a Sampling"),
    "text": (
        lambda run: run.generate("a", temperature="0.5"),
        ValueError,
        "temperature must be a number: got '0.5'",
    ),
    "bool": (lambda run: run.generate("a", top_k=True), ValueError, "top_k must be an integer .*: got True"),
    "float": (lambda run: run.generate("a", seed=1.0), ValueError, "seed must be an integer .*: got 1.0"),
    "samples": (lambda run: run.generate("a", num_samples=2**32 + 1), ValueError, "num_samples must be at most"),
    "stop": (lambda run: run.generate("a", stop=3), ValueError, "stop must be a text or a list of texts: got 3"),
    "sample": (lambda run: run.stream("a", sample=2**32), ValueError, "sample must be at most 4294967295"),
    "num_samples": (lambda run: run.stream("a", num_samples=2), TypeError, "a stream is of one sample"),
    "ids": (lambda run: run.score([[1.5, 2.5]]), ValueError, "ids must be integers: got 1.5"),
    "bools": (lambda run: run.score([[True, False]]), ValueError, "ids must be integers: got True"),
    "matrix": (lambda run: run.score([np.ones((2, 2), int)]), ValueError, "a text or a list of ids"),
    "stride": (lambda run: run.score("the king", stride=1.5), ValueError, "stride must be an integer: got 1.5"),
    "scored bytes": (lambda run: run.score(b"the king"), TypeError, "texts must be a text or a list"),
    "none": (lambda run: run.score(None), TypeError, "texts must be a text or a list"),
    "name": (lambda run: PACKAGE.load_run(3), TypeError, "name is of the wrong type: got 3"),
    "step": (lambda run: PACKAGE.load_run("shakespeare", step=1.5), ValueError, "step must be an integer"),
    "step text": (
        lambda run: PACKAGE.load_run("shakespeare", step="x"),
        ValueError,
        "step must be a number, best or latest: got 'x'",
    ),
    "prompt": (lambda run: PACKAGE.Prompt(text=b"a"), TypeError, "text must be a string: got b'a'"),
    "generation": (
        lambda run: PACKAGE.Prompt(text="a", generation={"nums": 3}),
        TypeError,
        "generation has no setting 'nums'",
    ),
    "one id": (
        lambda run: run.generate([PACKAGE.Prompt(text="a", id="x"), PACKAGE.Prompt(text="b", id="x")]),
        ValueError,
        "prompt 2: id 'x' is that of prompt 1 too",
    ),
    "one id, of an iterator": (
        lambda run: list(run.records((PACKAGE.Prompt(text=text, id="x") for text in "ab"), num_tokens=1)),
        ValueError,
        "prompt 2: id 'x' is that of a different prompt too",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_are_refused_by_name(run: hipgpt_jax.Run, name: str) -> None:
    call, kind, message = BAD_CALLS[name]
    with pytest.raises(kind, match=message):
        call(run)


def test_ids_may_be_arrays_of_any_integer_type(run: Any) -> None:
    ids = run.files.vocabulary.encode("the king and his fool")
    (expected,) = run.score([ids])
    for array in (np.array(ids, np.uint16), np.array(ids, np.int64), tuple(map(np.int32, ids))):
        (scored,) = run.score([array])
        assert scored.ids == expected.ids == tuple(ids)
        assert scored.logprobs.tolist() == expected.logprobs.tolist()


def test_an_iterator_of_prompts_is_consumed_as_needed(run: hipgpt_jax.Run) -> None:
    taken = []

    def prompts() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield f"the king {number}"

    made = run.records(prompts(), num_tokens=1)
    assert [next(made).prompt for _ in range(2)] == ["the king 0", "the king 1"]
    assert len(taken) < 80


def test_a_step_may_be_given_as_text(tiny: Path) -> None:
    for given, step in (("20", 20), ("latest", 600), (20, 20), (None, 600)):
        assert hipgpt_jax.load_run("tiny", step=given, where=tiny / "checkpoints/tiny").files.checkpoint.step == step


def test_a_device_other_than_that_of_jax_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda': JAX "):
        hipgpt_jax.load_run("shakespeare", device="cuda")


def test_url_is_no_path() -> None:
    for url in ("gs://bucket/run", Path("s3://bucket/run")):
        with pytest.raises(ValueError, match="where must be a path on this machine: got the URL "):
            hipgpt_jax.load_run("tiny", where=url)
        with pytest.raises(ValueError, match="path must be a path on this machine"):
            hipgpt_jax.read_records(url)
    with pytest.raises(ValueError, match="name must be a path on this machine"):
        hipgpt_jax.load_run("hf://openai/gpt2")
    with pytest.raises(ValueError, match="--data-path must be a path on this machine: got the URL https:"):
        hipgpt_jax.train(data_path="https://host/a.txt")
