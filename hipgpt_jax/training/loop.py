"""The training loop: data, step, log, evaluation, checkpoint."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hipgpt_jax import config, numerics, training_config
from hipgpt_jax.evaluation import score
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import directory
from hipgpt_jax.text import dataset
from hipgpt_jax.training import checkpoint, mesh, metrics, optimizer, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, how, where.

    Attributes:
        directory: The run's directory; it exists and holds the prepared data.
        data: The run's data.
        model: Shape of the model.
        train: How to train it.
        layout: The devices.
        weights_dtype: Of the ``.bin`` files, one of ``training_config.WEIGHTS_DTYPES``.
        attention: As of ``transformer.Transformer``.
        utilisation: Gives the model FLOPs utilisation at a rate of tokens a second, where it is known.
        check_directory: Raises OSError where the directory is no longer the one that training began in.
    """

    directory: Path
    data: dataset.Dataset
    model: config.ModelConfig
    train: training_config.TrainConfig
    layout: mesh.Layout
    weights_dtype: str = "float32"
    attention: str = "xla"
    utilisation: Callable[[float], float | None] = lambda rate: None
    check_directory: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Where the loop tells what it does; of many processes the first alone tells.

    Attributes:
        log: Takes a line of text.
        progress: Takes the step, its loss and the tokens a second since the last log line.
        metrics: Takes a line of metrics, as it is written.
        sample: Takes a step and the model's parameters, on the host, to write a sample of text.
        saved: Takes a step that training can resume from, once ``latest`` names it.
        should_stop: Says whether to stop after the step under way.
    """

    log: Callable[[str], None]
    progress: Callable[[int, float, float], None]
    metrics: Callable[[dict[str, Any]], None] = lambda line: None
    sample: Callable[[int, Any], None] = lambda step, params: None
    saved: Callable[[int], None] = lambda step: None
    should_stop: Callable[[], bool] = lambda: False


class TrainResult(NamedTuple):
    """Where training ended; its state and weights are on disk.

    Attributes:
        step: The last step taken.
        completed: Whether nothing is left to do.
    """

    step: int
    completed: bool


class _StopError(Exception):
    """An evaluation was cut short."""


@train_step.fixed_random_bits()
def train(job: Job, report: Report, *, resume_step: int | None = None) -> TrainResult:
    """Trains a run to its last step, or until it is told to stop.

    Each batch and each dropout key is a function of the step's number, so a run that was cut short and
    resumed draws what the uninterrupted one would have drawn. An evaluation that a stop cut short is
    made when the run is resumed.

    Args:
        job: What is trained.
        report: Told of every step.
        resume_step: Step of the training state to resume from, one that ``states.find_intact`` returned; None begins at
            the first step.

    Raises:
        FloatingPointError: A loss or a gradient is not finite; nothing is saved from that step on.
        OSError: A checkpoint could not be written.
        ValueError: The training state cannot be read.
    """
    trainer = _Trainer(job, report)
    try:
        end = _train(trainer, job, report, resume_step)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            trainer.close()
        raise
    trainer.close()
    return end


def _train(trainer: "_Trainer", job: Job, report: Report, resume_step: int | None) -> TrainResult:
    state = trainer.begin(resume_step)
    step, last, stopped = int(state.step), job.train.steps, False
    if trainer.evaluation_pending(step):
        is_best, stopped = trainer.evaluate(state, step)
        if is_best:
            trainer.save(state, step, latest=False, best=True)
    while step < last and not stopped:
        step += 1
        state = trainer.take_step(state, step)
        trainer.finish_save(wait=False)
        is_best, stopped = (
            trainer.evaluate(state, step) if trainer.is_evaluated(step) else (False, trainer.is_stopping())
        )
        save = stopped or trainer.is_checkpoint(step)
        if save or is_best:
            trainer.save(state, step, latest=save, best=is_best)
        if _every(step, job.train.sample_every):
            params = job.layout.to_host(state.params)
            if trainer.is_main_process:
                report.sample(step, params)
    trainer.finish_save(wait=True)
    return TrainResult(step, completed=step == last and not trainer.evaluation_pending(step))


class _Trainer:
    """The parts of one run: its compiled step, its files, and the time and the best loss so far."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report = job, report
        self._key = numerics.key_of(job.train.seed)
        self._model = transformer.Transformer(job.model, job.train.dtype, job.train.remat, job.attention)
        self._optimizer = optimizer.make(job.train)
        self._step = train_step.make_train_step(self._model, self._optimizer, job.train, self._key, job.layout)
        self._schedule = optimizer.learning_rate(job.train)
        self._metrics_path = job.directory / directory.METRICS_NAME
        self._writer = checkpoint.CheckpointWriter(
            directory=job.directory,
            model=job.model,
            train=job.train,
            manifest=job.data.manifest,
            weights_dtype=job.weights_dtype,
            attention=job.attention,
        )
        self._store = checkpoint.StateStore(job.directory)
        self._saving: int | None = None
        self.is_main_process = jax.process_index() == 0
        self._best = math.inf
        self._seconds, self._timed = 0.0, 0

    def begin(self, resume_step: int | None) -> train_step.TrainState:
        """Returns the state to begin with, and brings the metrics, the weights and the links to its step."""
        state = train_step.init_sharded(self._job.layout, self._model, self._optimizer, self._key)
        if resume_step is not None:
            state = self._store.restore(resume_step, state, self._job.layout)
        step = int(state.step)
        if self.is_main_process:
            metrics.truncate(self._metrics_path, step)
        self._best = metrics.best_loss(self._metrics_path, step)
        if step:
            if not self._writer.has(step):  # the run was killed between the state and its weights
                params = self._job.layout.to_host(state.params)
                if self.is_main_process:
                    self._writer.write(step, params, latest=False, best=False)
            if self.is_main_process:
                self._writer.rewind(step, metrics.best_step(self._metrics_path, step))
        return state

    def take_step(self, state: train_step.TrainState, step: int) -> train_step.TrainState:
        """Takes a step and logs it where it is due."""
        train = self._job.train
        began = time.perf_counter()
        length = self._job.model.max_seq_len
        batch = self._job.data.batch_at(step - 1, seed=train.seed, batch_size=train.batch_size, length=length)
        state, measured = self._step(state, self._job.layout.shard_batch(batch))
        value = _require_finite("loss", float(measured.loss), step)
        if math.isnan(float(measured.gradient_norm)):  # an infinite one is clipped
            _require_finite("the gradient's norm", math.nan, step)
        self._seconds, self._timed = self._seconds + time.perf_counter() - began, self._timed + 1
        rate = self._timed * train.batch_size * length / self._seconds
        self._report.progress(step, value, rate)
        if _every(step, train.log_every) or step == train.steps:
            learning_rate = float(jnp.asarray(self._schedule(step - 1)))
            timing = {"milliseconds": 1e3 * self._seconds / self._timed, "tokens_per_second": rate}
            line = {"step": step, **metrics.describe_step(measured), "learning_rate": learning_rate, **timing}
            if (share := self._job.utilisation(rate)) is not None:
                line["utilisation"] = share
            self._log(line, metrics.format_step(line))
            self._seconds, self._timed = 0.0, 0
        return state

    def is_checkpoint(self, step: int) -> bool:
        """Whether a step's state is kept whatever happens."""
        return step == self._job.train.steps or _every(step, self._job.train.ckpt_every)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        return self.is_checkpoint(step) or _every(step, self._job.train.eval_every)

    def evaluation_pending(self, step: int) -> bool:
        """Whether the evaluation that follows a step was cut short."""
        is_owed = self.is_evaluated(step) and not metrics.is_evaluated(self._metrics_path, step)
        return step > 0 and _any_process(self.is_main_process and is_owed)

    def is_stopping(self) -> bool:
        """Whether to stop after the step under way."""
        return _any_process(self._report.should_stop())

    def evaluate(self, state: train_step.TrainState, step: int) -> tuple[bool, bool]:
        """Scores the validation split.

        Returns:
            Whether no step before had a lower loss, and whether to stop; then the first is False and nothing was noted.
        """
        job = self._job

        def raise_if_stopping() -> None:
            if self.is_stopping():
                raise _StopError

        try:
            scored = score.evaluate(
                self._model,
                state.params,
                job.data.validation,
                text_bytes=job.data.manifest.scored_bytes,
                batch_size=job.train.batch_size,
                length=job.model.max_seq_len,
                max_batches=job.train.eval_batches,
                put=job.layout.shard_batch,
                before_batch=raise_if_stopping,
            )
        except _StopError:
            return False, True
        _require_finite("validation loss", scored.loss, step)
        line = {"step": step, **metrics.describe_score(scored)}
        self._log(line, metrics.format_evaluation(line))
        is_best, self._best = scored.loss < self._best, min(scored.loss, self._best)
        return is_best, False

    def save(self, state: train_step.TrainState, step: int, *, latest: bool, best: bool) -> None:
        """Saves a step's weights, and in the background its state where training can resume from there.

        ``latest`` is pointed at the step by ``finish_save``, so that whatever it names can be resumed.
        """
        self.finish_save(wait=True)
        self._job.check_directory()
        with checkpoint.saving(step):
            if latest:
                self._store.save(state)
            params = self._job.layout.to_host(state.params)
            if self.is_main_process:
                self._writer.write(step, params, latest=False, best=best)
        if latest:
            self._saving = step

    def finish_save(self, *, wait: bool) -> None:
        """Points ``latest`` at the step whose state was being saved, if that is complete or ``wait`` is set."""
        if self._saving is None or not (wait or self._store.is_complete()):
            return
        step, self._saving = self._saving, None
        with checkpoint.saving(step):
            self._store.wait()
            if self.is_main_process:
                self._writer.link_latest(step)
        if self.is_main_process:
            self._report.saved(step)

    def close(self) -> None:
        """Finishes a save under way and closes the store."""
        try:
            self.finish_save(wait=True)
        finally:
            self._store.close()

    def _log(self, line: dict[str, Any], text: str) -> None:
        if self.is_main_process:
            self._job.check_directory()
            metrics.append(self._metrics_path, line)
            self._report.metrics(line)
            self._report.log(text)


def _every(number: int, interval: int) -> bool:
    return interval > 0 and number % interval == 0


def _any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all stop after the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _require_finite(name: str, value: float, number: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} is {value} at step {number}: training stopped, nothing was saved from this step. "
            f"Lower --lr, or lengthen --warmup-steps"
        )
    return value
