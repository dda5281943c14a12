"""``hipgpt-evaluate``: scores of a run on texts."""

import gzip
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import programs
import pytest
import safetensors.numpy
import zstandard

from hipgpt_jax import files
from hipgpt_jax.text import corpus, dataset, tokenizer

Run = Callable[..., programs.Result]


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``hipgpt-evaluate`` of the trained run in this process, in a directory of its own."""
    for name in ("checkpoints", "text.txt"):
        (tmp_path / name).symlink_to(trained / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))
    return lambda *arguments: programs.call(
        "evaluate", "--run-name", "tiny", *arguments, monkeypatch=monkeypatch, capsys=capsys
    )


def figures(text: str) -> dict[str, float]:
    return {name.strip(): float(value) for name, value in re.findall(r"^  ([a-z ]+?) +([\d.]+)\b", text, re.MULTILINE)}


def test_the_validation_split_scores_as_in_training(run: Run, trained: Path) -> None:
    found = figures(run().out)
    logged = [json.loads(line) for line in (trained / "checkpoints/tiny/metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if line["step"] == 40 and "validation_loss" in line][-1]
    assert found["loss"] == pytest.approx(last["validation_loss"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(last["validation_loss"]), rel=1e-3)
    assert found["bits per byte"] == pytest.approx(found["nats per byte"] / math.log(2), abs=2e-4)
    assert 0 < found["accuracy"] < 1
    assert found == figures(run("--data-path", "text.txt", "--split", "validation").out)


def test_bfloat16_is_near(run: Run) -> None:
    exact, half = figures(run().out)["loss"], figures(run("--dtype", "bfloat16").out)["loss"]
    assert abs(half - exact) < 0.01
    prompt = ("--prompt", "the king and his fool", "--output", "-")
    whole, other = (json.loads(run(*prompt, *more).out) for more in ((), ("--dtype", "bfloat16")))
    assert (whole["numerics"]["dtype"], other["numerics"]["dtype"]) == ("float32", "bfloat16")
    errors = [abs(a - b) for a, b in zip(whole["logprobs"][1:], other["logprobs"][1:], strict=True)]
    assert 0 < max(errors) < 0.1


def test_all_of_a_text_is_both_splits(run: Run, trained: Path) -> None:
    whole = run("--data-path", "text.txt")
    own = run("--split", "all")
    assert abs(int(whole.out.split()[1]) - int(own.out.split()[1])) < 3, "a token may straddle the splits"
    assert figures(whole.out)["loss"] == pytest.approx(figures(own.out)["loss"], abs=1e-3)
    assert f"{(trained / 'text.txt').stat().st_size} bytes" in whole.out


def test_each_token_counts_once_at_every_stride(run: Run) -> None:
    """Against the same text scored token by token, whose rule the tests of the API hold to its definition."""
    offset = corpus.Corpus(Path("text.txt")).split
    text = Path("text.txt").read_bytes()[offset:].decode()[:600]
    Path("short.txt").write_text(text)
    Path("p.jsonl").write_text(json.dumps({"prompt": text}))
    losses = []
    for stride in ("1", "7", "32"):
        run("--prompts_file", "p.jsonl", "--output", "s.jsonl", "--overwrite", "--stride", stride)
        line = json.loads(Path("s.jsonl").read_text())
        found = figures(run("--data-path", "short.txt", "--stride", stride).out)
        assert found["loss"] == pytest.approx(line["loss"], abs=1e-4)
        assert found["loss"] == pytest.approx(-np.mean(line["logprobs"][1:]), abs=1e-4)
        assert found["accuracy"] == pytest.approx(np.mean(np.asarray(line["ranks"][1:]) == 1), abs=1e-4)
        losses.append(found["loss"])
    assert losses[0] != losses[1] != losses[2]


def test_bits_per_byte_of_a_prompt_and_a_file_are_equal(run: Run) -> None:
    Path("t.txt").write_text("the king and his fool")
    line = json.loads(run("--prompt", "the king and his fool", "--output", "-").out)
    assert figures(run("--data-path", "t.txt").out)["bits per byte"] == pytest.approx(line["bits_per_byte"], abs=1e-4)


def test_an_existing_file_is_not_replaced_without_overwrite(run: Run) -> None:
    Path("t.txt").write_text("the king\n")
    for arguments in (("--prompt", "a queen"), ("--prompts_file", "t.txt")):
        result = run(*arguments, "--output", "t.txt")
        assert (result.code, result.out) == (1, "")
        assert "--output t.txt exists: give another name, or --overwrite" in result.err
    assert Path("t.txt").read_text() == "the king\n"
    Path("link").symlink_to("u.jsonl")
    assert run("--prompt", "a queen", "--output", "link").code == 0
    assert Path("link").is_symlink()
    assert json.loads(Path("u.jsonl").read_text())["text"] == "a queen"
    assert run("--prompt", "a queen", "--output", "/dev/null").code == 0
    assert Path("/dev/null").is_char_device()


def test_overwrite_replaces_only_what_evaluate_wrote(run: Run) -> None:
    score = ("--prompt", "a queen", "--overwrite", "--output")
    Path("o.jsonl").touch()
    assert run(*score, "o.jsonl").code == 0, "an empty file"
    whole = Path("o.jsonl").read_bytes()
    Path("link").symlink_to("o.jsonl")
    assert run(*score, "link", "--stride", "1").code == 0
    assert whole != Path("o.jsonl").read_bytes()
    assert Path("link").is_symlink()
    os.link("o.jsonl", "hard.txt")
    ours = Path("o.jsonl").read_bytes()
    for content in (
        b"my thesis",
        b'{"id":"a","text":"b"}\n',
        ours[:-30],
        b"[]\n",
        b"9" * 5000,
        b"\xff\n",
        b"[" * 99999,
    ):
        Path("t.jsonl").write_bytes(content)
        result = run(*score, "t.jsonl")
        assert result.code == 1
        assert "--output t.jsonl exists and is not a file of hipgpt-evaluate: give another name" in result.err
        assert Path("t.jsonl").read_bytes() == content
    for source in ("o.jsonl", "link", "hard.txt"):
        for target in ("o.jsonl", "link", "hard.txt"):
            result = run("--prompts_file", source, "--overwrite", "--output", target)
            assert result.code == 1
            assert "input of this command" in result.err or "unknown key" in result.err
            assert Path(target).read_bytes() == ours
    result = run("--prompts_file", "hard.txt", "--overwrite", "--output", "link")
    assert "--output link is an input of this command" in result.err
    assert "--overwrite needs --output FILE" in run("--prompt", "a queen", "--overwrite").err


def test_lines_go_to_pipes_and_to_stdout_by_any_name(run: Run) -> None:
    for output in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        result = run("--prompt", "a queen", "--output", output)
        assert json.loads(result.out)["text"] == "a queen", "and no table"
    os.mkfifo("pipe")
    with open(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert run("--prompt", "a queen", "--output", "pipe").code == 0
        assert json.loads(reader.read())["text"] == "a queen"
    assert Path("pipe").is_fifo()
    ended = threading.Thread(target=lambda: os.close(os.open("pipe", os.O_RDONLY)))
    ended.start()
    result = run("--prompt", "a queen", "--output", "pipe")
    ended.join()
    assert (result.code, "error" in result.err) == (141, False)


def test_a_text_is_the_same_in_any_form(run: Run) -> None:
    text = Path("text.txt").read_bytes()[:900]
    Path("short.txt").write_bytes(text)
    Path("short.txt.gz").write_bytes(gzip.compress(text))
    Path("short.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"body": text.decode()}).encode()))
    Path("folder").mkdir()
    Path("folder/a.txt").write_bytes(text[:450])
    Path("folder/b.txt").write_bytes(text[450:])
    plain = run("--data-path", "short.txt").out
    assert "short.txt: " in plain
    for arguments in (("short.txt.gz",), ("short.jsonl.zst", "--text-field", "body")):
        other = run("--data-path", *arguments).out
        assert other.splitlines()[1:] == plain.splitlines()[1:]
        assert other.splitlines()[0].partition(": ")[2] == plain.splitlines()[0].partition(": ")[2]
    both = run("--data-path", "folder")
    again = run("--data-path", "folder/a.txt", "--data-path", "folder/b.txt")
    assert both.out == again.out
    assert "2 files: " in both.out
    assert "900 bytes" in both.out
    assert "the run has no end token: 2 documents are scored as one text" in both.err
    assert figures(both.out)["nats per byte"] == pytest.approx(figures(plain)["nats per byte"], rel=0.02)


def test_the_end_token_is_scored_after_each_document(run: Run, trained: Path) -> None:
    """The config names the end token; here the line break, which can be written by hand."""
    Path("checkpoints").unlink()
    shutil.copytree(trained / "checkpoints/tiny", "checkpoints/tiny", symlinks=True)
    settings = Path("checkpoints/tiny/tiny_step40_config.json")
    vocabulary = tokenizer.Tokenizer.load(Path("checkpoints/tiny/tokenizer.json"))
    value = json.loads(settings.read_text())
    value["data"]["eos_id"] = vocabulary.encode("\n")[0]
    settings.write_text(json.dumps(value))
    Path("two.jsonl").write_text('{"text": "the king and"}\n{"text": "a queen"}\n')
    Path("one.txt").write_text("the king and\na queen\n")
    ended, by_hand = run("--data-path", "two.jsonl"), run("--data-path", "one.txt")
    assert "no end token" not in ended.err
    assert ended.out.split()[1] == by_hand.out.split()[1]
    assert figures(ended.out)["loss"] == figures(by_hand.out)["loss"]


def test_texts_are_scored_token_by_token(run: Run) -> None:
    Path("p.txt").write_text("the king and\na queen\n")
    out = run("--prompts_file", "p.txt", "--output", "-").out
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["text"], "".join(second["tokens"])) == ("the king and", "a queen")
    for one in (first, second):
        assert len(one["ids"]) == len(one["tokens"]) == len(one["logprobs"]) == len(one["ranks"])
        assert (one["logprobs"][0], one["ranks"][0]) == (None, None)
        assert one["loss"] == pytest.approx(-np.mean(one["logprobs"][1:]))
        assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
        assert one["run"].keys() == {"name", "step", "weights_sha256", "tokenizer_sha256", "config_sha256"}
    assert json.loads(run("--prompt", "a queen", "--output", "-").out)["logprobs"] == second["logprobs"]
    table = run("--prompt", "a queen").out
    assert figures(table)["loss"] == pytest.approx(second["loss"], abs=1e-4)


def test_sampled_log_probabilities_are_those_of_the_settings(run: Run) -> None:
    flags = "--prompt queens --as-sampled --output - --top_k 0 --top_p 1 --rep-penalty 1"
    one = json.loads(run(*flags.split()).out)
    assert one["sampled_logprobs"][1:] == pytest.approx(one["logprobs"][1:], abs=2e-6)
    greedy = json.loads(run(*flags.split(), "--temp", "0").out)
    assert greedy["sampled_logprobs"][1:] == [0.0 if rank == 1 else None for rank in greedy["ranks"][1:]]
    assert greedy["sampling"]["temperature"] == 0.0
    own = json.loads(run(*flags.split(), "--ban", "k", "--logit_bias", "q=1").out)["sampling"]
    vocabulary = tokenizer.Tokenizer.load(Path("checkpoints/tiny/tokenizer.json"))
    assert (own["ban"], own["logit_bias"]) == ([vocabulary.id_of("k")], [[vocabulary.id_of("q"), 1.0]])
    table = run("--prompt", "the king and a queen", "--as-sampled", "--temp", "0", "--rep-penalty", "1").out
    assert re.search(r"cut +\d+ of the tokens by the sampling settings", table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data-path", "none.txt"), "data file not found: none.txt"),
        (("--data-path", "none.txt", "--split", "validation"), "data file not found: none.txt"),
        (("--data-path", "one.txt"), "one.txt is too short: 1 tokens, and a score needs at least 2"),
        (("--split", "train"), "--split must be one of validation, all: got 'train'"),
        (("--stride", "0"), "--stride must be at least 1 and at most the window of 32 tokens: got 0"),
        (("--stride", "33"), "--stride must be at least 1 .*: got 33"),
        (("--stride", "17", "--max_seq_len", "16"), "at most the window of 16 tokens: got 17"),
        (("--step", "7"), "no step 7. Steps: 20, 40"),
        (("--prompt", "a", "--data-path", "text.txt"), "--data-path excludes --prompt"),
        (("--prompt", "a", "--prompts_file", "text.txt"), "are both given"),
        (("--text-field", "body"), "--text-field needs --data-path"),
        (("--output", "-"), "--output needs --prompt, --prompts_file or --choices"),
        (("--as-sampled",), "--as-sampled needs --prompt or --prompts_file"),
        (("--prompt", "the king", "--temp", "0.5"), "--temp needs --as-sampled: the model's own probabilities"),
        (("--prompt", "the king", "--ban", "5"), "--ban needs --as-sampled"),
        (("--prompt", "the king", "--as-sampled", "--min_p", "1"), "--min_p must be at least 0 and below 1"),
        (("--prompt", "the king", "--as-sampled", "--ban", "300"), "--ban must be below the vocabulary's size 300"),
        (("--prompt", "a"), r"text 1 \('a'\): a text to score needs at least 2 tokens"),
        (("--prompt", "the king", "--output", "none/o.jsonl"), "none/o.jsonl cannot be written: there is no directory"),
        (
            ("--run-name", "shakespeare"),
            "run 'shakespeare' does not include its training text: give --data-path",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(run: Run, arguments: tuple[str, ...], message: str) -> None:
    Path("one.txt").write_text("a")
    result = run(*arguments)
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(f"evaluate: error: .*{message}.*", result.err.splitlines()[-1])
    assert not Path("o.jsonl").exists()


def replace_weights(trained: Path, change: Callable[[np.ndarray], object]) -> None:
    """Changes the token embedding of the last step, and its digest."""
    Path("checkpoints").unlink()
    shutil.copytree(trained / "checkpoints/tiny", "checkpoints/tiny", symlinks=True)
    path = Path("checkpoints/tiny/tiny_step40.bin")
    tensors = safetensors.numpy.load_file(path)
    change(tensors["wte.weight"])
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    settings = Path("checkpoints/tiny/tiny_step40_config.json")
    value = json.loads(settings.read_text())
    value["checkpoint"]["sha256"] = files.sha256(path)
    settings.write_text(json.dumps(value))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run: Run, trained: Path, number: float) -> None:
    replace_weights(trained, lambda table: table.__setitem__(65, number))
    for arguments in ((), ("--prompt", "the king", "--output", "-"), ("--prompt", "the king", "--output", "o.jsonl")):
        result = run(*arguments)
        assert result.code == 1
        assert re.fullmatch(
            r"evaluate: error: the model's log-probabilities are not finite \(loss (nan|inf)\): .*",
            result.err.splitlines()[-1],
        )
        assert figures(result.out) == {}
    assert not Path("o.jsonl").exists()


def test_a_perplexity_beyond_float64_is_infinite(run: Run, trained: Path) -> None:
    """And no number: JSON has none for it."""
    replace_weights(trained, lambda table: table.__imul__(1e6))
    line = json.loads(run("--prompt", "the king and his fool", "--output", "-").out)
    assert line["loss"] > 710
    assert line["perplexity"] is None
    assert "  perplexity           inf\n" in run("--prompt", "the king and his fool").out


def test_nats_per_byte_are_of_the_tokens_predicted(run: Run, trained: Path) -> None:
    """In the training log as here: the first token of the split is not predicted, so its bytes do not count."""
    data = dataset.Dataset(trained / "checkpoints/tiny")
    vocabulary = tokenizer.Tokenizer.load(trained / "checkpoints/tiny/tokenizer.json")
    size = len(vocabulary.decode_bytes(data.validation[1:]))
    logged = [json.loads(line) for line in (trained / "checkpoints/tiny/metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "validation_loss" in line][-1]
    expected = last["validation_loss"] * (len(data.validation) - 1) / size
    assert last["validation_nats_per_byte"] == pytest.approx(expected, rel=1e-12)
    assert figures(run().out)["nats per byte"] == pytest.approx(expected, abs=1e-4)


def test_invalid_utf8_is_noted_and_counts_as_replaced(run: Run) -> None:
    Path("latin.txt").write_bytes("naïve café\n".encode("latin-1") * 30)
    Path("replaced.txt").write_text("na\ufffdve caf\ufffd\n" * 30)
    found, expected = run("--data-path", "latin.txt"), run("--data-path", "replaced.txt")
    assert "60 bytes (the first in latin.txt) of the text are not UTF-8 and became U+FFFD" in found.err
    assert "not UTF-8" not in expected.err
    assert figures(found.out) == figures(expected.out)
    assert "450 bytes" in found.out


def test_changed_token_ids_are_an_error(run: Run, trained: Path) -> None:
    replace_weights(trained, lambda table: table)
    path = Path("checkpoints/tiny/tokens.bin")
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    result = run()
    assert (result.code, result.out) == (1, "")
    assert "tokens.bin is not the file that data.json describes: it was changed" in result.err
