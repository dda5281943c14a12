"""Figures of training metrics: one panel per metric, with the curves of all runs."""

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
from matplotlib import ticker

from hipgpt_jax import files
from hipgpt_jax.report import curves

SUFFIXES = (".png", ".svg")
MARKER = b"hipgpt-plot"
"""Identifies a figure of this package, in the metadata at its beginning."""

# Paul Tol's "bright" scheme, safe for all kinds of colour vision; the seventh run starts again with dashed lines.
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
    "text.parse_math": False,  # a run's name may contain dollar signs
    "svg.hashsalt": "hipgpt_jax",  # deterministic ids
}
_TITLES = {
    "perplexity": "Perplexity per token",
    "accuracy": "Accuracy, % of tokens",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens/s",
}
_FORMATS = {"loss": "{:.3f}", "perplexity": "{:.3g}", "accuracy": "{:.1f}"}


def draw(
    runs: Sequence[curves.Run], *, metrics: Sequence[str], unit: str, smooth: int = 1, title: str = ""
) -> mpl_figure.Figure:
    """Draws the metrics of runs.

    Training is a thin line. Validation is a thick line with a point per evaluation and its last value as a label.

    Args:
        runs: At least one; each has a colour.
        metrics: The panels, from ``curves.METRICS``. The first of an odd number is twice as wide.
        unit: Unit of the loss, ``byte`` or ``token``.
        smooth: Window of the running median of the training curves, in log lines; the raw values stay as a faint line.
            1 draws only the raw values. The learning rate is never smoothed.
        title: Title of the figure; none if empty.
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
        figure.draw_without_rendering()  # the labels need the final positions of the axes
        for metric, panel in panels.items():
            _label_last_values(panel, metric, runs, unit)
    return figure


def save(figure: mpl_figure.Figure, path: Path) -> None:
    """Writes a figure atomically: as SVG without a date if the name ends in ``.svg``, else as PNG at 150 dpi.

    The target of a link is replaced, not the link. Pipes and devices are written to.
    """
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    metadata = {"Creator": MARKER.decode(), "Date": None} if kind == "svg" else {"Software": MARKER.decode()}

    def write(target: Path | BinaryIO) -> None:
        with matplotlib.rc_context(_STYLE):
            figure.savefig(target, format=kind, dpi=150, metadata=metadata)

    if files.is_stream(path):
        content = io.BytesIO()  # a pipe cannot seek, as Pillow does
        write(content)
        with files.writing_stream(path) as file:
            file.write(content.getvalue())
        return
    with files.replacing(path.resolve()) as temporary:
        write(temporary)


def median(values: Sequence[float], width: int) -> list[float]:
    """Returns the running median over a centred window of ``width`` values, one more if ``width`` is even.

    Near the start the window shrinks on both sides, so that a steep start is kept; near the end it is cut off.
    """
    reaches = (min(width // 2, i) for i in range(len(values)))
    return [statistics.median(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


def _grid(figure: mpl_figure.Figure, count: int) -> list[mpl_axes.Axes]:
    """Returns the axes, two per row; the first of an odd number fills a row."""
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
        _shade(panel, validation, _scaled(metric, run.validation_deviation(metric, unit)), colour)
    panel.set_title(f"Loss, nats per {unit}" if metric == "loss" else _TITLES[metric])
    _dress_axes(panel, metric, last_step=max(curve.steps[-1] for run in runs for curve in run.curves.values()))


def _stroke(panel: mpl_axes.Axes, curve: curves.Curve, **look: Any) -> None:
    if curve.steps:
        panel.plot(curve.steps, curve.values, **look)


def _shade(panel: mpl_axes.Axes, curve: curves.Curve, deviation: curves.Curve, colour: str) -> None:
    """Fills the band of one standard deviation around a mean."""
    if deviation.steps:
        pairs = list(zip(curve.values, deviation.values, strict=True))
        bounds = ([value - own for value, own in pairs], [value + own for value, own in pairs])
        panel.fill_between(curve.steps, *bounds, color=colour, alpha=0.2, linewidth=0)


def _dress_axes(panel: mpl_axes.Axes, metric: str, last_step: int) -> None:
    subplot = panel.get_subplotspec()
    assert subplot is not None, "_grid makes every panel"
    wide = len(subplot.colspan) > 1
    panel.set_xlim(0, max(1, last_step) * (1.08 if wide else 1.17))  # room for the labels
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
    """Returns the values to draw. A diverged run's perplexity may be near the largest float: axis limits overflow."""
    if metric == "accuracy":
        return curve._replace(values=tuple(100 * value for value in curve.values))
    return curve._replace(values=tuple(min(value, 1e100) for value in curve.values))


def _look(number: int) -> tuple[str, Any]:
    """Returns the colour and the dashes of a run."""
    return _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]


def _add_legend(figure: mpl_figure.Figure, runs: Sequence[curves.Run], validated: bool) -> None:
    """Adds the colours of the runs, if there are several, and the strokes of the two splits, if there are both."""
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


def _label_last_values(panel: mpl_axes.Axes, metric: str, runs: Sequence[curves.Run], unit: str) -> None:
    """Writes the last validation value of each run at the right edge, moved up where labels would overlap."""
    found = (_scaled(metric, run.validation(metric, unit)) for run in runs)
    ends = sorted((curve.values[-1], number) for number, curve in enumerate(found) if curve.steps)
    label_height = -math.inf
    for value, number in ends:
        height = panel.transData.transform((0, value))[1] * 72 / panel.figure.dpi
        label_height = max(height, label_height + 1.1 * _LABEL_POINTS)
        panel.annotate(
            _FORMATS[metric].format(value),
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, label_height - height),
            textcoords="offset points",
            ha="right",
            va="center",
            color=_look(number)[0],
            fontsize=_LABEL_POINTS,
            fontweight="bold",
        ).set_in_layout(False)
