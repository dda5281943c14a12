"""Training curves of a run, read from its ``metrics.jsonl``."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hipgpt_jax import json_files

METRICS = ("loss", "perplexity", "accuracy", "learning_rate", "tokens_per_second")
UNITS = ("byte", "token")

_NATS_PER_BYTE = "validation_nats_per_byte"
_KEYS = (*METRICS, "validation_loss", "validation_perplexity", "validation_accuracy", _NATS_PER_BYTE)
_SCHEMA = json_files.Schema(
    "line of metrics",
    {
        "type": "object",
        "required": ["step"],
        "properties": {"step": {"type": "integer"}, **{key: {"type": "number"} for key in _KEYS}},
    },
)


class Curve(NamedTuple):
    """Values of a quantity at ascending steps."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Metrics of a run, or the mean of several.

    Attributes:
        name: Name of the run in a figure.
        curves: Curves by key; absent keys have no values.
        is_torn: Whether an incomplete last line was skipped.
        deviations: Standard deviation of each curve of a mean.
    """

    name: str
    curves: dict[str, Curve]
    is_torn: bool = False
    deviations: Mapping[str, Curve] = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens per byte of the validation text, from the last evaluation; None if there is none."""
        losses, rates = self._curve("validation_loss"), self._curve(_NATS_PER_BYTE)
        if not rates.steps or losses.steps != rates.steps or losses.values[-1] <= 0:
            return None
        return rates.values[-1] / losses.values[-1]

    def training(self, metric: str, unit: str) -> Curve:
        """Returns one of ``METRICS`` on the training batches; a loss is in nats per ``unit``."""
        curve = self._curve(metric)
        if (metric, unit) != ("loss", "byte"):
            return curve
        scale = self.tokens_per_byte
        return Curve() if scale is None else curve._replace(values=tuple(scale * value for value in curve.values))

    def validation(self, metric: str, unit: str) -> Curve:
        """Returns one of ``METRICS`` on the validation split; a loss is in nats per ``unit``."""
        return self._curve(_validation_key(metric, unit))

    def validation_deviation(self, metric: str, unit: str) -> Curve:
        """Returns the standard deviation of ``validation`` among the runs of a mean; empty for a single run."""
        return self.deviations.get(_validation_key(metric, unit), Curve())

    def _curve(self, key: str) -> Curve:
        return self.curves.get(key, Curve())


def _validation_key(metric: str, unit: str) -> str:
    return _NATS_PER_BYTE if (metric, unit) == ("loss", "byte") else f"validation_{metric}"


def mean(runs: Sequence[Run], name: str) -> Run:
    """Returns the mean of at least two runs, at the steps that all of them have.

    Raises:
        ValueError: There is no such step.
    """
    means, deviations = {}, {}
    for key in _KEYS:
        at_step = [dict(zip(*run.curves.get(key, Curve()), strict=True)) for run in runs]
        steps = tuple(sorted(set.intersection(*map(set, at_step))))
        values = [[one[step] for one in at_step] for step in steps]
        if steps:
            means[key] = Curve(steps, tuple(map(statistics.fmean, values)))
            deviations[key] = Curve(steps, tuple(map(statistics.stdev, values)))
    if not means:
        raise ValueError(f"{', '.join(run.name for run in runs)} have no logged step in common: no mean can be drawn")
    return Run(name=name, curves=means, deviations=deviations)


def choose_unit(runs: Sequence[Run], unit: str | None) -> str:
    """Returns the unit of the loss: ``unit`` if given, else ``byte`` if all runs were evaluated, else ``token``.

    Raises:
        ValueError: The unit is ``byte`` and a run was not evaluated.
    """
    unevaluated = [run.name for run in runs if run.tokens_per_byte is None]
    if unit is None:
        return "token" if unevaluated else "byte"
    if unit == "byte" and unevaluated:
        raise ValueError(
            f"run {unevaluated[0]!r} was not evaluated, so its nats per byte are unknown: omit the run, or use "
            f"nats per token (--unit token)"
        )
    return unit


def read(path: Path, name: str) -> Run:
    """Reads the metrics of a run, except a torn last line.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not valid, the steps of a curve do not ascend, or there is no complete line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"run {name!r} has no metrics: {path} not found")
    found: dict[str, dict[int, float]] = {}
    is_torn = False
    for line in json_files.read_lines(path):
        if is_torn := line.is_torn:
            break
        location = f"{path} line {line.number}"
        value = _SCHEMA.parse(line.text, location)
        for key in value.keys() & set(_KEYS):
            curve = found.setdefault(key, {})
            if curve and value["step"] <= (last := next(reversed(curve))):
                raise ValueError(f"{location}: {key} of step {value['step']} follows step {last}")
            curve[value["step"]] = value[key]
    if not found:
        raise ValueError(f"{path} has no complete line of metrics yet")
    curves = {key: Curve(tuple(curve), tuple(curve.values())) for key, curve in found.items()}
    return Run(name=name, curves=curves, is_torn=is_torn)
