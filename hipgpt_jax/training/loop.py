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
from hipgpt_jax.training import checkpoint, mesh, metrics, optimizer, step


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
        require_same_directory: Raises OSError where the directory is no longer the one that training began in.
    """

    directory: Path
    data: dataset.Dataset
    model: config.ModelConfig
    train: training_config.TrainConfig
    layout: mesh.Layout
    weights_dtype: str = "float32"
    attention: str = "xla"
    utilisation: Callable[[float], float | None] = lambda rate: None
    require_same_directory: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Where the loop tells what it does; of many processes the first alone tells.

    Attributes:
        line: Takes a line of text.
        progress: Takes the step, its loss and the tokens a second since the last log line.
        metrics: Takes a line of metrics, as it is written.
        sample: Takes a step and the model's parameters, on the host, to write a sample of text.
        saved: Takes a step that training can resume from, once ``latest`` names it.
        stops: Says whether to stop after the step under way.
    """

    line: Callable[[str], None]
    progress: Callable[[int, float, float], None]
    metrics: Callable[[dict[str, Any]], None] = lambda line: None
    sample: Callable[[int, Any], None] = lambda at, params: None
    saved: Callable[[int], None] = lambda at: None
    stops: Callable[[], bool] = lambda: False


class End(NamedTuple):
    """Where training ended; its state and weights are on disk.

    Attributes:
        at: The last step taken.
        whole: Whether nothing is left to do.
    """

    at: int
    whole: bool


class _StopError(Exception):
    """An evaluation was cut short."""


@step.fixed_random_bits()
def train(job: Job, report: Report, *, resume_at: int | None = None) -> End:
    """Trains a run to its last step, or until it is told to stop.

    Each batch and each dropout key is a function of the step's number, so a run that was cut short and
    resumed draws what the uninterrupted one would have drawn. An evaluation that a stop cut short is
    made when the run is resumed.

    Args:
        job: What is trained.
        report: Told of every step.
        resume_at: Step of the training state to resume from, one that ``states.find_intact`` returned; None begins at
            the first step.

    Raises:
        FloatingPointError: A loss or a gradient is not finite; nothing is saved from that step on.
        OSError: A checkpoint could not be written.
        ValueError: The training state cannot be read.
    """
    trainer = _Trainer(job, report)
    try:
        end = _train(trainer, job, report, resume_at)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            trainer.close()
        raise
    trainer.close()
    return end


def _train(trainer: "_Trainer", job: Job, report: Report, resume_at: int | None) -> End:
    state = trainer.begin(resume_at)
    at, last, stopped = int(state.step), job.train.steps, False
    if trainer.owes_evaluation(at):
        is_best, stopped = trainer.evaluate(state, at)
        if is_best:
            trainer.save(state, at, latest=False, best=True)
    while at < last and not stopped:
        at += 1
        state = trainer.take_step(state, at)
        trainer.finish_save(wait=False)
        is_best, stopped = (
            trainer.evaluate(state, at) if trainer.is_evaluated(at) else (False, trainer.is_told_to_stop())
        )
        save = stopped or trainer.is_checkpoint(at)
        if save or is_best:
            trainer.save(state, at, latest=save, best=is_best)
        if _every(at, job.train.sample_every):
            params = job.layout.fetch(state.params)
            if trainer.tells:
                report.sample(at, params)
    trainer.finish_save(wait=True)
    return End(at, whole=at == last and not trainer.owes_evaluation(at))


class _Trainer:
    """The parts of one run: its compiled step, its files, and the time and the best loss so far."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report = job, report
        self._key = numerics.key_of(job.train.seed)
        self._model = transformer.Transformer(job.model, job.train.dtype, job.train.remat, job.attention)
        self._optimizer = optimizer.make(job.train)
        self._step = step.make(self._model, self._optimizer, job.train, self._key, job.layout)
        self._schedule = optimizer.learning_rate(job.train)
        self._metrics_path = job.directory / directory.METRICS_NAME
        self._writer = checkpoint.Writer(
            directory=job.directory,
            model=job.model,
            train=job.train,
            manifest=job.data.manifest,
            weights_dtype=job.weights_dtype,
            attention=job.attention,
        )
        self._store = checkpoint.StateStore(job.directory)
        self._saving: int | None = None
        self.tells = jax.process_index() == 0
        self._best = math.inf
        self._seconds, self._timed = 0.0, 0

    def begin(self, resume_at: int | None) -> step.TrainState:
        """Returns the state to begin with, and brings the metrics, the weights and the links to its step."""
        state = step.init_on(self._job.layout, self._model, self._optimizer, self._key)
        if resume_at is not None:
            state = self._store.restore(resume_at, state, self._job.layout)
        at = int(state.step)
        if self.tells:
            metrics.truncate(self._metrics_path, at)
        self._best = metrics.best_loss(self._metrics_path, at)
        if at:
            if not self._writer.has(at):  # the run was killed between the state and its weights
                params = self._job.layout.fetch(state.params)
                if self.tells:
                    self._writer.write(at, params, latest=False, best=False)
            if self.tells:
                self._writer.rewind(at, metrics.best_step(self._metrics_path, at))
        return state

    def take_step(self, state: step.TrainState, at: int) -> step.TrainState:
        """Takes a step and logs it where it is due."""
        train = self._job.train
        began = time.perf_counter()
        length = self._job.model.max_seq_len
        batch = self._job.data.batch_at(at - 1, seed=train.seed, batch_size=train.batch_size, length=length)
        state, measured = self._step(state, self._job.layout.rows(batch))
        value = _require_finite("loss", float(measured.loss), at)
        if math.isnan(float(measured.gradient_norm)):  # an infinite one is clipped
            _require_finite("the gradient's norm", math.nan, at)
        self._seconds, self._timed = self._seconds + time.perf_counter() - began, self._timed + 1
        rate = self._timed * train.batch_size * length / self._seconds
        self._report.progress(at, value, rate)
        if _every(at, train.log_every) or at == train.steps:
            learning_rate = float(jnp.asarray(self._schedule(at - 1)))
            timing = {"milliseconds": 1e3 * self._seconds / self._timed, "tokens_per_second": rate}
            line = {"step": at, **metrics.describe_step(measured), "learning_rate": learning_rate, **timing}
            if (share := self._job.utilisation(rate)) is not None:
                line["utilisation"] = share
            self._tell(line, metrics.format_step(line))
            self._seconds, self._timed = 0.0, 0
        return state

    def is_checkpoint(self, at: int) -> bool:
        """Whether a step's state is kept whatever happens."""
        return at == self._job.train.steps or _every(at, self._job.train.ckpt_every)

    def is_evaluated(self, at: int) -> bool:
        """Whether an evaluation follows a step."""
        return self.is_checkpoint(at) or _every(at, self._job.train.eval_every)

    def owes_evaluation(self, at: int) -> bool:
        """Whether the evaluation that follows a step was cut short."""
        is_owed = self.is_evaluated(at) and not metrics.is_evaluated(self._metrics_path, at)
        return at > 0 and _any_process(self.tells and is_owed)

    def is_told_to_stop(self) -> bool:
        """Whether to stop after the step under way."""
        return _any_process(self._report.stops())

    def evaluate(self, state: step.TrainState, at: int) -> tuple[bool, bool]:
        """Scores the validation split.

        Returns:
            Whether no step before had a lower loss, and whether to stop; then the first is False and nothing was noted.
        """
        job = self._job

        def heed() -> None:
            if self.is_told_to_stop():
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
                put=job.layout.rows,
                before_batch=heed,
            )
        except _StopError:
            return False, True
        _require_finite("validation loss", scored.loss, at)
        line = {"step": at, **metrics.describe_score(scored)}
        self._tell(line, metrics.format_evaluation(line))
        is_best, self._best = scored.loss < self._best, min(scored.loss, self._best)
        return is_best, False

    def save(self, state: step.TrainState, at: int, *, latest: bool, best: bool) -> None:
        """Saves a step's weights, and in the background its state where training can resume from there.

        ``latest`` is pointed at the step by ``finish_save``, so that whatever it names can be resumed.
        """
        self.finish_save(wait=True)
        self._job.require_same_directory()
        with checkpoint.saving(at):
            if latest:
                self._store.save(state)
            params = self._job.layout.fetch(state.params)
            if self.tells:
                self._writer.write(at, params, latest=False, best=best)
        if latest:
            self._saving = at

    def finish_save(self, *, wait: bool) -> None:
        """Points ``latest`` at the step whose state was being saved, if that is complete or ``wait`` is set."""
        if self._saving is None or not (wait or self._store.is_complete()):
            return
        at, self._saving = self._saving, None
        with checkpoint.saving(at):
            self._store.wait()
            if self.tells:
                self._writer.link_latest(at)
        if self.tells:
            self._report.saved(at)

    def close(self) -> None:
        """Finishes a save under way and closes the store."""
        try:
            self.finish_save(wait=True)
        finally:
            self._store.close()

    def _tell(self, line: dict[str, Any], text: str) -> None:
        if self.tells:
            self._job.require_same_directory()
            metrics.append(self._metrics_path, line)
            self._report.metrics(line)
            self._report.line(text)


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
