"""``hipgpt-generate`` with prompts in and records out."""

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest

from hipgpt_jax.records import record

PROMPTS = ["the king", "a queen", "the fool and", "in war", "see what", "the king"]


@pytest.fixture
def run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., programs.Result]:
    """Runs ``hipgpt-generate`` of the run ``tiny`` in this process, in a directory of its own."""
    (tmp_path / "checkpoints").symlink_to(tiny / "checkpoints")
    monkeypatch.chdir(tmp_path)
    flags = ("--run-name", "tiny", "--num_tokens", "12")
    return lambda *arguments: programs.call("generate", *flags, *arguments, monkeypatch=monkeypatch, capsys=capsys)


def lines_of(path: str | Path) -> dict[tuple[str, int], str]:
    """Returns the lines of a record file by prompt and sample, without provenance."""
    found = {}
    for one in record.read(Path(path)):
        value = json.loads(one.to_json())
        assert (one.id, one.sample) not in found
        found[one.id, one.sample] = json.dumps(
            {k: v for k, v in value.items() if k not in ("argv", "started", "timings")}
        )
    return found


def write_prompts(name: str, lines: list[Any]) -> str:
    Path(name).write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return name


def test_repeated_prompts_are_generated_once_in_any_order(run) -> None:
    result = run("--prompts_file", write_prompts("p.txt", PROMPTS), "--num_samples", "2", "--output", "all.jsonl")
    assert (result.code, result.out) == (0, "")
    assert "1 prompts repeat earlier ones" in result.err
    expected = lines_of("all.jsonl")
    assert len(expected) == 10
    write_prompts("q.txt", random.Random(3).sample(PROMPTS * 2, 12))
    assert run("--prompts_file", "q.txt", "--num_samples", "2", "--output", "shuffled.jsonl").code == 0
    assert lines_of("shuffled.jsonl") == expected


def test_a_sample_that_is_missing_in_the_output_is_generated_alone(run) -> None:
    assert run("--prompt", "the king", "--num_samples", "10", "--output", "ten.jsonl").code == 0
    kept = [line for line in Path("ten.jsonl").read_text().splitlines(True) if '"sample":7,' not in line]
    Path("nine.jsonl").write_text("".join(kept))
    result = run("--prompt", "the king", "--num_samples", "10", "--output", "nine.jsonl")
    assert "nine.jsonl has 9 of the samples: 1 are left" in result.err
    assert lines_of("nine.jsonl") == lines_of("ten.jsonl")


def test_compressed_records_are_those_of_a_plain_file(run, monkeypatch, capsys) -> None:
    flags = ("--prompt", "the king", "--num_samples", "6", "--batch_size", "2", "--output")
    for name in ("a.jsonl", "a.jsonl.zst"):
        assert run(*flags, name).code == 0
    expected = lines_of("a.jsonl")
    assert lines_of("a.jsonl.zst") == expected
    whole = Path("a.jsonl.zst").read_bytes()
    Path("a.jsonl.zst").write_bytes(whole[:-1])
    inspected = programs.call("inspect", "a.jsonl.zst", "--html", "a.html", monkeypatch=monkeypatch, capsys=capsys)
    assert "a.jsonl.zst: skipped an incomplete last line" in inspected.err
    resumed = run(*flags, "a.jsonl.zst")
    assert "a.jsonl.zst: dropped an incomplete last frame of" in resumed.err
    assert re.search(r"a\.jsonl\.zst has [1-5] of the samples: [1-5] are left", resumed.err)
    assert lines_of("a.jsonl.zst") == expected
    replayed = programs.call("replay", "a.jsonl.zst", monkeypatch=monkeypatch, capsys=capsys)
    assert replayed.out.splitlines()[-1] == "6 of 6 identical, log-probabilities equal to the bit"
    assert run(*flags, "a.jsonl.zst", "--overwrite", "--num_samples", "1").code == 0
    assert len(lines_of("a.jsonl.zst")) == 1


def test_the_text_is_the_same_with_and_without_records(run) -> None:
    plain = run("--prompt", "the king", "--num_samples", "2", "--batch_size", "2")
    both = run("--prompt", "the king", "--num_samples", "2", "--batch_size", "2", "--output", "a.jsonl")
    only = run("--prompt", "the king", "--num_samples", "2", "--batch_size", "2", "--output", "-")
    assert both.out == plain.out
    told = [record.parse(line.encode(), "it") for line in only.out.splitlines()]
    assert "".join(one.text + "\n" for one in told) == plain.out
    assert {(one.id, one.sample): one.ids for one in told} == {
        (one.id, one.sample): one.ids for one in record.read(Path("a.jsonl"))
    }


def test_prompts_of_a_file_without_records_are_written_as_text(run) -> None:
    result = run("--prompts_file", write_prompts("p.txt", PROMPTS), "--echo")
    alone = [run("--prompt", prompt, "--echo").out for prompt in PROMPTS]
    assert result.out == "".join(alone)


def test_alternatives_that_are_not_recorded_are_noted(run) -> None:
    name = write_prompts("p.jsonl", [{"id": "x", "prompt": "the", "num_tokens": 1, "top_logprobs": 2}])
    note = "prompt has top_logprobs, which are only recorded: --output writes records"
    assert note in run("--prompts_file", name).err
    assert note not in run("--prompts_file", name, "--output", "o.jsonl").err


def test_a_short_line_fits_where_the_default_would_not(run) -> None:
    name = write_prompts("p.jsonl", [{"prompt": "the", "num_tokens": 5}])
    flags = ("--prompts_file", name, "--overflow", "error", "--max_seq_len", "12", "--num_tokens", "50")
    assert run(*flags, "--output", "o.jsonl").code == 0


def test_a_prompt_that_is_not_utf_8_is_recorded_as_decoded(run) -> None:
    assert run("--prompt", "a\udcff", "--output", "o.jsonl").code == 0
    (made,) = record.read(Path("o.jsonl"))
    assert made.prompt == "a\ufffd"
    assert "a\ufffd" in made.argv


def test_equal_prompts_with_different_numbers_of_samples_are_merged(run) -> None:
    name = write_prompts("p.jsonl", [{"prompt": "a", "num_samples": 5}, {"prompt": "a", "num_samples": 2}])
    assert run("--prompts_file", name, "--output", "o.jsonl").code == 0
    assert len(lines_of("o.jsonl")) == 5
    assert (
        "o.jsonl has 5 of the samples: nothing is left to do" in run("--prompts_file", name, "--output", "o.jsonl").err
    )


def test_a_line_may_have_its_own_settings(run) -> None:
    lines = [
        {"id": "a", "prompt": "the king", "seed": 9, "num_samples": 2, "num_tokens": 5},
        {"id": "b", "prompt": "the king", "temp": 0, "stop": " "},
        {"id": "c", "prompt": "the king"},
    ]
    assert run("--prompts_file", write_prompts("p.jsonl", lines), "--output", "o.jsonl", "--top_k", "7").code == 0
    found = {(one.id, one.sample): one for one in record.read(Path("o.jsonl"))}
    assert found.keys() == {("a", 0), ("a", 1), ("b", 0), ("c", 0)}
    assert (found["a", 0].seed, found["a", 1].settings.num_tokens, found["a", 0].settings.top_k) == (9, 5, 7)
    assert (found["b", 0].settings.temperature, found["b", 0].settings.stop) == (0, (" ",))
    run("--prompt", "the king", "--seed", "9", "--num_tokens", "5", "--top_k", "7", "--output", "a.jsonl")
    (alone,) = record.read(Path("a.jsonl"))
    assert alone.ids == found["a", 0].ids


def test_a_prompt_may_come_from_stdin(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the\nkïng\xff".encode() + b"\xff")))
    assert run("--prompt", "-", "--echo", "--num_tokens", "0").out == "the\nkïng\xff\ufffd\n"


def test_a_stop_string_ends_the_text(run) -> None:
    text = run("--prompt", "the king", "--num_tokens", "30").out.removesuffix("\n")
    first, second = text[9:12], text[5:7]
    result = run("--prompt", "the king", "--num_tokens", "30", "--stop", first, "--stop", second, "--output", "s.jsonl")
    assert result.out == text[: min(text.index(first), text.index(second))] + "\n"
    (made,) = record.read(Path("s.jsonl"))
    assert (made.finish_reason, made.stop in (first, second), made.text + "\n") == ("stop", True, result.out)


def test_other_settings_are_refused_and_overwriting_replaces(run) -> None:
    base = ("--prompt", "the king", "--output", "a.jsonl")
    assert run(*base).code == 0
    before = Path("a.jsonl").read_bytes()
    changes = {
        "seed": ("--seed", "1"),
        "temperature": ("--temp", "0.5"),
        "num_tokens": ("--num_tokens", "13"),
        "window_stride": ("--window_stride", "4"),
        "batch_size": ("--batch_size", "2"),
        "dtype": ("--dtype", "bfloat16"),
        "weights": ("--step", "20"),
        "stop": ("--stop", "x"),
        "ban": ("--ban", "5"),
        "logit_bias": ("--logit_bias", "5=1"),
    }
    for name, change in changes.items():
        run_wide = name in ("window_stride", "batch_size", "dtype", "weights")
        for prompt in ("the king", "another") if run_wide else ("the king",):
            result = run("--output", "a.jsonl", "--prompt", prompt, *change)
            assert (result.code, result.out) == (1, "")
            assert re.search(f"a.jsonl was made by other settings: {name} .* now. Repeat", result.err)
    assert Path("a.jsonl").read_bytes() == before
    assert run("--prompt", "a queen", "--temp", "0.7", "--output", "a.jsonl").code == 0, "another prompt may"
    assert len(lines_of("a.jsonl")) == 2
    assert run(*base, "--seed", "1", "--overwrite").code == 0
    (made,) = record.read(Path("a.jsonl"))
    assert made.seed == 1


def test_other_ids_of_the_same_text_are_refused(run) -> None:
    first = write_prompts("p.jsonl", [{"id": "x", "prompt": "the"}])
    assert run("--prompts_file", first, "--output", "a.jsonl").code == 0
    before = Path("a.jsonl").read_bytes()
    second = write_prompts("q.jsonl", [{"id": "x", "prompt_ids": [83, 71, 68], "num_samples": 2}])  # letter by letter
    result = run("--prompts_file", second, "--output", "a.jsonl")
    assert result.code == 1
    assert re.search(
        r"a.jsonl was made by other settings: prompt_ids \(\d+,.* in sample 0 of x, \(83, 71, 68\) now", result.err
    )
    assert Path("a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a", "--prompts_file", "p.txt"), "--prompt and --prompts_file are both given"),
        ((), "--prompt or --prompts_file is required"),
        (("--prompts_file", "none.txt"), "prompts file not found: none.txt"),
        (("--prompts_file", "bad.jsonl"), "bad.jsonl line 2: unknown key 'promt'"),
        (("--prompts_file", "few.jsonl", "--num_tokens", "3"), r"few.jsonl line 1 \(\w+\): min_tokens must be at most"),
        (
            ("--prompts_file", "ban.jsonl"),
            r"ban.jsonl line 2 \(\w+\): ban must be below the vocabulary's size 300: got 300",
        ),
        (("--prompts_file", "ban.jsonl", "--allow", "7"), r"ban.jsonl line 1 \(\w+\): allow must have a token"),
        (("--prompt", "a", "--ban", "qq"), "--ban must be a token's id, or a text that is one token: 'qq' is 2 tokens"),
        (
            ("--prompts_file", "p.txt", "--overflow", "error", "--num_tokens", "40"),
            r"p.txt line 1 \(\w{16}\): a prompt of",
        ),
        (("--prompt", "a", "--output", "none/o.jsonl"), "--output none/o.jsonl cannot be written: No such file"),
        (("--prompt", "a", "--output", "checkpoints"), "--output checkpoints cannot be written: Is a directory"),
        (("--prompt", "a", "--output", "p.txt"), "p.txt line 1 is not JSON"),
        (("--prompt", "a", "--stop", ""), "stop must be a text of at least one character"),
        (("--prompt", "a", "--top_logprobs", "21", "--output", "-"), "--top_logprobs must be at most 20 .*got 21"),
        (("--prompt", "a", "--top_logprobs", "2"), "--top_logprobs needs --output"),
        (("--prompt", "a", "--window_stride", "4", "--overflow", "stop"), "--window_stride needs --overflow roll"),
        (("--prompt", "a", "--overwrite"), "--overwrite needs --output FILE"),
        (("--prompt", "a", "--echo", "--output", "-"), "--echo needs text on stdout, and the records are written"),
        (("--prompts_file", "p.txt", "--separator", "", "--output", "o.jsonl"), "--separator needs text on stdout"),
        (("--prompt_ids", "3", "--parse_special"), "--parse_special needs a text, and --prompt_ids has none"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(run, arguments: tuple[str, ...], message: str) -> None:
    write_prompts("p.txt", PROMPTS)
    write_prompts("bad.jsonl", [{"prompt": "a"}, {"promt": "a"}])
    write_prompts("few.jsonl", [{"prompt": "a", "min_tokens": 4}])
    write_prompts("ban.jsonl", [{"prompt": "a", "ban": [7]}, {"prompt": "a", "ban": [300]}])
    before = {path: path.is_dir() or path.read_bytes() for path in Path.cwd().iterdir()}
    result = run(*arguments)
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(f"generate: error: .*{message}.*", result.err.splitlines()[-1])
    assert {path: path.is_dir() or path.read_bytes() for path in Path.cwd().iterdir()} == before


def test_an_unwritable_output_is_an_error_before_jax_starts(tiny: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('hipgpt_jax.cli.generate', run_name='__main__')\n"
        "finally: print('jax' in sys.modules, file=sys.stderr)"
    )
    for arguments in (("--output", "/none/o.jsonl", "--prompt", "a"), ("--prompts_file", "none.txt")):
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", "--run-name", "tiny", *arguments],
            cwd=tiny,
            env=programs.environment(),
            capture_output=True,
            text=True,
        )
        assert done.stderr.splitlines()[-1] == "False"


def spawn_many(tiny: Path, out: Path, samples: int, *more: str) -> "subprocess.Popen[str]":
    flags = ("--run-name", "tiny", "--prompt", "the king", "--num_tokens", "6", "--num_samples", str(samples))
    return subprocess.Popen(
        programs.command("generate", *flags, "--batch_size", "4", "--output", str(out), *more),
        cwd=tiny,
        env=programs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_command_continues_where_it_stopped(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    with spawn_many(tiny, whole, 300) as process:
        process.communicate(timeout=120)
    sizes = [0]
    for turn in range(4):
        with spawn_many(tiny, killed, 300) as process:
            until = time.monotonic() + 60
            while process.poll() is None and (not killed.exists() or killed.stat().st_size <= sizes[-1]):
                assert time.monotonic() < until
                time.sleep(0.002)
            time.sleep(0.01 * turn)
            process.send_signal(signal.SIGKILL)
        sizes.append(killed.stat().st_size)
        assert len(lines_of(killed)) >= len(sizes) - 1
    with killed.open("ab") as file:  # and cut in the middle of a line
        file.truncate(sizes[-1] - 40)
    with spawn_many(tiny, killed, 300) as process:
        _, err = process.communicate(timeout=120)
    assert "dropped an incomplete last line" in err
    assert lines_of(killed) == lines_of(whole)


def peak_of(tiny: Path, *arguments: str) -> float:
    """Returns the peak memory of ``hipgpt-generate`` in MiB, as measured in its process."""
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('hipgpt_jax.cli.generate', run_name='__main__')\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--run-name", "tiny", "--prompt", "the king", *arguments],
        cwd=tiny,
        env=programs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1]) / 1024


@pytest.mark.slow
def test_ten_thousand_samples_take_no_more_memory_than_one_thousand(tiny: Path, tmp_path: Path) -> None:
    """Only the set of finished samples grows, by some hundred bytes per prompt id."""
    peaks = []
    for samples in (1000, 10_000):
        out = tmp_path / f"{samples}.jsonl"
        flags = ("--num_tokens", "2", "--batch_size", "250", "--num_samples", str(samples), "--output", str(out))
        peaks.append(peak_of(tiny, *flags))
        assert out.read_bytes().count(b"\n") == samples
    assert peaks[1] < peaks[0] + 40, f"peaks of {peaks} MiB"


@pytest.mark.slow
def test_twenty_thousand_tokens_take_no_more_memory_than_one_thousand(tiny: Path) -> None:
    peaks = [peak_of(tiny, "--window_stride", "8", "--num_tokens", tokens) for tokens in ("1000", "20000")]
    assert peaks[1] < peaks[0] + 40, f"peaks of {peaks} MiB"


def test_stdout_of_records_may_be_closed(tiny: Path) -> None:
    line = " ".join([*programs.command("generate"), "--run-name tiny --prompt king --num_samples 500 --output -"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -n 1"],
        cwd=tiny,
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 141
    assert record.parse(done.stdout.encode(), "it").sample == 0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_progress_bar_is_shown_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """On a terminal of its own, which the text does not go to."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        programs.command(
            "generate",
            "--run-name",
            "tiny",
            "--prompt",
            "king",
            "--num_samples",
            "60",
            "--output",
            str(tmp_path / "a.jsonl"),
        ),
        cwd=tiny,
        env={**programs.environment(), "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        for _ in itertools.repeat(None):
            shown += os.read(ours, 65536)
    except OSError:  # how Linux says that the other end was closed
        process.wait(timeout=60)
    assert re.search(rb"\d+/60 samples.*\d+ tokens/s", shown)
    assert b"60/60 samples" in shown
