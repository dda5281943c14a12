"""Curves of runs and their figure."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import axes as mpl_axes
from matplotlib import colors, image
from matplotlib import figure as mpl_figure
from matplotlib import text as mpl_text

from hipgpt_jax.report import curves, plots
from hipgpt_jax.runs import directory

SHAKESPEARE = directory.SHIPPED / "shakespeare" / directory.METRICS_NAME

LINES: list[dict[str, Any]] = [
    {"step": 10, "loss": 4.0, "perplexity": 54.6, "accuracy": 0.1, "learning_rate": 1e-3, "tokens_per_second": 900.0},
    {"step": 20, "loss": 3.0, "perplexity": 20.1, "accuracy": 0.2, "learning_rate": 2e-3, "tokens_per_second": 950.0},
    {
        "step": 20,
        "validation_loss": 3.2,
        "validation_nats_per_byte": 1.6,
        "validation_perplexity": 24.5,
        "validation_accuracy": 0.15,
        "validation_tokens": 7,
    },
    {"step": 30, "loss": 2.0, "perplexity": 7.4, "accuracy": 0.3, "learning_rate": 1e-3, "tokens_per_second": 100.0},
]


def write(path: Path, lines: Sequence[dict[str, Any]], end: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


@pytest.fixture
def run(tmp_path: Path) -> curves.Run:
    """A run of three log lines and one evaluation, of half a token per byte."""
    return curves.read(write(tmp_path / "metrics.jsonl", LINES), "tiny")


def drawn(panel: mpl_axes.Axes) -> list[tuple[list[float], ...]]:
    """Returns the steps and values of the lines of a panel."""
    return [tuple(np.asarray(data).tolist() for data in line.get_data()) for line in panel.get_lines()]


def labels(panel: mpl_axes.Axes) -> list[str]:
    return [text.get_text() for text in panel.texts]


def legend(figure: mpl_figure.Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_the_values_are_those_of_the_lines(run: curves.Run) -> None:
    assert run.training("loss", "token") == ((10, 20, 30), (4.0, 3.0, 2.0))
    assert run.validation("loss", "token") == ((20,), (3.2,))
    assert run.training("loss", "byte") == ((10, 20, 30), (2.0, 1.5, 1.0))
    assert run.validation("loss", "byte") == ((20,), (1.6,))
    assert run.training("learning_rate", "byte").values == (1e-3, 2e-3, 1e-3)
    assert run.validation("learning_rate", "byte") == ((), ())


def test_nats_per_byte_are_the_unit_if_all_runs_were_evaluated(run: curves.Run, tmp_path: Path) -> None:
    silent = curves.read(write(tmp_path / "b.jsonl", [LINES[0]]), "silent")
    assert curves.choose_unit([run, run], None) == "byte"
    assert curves.choose_unit([run, silent], None) == "token"
    assert curves.choose_unit([run], "token") == "token"
    with pytest.raises(ValueError, match=r"run 'silent' was not evaluated, .*\(--unit token\)"):
        curves.choose_unit([run, silent], "byte")


def test_the_shipped_run_has_the_loss_of_its_readme() -> None:
    shipped = curves.read(SHAKESPEARE, "shakespeare")
    assert round(shipped.validation("loss", "byte").values[-1], 3) == 1.494
    assert len(shipped.training("loss", "byte").steps) == 40


def test_a_torn_last_line_is_skipped(tmp_path: Path) -> None:
    torn = curves.read(write(tmp_path / "a.jsonl", LINES[:2], end='{"step": 30, "loss": 2.'), "a")
    assert torn.training("loss", "token").steps == (10, 20)
    assert torn.is_torn
    assert not curves.read(write(tmp_path / "b.jsonl", LINES[:2]), "b").is_torn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 2}\n{"step": 2, "lo\n{"step": 3, "loss": 2}\n', " line 2 is not JSON: "),
        ('{"loss": 2}\n{"step": 3}\n', " line 1 is not a valid line of metrics: .* has no 'step'"),
        ('{"step": 1, "loss": 2}\n[1]\n', " line 2 is not a valid line of metrics: "),
        ('{"step": true, "loss": 2}\n', r" line 1 is not a valid line of metrics: .*step must be integer"),
        ('{"step": 1, "loss": "2"}\n', r" line 1 is not a valid line of metrics: .*loss must be number"),
        ('{"step": 1, "loss": NaN}\n', " line 1 is not JSON: NaN is not a JSON number"),
        ('{"step": 1, "loss": 1e999}\n', " line 1 is not JSON: the number 1e999 is too large"),
        ('{"step": 2, "loss": 2}\n{"step": 1, "loss": 2}\n', " line 2: loss of step 1 follows step 2"),
        ('{"step": 2, "loss": 2}\n{"step": 2, "loss": 2}\n', " line 2: loss of step 2 follows step 2"),
        ("\n\n", " has no complete line of metrics yet"),
        ("", " has no complete line of metrics yet"),
        ('{"step": 1, "lo', " has no complete line of metrics yet"),
        ('{"step": 1}\n', " has no complete line of metrics yet"),
    ],
)
def test_an_invalid_file_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        curves.read(path, "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run 'a' has no metrics: .*metrics\.jsonl not found"):
        curves.read(tmp_path / "metrics.jsonl", "a")


def test_each_metric_has_a_panel_with_training_and_validation(run: curves.Run) -> None:
    figure = plots.draw([run], metrics=curves.METRICS, unit="byte", title="My $1$ run")
    panels = dict(zip(curves.METRICS, figure.axes, strict=True))
    assert drawn(panels["loss"]) == [([10, 20, 30], [2.0, 1.5, 1.0]), ([20], [1.6])]
    assert drawn(panels["perplexity"]) == [([10, 20, 30], [54.6, 20.1, 7.4]), ([20], [24.5])]
    assert drawn(panels["accuracy"]) == [([10, 20, 30], [10, 20, 30]), ([20], [15])]
    assert drawn(panels["learning_rate"]) == [([10, 20, 30], [1e-3, 2e-3, 1e-3])]
    assert drawn(panels["tokens_per_second"]) == [([10, 20, 30], [900, 950, 100])]
    assert [labels(panel) for panel in figure.axes] == [["1.600"], ["24.5"], ["15.0"], [], []]
    assert [panel.get_title("left") for panel in figure.axes][:2] == ["Loss, nats per byte", "Perplexity per token"]
    assert legend(figure) == ["training", "validation"]
    assert figure.get_suptitle() == "My $1$ run"
    assert not any(text.get_parse_math() for text in figure.findobj(mpl_text.Text))  # dollars are no formula


def test_the_loss_is_in_the_given_unit(run: curves.Run) -> None:
    (panel,) = plots.draw([run], metrics=["loss"], unit="token").axes
    assert panel.get_title("left") == "Loss, nats per token"
    assert drawn(panel) == [([10, 20, 30], [4, 3, 2]), ([20], [3.2])]
    assert labels(panel) == ["3.200"]


def test_runs_differ_by_colour_and_then_by_dashes(run: curves.Run) -> None:
    runs = [curves.Run(name=f"_{i}$", curves=run.curves) for i in range(8)]
    figure = plots.draw(runs, metrics=["loss"], unit="byte")
    assert legend(figure) == [*(one.name for one in runs), "training", "validation"]
    lines = figure.axes[0].get_lines()[1::2]
    looks = {(colors.to_hex(line.get_color()), line.get_linestyle()) for line in lines}
    assert len(lines) == len(looks) == 8


def test_labels_of_runs_that_end_alike_do_not_overlap(run: curves.Run) -> None:
    runs = [run, curves.Run(name="b", curves={**run.curves, "validation_loss": curves.Curve((20,), (3.201,))})]
    figure = plots.draw(runs, metrics=["loss"], unit="token")
    figure.draw_without_rendering()
    first, second = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert first.y1 <= second.y0 + 1
    assert sorted(labels(figure.axes[0])) == ["3.200", "3.201"]


def test_a_run_without_evaluation_has_its_training_alone(tmp_path: Path) -> None:
    alone = curves.read(write(tmp_path / "a.jsonl", LINES[:2]), "a")
    figure = plots.draw([alone], metrics=["loss", "accuracy", "learning_rate"], unit="token")
    assert [len(drawn(panel)) for panel in figure.axes] == [1, 1, 1]
    assert [labels(panel) for panel in figure.axes] == [[], [], []]
    assert legend(figure) == []


def test_a_metric_without_values_is_marked(tmp_path: Path) -> None:
    bare = curves.read(write(tmp_path / "a.jsonl", [{"step": 1, "loss": 2.0}]), "a")
    figure = plots.draw([bare], metrics=curves.METRICS, unit="token")
    assert [labels(panel) for panel in figure.axes] == [[], *[["no values"]] * 4]


@pytest.mark.parametrize("values", [(20.5, 24.0), (3.0, 3.0), (1.0, 1e304)])
def test_perplexity_has_ticks_however_narrow_or_wide_it_is(tmp_path: Path, values: tuple[float, float]) -> None:
    lines = [{"step": step, "perplexity": value} for step, value in enumerate(values)]
    run = curves.read(write(tmp_path / "a.jsonl", lines), "a")
    (panel,) = plots.draw([run], metrics=["perplexity"], unit="token").axes
    low, high = panel.get_ylim()
    shown = [tick.get_text() for tick in panel.get_yticklabels() if low <= tick.get_position()[1] <= high]
    assert 1 <= len(shown) < 20
    assert max(map(len, shown)) < 10


def test_smoothing_leaves_the_raw_curve_behind_and_the_learning_rate_alone(run: curves.Run) -> None:
    loss, speed, rate = plots.draw(
        [run], metrics=["loss", "tokens_per_second", "learning_rate"], unit="token", smooth=3
    ).axes
    assert drawn(loss) == [([10, 20, 30], [4, 3, 2]), ([10, 20, 30], [4, 3, 2.5]), ([20], [3.2])]
    assert drawn(speed) == [([10, 20, 30], [900, 950, 100]), ([10, 20, 30], [900, 900, 525])]
    assert len(drawn(rate)) == 1
    raw, smoothed = loss.get_lines()[:2]
    assert (raw.get_alpha() or 1) < (smoothed.get_alpha() or 1)


def test_a_running_median_ignores_a_spike() -> None:
    assert plots.median([9, 1, 1, 50, 1, 2, 3], 3) == [9, 1, 1, 1, 2, 2, 2.5]
    assert plots.median([9, 1, 5], 1) == [9, 1, 5]
    assert plots.median([9, 1, 1, 50, 1, 2, 3], 2) == plots.median([9, 1, 1, 50, 1, 2, 3], 3)
    assert plots.median([1, 2], 99) == [1, 1.5]


@pytest.mark.slow
def test_the_files_are_the_same_each_time(run: curves.Run, tmp_path: Path) -> None:
    for suffix in plots.SUFFIXES:
        made = []
        for i in range(2):
            plots.save(plots.draw([run], metrics=curves.METRICS, unit="byte"), tmp_path / f"{i}{suffix}")
            made.append((tmp_path / f"{i}{suffix}").read_bytes())
        assert made[0] == made[1]
    svg = (tmp_path / "0.svg").read_text()
    assert "<svg" in svg
    assert "<dc:date>" not in svg
    figure = plots.draw([run], metrics=["loss"], unit="byte")
    plots.save(figure, tmp_path / "a.PNG")
    height, width = image.imread(tmp_path / "a.PNG").shape[:2]
    assert (width, height) == tuple(round(150 * inches) for inches in figure.get_size_inches())


def test_an_older_figure_stays_whole_when_the_new_one_fails(
    run: curves.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.svg").write_text("old")
    figure = plots.draw([run], metrics=["loss"], unit="byte")

    def fail(target: Path, **_: Any) -> None:
        target.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, tmp_path / "a.svg")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == ["a.svg"]
    assert (tmp_path / "a.svg").read_text() == "old"


def test_a_link_stays_a_link(run: curves.Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.svg").symlink_to("elsewhere/b.svg")
    plots.save(plots.draw([run], metrics=["loss"], unit="byte"), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").is_symlink()
    assert (tmp_path / "elsewhere/b.svg").read_text().startswith("<?xml")


def test_a_mean_has_the_steps_of_all_runs_and_their_standard_deviation() -> None:
    losses = {"a": (2.0, 1.0, 0.5), "b": (4.0, 3.0)}
    key = "validation_nats_per_byte"
    runs = [
        curves.Run(name=name, curves={key: curves.Curve((10, 20, 30)[: len(values)], values)})
        for name, values in losses.items()
    ]
    mean = curves.mean(runs, "mean")
    assert mean.validation("loss", "byte") == ((10, 20), (3.0, 2.0))
    assert mean.validation_deviation("loss", "byte") == ((10, 20), pytest.approx((2**0.5, 2**0.5)))
    figure = plots.draw([mean], metrics=["loss"], unit="byte")
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((10, 2 - 2**0.5, 10, 1 + 2 * 2**0.5))
    apart = curves.Run(name="c", curves={key: curves.Curve((5,), (1.0,))})
    with pytest.raises(ValueError, match="a, c have no logged step in common: no mean can be drawn"):
        curves.mean([runs[0], apart], "mean")
