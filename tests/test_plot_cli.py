"""``hipgpt-plot``: names of runs, output files and mistakes."""

import fcntl
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import programs
import pytest
from absl import flags

from hipgpt_jax.cli import arguments, plot
from hipgpt_jax.runs import directory

Run = Callable[..., programs.Result]

LOGGED = [{"step": step, "loss": 5.0 - step, "learning_rate": 1e-3} for step in (1, 2, 3)]
SCORED = [{"step": 3, "validation_loss": 5.0, "validation_nats_per_byte": 2.0}]
LINES = "".join(json.dumps(line) + "\n" for line in LOGGED + SCORED)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``hipgpt-plot`` in this process, in a directory with runs."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "checkpoints/own": LINES,  # still training: no checkpoint yet
        "checkpoints/torn": LINES + '{"step": 4, "lo',
        "checkpoints/broken": LINES.replace("}\n", "\n", 1),
        "checkpoints/silent": '{"step": 1, "loss": 2.0}\n',
        "checkpoints/empty": "",
        "backup/own": LINES,
    }
    for place, text in texts.items():
        Path(place).mkdir(parents=True)
        Path(place, directory.METRICS_NAME).write_text(text)
    Path("checkpoints/bare").mkdir()
    return lambda *arguments: programs.call("plot", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_a_run_is_drawn_by_its_name_or_its_directory(call: Run) -> None:
    for words, names in (
        (("shakespeare",), "shakespeare"),
        (("own", "shakespeare"), "own, shakespeare"),
        (("--run-name", "own", "--run_name=shakespeare"), "own, shakespeare"),
        (("--run-name", "own", "shakespeare"), "own, shakespeare"),
        (("backup/own",), "own"),
        (("own", "backup/own"), "own, backup/own"),
        (("./backup/own/", "torn"), "own, torn"),
    ):
        result = call(*words, "--output", "a.svg", "--metrics", "loss,learning_rate")
        assert (result.code, result.out) == (0, ""), result.err
        assert result.err.splitlines()[-1] == f"a.svg: loss, learning_rate of {names}"
        assert Path("a.svg").read_text().startswith("<?xml")
    assert "checkpoints/torn/metrics.jsonl: skipped an incomplete last line" in result.err


def strokes(svg: Path) -> list[np.ndarray]:
    """Returns the curves of an SVG file, each scaled to reach from 0 to 1, as the fonts decide how large a panel is."""
    found = re.findall(r'<path d="(M [^"]+)" clip-path', svg.read_text())
    points = [np.array(re.findall(r"[-.0-9]+", path), float).reshape(-1, 2) for path in found]
    return [(one - one.min(axis=0)) / np.ptp(one, axis=0) for one in points if len(one) > 2]


def test_the_shipped_figure_is_the_programs_own(call: Run) -> None:
    assert call("shakespeare", "--metrics", "loss", "--output", "loss.svg").code == 0
    shipped, drawn = strokes(directory.SHIPPED / "shakespeare/loss.svg"), strokes(Path("loss.svg"))
    assert len(shipped) == len(drawn) == 2
    for one, other in zip(shipped, drawn, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_figure_replaces_an_older_figure_and_nothing_else(call: Run) -> None:
    draw = ("own", "--metrics", "loss", "--output")
    for name, beginning in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        Path(name).touch()
        Path(f"link-{name}").symlink_to(name)
        assert call(*draw, name, "--smooth", "3", "--unit", "token", "--title", "T").code == 0
        assert Path(name).read_bytes().startswith(beginning)
        assert call(*draw, f"link-{name}", "--title", "a longer title").code == 0
        assert Path(f"link-{name}").is_symlink()
        for foreign in (b"thesis", beginning + b"\n drawn by somebody else", b"\0" * 5000 + b"hipgpt-plot"):
            Path(name).write_bytes(foreign)
            for output in (name, f"link-{name}"):
                result = call(*draw, output)
                assert result.code == 1
                assert f"--output {output} exists and is not a figure of hipgpt-plot" in result.err
                assert Path(name).read_bytes() == foreign


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "b.svg"), "--run-name is required"),
        (("own",), "--output is required"),
        (("none", "--output", "b.svg"), r"run 'none' not found in checkpoints/ or the package\. Runs: .*shakespeare"),
        (("bare", "--output", "b.svg"), "run 'bare' in checkpoints/ has no whole checkpoint yet"),
        (("checkpoints/none", "--output", "b.svg"), "directory of a run not found: checkpoints/none"),
        (("checkpoints/bare", "--output", "b.svg"), r"run 'bare' has no metrics: checkpoints/bare/metrics\.jsonl not"),
        (("..x", "--output", "b.svg"), "run name must be a plain name"),
        (("own", "checkpoints/own", "--output", "b.svg"), "--run-name must name each run once: got own, checkpoints/"),
        (("broken", "--output", "b.svg"), r"checkpoints/broken/metrics\.jsonl line 1 is not JSON"),
        (("empty", "--output", "b.svg"), r"checkpoints/empty/metrics\.jsonl has no complete line of metrics yet"),
        (("own", "--output", "b.pdf"), r"--output must end in \.png or \.svg: got 'b\.pdf'"),
        (("own", "--output", "none/b.svg"), "--output none/b.svg cannot be written: there is no directory none"),
        (("own", "--output", "d.svg"), r"--output d\.svg is a directory"),
        (("own", "--output", "b.svg", "--metrics", "loss,los"), "--metrics must be of loss, perplexity, .*: got 'los'"),
        (("own", "--output", "b.svg", "--metrics", "loss,loss"), "--metrics must name each panel once.*'loss,loss'"),
        (
            ("own", "--output", "b.svg", "--metrics", ""),
            "--metrics must name each panel once, and at least one: got ''",
        ),
        (("own", "silent", "--output", "b.svg", "--unit", "byte"), "run 'silent' was not evaluated"),
        (("own", "--output", "b.svg", "--unit", "word"), "--unit must be one of byte, token: got 'word'"),
        (("own", "--output", "b.svg", "--smooth", "0"), "--smooth must be a positive integer: got '0'"),
        (("own", "--output", "b.svg", "--mean"), "--mean needs at least two runs: got own"),
        (("own", "--output", "b.svg", "--frob"), "unknown flag --frob: "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_figure(call: Run, arguments: tuple[str, ...], message: str) -> None:
    Path("d.svg").mkdir()
    result = call(*arguments)
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(f"plot: error: .*{message}.*\n", result.err)
    assert not Path("b.svg").exists()


def test_a_figure_goes_to_pipes(call: Run) -> None:
    for name, beginning in (("pipe", b"\x89PNG"), ("pipe.svg", b"<?xml")):
        os.mkfifo(name)
        reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 2**20)
        result = call("own", "--metrics", "loss", "--output", name)
        assert result.code == 0, result.err
        assert os.read(reader, 2**20).startswith(beginning)
        os.close(reader)
        assert Path(name).is_fifo()


def test_a_title_may_have_characters_that_svg_cannot(call: Run) -> None:
    title = "a\x01\x1b\udcff -->\ntwo"
    assert call("own", "--metrics", "loss", "--output", "a.svg", "--title", title).code == 0
    xml.etree.ElementTree.parse("a.svg")


def test_nats_per_byte_are_needed_for_the_loss_alone(call: Run) -> None:
    result = call("own", "silent", "--output", "a.svg", "--unit", "byte", "--metrics", "learning_rate")
    assert result.code == 0, result.err


def test_without_matplotlib_the_error_has_the_command_that_installs_it(
    call: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hipgpt_jax.report.plots", raising=False)
    monkeypatch.delattr("hipgpt_jax.report.plots", raising=False)
    result = call("own", "--output", "b.svg")
    assert result.code == 1
    assert re.fullmatch(r"plot: error: figures need matplotlib \(.*\): pip install -e '\.\[plots\]'\n", result.err)


def test_help_shows_that_several_runs_may_be_given(call: Run) -> None:
    result = call("--help")
    assert result.code == 0
    assert "usage: hipgpt-plot [RUN-NAME ...] [--flag value" in result.out


def test_an_operand_takes_as_many_words_as_its_flag() -> None:
    values = flags.FlagValues()
    one = flags.DEFINE_string("one", None, "", flag_values=values)
    many = flags.DEFINE_multi_string("many", None, "", flag_values=values)
    assert arguments.parse(values, ["a", "--many", "b", "c"], "many") is None
    assert (one.value, many.value) == (None, ["b", "a", "c"])
    assert arguments.parse(values, ["a"], "many") is None
    assert many.value == ["a"]
    assert arguments.parse(values, ["a"], "one") is None
    assert (one.value, many.value) == ("a", None)
    with pytest.raises(ValueError, match="unexpected argument 'b'"):
        arguments.parse(values, ["a", "b"], "one")
    with pytest.raises(ValueError, match="unexpected argument 'a'"):
        arguments.parse(values, ["--one", "b", "a"], "one")


def test_the_module_runs_as_a_program(call: Run, tmp_path: Path) -> None:
    shutil.copytree("backup/own", "checkpoints/copy")
    done = programs.spawn("plot", "copy", "--output", "a.png", cwd=tmp_path, cache=tmp_path / "cache")
    assert (done.code, done.out) == (0, ""), done.err
    assert Path("a.png").is_file()
    assert plot.FLAGS["run-name"].value is None
