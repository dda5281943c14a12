"""``hipgpt-plot``: training curves of runs as a figure."""

import functools
from pathlib import Path

import absl.flags

from hipgpt_jax import files
from hipgpt_jax.cli import output, program
from hipgpt_jax.report import curves
from hipgpt_jax.runs import directory

SUMMARY = """Plot the metrics of one or more runs into a PNG or SVG file. A run is given by its name or the path of its
directory, and may still be training. Examples:

  hipgpt-plot my_run --output my_run.png
  hipgpt-plot my_run backup/my_run shakespeare --metrics loss,accuracy --smooth 9 --output runs.svg
  hipgpt-plot my_run_seed0 my_run_seed1 my_run_seed2 --mean --output mean.svg"""

FLAGS = absl.flags.FlagValues()
_string = functools.partial(absl.flags.DEFINE_string, flag_values=FLAGS)
_RUN_NAME = absl.flags.DEFINE_multi_string(
    "run-name", None, "A run, by name or directory; the flag's name may be omitted.", flag_values=FLAGS
)
_OUTPUT = _string(
    "output", None, "The figure to write, .png or .svg; an existing figure is replaced. - writes a PNG to stdout."
)
_METRICS = absl.flags.DEFINE_list(
    "metrics", list(curves.METRICS), "The panels, separated by commas.", flag_values=FLAGS
)
_UNIT = absl.flags.DEFINE_enum(
    "unit",
    None,
    curves.UNITS,
    "Unit of the loss: nats per byte, comparable between vocabularies, or nats per token. If absent, byte if all runs "
    "were evaluated, else token.",
    flag_values=FLAGS,
)
_SMOOTH = absl.flags.DEFINE_integer(
    "smooth",
    1,
    "Window of a running median of the training curves, in log lines; 1: none.",
    lower_bound=1,
    flag_values=FLAGS,
)
_MEAN = absl.flags.DEFINE_boolean(
    "mean", False, "Draw the mean of the runs and a band of one standard deviation.", flag_values=FLAGS
)
_TITLE = _string("title", None, "Title of the figure; the name of a single run if absent.")


def main() -> None:
    """Runs ``hipgpt-plot``."""
    program.run("plot", SUMMARY, FLAGS, _plot, operand="run-name")


def _plot() -> None:
    words, target = program.required(_RUN_NAME), output.path_of(program.required(_OUTPUT))
    metrics = _check_metrics(_METRICS.value)
    try:
        from hipgpt_jax.report import plots
    except ImportError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install -e '.[plots]'") from error
    if target.suffix.lower() not in plots.SUFFIXES and not (files.is_stream(target) and not target.suffix):
        raise ValueError(f"--output must end in {' or '.join(plots.SUFFIXES)}: got {str(target)!r}")
    output.check(
        "output",
        target,
        source=None,
        kind="figure of hipgpt-plot",
        is_ours=lambda path: output.begins_with(path, plots.MARKER),
    )
    runs = _read(words)
    unit = curves.choose_unit(runs, _UNIT.value) if "loss" in metrics or _MEAN.value else "token"
    names = ", ".join(run.name for run in runs)
    if _MEAN.value:
        if len(runs) < 2:
            raise ValueError(f"--mean needs at least two runs: got {names}")
        runs = [curves.mean(runs, f"mean of {len(runs)} runs")]
        program.note(_last_loss(runs[0], unit))
    title = _TITLE.value if _TITLE.value is not None else runs[0].name if len(runs) == 1 else ""
    title = "\n".join(program.printable(line) for line in title.split("\n"))  # SVG allows no control characters
    figure = plots.draw(runs, metrics=metrics, unit=unit, smooth=_SMOOTH.value, title=title)
    plots.save(figure, target)
    program.note(f"{target}: {', '.join(metrics)} of {names}")


def _last_loss(mean: curves.Run, unit: str) -> str:
    losses, deviations = mean.validation("loss", unit), mean.validation_deviation("loss", unit)
    if not losses.steps:
        return f"{mean.name}: no evaluation at a step of all"
    return (
        f"{mean.name}: validation loss {losses.values[-1]:.4f} ± {deviations.values[-1]:.4f} nats per {unit} at step "
        f"{losses.steps[-1]} (mean ± standard deviation)"
    )


def _check_metrics(metrics: list[str]) -> list[str]:
    for metric in metrics:
        if metric not in curves.METRICS:
            raise ValueError(f"--metrics must be of {', '.join(curves.METRICS)}: got {metric!r}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"--metrics must name each panel once, and at least one: got {','.join(metrics)!r}")
    return metrics


def _read(words: list[str]) -> list[curves.Run]:
    """Reads the runs; those with equal names are labelled as they were given."""
    directories = [_find(word) for word in words]
    if len({one.resolve() for one in directories}) < len(directories):
        raise ValueError(f"--run-name must name each run once: got {', '.join(words)}")
    names = [one.resolve().name for one in directories]
    runs = []
    for word, run_directory, name in zip(words, directories, names, strict=True):
        path = run_directory / directory.METRICS_NAME
        runs.append(curves.read(path, program.printable(name if names.count(name) == 1 else word)))
        if runs[-1].is_torn:
            program.note(f"{path}: skipped an incomplete last line")
    return runs


def _find(word: str) -> Path:
    """Returns the directory of a run, which may have no checkpoint yet."""
    if directory.is_path(word):
        if not Path(word).is_dir():
            raise FileNotFoundError(f"directory of a run not found: {word}")
        return Path(word)
    started = directory.CHECKPOINTS / directory.check_name(word)
    return started if (started / directory.METRICS_NAME).is_file() else directory.find(word)


if __name__ == "__main__":
    main()
