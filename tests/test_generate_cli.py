"""``hipgpt-generate``: flags, output and mistakes."""

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest

from hipgpt_jax import files
from hipgpt_jax.records import record
from hipgpt_jax.text import tokenizer

HI = ("--run-name", "tiny", "--prompt", "the king")


@pytest.fixture
def run(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``hipgpt-generate`` in this process, in the working directory of the committed run."""
    monkeypatch.chdir(tiny)
    return lambda *arguments: programs.call("generate", *arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run-name", "tiny"), "--prompt or --prompts_file is required"),
        (("--prompt", "hi"), "--run-name is required"),
        (("--prompt", "hi", "--run-name", "nosuch"), "run 'nosuch' not found .*Runs: .*tiny"),
        ((*HI, "--step", "7"), "no step 7. Steps: 20, 600"),
        (("--prompt", "hi", "--run-name", "../tiny"), "directory of a run not found: ../tiny"),
        (("--prompt", "", "--run-name", "tiny"), "the prompt is empty, .* but the run has none, .* at least one token"),
        ((*HI, "--prompt_ids", "1"), "--prompt and --prompt_ids are both given: give one of them"),
        (("--run-name", "tiny", "--prompt_ids", "1,x"), "--prompt_ids must be token ids separated by commas.*'1,x'"),
        (("--run-name", "tiny", "--prompt_ids", ""), "--prompt_ids must be token ids separated by commas"),
        (("--run-name", "tiny", "--prompt_ids", "-1"), "--prompt_ids must be token ids separated by commas"),
        (
            ("--run-name", "tiny", "--prompt_ids", "5,300"),
            "prompt_ids must be below the vocabulary's size 300: got 300",
        ),
        ((*HI, "--frobnicate", "3"), "unknown flag --frobnicate: "),
        ((*HI, "--num_token", "3"), "did you mean --num_tokens"),
        ((*HI, "more"), "unexpected argument 'more'"),
        ((*HI, "--temp", "hot"), "--temp must be a number: got 'hot'"),
        ((*HI, "--batch_size", "0"), "batch_size must be an integer of at least 1 .*got 0"),
        ((*HI, "--max_seq_len", "33"), "at most the run's own 32 .*got 33"),
        ((*HI, "--overflow", "wrap"), "--overflow must be one of roll, stop, error: got 'wrap'"),
        ((*HI, "--overflow", "error"), "need a window of .*it holds 32"),
        ((*HI, "--eos_id", "300"), "eos_id must be -1 or below the vocabulary's size 300: got 300"),
        ((*HI, "--device", "tpu"), "--device must be one of auto, cpu, rocm, cuda: got 'tpu'"),
        ((*HI, "--min_p", "1"), "--min_p must be at least 0 and below 1 .*got 1.0"),
        ((*HI, "--min_p", "nan"), "--min_p must be .*got nan"),
        ((*HI, "--frequency_penalty", "1e7"), "--frequency_penalty must be from -1e6 to 1e6 .*got 10000000.0"),
        ((*HI, "--presence_penalty", "-inf"), "--presence_penalty must be from -1e6 to 1e6 .*got -inf"),
        ((*HI, "--penalty_scope", "prompt"), "--penalty_scope must be one of all, output: got 'prompt'"),
        ((*HI, "--no_repeat_ngram", "-1"), "--no_repeat_ngram must be an integer of at least 0 .*got -1"),
        ((*HI, "--no_repeat_ngram", "1.5"), "--no_repeat_ngram must be an integer: got '1.5'"),
        ((*HI, "--min_tokens", "-1"), "--min_tokens must be an integer of at least 0 .*got -1"),
        ((*HI, "--min_tokens", "9", "--num_tokens", "5"), "--min_tokens must be at most --num_tokens: got 9 and 5"),
        ((*HI, "--ban", "300"), "--ban must be below the vocabulary's size 300: got 300"),
        ((*HI, "--ban", ""), "--ban must be a text of at least one character"),
        (
            (*HI, "--ban", "nosuch"),
            "--ban must be a token's id, or a text that is one token: 'nosuch' is 6 tokens, 77, 78, 82, 84, 66, 71",
        ),
        ((*HI, "--allow", "9" * 20), "--allow must be below the vocabulary's size 300: got 9{20}"),
        ((*HI, "--allow", "5", "--ban", "5"), "--allow must have a token that --ban does not have"),
        ((*HI, "--allow", "t", "--ban", "83"), "--allow must have a token that --ban does not have"),
        ((*HI, "--logit_bias", "5"), "--logit_bias must be given as ID=VALUE: got '5'"),
        ((*HI, "--logit_bias", "=5"), "--logit_bias must be given as ID=VALUE: got '=5'"),
        ((*HI, "--logit_bias", "5=x"), "--logit_bias must be given as ID=VALUE: got '5=x'"),
        ((*HI, "--logit_bias", "5=nan"), "--logit_bias must be from -1e6 to 1e6 .*got nan"),
        ((*HI, "--logit_bias", "300=1"), "--logit_bias must be below the vocabulary's size 300: got 300"),
        ((*HI, "--logit_bias", "he=1=2"), "'he=1' is . tokens, .*"),
        ((*HI, "--logit_bias", "5=1", "--logit_bias", "5=2"), "--logit_bias has two values for the token 5"),
        ((*HI, "--logit_bias", "t=1", "--logit_bias", "83=2"), "--logit_bias has two values for the token 83"),
        (("--prompt", "hi", "--run-name"), "--run-name needs a value"),
        ((*HI, "--flagfile=nosuch.flags"), "nosuch.flags"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(run, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.code == 1
    assert result.out == ""
    last = result.err.splitlines()[-1]
    assert re.fullmatch(f"generate: error: .*{message}.*", last)
    assert "Traceback" not in result.err


@pytest.fixture
def ended(run, tiny: Path):
    """Runs ``hipgpt-generate`` with the run ``ended``: ``tiny``, whose last token is an end token instead of ``st``."""
    folder = tiny / "checkpoints/ended"
    programs.copy_tiny(folder, name="ended")
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["merges"].pop()
    del value["model"]["vocab"]["st"]
    (folder / "tokenizer.json").write_text(json.dumps(value))
    vocabulary = tokenizer.Tokenizer.from_value(value, folder, ["<|endoftext|>"])
    (folder / "tokenizer.json").write_text(vocabulary.to_json())
    path = folder / "ended_step600_config.json"
    config = json.loads(path.read_text())
    config["tokenizer"]["sha256"] = files.sha256(folder / "tokenizer.json")
    config["data"]["eos_id"] = 299
    path.write_text(json.dumps(config))
    return lambda *arguments: run("--run-name", "ended", "--num_tokens", "9", *arguments)


def test_an_empty_prompt_begins_a_document(
    ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the end token, whose id and whose text, if parsed, give the same samples; their records replay."""
    lines = [{"prompt": ""}, {"prompt_ids": [299]}, {"prompt": "<|endoftext|>", "parse_special": True}]
    path, out = tmp_path / "p.jsonl", str(tmp_path / "out.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # the second time, all samples are found
        assert ended("--prompts_file", str(path), "--output", out).code == 0
    found = list(record.read(Path(out)))
    assert len({one.id for one in found}) == len(found) == 3
    assert {(one.prompt, one.prompt_ids, one.ids) for one in found} == {("<|endoftext|>", (299,), found[0].ids)}
    replayed = programs.call("replay", out, monkeypatch=monkeypatch, capsys=capsys)
    assert (replayed.code, "identical" in replayed.out) == (0, True)
    for given in (("--prompt", ""), ("--prompt_ids", "299"), ("--prompt", "<|endoftext|>", "--parse_special")):
        assert ended(*given).out.rstrip("\n") == found[0].text
    assert ended("--prompt_ids", " 77, 78").out == ended("--prompt", "no").out


def test_odd_prompts_are_noted(ended) -> None:
    special = "the prompt spells the special token '<|endoftext|>' and is read as ordinary text: --parse_special"
    space = "the prompt ends with a space, and tokens mostly begin with theirs"
    cases = [
        (("--prompt", "a<|endoftext|>"), True, False),
        (("--prompt", "<|endoftext|>a "), True, True),
        (("--prompt", "a<|endoftext|>", "--parse_special"), False, False),
        (("--prompt", ""), False, False),
        (("--prompt", "the king"), False, False),
    ]
    for given, has_special, has_space in cases:
        err = ended(*given).err
        assert (special in err, space in err) == (has_special, has_space), given


def test_spelling_and_order_of_flags_do_not_matter(run) -> None:
    result = run("--prompt", "the king", "--run-name", "tiny", "--num_tokens", "9", "--rep-penalty", "1.3")
    assert result.code == 0
    assert run("--rep_penalty=1.3", "--num-tokens=9", "--run_name=tiny", "--prompt=the king").out == result.out


def test_defaults_are_the_documented_ones(run) -> None:
    written_out = ("--step", "600", "--num_tokens", "50", "--max_seq_len", "32", "--eos_id", "-1", "--top_k", "5")
    more = ("--temp", "1.0", "--top_p", "0.9", "--rep-penalty", "1.1", "--seed", "0")
    assert run(*HI).out == run(*HI, *written_out, *more).out


@pytest.mark.parametrize(
    "arguments", [("--prompt=-x",), ("--prompt", "-x"), ("--prompt", "--top_k"), ("--prompt", "-h")], ids=" ".join
)
def test_a_prompt_may_begin_with_a_dash(run, arguments: tuple[str, ...]) -> None:
    result = run("--run-name", "tiny", "--num_tokens", "1", "--echo", *arguments)
    assert result.code == 0
    assert result.out.startswith(arguments[-1].removeprefix("--prompt="))


@pytest.mark.parametrize("word", ["--help", "-h", "--version", "-version"])
def test_help_and_version_go_to_stdout(run, word: str) -> None:
    result = run(word, "--run-name", "tiny")
    assert (result.code, result.err) == (0, "")
    assert ("--rep-penalty" in result.out) == ("h" in word)


def test_an_echoed_prompt_is_decoded_as_text(run) -> None:
    assert run(*HI[:2], "--prompt", "a\udcff", "--echo", "--num_tokens", "0").out == "a\ufffd\n"


def test_flagfile_holds_flags(run, tiny: Path) -> None:
    (tiny / "some.flags").write_text("# a comment\n--run-name=tiny\n--num_tokens=5\n--nostream\n")
    assert (
        run("--flagfile=some.flags", "--prompt", "the").out == run(*HI[:2], "--prompt", "the", "--num_tokens", "5").out
    )


def test_streaming_echo_and_samples_change_only_what_is_shown(run) -> None:
    text = run(*HI, "--num_tokens", "20").out
    assert run(*HI, "--num_tokens", "20", "--nostream").out == text
    assert run(*HI, "--num_tokens", "20", "--no-stream").out == text
    assert run(*HI, "--num_tokens", "20", "--echo").out == "the king" + text
    many = run(*HI, "--num_tokens", "20", "--num_samples", "3").out
    assert many.startswith(text)
    assert len(many) > 2 * len(text)


def test_samples_are_told_apart(run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*HI, "--num_tokens", "3", "--num_samples", "2", "--verbose")
    plain = run(*arguments)
    assert "---" not in plain.err
    first, second = plain.out.splitlines()
    assert run(*arguments, "--separator", "=====").out == f"{first}\n=====\n{second}\n"
    refused = run(*arguments, "--separator", "x", "--output", "-")
    assert (refused.code, refused.out) == (1, "")
    assert "--separator needs text on stdout" in refused.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run(*arguments)
    assert shown.out == plain.out
    assert [line for line in shown.err.splitlines() if "--- sample" in line][-1].endswith("--- sample 2 of 2 ---")


def test_the_run_may_be_given_by_its_path(run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tiny / "checkpoints" / "tiny")
    arguments = ("--prompt", "the king", "--num_tokens", "3", "--output", "-")
    by_name, by_path = (run("--run-name", name, *arguments) for name in ("tiny", f"{tmp_path}/other/"))
    assert by_path.code == 0
    assert json.loads(by_path.out)["run"] == json.loads(by_name.out)["run"]
    assert str(tmp_path) not in by_path.out
    assert f"directory of a run not found: {tmp_path}/none" in run("--run-name", f"{tmp_path}/none", *arguments).err
    assert f"{tmp_path}/ has no complete checkpoint" in run("--run-name", f"{tmp_path}/", *arguments).err


def test_eos_ends_the_text_and_is_not_printed(run, tiny: Path) -> None:
    vocabulary = tokenizer.Tokenizer.load(tiny / "checkpoints/tiny/tokenizer.json")
    text = run(*HI, "--num_tokens", "12").out.removesuffix("\n")
    eos_id = vocabulary.encode(text)[5]
    cut = run(*HI, "--num_tokens", "12", "--eos_id", str(eos_id)).out.removesuffix("\n")
    assert len(cut) < len(text)
    assert text.startswith(cut)
    assert vocabulary.decode([eos_id]) == text[len(cut) :][: len(vocabulary.decode([eos_id]))]


def test_seed_minus_one_shows_the_seed_it_drew(run) -> None:
    drawn = run(*HI, "--seed", "-1")
    seed = re.search(r"seed (\d+)", drawn.err)
    assert seed is not None
    assert run(*HI, "--seed", seed[1]).out == drawn.out


def test_a_prompt_longer_than_the_window_is_cut_with_a_note(run) -> None:
    long = "the king and his fool " * 30
    result = run("--run-name", "tiny", "--prompt", long, "--num_tokens", "3")
    assert result.code == 0
    assert re.search(r"the prompt has \d+ tokens: the first \d+ are beyond the window and not read", result.err)


def test_an_absent_device_is_an_error_with_the_remedy(tiny: Path) -> None:
    result = programs.spawn("generate", *HI, "--device", "rocm", cwd=tiny)
    assert result.code == 1
    assert result.out == ""
    assert re.search(r"error: --device 'rocm': JAX [\d.]+ found no such device .*pip install '\.\[rocm\]'", result.err)
    assert "Traceback" not in result.err


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "swapped", "tokenizer", "vocabulary", "config", "key"])
def test_damaged_files_are_named(run, tiny: Path, damage: str) -> None:
    directory = tiny / "checkpoints" / f"bad_{damage}"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(tiny / "checkpoints/tiny", directory, symlinks=True)
    weights, config = directory / "tiny_step600.bin", directory / "tiny_step600_config.json"
    named = weights
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty":
            weights.write_bytes(b"")
        case "foreign":
            weights.write_bytes(b"PK\x03\x04" * 100)
        case "swapped":
            weights.write_bytes((directory / "tiny_step20.bin").read_bytes())
        case "tokenizer":
            named = directory / "tokenizer.json"
            named.write_text("{}")
        case "vocabulary":
            named = directory / "tokenizer.json"
            before = files.sha256(named)
            files.write_text(named, tokenizer.Tokenizer.train([], 256).to_json())
            config.write_text(config.read_text().replace(before, files.sha256(named)))
        case "config":
            named = directory / "latest_config.json"
            config.write_text(config.read_text()[:-20])
        case "key":
            named = directory / "latest_config.json"
            config.write_text(config.read_text().replace('"embed_dim"', '"width"'))
    result = run("--run-name", f"bad_{damage}", "--prompt", "hi")
    assert result.code == 1
    assert named.name in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_text_comes_token_by_token(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5,000 tokens each is written by itself, until the reader is gone."""
    pieces: list[bytes] = []

    class Pipe(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            pieces.append(bytes(data))
            if len(pieces) == 50:
                raise BrokenPipeError
            return len(data)

    text = run(*HI, "--num_tokens", "50").out
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Pipe()), "utf-8"))
    assert run(*HI, "--num_tokens", "5000").code == 128 + signal.SIGPIPE
    assert b"".join(pieces[:40]).decode() in text


def test_a_closed_pipe_ends_quietly(tiny: Path) -> None:
    line = " ".join(["exec", *programs.command("generate"), *HI[:2], "--prompt king --num_tokens 3000 | head -c 1"])
    done = subprocess.run(
        ["bash", "-c", line], cwd=tiny, env=programs.environment(), capture_output=True, text=True, timeout=120
    )
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.usefixtures("ctrl_c_heeded")
def test_ctrl_c_ends_quietly(tiny: Path) -> None:
    with subprocess.Popen(
        programs.command("generate", *HI, "--num_tokens", "1000000"),
        cwd=tiny,
        env=programs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tiny: Path, tmp_path: Path) -> None:
    first = programs.spawn("generate", *HI, cwd=tiny, cache=tmp_path)
    directory = tmp_path / "hipgpt_jax" / "compiled"
    assert directory.stat().st_mode & 0o777 == 0o700
    compiled = {path.name for path in directory.iterdir() if not path.name.endswith("-atime")}
    assert compiled
    second = programs.spawn("generate", *HI, "--seed", "3", "--temp", "0.5", "--top_k", "9", cwd=tiny, cache=tmp_path)
    again = {path.name for path in directory.iterdir() if not path.name.endswith("-atime")}
    assert again == compiled
    assert (first.code, second.code) == (0, 0)
    told = [re.search(r"first token [\d.]+ s later \(programs: (\d+) (.+?)\)", one.err) for one in (first, second)]
    assert all(told), first.err + second.err
    (made, how), (read, again_how) = (one.groups() for one in told if one)
    assert made == read
    assert how == "compiled"
    assert again_how == "from the cache"
    assert programs.spawn("generate", *HI, cwd=tiny, cache=tmp_path).out == first.out


def test_only_what_generation_needs_is_imported(tiny: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('hipgpt_jax.cli.generate', run_name='__main__')\n"
        "finally: print(sorted({'orbax', 'optax', 'torch', 'jax'} & sys.modules.keys()), file=sys.stderr)"
    )
    bad_value, no_run = (*HI, "--temp", "-1"), (*HI[2:], "--run-name", "x")
    for arguments, loaded in ((HI, "['jax']"), (("--help",), "[]"), (bad_value, "[]"), (no_run, "[]")):
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", *arguments],
            cwd=tiny,
            env=programs.environment(),
            capture_output=True,
            text=True,
        )
        assert done.stderr.splitlines()[-1] == loaded


# Every command of the document that this package implements, with ./build/generate read as hipgpt-generate.
DOCUMENTED = [
    'generate --prompt "To be, or not to be:" --run-name shakespeare_v1',
    'generate --prompt "Once upon a time" --run-name shakespeare_v1 --step 1500',
    """generate --prompt "The meaning of life is" \
      --run-name philosophy_model \
      --num_tokens 100 \
      --temp 0.7 \
      --top_k 20 \
      --top_p 0.9 \
      --rep-penalty 1.1""",
    """generate --prompt "In a galaxy far away" \
      --run-name scifi_model \
      --num_tokens 200 \
      --temp 1.2 \
      --top_k 50 \
      --top_p 0.95""",
    'generate --prompt "Hello world" --run-name test_run --num_tokens 20',
    """generate \
      --prompt "The old wizard looked into the crystal ball and saw" \
      --run-name fantasy_model \
      --num_tokens 150 \
      --temp 0.8 \
      --top_k 30 \
      --top_p 0.92 \
      --rep-penalty 1.08""",
    """generate \
      --prompt "Imagine a world where" \
      --run-name creative_model \
      --num_tokens 100 \
      --temp 1.3 \
      --top_k 100 \
      --top_p 0.95 \
      --rep-penalty 1.05""",
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_commands(run, tiny: Path, line: str) -> None:
    words = shlex.split(line)[1:]
    name = words[words.index("--run-name") + 1]
    programs.copy_tiny(tiny / "checkpoints" / name, name, step=1500)
    result = run(*words)
    assert result.code == 0, result.err
    wanted = words[words.index("--num_tokens") + 1] if "--num_tokens" in words else "50"
    assert f"{wanted} tokens" in result.err
    assert result.out.strip()
