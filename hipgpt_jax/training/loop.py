"""The training loop: step, metrics, evaluation, checkpoint."""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hipgpt_jax import config, numerics, training_config
from hipgpt_jax.evaluation import score
from hipgpt_jax.model import mesh, transformer
from hipgpt_jax.runs import directory, initial, loading
from hipgpt_jax.text import dataset
from hipgpt_jax.training import checkpoint, metrics, optimizer, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that determines a training run.

    Attributes:
        directory: The run's directory, with the prepared data.
        data: The run's data.
        model: Shape of the model.
        train: Settings of training.
        layout: Devices and shardings.
        init_from: Checkpoint whose weights a new run starts from; None draws random ones.
        weights_dtype: Type of the weights on disk, one of ``training_config.WEIGHTS_DTYPES``.
        attention: Attention of ``transformer.Transformer``.
        steps_in_flight: Largest number of dispatched steps whose metrics were not fetched yet; at least 0. 1 keeps an
            accelerator busy while the host prepares a batch. A CPU computes a step while it is dispatched, so 0 loses
            nothing there.
        utilisation: Returns the model FLOPs utilisation at a rate in tokens/s, or None if unknown.
        check_directory: Raises OSError if the directory is no longer the one that training started in.
    """

    directory: Path
    data: dataset.Dataset
    model: config.ModelConfig
    train: training_config.TrainConfig
    layout: mesh.Layout
    init_from: initial.Initial | None = None
    weights_dtype: str = "float32"
    attention: str = "xla"
    steps_in_flight: int = 0
    utilisation: Callable[[float], float | None] = lambda rate: None
    check_directory: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Callbacks of the loop; of several processes only the first calls them, except ``progress`` and ``should_stop``.

    Attributes:
        log: Takes a line of text.
        progress: Takes a step, its loss and the tokens/s since the last log line.
        metrics: Takes each line of metrics once it is written.
        sample: Takes a step and the model's parameters on the host, to write a sample of text.
        saved: Takes a step that training can resume from, once ``latest`` is linked to it.
        should_stop: Returns whether to stop after the current step.
    """

    log: Callable[[str], None]
    progress: Callable[[int, float, float], None]
    metrics: Callable[[dict[str, Any]], None] = lambda line: None
    sample: Callable[[int, Any], None] = lambda step, params: None
    saved: Callable[[int], None] = lambda step: None
    should_stop: Callable[[], bool] = lambda: False


class TrainResult(NamedTuple):
    """The end of training.

    Attributes:
        step: The last step taken, whose state and weights are saved.
        completed: Whether the run is completed: it has all its steps, or stopped early.
        stopped_early: Whether it ended because its validation loss no longer fell.
    """

    step: int
    completed: bool
    stopped_early: bool = False


class _StopEvaluationError(Exception):
    """An evaluation was cut short."""


@train_step.fixed_random_bits()
def train(job: Job, report: Report, *, resume_step: int | None = None) -> TrainResult:
    """Trains a run to its last step, or until it is to stop.

    Each batch and each dropout key is a function of the step's number, so a resumed run equals an uninterrupted one
    bit for bit. An evaluation that was cut short by a stop is made when the run resumes.

    Args:
        job: The run.
        report: Callbacks.
        resume_step: Step of an intact training state, as from ``states.find_intact``; None starts a new run.

    Raises:
        FloatingPointError: A loss or a gradient is not finite; nothing is saved from that step on.
        OSError: A checkpoint could not be written.
        ValueError: The training state, or the weights to start from, cannot be read.
    """
    trainer = _Trainer(job, report)
    try:
        result = _train(trainer, job, resume_step)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            trainer.close()
        raise
    trainer.close()
    return result


def _train(trainer: "_Trainer", job: Job, resume_step: int | None) -> TrainResult:
    state = trainer.restore(resume_step)
    step, is_stopping = int(state.step), False
    # A stop may have cut short the evaluation of the step that the run resumes from. Its state is on disk already.
    if trainer.evaluation_pending(step):
        is_best, is_stopping = trainer.evaluate(state, step)
        if is_best:
            trainer.save(state, step, resumable=False, best=True)
    while step < job.train.steps and not is_stopping and not trainer.is_patience_exhausted:
        step += 1
        state = trainer.take_step(state, step)
        # The state of an earlier step may have reached the disk meanwhile.
        trainer.finish_save(wait=False)
        if trainer.is_evaluated(step):
            is_best, is_stopping = trainer.evaluate(state, step)
        else:
            is_best, is_stopping = False, trainer.is_stopping()
        # A best step that is no checkpoint is kept for generation alone, because Orbax's states are large.
        resumable = is_stopping or trainer.is_checkpoint(step) or trainer.is_patience_exhausted
        if resumable or is_best:
            trainer.save(state, step, resumable=resumable, best=is_best)
        if _is_multiple(step, job.train.sample_every):
            trainer.sample(state, step)
    trainer.finish_save(wait=True)
    is_last = step == job.train.steps or trainer.is_patience_exhausted
    completed = is_last and not trainer.evaluation_pending(step)
    return TrainResult(step, completed, stopped_early=completed and step < job.train.steps)


class _InFlight(NamedTuple):
    """A dispatched step whose metrics were not fetched yet; the learning rate only if the step is logged."""

    step: int
    metrics: train_step.Metrics
    learning_rate: jax.Array | None


class _Trainer:
    """The compiled step of one run, its files, its steps in flight, and its best loss so far."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report = job, report
        key = numerics.key_of(job.train.seed)
        self._model = transformer.Transformer(job.model, job.train.dtype, job.train.remat, job.attention)
        tx = optimizer.make(job.train)
        self._train_step = train_step.make_train_step(self._model, tx, job.train, key, job.layout)
        self._init = functools.partial(train_step.init_sharded, job.layout, self._model, tx, key)
        self._start_from = functools.partial(train_step.start_from, job.layout, tx)
        self._schedule = optimizer.learning_rate(job.train)
        self._metrics_path = job.directory / directory.METRICS_NAME
        self._writer = checkpoint.CheckpointWriter(
            directory=job.directory,
            model=job.model,
            train=job.train,
            manifest=job.data.manifest,
            init_from=job.init_from,
            weights_dtype=job.weights_dtype,
            attention=job.attention,
        )
        self._store = checkpoint.StateStore(job.directory)
        self._saving: tuple[int, futures.Future[None]] | None = None
        # One process writes all files except Orbax's, and all log lines.
        self._is_main_process = jax.process_index() == 0
        self._best, self._since_best = math.inf, 0
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        # Since the last log line; evaluations, checkpoints and samples are not counted.
        self._seconds, self._timed_steps = 0.0, 0

    def restore(self, resume_step: int | None) -> train_step.TrainState:
        """Returns the state to start from; brings the metrics, the weights and the links to its step."""
        if resume_step is None and self._job.init_from:
            state = self._start_from(loading.read_initial(self._job.init_from, self._job.model))
        else:
            state = self._init()
        if resume_step is not None:
            state = self._store.restore(resume_step, state, self._job.layout)
        step = int(state.step)
        if self._is_main_process:
            metrics.truncate(self._metrics_path, step)
        self._best = metrics.best_loss(self._metrics_path, step)
        self._since_best = metrics.evaluations_since_best(self._metrics_path, step)
        if step and not self._writer.has(step):  # killed between its state and its weights
            self._write_weights(state, step, best=False)
        if step and self._is_main_process:
            dtype, before = self._job.weights_dtype, self._writer.dtype_of(step)
            if before not in (None, dtype):
                self._report.log(f"weights_dtype is {dtype}: the weights of step {step} are on disk in {before}")
            self._writer.rewind(step, metrics.best_step(self._metrics_path, step))
        return state

    def take_step(self, state: train_step.TrainState, step: int) -> train_step.TrainState:
        """Dispatches a step, and logs the metrics of all but the newest ``steps_in_flight``."""
        started, train = time.perf_counter(), self._job.train
        length = self._job.model.max_seq_len
        shape = (train.batch_size, length + 1)
        read = functools.partial(
            self._job.data.batch_at, step - 1, seed=train.seed, batch_size=train.batch_size, length=length
        )
        # Each process reads the rows of its own devices.
        batch = self._job.layout.shard_batch(shape, lambda rows: read(rows=rows))
        is_logged = _is_multiple(step, train.log_every) or step == train.steps
        # Queued on the device before the step: fetched later, it waits for no step but its own.
        learning_rate = jnp.asarray(self._schedule(step - 1)) if is_logged else None
        state, measured = self._train_step(state, batch)
        self._in_flight.append(_InFlight(step, measured, learning_rate))
        # While the host waits for the step before and prepares the next batch, the device computes this one.
        self._fetch_metrics(self._job.steps_in_flight, started)
        return state

    def drain(self) -> None:
        """Waits for the steps in flight. Nothing may be saved or evaluated before: one of them may be NaN."""
        self._fetch_metrics(0, time.perf_counter())

    def is_checkpoint(self, step: int) -> bool:
        """Returns whether the state of a step is saved in any case."""
        return step == self._job.train.steps or _is_multiple(step, self._job.train.ckpt_every)

    def is_evaluated(self, step: int) -> bool:
        """Returns whether an evaluation follows a step."""
        return self.is_checkpoint(step) or _is_multiple(step, self._job.train.eval_every)

    @property
    def is_patience_exhausted(self) -> bool:
        """Whether training stops early."""
        return 0 < self._job.train.patience <= self._since_best

    def evaluation_pending(self, step: int) -> bool:
        """Returns whether the evaluation that follows a step was cut short."""
        is_missing = self.is_evaluated(step) and not metrics.is_evaluated(self._metrics_path, step)
        return step > 0 and _any_process(self._is_main_process and is_missing)

    def is_stopping(self) -> bool:
        """Returns whether to stop after the current step."""
        # A process that has failed on NaN cannot take part in the agreement, so all must see the NaN first.
        if jax.process_count() > 1:
            self.drain()
        return _any_process(self._report.should_stop())

    def evaluate(self, state: train_step.TrainState, step: int) -> tuple[bool, bool]:
        """Scores the validation split.

        Returns:
            Whether its loss is the lowest so far, and whether to stop. A stop cuts the evaluation short; then the first
            is False, and no line of metrics is written.
        """
        job = self._job
        self.drain()
        try:
            found = score.evaluate(
                self._model,
                state.params,
                job.data.validation,
                text_bytes=job.data.manifest.scored_bytes,
                batch_size=job.train.batch_size,
                length=job.model.max_seq_len,
                max_batches=job.train.eval_batches,
                put=job.layout.shard_batch,
                before_batch=self._raise_if_stopping,
            )
        except _StopEvaluationError:
            return False, True
        _check_finite("validation loss", found.loss, step)
        line = {"step": step, **metrics.describe_score(found)}
        self._log(line, metrics.format_evaluation(line))
        is_best, self._best = found.loss < self._best, min(found.loss, self._best)
        self._since_best = 0 if is_best else self._since_best + 1
        return is_best, False

    def save(self, state: train_step.TrainState, step: int, *, resumable: bool, best: bool) -> None:
        """Saves the weights of a step, and in the background its state if training can resume from there.

        ``finish_save`` links ``latest`` to the step, so that whatever ``latest`` refers to can be resumed.
        """
        self.drain()
        self.finish_save(wait=True)
        self._job.check_directory()
        with checkpoint.reporting_failure(step):
            # The state first: Orbax copies it to the host and writes it while the weights are written here.
            saving = self._store.save(state) if resumable else None
            self._write_weights(state, step, best=best)
        if saving:
            self._saving = step, saving

    def finish_save(self, *, wait: bool) -> None:
        """Links ``latest`` to the step whose state is being saved, if that is complete or ``wait`` is True."""
        if self._saving is None or not (wait or self._saving[1].done()):
            return
        (step, saving), self._saving = self._saving, None
        with checkpoint.reporting_failure(step):
            saving.result()
            if self._is_main_process:
                self._writer.link_latest(step)
        if self._is_main_process:
            self._report.saved(step)

    def sample(self, state: train_step.TrainState, step: int) -> None:
        """Writes a sample of text."""
        self.drain()
        params = self._job.layout.to_host(state.params)
        if self._is_main_process:
            self._report.sample(step, params)

    def close(self) -> None:
        """Finishes a save in progress and closes the store."""
        try:
            self.finish_save(wait=True)
        finally:
            self._store.close()

    def _fetch_metrics(self, in_flight: int, started: float) -> None:
        """Fetches and logs the metrics of all but the newest ``in_flight`` steps; the clock runs from ``started``."""
        while len(self._in_flight) > in_flight:
            step, measured, learning_rate = self._in_flight.popleft()
            mean_loss, accuracy, gradient_norm = map(float, jax.device_get(measured))
            self._seconds, self._timed_steps = self._seconds + time.perf_counter() - started, self._timed_steps + 1
            _check_finite("loss", mean_loss, step)
            if math.isnan(gradient_norm):  # an infinite one is clipped
                _check_finite("the gradient's norm", math.nan, step)
            rate = self._timed_steps * self._job.train.batch_size * self._job.model.max_seq_len / self._seconds
            self._report.progress(step, mean_loss, rate)
            if learning_rate is not None:
                line = {
                    "step": step,
                    **metrics.describe_step(mean_loss, accuracy, gradient_norm),
                    "learning_rate": float(learning_rate),
                    "milliseconds": 1e3 * self._seconds / self._timed_steps,
                    "tokens_per_second": rate,
                }
                if (share := self._job.utilisation(rate)) is not None:
                    line["utilisation"] = share
                self._log(line, metrics.format_step(line, self._job.data.manifest.bytes_per_token))
                self._seconds, self._timed_steps = 0.0, 0
            started = time.perf_counter()
        self._seconds += time.perf_counter() - started

    def _raise_if_stopping(self) -> None:
        if self.is_stopping():
            raise _StopEvaluationError

    def _write_weights(self, state: train_step.TrainState, step: int, *, best: bool) -> None:
        # All processes take part in gathering the parameters.
        params = self._job.layout.to_host(state.params)
        if self._is_main_process:
            self._writer.write(step, params, best=best)

    def _log(self, line: dict[str, Any], text: str) -> None:
        if self._is_main_process:
            self._job.check_directory()
            metrics.append(self._metrics_path, line)
            self._report.metrics(line)
            self._report.log(text)


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process, so that all stop after the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} is {value} at step {step}: training stopped, nothing was saved from this step. "
            f"Lower --lr, or lengthen --warmup-steps"
        )
