"""``metrics.jsonl``: one line for each logged step, the source of every plot."""

import json
from pathlib import Path
from typing import Any

from hipgpt_jax import files


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends one object as one line, in a single write."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def truncate(path: Path, step: int) -> None:
    """Drops the lines after ``step``, and a torn last line, before a run goes on from there.

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
        if reached <= step:
            kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def format_step(line: dict[str, Any]) -> str:
    """Returns HipGPT's log line for the metrics of a step."""
    return (
        f"[Step {line['step']}] Loss: {line['loss']:.4f} | Perplexity: {line['perplexity']:.2f} | "
        f"Accuracy: {100 * line['accuracy']:.2f}% | LR: {line['learning_rate']:.3g} | "
        f"Time: {line['milliseconds']:.1f} ms | {line['tokens_per_second']:.0f} tok/s"
    )


def format_evaluation(line: dict[str, Any]) -> str:
    """Returns the log line for an evaluation on the validation split."""
    return (
        f"[Step {line['step']}] Validation loss: {line['validation_loss']:.4f} | "
        f"Perplexity: {line['validation_perplexity']:.2f} | Nats a byte: {line['validation_nats_per_byte']:.4f} | "
        f"Accuracy: {100 * line['validation_accuracy']:.2f}%"
    )
