"""``metrics.jsonl``: one line per logged step or evaluation, the source of every plot."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from hipgpt_jax import files, json_files
from hipgpt_jax.evaluation import score

_VALIDATION = "validation_loss"
_SCHEMA = json_files.Schema(
    "line of metrics",
    {
        "type": "object",
        "required": ["step"],
        "properties": {"step": {"type": "integer", "minimum": 1}},
        "additionalProperties": {"type": "number"},
    },
)


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends one object as one line, in a single write, so that a kill tears at most the last line."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def truncate(path: Path, last_step: int) -> None:
    """Drops the lines after ``last_step``, and a torn last line, before a run resumes from there.

    Raises:
        ValueError: A line, other than a torn last one, is not a line of metrics.
    """
    if path.is_file():
        kept = [line for line, value in _read(path) if value["step"] <= last_step]
        files.write_text(path, "".join(f"{line}\n" for line in kept))


def best_loss(path: Path, last_step: int) -> float:
    """Returns the lowest validation loss up to ``last_step``; infinity if none was evaluated."""
    return min(_validation_losses(path, last_step).values(), default=math.inf)


def best_step(path: Path, last_step: int) -> int | None:
    """Returns the first step up to ``last_step`` with the lowest validation loss; None if none was evaluated."""
    losses = _validation_losses(path, last_step)
    return min(losses, key=lambda step: (losses[step], step), default=None)


def evaluations_since_best(path: Path, last_step: int) -> int:
    """Returns the number of evaluations up to ``last_step`` after the one with the lowest validation loss."""
    best = best_step(path, last_step)
    return 0 if best is None else sum(step > best for step in _validation_losses(path, last_step))


def is_evaluated(path: Path, step: int) -> bool:
    """Returns whether a step was evaluated."""
    return step in _validation_losses(path, step)


def describe_step(loss: float, accuracy: float, gradient_norm: float) -> dict[str, float]:
    """Returns the numbers of a step's line, except its number, learning rate and timing."""
    return {
        "loss": loss,
        **_finite("perplexity", score.perplexity(loss)),
        "accuracy": accuracy,
        "gradient_norm": min(gradient_norm, sys.float_info.max),  # JSON has no infinity
    }


def describe_score(found: score.Score) -> dict[str, float]:
    """Returns the numbers of an evaluation's line, except its step."""
    return {
        _VALIDATION: found.loss,
        **_finite("validation_perplexity", found.perplexity),
        "validation_nats_per_byte": found.nats_per_byte,
        "validation_accuracy": found.accuracy,
        "validation_tokens": found.tokens,
    }


def format_step(line: dict[str, Any], bytes_per_token: float) -> str:
    """Returns the log line of a step, in HipGPT's form, with the mean bytes of a token to convert the loss."""
    return (
        f"[Step {line['step']}] Loss: {line['loss']:.4f} nats/token, {line['loss'] / bytes_per_token:.4f} nats/byte | "
        f"Perplexity: {_format_perplexity(line.get('perplexity', math.inf))} | "
        f"Accuracy: {100 * line['accuracy']:.2f}% | LR: {line['learning_rate']:.3g} | "
        f"Time: {line['milliseconds']:.1f} ms | {line['tokens_per_second']:.0f} tok/s"
        + (f" | MFU: {100 * line['utilisation']:.1f}%" if "utilisation" in line else "")
    )


def format_evaluation(line: dict[str, Any]) -> str:
    """Returns the log line of an evaluation."""
    return (
        f"[Step {line['step']}] Validation loss: {line['validation_loss']:.4f} nats/token, "
        f"{line['validation_nats_per_byte']:.4f} nats/byte | "
        f"Perplexity: {_format_perplexity(line.get('validation_perplexity', math.inf))} | "
        f"Accuracy: {100 * line['validation_accuracy']:.2f}%"
    )


def _finite(name: str, value: float) -> dict[str, float]:
    return {name: value} if math.isfinite(value) else {}  # JSON has no infinity


def _format_perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def _validation_losses(path: Path, last_step: int) -> dict[int, float]:
    lines = (value for _, value in _read(path)) if path.is_file() else ()
    return {line["step"]: line[_VALIDATION] for line in lines if _VALIDATION in line and line["step"] <= last_step}


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the text and the object of each line, without a last line that a kill tore."""
    found: list[tuple[str, dict[str, Any]]] = []
    for line in json_files.read_lines(path):
        if line.is_torn:
            break
        try:
            value = _SCHEMA.parse(line.text, f"{path} line {line.number}")
        except ValueError as error:
            raise ValueError(f"{error}. Restore the line or delete it") from error
        found.append((line.text.decode().strip(), value))
    return found
