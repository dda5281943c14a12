"""Figures of training: one panel a metric, the runs laid over one another."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
from matplotlib import patheffects, ticker

from hipgpt_jax import files
from hipgpt_jax.report import curves

SUFFIXES = (".png", ".svg")
MARKER = b"hipgpt-plot"
"""Identifies a figure of this package: in its metadata, near its beginning."""

# Paul Tol's "bright" scheme, told apart with every kind of colour vision; a seventh run begins it anew, dashed.
# References: Tol, Colour Schemes, SRON technical note 09-002, 2021.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)))
_INK, _GREY = "#333333", "#8c8c8c"
_LABEL_POINTS = 8.5
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#b0b0b0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a run's name is one
    "svg.hashsalt": "hipgpt_jax",  # ids in the file are the same each time
}
_TITLES = {
    "perplexity": "Perplexity of a token",
    "accuracy": "Accuracy, % of tokens",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens a second",
}
_FORMATS = {"loss": "{:.3f}", "perplexity": "{:.3g}", "accuracy": "{:.1f}"}


def draw(
    runs: Sequence[curves.Run], *, metrics: Sequence[str], unit: str, smooth: int = 1, title: str = ""
) -> mpl_figure.Figure:
    """Draws runs into one figure.

    Training is a thin line, validation a stronger one with a point an evaluation and its last value beside it.

    Args:
        runs: At least one; each takes a colour.
        metrics: The panels, of ``curves.METRICS``. The first of an odd number is twice as wide.
        unit: Of the loss, ``byte`` or ``token``.
        smooth: Log lines in the running median of a training curve, whose raw values stand faint behind
            it; 1 draws the raw values alone. The learning rate has no noise and stays as it is.
        title: Above the figure; none if empty.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = mpl_figure.Figure(layout="constrained")
        panels = dict(zip(metrics, _grid(figure, len(metrics)), strict=True))
        for metric, panel in panels.items():
            _draw_panel(panel, metric, runs, unit, smooth)
        _add_legend(figure, runs, any(run.validation(metric, unit).steps for run in runs for metric in metrics))
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
        figure.draw_without_rendering()  # the labels need to know where the points came to lie
        for metric, panel in panels.items():
            _label_ends(panel, metric, runs, unit)
    return figure


def save(figure: mpl_figure.Figure, path: Path) -> None:
    """Writes a figure in one atomic replacement: PNG at 150 dpi, or SVG without a date if the name ends in ``.svg``.

    If ``path`` is a link, its target is replaced. Pipes and devices are written to.
    """
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    metadata = {"Creator": MARKER.decode(), "Date": None} if kind == "svg" else {"Software": MARKER.decode()}

    def write(target: Path | BinaryIO) -> None:
        with matplotlib.rc_context(_STYLE):
            figure.savefig(target, format=kind, dpi=150, metadata=metadata)

    if files.is_stream(path):
        content = io.BytesIO()  # Pillow seeks
        write(content)
        with files.writing_stream(path) as file:
            file.write(content.getvalue())
        return
    with files.replacing(path.resolve()) as temporary:
        write(temporary)


def median(values: Sequence[float], width: int) -> list[float]:
    """Returns the running median over ``width`` values, one more where that is even, so that it lies in their middle.

    Near the start it takes as many values before as after, so that a steep start is not cut; near the end
    it goes on with those there are.
    """
    reaches = (min(width // 2, i) for i in range(len(values)))
    return [statistics.median(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


def _grid(figure: mpl_figure.Figure, count: int) -> list[mpl_axes.Axes]:
    """Two panels a row; an odd one out comes first and takes a row of its own."""
    rows = (count + 1) // 2
    figure.set_size_inches((7.0, 3.4) if count == 1 else (8.0, 0.6 + 2.35 * rows))
    grid = figure.add_gridspec(rows, 2)
    wide = [figure.add_subplot(grid[0, :])] if count % 2 else []
    return wide + [figure.add_subplot(grid[i // 2, i % 2]) for i in range(2 * len(wide), count + len(wide))]


def _draw_panel(panel: mpl_axes.Axes, metric: str, runs: Sequence[curves.Run], unit: str, smooth: int) -> None:
    for number, run in enumerate(runs):
        colour, dash = _look(number)
        training, validation = (_scaled(metric, split(metric, unit)) for split in (run.training, run.validation))
        smoothed = smooth > 1 and metric != "learning_rate"
        if smoothed:
            _stroke(panel, training, color=colour, linewidth=0.8, alpha=0.25)
            training = training._replace(values=tuple(median(training.values, smooth)))
        alpha = 1.0 if smoothed or not validation.steps else 0.55
        width = 1.1 if validation.steps else 1.4
        _stroke(panel, training, color=colour, linewidth=width, alpha=alpha, linestyle=dash)
        _stroke(panel, validation, color=colour, linewidth=1.8, marker="o", markersize=3.5, linestyle=dash)
    panel.set_title(f"Loss, nats a {unit}" if metric == "loss" else _TITLES[metric])
    _dress_axes(panel, metric, last_step=max(curve.steps[-1] for run in runs for curve in run.curves.values()))


def _stroke(panel: mpl_axes.Axes, curve: curves.Curve, **look: Any) -> None:
    if curve.steps:
        panel.plot(curve.steps, curve.values, **look)


def _dress_axes(panel: mpl_axes.Axes, metric: str, last_step: int) -> None:
    subplot = panel.get_subplotspec()
    assert subplot is not None, "_grid makes every panel"
    wide = len(subplot.colspan) > 1
    panel.set_xlim(0, max(1, last_step) * (1.08 if wide else 1.17))  # room for the label of the last value
    panel.xaxis.set_major_locator(ticker.MaxNLocator(8 if wide else 5, steps=[1, 2, 5, 10], integer=True))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    if subplot.is_last_row():
        panel.set_xlabel("step")
    if not panel.has_data():
        panel.text(0.5, 0.5, "no values", transform=panel.transAxes, ha="center", color=_GREY)
        panel.set_yticks([])
    elif metric == "perplexity":
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_formatter("{x:,.6g}")
    elif metric == "learning_rate":
        panel.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylim(bottom=0)
    elif metric == "tokens_per_second":
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.set_ylim(bottom=0)


def _scaled(metric: str, curve: curves.Curve) -> curves.Curve:
    """The values as they are drawn; a perplexity near the largest float, of a run that diverged, leaves no margin."""
    if metric == "accuracy":
        return curve._replace(values=tuple(100 * value for value in curve.values))
    return curve._replace(values=tuple(min(value, 1e100) for value in curve.values))


def _look(number: int) -> tuple[str, Any]:
    """Colour and dashes of a run."""
    return _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]


def _add_legend(figure: mpl_figure.Figure, runs: Sequence[curves.Run], validated: bool) -> None:
    """Colours are runs, where there are several; strokes are the two splits, where both are there."""
    entries: dict[str, mpl_lines.Line2D] = {}
    plain = _look(0)[0] if len(runs) == 1 else _GREY
    if len(runs) > 1:
        for number, run in enumerate(runs):
            colour, dash = _look(number)
            entries[run.name] = mpl_lines.Line2D([], [], color=colour, linewidth=1.8, linestyle=dash)
    if validated:
        entries["training"] = mpl_lines.Line2D([], [], color=plain, linewidth=1.1, alpha=0.55)
        entries["validation"] = mpl_lines.Line2D([], [], color=plain, linewidth=1.8, marker="o", markersize=3.5)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=4, handlelength=2.2)


def _label_ends(panel: mpl_axes.Axes, metric: str, runs: Sequence[curves.Run], unit: str) -> None:
    """Writes the last validation values beside their points, moved apart where they would overlap.

    A run that ended before another has its label above the point, off the other's curve.
    """
    ends = []
    for number, run in enumerate(runs):
        if (curve := _scaled(metric, run.validation(metric, unit))).steps:
            end = (curve.steps[-1], curve.values[-1])
            left, height = panel.transData.transform(end) * 72 / panel.figure.dpi
            ends.append((height, left, end, _look(number)[0]))
    last = max((end[0] for _, _, end, _ in ends), default=0)
    placed: list[tuple[float, float]] = []
    for height, left, end, colour in sorted(ends):
        early = end[0] < last
        beside = [place for other, place in placed if abs(other - left) < 4 * _LABEL_POINTS]
        place = max([height + _LABEL_POINTS * early, *(below + 1.1 * _LABEL_POINTS for below in beside)])
        placed.append((left, place))
        panel.annotate(
            _FORMATS[metric].format(end[1]),
            end,
            xytext=(0 if early else 6, place - height),
            textcoords="offset points",
            ha="center" if early else "left",
            va="center",
            color=colour,
            fontsize=_LABEL_POINTS,
            fontweight="bold",
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
        ).set_in_layout(False)
