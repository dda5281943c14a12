"""``hipgpt-plot``: the curves of runs as a figure."""

import os
from pathlib import Path

from absl import flags

from hipgpt_jax import files
from hipgpt_jax.cli import outputs, program
from hipgpt_jax.report import curves
from hipgpt_jax.runs import directory

SUMMARY = """Draw the metrics of one or more runs, laid over one another, into a PNG or SVG file. A run is named as
everywhere, or by the path of its directory; one that is still training can be drawn too. Examples:

  hipgpt-plot my_run --output my_run.png
  hipgpt-plot my_run backup/my_run shakespeare --metrics loss,accuracy --smooth 9 --output runs.svg"""

FLAGS = flags.FlagValues()
_RUN_NAME = flags.DEFINE_multi_string(
    "run-name", None, "A run, by its name or its directory; may be given without the flag's name", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "The figure to write, .png or .svg; an older figure is replaced. - writes a PNG to stdout.",
    flag_values=FLAGS,
)
_METRICS = flags.DEFINE_list("metrics", list(curves.METRICS), "The panels, with commas between.", flag_values=FLAGS)
_UNIT = flags.DEFINE_enum(
    "unit",
    None,
    curves.UNITS,
    "Unit of the loss in nats: a byte compares runs with other vocabularies, and is taken if absent "
    "wherever every run was evaluated.",
    flag_values=FLAGS,
)
_SMOOTH = flags.DEFINE_integer(
    "smooth",
    1,
    "Log lines in the running median of the training curves, which stand faint behind it; 1: none.",
    lower_bound=1,
    flag_values=FLAGS,
)
_TITLE = flags.DEFINE_string("title", None, "Above the figure; the name of a single run if absent.", flag_values=FLAGS)


def main() -> None:
    """Runs ``hipgpt-plot``."""
    program.run("plot", SUMMARY, FLAGS, _plot, operand="run-name")


def _plot() -> None:
    words, target = program.required(_RUN_NAME), outputs.path_of(program.required(_OUTPUT))
    metrics = _check_metrics(_METRICS.value)
    try:
        from hipgpt_jax.report import plots
    except ImportError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'hipgpt-jax[plots]'") from error
    if target.suffix.lower() not in plots.SUFFIXES and not (files.is_stream(target) and not target.suffix):
        raise ValueError(f"--output must end in {' or '.join(plots.SUFFIXES)}: got {str(target)!r}")
    outputs.check(
        "output",
        target,
        source=None,
        kind="figure of hipgpt-plot",
        is_ours=lambda path: outputs.begins_with(path, plots.MARKER),
    )
    runs = _read(words)
    unit = curves.choose_unit(runs, _UNIT.value) if "loss" in metrics else "token"
    title = _TITLE.value if _TITLE.value is not None else runs[0].name if len(runs) == 1 else ""
    title = "\n".join(program.printable(line) for line in title.split("\n"))  # SVG allows no control characters
    figure = plots.draw(runs, metrics=metrics, unit=unit, smooth=_SMOOTH.value, title=title)
    plots.save(figure, target)
    program.note(f"{target}: {', '.join(metrics)} of {', '.join(run.name for run in runs)}")


def _check_metrics(metrics: list[str]) -> list[str]:
    for metric in metrics:
        if metric not in curves.METRICS:
            raise ValueError(f"--metrics must be of {', '.join(curves.METRICS)}: got {metric!r}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"--metrics must name each panel once, and at least one: got {','.join(metrics)!r}")
    return metrics


def _read(words: list[str]) -> list[curves.Run]:
    """Reads the runs; those that share a name are told apart as they were given."""
    places = [_find(word) for word in words]
    if len({place.resolve() for place in places}) < len(places):
        raise ValueError(f"--run-name must name each run once: got {', '.join(words)}")
    names = [place.resolve().name for place in places]
    runs = []
    for word, place, name in zip(words, places, names, strict=True):
        path = place / directory.METRICS_NAME
        runs.append(curves.read(path, program.printable(name if names.count(name) == 1 else word)))
        if runs[-1].torn:
            program.note(f"{path}: the last line was cut short and is passed over")
    return runs


def _find(word: str) -> Path:
    """Returns a run's directory, which a run that has no checkpoint yet has too."""
    if os.sep in word or word in (".", ".."):
        if not Path(word).is_dir():
            raise FileNotFoundError(f"directory of a run not found: {word}")
        return Path(word)
    begun = directory.CHECKPOINTS / directory.check_name(word)
    return begun if (begun / directory.METRICS_NAME).is_file() else directory.find(word)


if __name__ == "__main__":
    main()
