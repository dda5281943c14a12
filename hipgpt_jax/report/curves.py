"""The curves of a run, read from its ``metrics.jsonl``."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

METRICS = ("loss", "perplexity", "accuracy", "learning_rate", "tokens_per_second")
UNITS = ("byte", "token")

_NATS_PER_BYTE = "validation_nats_per_byte"
_KEYS = (*METRICS, "validation_loss", "validation_perplexity", "validation_accuracy", _NATS_PER_BYTE)


class Curve(NamedTuple):
    """A quantity at the steps where it was written down, which ascend."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run wrote down of its training.

    Attributes:
        name: What the run is called in a figure.
        curves: By the keys of the lines; a key that no line has is absent.
        torn: Whether the last line was cut short and passed over.
    """

    name: str
    curves: dict[str, Curve]
    torn: bool = False

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens a byte of the validation text, by the last evaluation; None without one that tells."""
        losses, rates = self._curve("validation_loss"), self._curve(_NATS_PER_BYTE)
        if not rates.steps or losses.steps != rates.steps or losses.values[-1] <= 0:
            return None
        return rates.values[-1] / losses.values[-1]

    def training(self, metric: str, unit: str) -> Curve:
        """Returns one of ``METRICS`` on the training batches; a loss is in nats a ``unit``."""
        curve = self._curve(metric)
        if (metric, unit) != ("loss", "byte"):
            return curve
        scale = self.tokens_per_byte
        return Curve() if scale is None else curve._replace(values=tuple(scale * value for value in curve.values))

    def validation(self, metric: str, unit: str) -> Curve:
        """Returns one of ``METRICS`` on the validation split, which may have no values."""
        return self._curve(_NATS_PER_BYTE if (metric, unit) == ("loss", "byte") else f"validation_{metric}")

    def _curve(self, key: str) -> Curve:
        return self.curves.get(key, Curve())


def choose_unit(runs: Sequence[Run], unit: str | None) -> str:
    """Returns the unit of the loss: the one asked for, else ``byte`` where every run can tell it, else ``token``.

    Raises:
        ValueError: Nats a byte are asked for, and a run has no evaluation to tell them by.
    """
    silent = [run.name for run in runs if run.tokens_per_byte is None]
    if unit is None:
        return "token" if silent else "byte"
    if unit == "byte" and silent:
        raise ValueError(
            f"run {silent[0]!r} has no evaluation line that tells its tokens a byte: "
            f"leave the run out, or take nats a token (--unit token)"
        )
    return unit


def read(path: Path, name: str) -> Run:
    """Reads a run's metrics. A last line that is no whole object was cut short, and is passed over.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not one of metrics, a value is not a finite number, the steps of a curve
            do not ascend, or there is no line at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"run {name!r} has no metrics: {path} not found")
    lines = path.read_bytes().splitlines()
    found: dict[str, dict[int, float]] = {}
    torn = False
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            step, values = _parse(line)
        except ValueError as error:
            if number == len(lines) and not _is_json(line):
                torn = True
                break
            raise ValueError(f"{place} is not a line of metrics: {error}") from error
        for key, value in values.items():
            curve = found.setdefault(key, {})
            if curve and step <= (before := next(reversed(curve))):
                raise ValueError(f"{place} is not a line of metrics: its {key} of step {step} follows step {before}")
            curve[step] = value
    if not found:
        raise ValueError(f"{path} holds no whole line of metrics yet")
    return Run(name=name, curves={key: Curve(tuple(at), tuple(at.values())) for key, at in found.items()}, torn=torn)


def _parse(line: bytes) -> tuple[int, dict[str, float]]:
    """Returns the step of a line and those of its values that have a curve."""
    value: Any = json.loads(line)
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        raise ValueError(f"it holds no step: {line[:60].decode(errors='replace')!r}")
    values = {key: value[key] for key in _KEYS if key in value}
    for key, number in values.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"its {key} must be a finite number: got {number!r}")
    return value["step"], values


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
