"""``hipgpt-train`` as a user meets it, and the directory it leaves."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import jax
import numpy as np
import programs
import pytest
import safetensors

import hipgpt_jax
from hipgpt_jax.cli import train_report

TINY = (
    *("--data-path", "text.txt", "--vocab-size", "300", "--warmup-steps", "2"),
    *("--dim", "16", "--heads", "2", "--ff", "32", "--layers", "1", "--seq", "16", "--mesh", "data=1"),
)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a text in it."""
    (tmp_path / "text.txt").write_text(programs.TEXT)
    return tmp_path


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Optax 0.2.8 itself promotes a Python float with an integer count; our own code is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``hipgpt-train`` in this process, in the directory with the text."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    return lambda *arguments: programs.call("train", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def metrics(work: Path, run: str) -> list[dict[str, float]]:
    """The lines of a run's metrics, without what only the clock decides."""
    lines = (work / "checkpoints" / run / "metrics.jsonl").read_text().splitlines()
    clock = ("milliseconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def test_what_is_odd_about_a_text_is_said_before_it_is_trained_on(run, work: Path) -> None:
    (work / "latin.txt").write_bytes(b"caf\xe9")
    result = run(*TINY[2:], "--data-path", "latin.txt", "--run-name", "latin")
    assert result.code == 1
    note, error = result.err.splitlines()[-2:]
    assert note.startswith(
        "1 byte (the first in latin.txt) of the text are not UTF-8 and became U+FFFD; is the file in"
    )
    assert error.startswith("train: error: latin.txt is too short: its training split has")
    assert list((work / "checkpoints").glob(".*new")) == []


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--dim", "1000000000", "--dim must be at most 65536"),
        ("--heads", "7", r"Choose --heads from \[1, 2, 4, 8, 16\]"),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(run, work: Path, flag: str, value: str, message: str) -> None:
    result = run(*TINY, flag, value)
    assert result.code == 1
    assert re.search(rf"^train: error: .*{message}", result.err)
    assert not (work / "checkpoints").exists()


def test_preparing_is_reported_once_a_minute_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 1.0, 59.0, 61.0, 61.0, 62.0, 121.5, 121.5])
    report = train_report._lines(lambda: next(times))
    for done in (0, 1, 2, 3, 4):
        report(done * 10**6, 9 * 10**6, "encoding")
    assert capsys.readouterr().err == "encoding the text: 2 of 9 MB\nencoding the text: 4 of 9 MB\n"


def test_the_directory_is_the_documented_one(trained: Path) -> None:
    directory = trained / "checkpoints" / "tiny"
    assert {path.name for path in directory.iterdir()} == {
        *("tokenizer.json", "tokens.bin", "data.json", "settings.json", "metrics.jsonl", "train_state"),
        *("tiny_step20.bin", "tiny_step20_config.json", "tiny_step40.bin", "tiny_step40_config.json"),
        *("latest_checkpoint.bin", "latest_config.json", "best_checkpoint.bin", "best_config.json"),
    }
    assert (directory / "latest_checkpoint.bin").readlink() == Path("tiny_step40.bin")
    assert (directory / "latest_config.json").readlink() == Path("tiny_step40_config.json")
    config = json.loads((directory / "latest_config.json").read_text())
    committed = json.loads((programs.TINY / "latest_config.json").read_text())
    assert config["model"] == committed["model"]
    assert config.keys() == committed.keys()
    assert config["tokenizer"]["path"] == "tokenizer.json"
    assert config["checkpoint"]["latest"] == "tiny_step40.bin"
    assert str(trained) not in (directory / "latest_config.json").read_text()


def test_the_weights_are_a_safetensors_file_with_hugging_face_names(trained: Path) -> None:
    with safetensors.safe_open(trained / "checkpoints/tiny/latest_checkpoint.bin", framework="numpy") as file:
        assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.bias", "ln_f.bias"} <= set(
            file.keys()
        )
        assert file.get_slice("h.0.attn.c_attn.weight").get_shape() == [24, 72]


def test_log_lines_are_hipgpts(trained: Path) -> None:
    lines = (trained / "log.txt").read_text().splitlines()
    pattern = (
        r"\[Step (\d+)\] Loss: [\d.]+ nats/token, [\d.]+ nats/byte \| Perplexity: [\d.]+ \| "
        r"Accuracy: [\d.]+% \| LR: [\d.e-]+ \| Time: [\d.]+ ms \| \d+ tok/s"
    )
    steps = [int(match[1]) for line in lines if (match := re.fullmatch(pattern, line))]
    assert steps == [10, 20, 30, 40]


def test_training_learns(trained: Path) -> None:
    losses = [line["loss"] for line in metrics(trained, "tiny") if "loss" in line]
    validation = [line["validation_loss"] for line in metrics(trained, "tiny") if "validation_loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert validation[-1] < validation[0]


def test_an_interrupted_run_resumes_to_the_same_bits(run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*TINY, "--steps", "12", "--ckpt-every", "4", "--log-every", "1", "--dropout", "0.1")
    assert run(*flags, "--run-name", "whole").code == 0

    from hipgpt_jax.training import metrics as written

    append = written.append

    def interrupt(path: Path, line: dict[str, float]) -> None:
        append(path, line)
        if line["step"] == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(written, "append", interrupt)
        assert run(*flags, "--run-name", "parts").code == 130
    assert (work / "checkpoints/parts/latest_checkpoint.bin").readlink() == Path("parts_step4.bin")
    resumed = run(*flags, "--run-name", "parts", "--resume")
    assert resumed.code == 0, resumed.err
    whole, parts = (work / "checkpoints" / name / f"{name}_step12.bin" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
    assert metrics(work, "parts") == metrics(work, "whole")


@pytest.mark.slow
def test_a_run_killed_between_its_state_and_its_weights_gets_them_when_it_resumes(run, work: Path) -> None:
    flags = (*TINY, "--run-name", "late", "--steps", "4", "--ckpt-every", "2")
    assert run(*flags).code == 0
    directory = work / "checkpoints/late"
    whole = (directory / "late_step4.bin").read_bytes()
    for name in ("late_step4.bin", "late_step4_config.json", "latest_config.json", "latest_checkpoint.bin"):
        (directory / name).unlink()
    assert run(*flags, "--resume").code == 0
    assert (directory / "latest_checkpoint.bin").read_bytes() == whole


@pytest.mark.slow
def test_several_seeds_are_several_runs_with_their_mean(run, work: Path) -> None:
    flags = (*TINY, "--run-name", "r", "--steps", "3", "--ckpt-every", "2")
    assert run(*flags, "--seeds", "5").code == 0
    result = run(*flags, "--seeds", "5,6", "--resume")
    *log, header, first, second, mean = result.out.splitlines()
    assert not [line for line in log if "Step 1]" in line and "Validation" in line]
    assert header.split() == ["lowest", "validation", "loss", "step", "nats/token", "nats/byte"]
    losses = [
        min(line["validation_nats_per_byte"] for line in metrics(work, f"r_seed{n}") if "validation_loss" in line)
        for n in (5, 6)
    ]
    for name, line, loss in zip(("r_seed5", "r_seed6"), (first, second), losses, strict=True):
        assert (line.split()[0], line.split()[-1]) == (name, f"{loss:.4f}")
    assert mean.endswith(f", {np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f} nats per byte")
    assert run(*TINY, "--run-name", "one", "--steps", "3", "--ckpt-every", "2", "--seed", "5").code == 0
    assert metrics(work, "one") == metrics(work, "r_seed5")


@pytest.mark.slow
def test_python_trains_the_run_of_the_command_line_and_gets_its_metrics(run, work: Path) -> None:
    flags = (*TINY, "--run-name", "r", "--steps", "3", "--log-every", "1")
    assert run(*flags).code == 0
    lines: list[dict[str, float]] = []
    settings: dict[str, Any] = {
        name[2:].replace("-", "_"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)
    }
    name = hipgpt_jax.train(**settings, run_name="own", steps=3, log_every=1, on_metrics=lines.append)
    assert name == "own"
    clock = ("milliseconds", "tokens_per_second")
    assert [{key: line[key] for key in line if key not in clock} for line in lines] == metrics(work, "r")
    own = {name: value for name, value in settings.items() if name != "dim"}
    renamed = hipgpt_jax.train(**own, embed_dim=16, run_name="renamed", steps=3, log_every=1, min_lr=None)
    assert metrics(work, renamed) == metrics(work, "r")
    with pytest.raises(KeyboardInterrupt, match="training stopped at step 1"):
        hipgpt_jax.train(**settings, run_name="stopped", log_every=1, on_metrics=lambda _: os.kill(os.getpid(), 15))
    with pytest.raises(ValueError, match=r"unknown flag --stepz: did you mean --steps\?"):
        hipgpt_jax.train(stepz=3)
    with pytest.raises(ValueError, match="run 'own' exists already: --resume continues it"):
        hipgpt_jax.train(**settings, run_name="own")


def test_a_directory_that_is_no_run_is_left_alone(run, work: Path) -> None:
    (work / "checkpoints/mine").mkdir(parents=True)
    (work / "checkpoints/mine/thesis.txt").write_text("years of work")
    result = run(*TINY, "--run-name", "mine", "--steps", "1")
    assert "contains files that no run writes, such as thesis.txt: " in result.err
    assert (work / "checkpoints/mine/thesis.txt").exists()


@pytest.mark.slow
def test_the_best_step_stands_beside_the_latest(
    run, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation split unlike the rest makes its loss rise; the best step is kept however few are, and generates."""
    (work / "odd.txt").write_text("the king and the queen\n" * 400 + "".join(map(chr, range(33, 127))) * 11)
    flags = ("--data-path", "odd.txt", *TINY[2:], "--steps", "40", "--eval-every", "2", "--ckpt-every", "8")
    assert run(*flags, "--keep-last", "1", "--lr", "1e-2", "--run-name", "wild").code == 0
    losses = {line["step"]: line["validation_loss"] for line in metrics(work, "wild") if "validation_loss" in line}
    best = min(losses, key=lambda at: losses[at])
    assert best < 40
    directory = work / "checkpoints/wild"
    assert (directory / "best_checkpoint.bin").readlink() == Path(f"wild_step{best}.bin")
    assert (directory / "latest_checkpoint.bin").readlink() == Path("wild_step40.bin")
    assert {path.name for path in directory.glob("*_step*.bin")} == {f"wild_step{best}.bin", "wild_step40.bin"}
    for step, shown in (("best", best), ("latest", 40), (str(best), best)):
        flags = ("--run-name", "wild", "--prompt", "the", "--num_tokens", "2", "--step", step)
        result = programs.call("generate", *flags, monkeypatch=monkeypatch, capsys=capsys)
        assert f"wild step {shown} of" in result.err, result.err


@pytest.mark.slow
def test_documents_end_with_a_token_that_ends_generation(
    run, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"body": "the king is dead"})] * 400
    (work / "docs.jsonl").write_text("\n".join(lines))
    flags = ("--data-path", "docs.jsonl", "--text-field", "body", *TINY[2:], "--lr", "1e-2", "--steps", "150")
    assert run(*flags, "--run-name", "docs").code == 0
    config = json.loads((work / "checkpoints/docs/latest_config.json").read_text())
    eos_id = config["data"]["eos_id"]
    assert eos_id == config["model"]["vocab_size"] - 1
    ask = ("--run-name", "docs", "--prompt", "the king", "--num_tokens", "40", "--temp", "0", "--output", "-")
    made = json.loads(programs.call("generate", *ask, monkeypatch=monkeypatch, capsys=capsys).out)
    assert (made["settings"]["eos_id"], made["finish_reason"], made["text"]) == (eos_id, "eos", " is dead")
    made = json.loads(programs.call("generate", *ask, "--eos_id", "-1", monkeypatch=monkeypatch, capsys=capsys).out)
    assert made["finish_reason"] == "length"


@pytest.mark.slow
def test_a_stopped_run_saves_and_says_how_to_go_on(work: Path) -> None:
    """By SIGTERM at no checkpoint's step; resumed, it has the bits of the uninterrupted run."""
    flags = (
        *TINY,
        "--steps",
        "3000",
        "--ckpt-every",
        "1000",
        "--log-every",
        "1",
        "--eval-every",
        "3000",
        "--eval-batches",
        "1",
    )
    with subprocess.Popen(
        programs.command("train", *flags, "--run-name", "part"),
        cwd=work,
        env=programs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = re.search(r"stopped and saved at step (\d+); to resume: .*train (.*) --resume", err)
    assert found is not None
    assert 0 < int(found[1]) < 1000
    resumed = programs.spawn("train", *found[2].split(), "--resume", cwd=work)
    assert resumed.code == 0, resumed.err
    whole = programs.spawn("train", *flags, "--run-name", "whole", cwd=work)
    assert whole.code == 0, whole.err
    weights = [(work / "checkpoints" / name / f"{name}_step3000.bin").read_bytes() for name in ("part", "whole")]
    assert weights[0] == weights[1]
    assert metrics(work, "part") == metrics(work, "whole")


@pytest.mark.slow
def test_an_evaluation_that_a_stop_cuts_short_is_made_when_the_run_goes_on(
    run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop in the evaluation after step 4, in that again, and in the last one: as if it never was."""
    flags = (*TINY, "--lr", "1e-2", "--steps", "8", "--eval-every", "4", "--eval-batches", "3", "--log-every", "1")
    assert run(*flags, "--run-name", "whole").code == 0
    resume: tuple[str, ...] = ()
    for polls, at in ((5, 4), (2, 4), (8, 8)):
        asked = itertools.count(1)
        told = contextlib.nullcontext(lambda asked=asked, polls=polls: next(asked) >= polls)
        with monkeypatch.context() as patch:
            patch.setattr(train_report, "stopping", lambda told=told: told)
            stopped = run(*flags, "--run-name", "part", *resume)
        assert f"stopped and saved at step {at}; to resume:" in stopped.err
        resume = ("--resume",)
    assert len(metrics(work, "part")) == len(metrics(work, "whole")) - 1
    assert "done: hipgpt-generate" in run(*flags, "--run-name", "part", "--resume").err
    assert metrics(work, "part") == metrics(work, "whole")
    for name in ("latest", "best"):
        files = [work / f"checkpoints/{run}/{name}_checkpoint.bin" for run in ("part", "whole")]
        assert files[0].readlink().name == files[1].readlink().name.replace("whole", "part")
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_an_extended_run_says_what_changes(run, work: Path) -> None:
    flags = (*TINY, "--run-name", "more", "--ckpt-every", "2")
    assert run(*flags, "--steps", "4").code == 0
    result = run(*flags, "--steps", "8", "--resume", "--extend")
    assert result.code == 0, result.err
    assert re.search(
        r"extended from 4 to 8 steps: .* after step 4 the learning rate is [\d.e-]+ instead of", result.err
    )
    settings = json.loads((work / "checkpoints/more/settings.json").read_text())
    assert settings["extended"] == [{"at": 4, "from": 4, "to": 8}]
    assert run(*flags, "--steps", "8", "--resume").code == 0


@pytest.mark.slow
def test_longer_runs_compile_no_more(run) -> None:
    """So nothing compiles after the first step, its evaluation and its checkpoint."""
    flags = (*TINY, "--log-every", "1", "--eval-every", "1", "--ckpt-every", "1", "--grad-accum", "2")
    counts = []
    for steps in ("1", "1", "5"):
        with fakes.compilations() as compiled:
            assert run(*flags, "--run-name", f"run{len(counts)}", "--steps", steps).code == 0
        assert compiled.count("jit(train_step)") == 1
        counts.append(len(compiled))
    assert counts[2] == counts[1]


@pytest.mark.slow
def test_samples_of_text_are_shown(run) -> None:
    result = run(*TINY, "--run-name", "tells", "--steps", "4", "--sample-every", "2", "--sample-prompt", "the king")
    assert len(re.findall(r"\[Step [24]\] Sample: 'the king.+'", result.out)) == 2


@pytest.mark.slow
def test_keep_last_goes_by_step_number_and_spares_the_latest(run, work: Path) -> None:
    assert run(*TINY, "--run-name", "few", "--steps", "12", "--ckpt-every", "2", "--keep-last", "2").code == 0
    directory = work / "checkpoints/few"
    kept = {"few_step10.bin", "few_step12.bin", (directory / "best_checkpoint.bin").readlink().name}
    assert {path.name for path in directory.glob("few_step*.bin")} == kept
    assert {path.name for path in directory.glob("few_step*.json")} == {f"{name[:-4]}_config.json" for name in kept}


def test_a_loss_that_is_not_finite_stops_with_the_step(run, work: Path) -> None:
    result = run(*TINY, "--run-name", "wild", "--steps", "9", "--ckpt-every", "1", "--lr", "1e38", "--clip", "1e38")
    assert result.code == 1
    found = re.search(r"train: error: (?:validation )?loss is (?:nan|inf) at step (\d+)", result.err)
    assert found is not None
    assert not list((work / "checkpoints/wild").glob(f"wild_step{found[1]}*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data-path", "nofile.txt"), "data file not found: nofile.txt"),
        (("--data-path", "empty.txt"), "empty.txt is empty: 0 tokens"),
        (("--data-path", "short.txt"), "short.txt is too short: its training split has 1 tokens and needs 17"),
        (
            ("--dim", "130", "--heads", "4"),
            r"--dim must be a multiple of --heads: got 130 and 4, remainder 2. Choose --heads",
        ),
        (("--vocab-size", "255"), "--vocab-size must be at least 256"),
        (("--min-lr", "1"), "--min-lr must be between 0 and --lr"),
        (("--run-name", "a/.."), "must be a plain name"),
        (("--resume",), "nothing to resume"),
        (("--weights-dtype", "int3"), "weights-dtype"),
        (("--device", "tpu"), "device must be one of"),
        (("--grad-accum", "3"), "--grad-accum must divide the batch of 4: got 3"),
        (("--mesh", "data=3"), "mesh data=3 divides the rows of a step by 3: 4 rows"),
        (("--mesh", "data=16"), "mesh data=16 needs 16 devices: JAX has 8"),
        (("--mesh", "rows=2"), "mesh must be such as data=4,model=2"),
        (("--mesh", "model=3"), r"mesh .* divides h_0.attn.c_proj.kernel of shape \(16, 16\) by 3: 16 does not"),
        (("--extend",), "--extend needs --resume"),
        (("--seeds", "0,0"), "--seeds must be different seeds, at least one: got '0,0'"),
        (("--seeds", "0,x"), "--seeds must be an integer of at least 0 .*: got 'x'"),
        (("--seeds", "1", "--seed", "2"), "--seed and --seeds are both given"),
        (("--patience", "-1"), "--patience must be an integer of at least 0"),
        (("--num_processes", "2"), "--coordinator, --num_processes and --process_id go together"),
        (("--tokenizer-path", "none.json"), "tokenizer not found: none.json"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(run, work: Path, arguments: tuple[str, ...], message: str) -> None:
    (work / "empty.txt").write_text("")
    (work / "short.txt").write_text("hi")
    result = run(*(TINY[2:] if "--data-path" in arguments else TINY), "--run-name", "bad", *arguments)
    assert result.code == 1
    assert re.fullmatch(f"train: error: .*{message}.*", result.err.splitlines()[-1])
    assert not (work / "checkpoints").exists()


def test_an_existing_run_is_neither_overwritten_nor_given_other_data(run, work: Path) -> None:
    flags = (*TINY, "--run-name", "mine", "--steps", "2")
    assert run(*flags).code == 0
    before = (work / "checkpoints/mine/mine_step2.bin").read_bytes()
    assert "--resume continues it, --reset replaces it" in run(*flags).err
    assert (
        "was started with --steps 2, and --steps is 3 now: repeat --steps 2, or give --extend"
        in run(*flags, "--resume", "--steps", "3").err
    )
    assert "was started with --steps 2: 1 cannot cut it short" in run(*flags, "--resume", "--steps", "1").err
    assert "learning_rate 0.1 (the run has 0.001)" in run(*flags, "--resume", "--lr", "0.1").err
    for resume in ((), ("--resume",)):
        assert "--vocab-size 310 is not its 300" in run(*flags, *resume, "--vocab-size", "310").err
    (work / "other.txt").write_text(programs.TEXT[::-1])
    other = run(*flags[2:], "--resume", "--data-path", "other.txt").err
    assert re.search("--data-path other.txt .* is not its text text.txt", other)
    assert "none.txt" in run(*flags[2:], "--reset", "--data-path", "none.txt").err
    assert (work / "checkpoints/mine/mine_step2.bin").read_bytes() == before
    assert run(*flags, "--reset", "--seed", "5").code == 0
    assert (work / "checkpoints/mine/mine_step2.bin").read_bytes() != before


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_run_that_opens(work: Path) -> None:
    flags = (*TINY, "--run-name", "killed", "--steps", "4000", "--ckpt-every", "3", "--log-every", "1000")
    for attempt in range(4):
        resume = ("--resume",) if attempt else ()
        command = programs.command("train", *flags, *resume)
        with subprocess.Popen(
            command, cwd=work, env=programs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            deadline = time.monotonic() + 120
            latest = work / "checkpoints/killed/latest_config.json"
            started = latest.readlink() if latest.exists() else None
            while time.monotonic() < deadline and (not latest.exists() or latest.readlink() == started):
                time.sleep(0.005)
            time.sleep(0.037 * (attempt + 1))
            process.send_signal(signal.SIGKILL)
        done = programs.spawn("generate", "--run-name", "killed", "--prompt", "the", "--num_tokens", "2", cwd=work)
        assert done.code == 0, done.err


@pytest.mark.slow
def test_damaged_metrics_are_told_by_their_line(run, work: Path) -> None:
    assert run(*TINY, "--run-name", "a", "--steps", "4", "--log-every", "1").code == 0
    path = work / "checkpoints/a/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"step": ?}\n', *lines[2:]]))
    result = run(*TINY, "--run-name", "a", "--steps", "6", "--log-every", "1", "--resume", "--extend")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("train: error: checkpoints/a/metrics.jsonl line 2 is not JSON: ")
    path.write_text("".join(lines))
    assert run(*TINY, "--run-name", "a", "--steps", "6", "--log-every", "1", "--resume", "--extend").code == 0
    assert [line["step"] for line in metrics(work, "a") if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_run_of_a_newer_version_says_what_is_unknown(
    run, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*TINY, "--run-name", "a", "--steps", "2").code == 0
    config = work / "checkpoints/a/latest_config.json"
    newer = json.loads(config.read_text())
    newer["model"]["rotary"] = True
    config.write_text(json.dumps(newer))
    for name, arguments in (
        ("train", (*TINY, "--run-name", "a", "--steps", "4", "--resume", "--extend")),
        ("generate", ("--run-name", "a", "--prompt", "the")),
    ):
        result = programs.call(name, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert (result.code, result.out) == (1, "")
        assert "does not know model.rotary: the run was made by another" in result.err.splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_leaves_the_run_at_its_last_checkpoint(run, work: Path) -> None:
    """No file may grow beyond 8 KiB, so the weights of 20 KiB find no room, and the process goes on to say so."""
    assert run(*TINY, "--run-name", "a", "--steps", "2").code == 0
    before = {path.name: path.read_bytes() for path in (work / "checkpoints/a").glob("a_step*")}
    latest = (work / "checkpoints/a/latest_checkpoint.bin").readlink()
    longer = programs.command("train", *TINY, "--run-name", "a", "--steps", "4", "--resume", "--extend")
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *longer],
        cwd=work,
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("train: error: "))
    assert re.search(r"the checkpoint of step \d+ could not be written: .*File too large.*--resume", told)
    assert (work / "checkpoints/a/latest_checkpoint.bin").readlink() == latest
    after = {path.name: path.read_bytes() for path in (work / "checkpoints/a").glob("a_step*")}
    assert after == before
    assert run(*TINY, "--run-name", "a", "--steps", "4", "--resume", "--extend").code == 0
