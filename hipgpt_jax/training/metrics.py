"""``metrics.jsonl``: one line per logged step, the source of every plot."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import fastjsonschema

from hipgpt_jax import files
from hipgpt_jax.evaluation import score
from hipgpt_jax.training import train_step

_VALIDATION = "validation_loss"
_validate = fastjsonschema.compile(
    {
        "type": "object",
        "required": ["step"],
        "properties": {"step": {"type": "integer", "minimum": 1}},
        "additionalProperties": {"type": "number"},
    }
)


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends one object as one line, in a single write."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def truncate(path: Path, last_step: int) -> None:
    """Drops the lines after ``last_step``, and a torn last line, before a run resumes from there.

    Raises:
        ValueError: A line, other than a torn last one, is not a line of metrics.
    """
    if path.is_file():
        kept = [line for line, value in _read(path) if value["step"] <= last_step]
        files.write_text(path, "".join(line.decode() + "\n" for line in kept))


def best_loss(path: Path, last_step: int) -> float:
    """Returns the lowest validation loss of the steps up to ``last_step``; infinity where none was evaluated."""
    return min(_losses(path, last_step).values(), default=math.inf)


def best_step(path: Path, last_step: int) -> int | None:
    """Returns the first step up to ``last_step`` that has the lowest validation loss; None where none was evaluated."""
    losses = _losses(path, last_step)
    return min(losses, key=lambda step: (losses[step], step), default=None)


def is_evaluated(path: Path, step: int) -> bool:
    """Returns whether step ``step`` was evaluated."""
    return step in _losses(path, step)


def _losses(path: Path, last_step: int) -> dict[int, float]:
    """The validation loss of each step that was evaluated."""
    lines = (value for _, value in _read(path)) if path.is_file() else ()
    return {line["step"]: line[_VALIDATION] for line in lines if _VALIDATION in line and line["step"] <= last_step}


def _read(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns each line and its object. A last line that a kill tore, or a power cut filled with NUL, is left out."""
    *lines, rest = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            value = files.parse_json(line)
        except ValueError as error:
            if line is rest or (b"\0" in line and number == len(lines) and not rest):
                break
            raise _not_metrics(path, number, line, error) from error
        try:
            _validate(value)
        except fastjsonschema.JsonSchemaValueException as error:
            raise _not_metrics(path, number, line, error) from error
        found.append((line, value))
    return found


def _not_metrics(path: Path, number: int, line: bytes, error: ValueError) -> ValueError:
    shown = line[:60].decode(errors="replace")
    return ValueError(f"{path}:{number} is not a line of metrics ({error}): {shown!r}. Restore the line or delete it")


def describe_step(measured: train_step.Metrics) -> dict[str, float]:
    """Returns the numbers of a step's line, apart from its number, learning rate and timing."""
    value = float(measured.loss)
    return {
        "loss": value,
        **_finite("perplexity", score.perplexity(value)),
        "accuracy": float(measured.accuracy),
        "gradient_norm": min(float(measured.gradient_norm), sys.float_info.max),  # JSON has no infinity
    }


def describe_score(scored: score.Score) -> dict[str, float]:
    """Returns the numbers of a line for an evaluation on the validation split."""
    return {
        "validation_loss": scored.loss,
        **_finite("validation_perplexity", scored.perplexity),
        "validation_nats_per_byte": scored.nats_per_byte,
        "validation_accuracy": scored.accuracy,
        "validation_tokens": scored.tokens,
    }


def _finite(name: str, value: float) -> dict[str, float]:
    return {name: value} if math.isfinite(value) else {}  # JSON has no infinity


def _format_perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def format_step(line: dict[str, Any]) -> str:
    """Returns HipGPT's log line for the metrics of a step."""
    return (
        f"[Step {line['step']}] Loss: {line['loss']:.4f} | "
        f"Perplexity: {_format_perplexity(line.get('perplexity', math.inf))} | "
        f"Accuracy: {100 * line['accuracy']:.2f}% | LR: {line['learning_rate']:.3g} | "
        f"Time: {line['milliseconds']:.1f} ms | {line['tokens_per_second']:.0f} tok/s"
        + (f" | MFU: {100 * line['utilisation']:.1f}%" if "utilisation" in line else "")
    )


def format_evaluation(line: dict[str, Any]) -> str:
    """Returns the log line for an evaluation on the validation split."""
    return (
        f"[Step {line['step']}] Validation loss: {line['validation_loss']:.4f} | "
        f"Perplexity: {_format_perplexity(line.get('validation_perplexity', math.inf))} | "
        f"Nats per byte: {line['validation_nats_per_byte']:.4f} | "
        f"Accuracy: {100 * line['validation_accuracy']:.2f}%"
    )
