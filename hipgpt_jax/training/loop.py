"""The training loop: data, step, log, evaluation, checkpoint."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import directory
from hipgpt_jax.text import dataset
from hipgpt_jax.training import checkpoint, metrics, optimizer, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Where the loop tells what it does: a line of text, and the step with its loss for a progress bar."""

    line: Callable[[str], None]
    progress: Callable[[int, float], None]


def train(
    run_directory: Path,
    data: dataset.Dataset,
    model_config: config.ModelConfig,
    train_config: config.TrainConfig,
    report: Report,
    *,
    resume: bool,
    weights_dtype: str = "float32",
) -> None:
    """Trains a run to its last step.

    Each batch and each dropout key is a function of the step's number, so a run that was cut short and
    resumed draws what the uninterrupted one would have drawn.

    Args:
        run_directory: Exists, and holds the prepared data.
        data: The run's data.
        model_config: Shape of the model.
        train_config: How to train it.
        report: Told of every step.
        resume: Whether to go on from the newest saved state.
        weights_dtype: Of the ``.bin`` files, ``float32`` or ``float16``.

    Raises:
        FloatingPointError: A loss is not finite; nothing is saved from that step on.
        FileNotFoundError: There is no state to resume from.
    """
    key = jax.random.key(train_config.seed, impl="threefry2x32")
    model = transformer.Transformer(model_config)
    tx = optimizer.make(train_config)
    train_step = step.make(model, tx, train_config, key)
    schedule = optimizer.learning_rate(train_config)
    state = step.init(model, tx, key)
    store = checkpoint.StateStore(run_directory)
    write = functools.partial(
        checkpoint.write,
        run_directory,
        model=model_config,
        train=train_config,
        manifest=data.manifest,
        weights_dtype=weights_dtype,
    )
    metrics_path = run_directory / directory.METRICS_NAME
    if resume:
        state = _restore(store, state, run_directory, write)
    metrics.truncate(metrics_path, int(state.step))

    for number in range(int(state.step) + 1, train_config.steps + 1):
        began = time.perf_counter()
        batch = data.batch_at(
            number - 1, seed=train_config.seed, batch_size=train_config.batch_size, length=model_config.max_seq_len
        )
        state, measured = train_step(state, jnp.asarray(batch))
        value = _require_finite("loss", float(measured.loss), number)
        seconds = time.perf_counter() - began
        report.progress(number, value)
        last = number == train_config.steps
        if number % train_config.log_every == 0 or last:
            rate = float(jnp.asarray(schedule(number - 1)))
            timing = {"milliseconds": 1e3 * seconds, "tokens_per_second": batch[:, 1:].size / seconds}
            line = {"step": number, **metrics.describe_step(measured), "learning_rate": rate, **timing}
            metrics.append(metrics_path, line)
            report.line(metrics.format_step(line))
        save = last or _every(number, train_config.ckpt_every)
        if save or _every(number, train_config.eval_every):
            line = _evaluate(model, state.params, data, train_config, number)
            metrics.append(metrics_path, line)
            report.line(metrics.format_evaluation(line))
        if save:
            store.save(state)
            write(state)
    store.close()


def _every(number: int, interval: int) -> bool:
    return interval > 0 and number % interval == 0


def _require_finite(name: str, value: float, number: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} is {value} at step {number}: training stopped, nothing was saved from this step. "
            f"Lower --lr, or lengthen --warmup-steps"
        )
    return value


def _restore(
    store: checkpoint.StateStore, like: step.TrainState, run_directory: Path, write: Callable[[step.TrainState], None]
) -> step.TrainState:
    if (at := store.latest()) is None:
        raise FileNotFoundError(f"{run_directory} has no training state to resume from. Use --reset to start anew")
    state = store.restore(at, like)
    if not (run_directory / directory.config_name(run_directory.name, at)).is_file():
        write(state)  # the run was killed between the state and its weights
    return state


def _evaluate(
    model: transformer.Transformer, params: Any, data: dataset.Dataset, train_config: config.TrainConfig, number: int
) -> dict[str, Any]:
    scored = loss.score(
        model,
        params,
        data.validation,
        text_bytes=data.manifest.validation_bytes,
        batch_size=train_config.batch_size,
        length=model.config.max_seq_len,
        max_batches=train_config.eval_batches,
    )
    _require_finite("validation loss", scored.loss, number)
    return {"step": number, **metrics.describe_score(scored)}
