"""``metrics.jsonl``: one line for each logged step, the source of every plot."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from hipgpt_jax import files
from hipgpt_jax.evaluation import loss
from hipgpt_jax.training import step


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends one object as one line, in a single write."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def truncate(path: Path, last_step: int) -> None:
    """Drops the lines after ``last_step``, and a torn last line, before a run goes on from there.

    Raises:
        ValueError: A line other than the last holds no step.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            reached = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not a line of metrics: {line[:60]!r}") from error
        if reached <= last_step:
            kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def best_loss(path: Path, last_step: int) -> float:
    """Returns the lowest validation loss of the steps up to ``last_step``; infinity where none was evaluated."""
    losses = [
        line["validation_loss"] for line in _read(path) if "validation_loss" in line and line["step"] <= last_step
    ]
    return min(losses, default=math.inf)


def is_evaluated(path: Path, at: int) -> bool:
    """Returns whether step ``at`` was evaluated."""
    return any("validation_loss" in line for line in _read(path) if line["step"] == at)


def is_best(path: Path, at: int) -> bool:
    """Returns whether step ``at`` was evaluated and no step before it had a lower validation loss."""
    own = [line["validation_loss"] for line in _read(path) if "validation_loss" in line and line["step"] == at]
    return bool(own) and own[0] < best_loss(path, at - 1)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def describe_step(measured: step.Metrics) -> dict[str, float]:
    """Returns what a line says of a step, beside its number, rate and time."""
    value = float(measured.loss)
    return {
        "loss": value,
        **_finite("perplexity", loss.perplexity(value)),
        "accuracy": float(measured.accuracy),
        "gradient_norm": min(float(measured.gradient_norm), sys.float_info.max),  # JSON has no infinity
    }


def describe_score(scored: loss.Score) -> dict[str, float]:
    """Returns what a line says of an evaluation on the validation split."""
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
