"""Start of a training run: new, resumed or replaced; locked and checked before anything is changed."""

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax import config, training_config
from hipgpt_jax.cli import program, train_flags, train_init, train_report
from hipgpt_jax.runs import directory, initial, lock, reset, states
from hipgpt_jax.text import documents, manifest, preparation, tokenizer

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_flags(train: training_config.TrainConfig) -> None:
    """Raises ValueError for flags that contradict each other or would fail only later."""
    if train_flags.RESET.value and train_flags.RESUME.value:
        raise ValueError("--reset replaces the run and --resume continues it: give one of them")
    if train_flags.EXTEND.value and not train_flags.RESUME.value:
        raise ValueError("--extend needs --resume: it extends a run beyond its original --steps")
    if train_flags.RESUME.value and train_flags.RUN_NAME.value is None:
        raise ValueError("--resume needs --run-name, the run to continue")
    if train_flags.RUN_NAME.value is not None:
        directory.new(train_flags.RUN_NAME.value, train.steps)
    if train_flags.FLAGS["sample-prompt"].present and not train.sample_every:
        raise ValueError("--sample-prompt needs --sample-every, the steps between the samples")
    if train.sample_every:
        config.require_text("--sample-prompt", train_flags.SAMPLE_PROMPT.value)
    if train_flags.TENSORBOARD.value:
        from hipgpt_jax.training import tensorboard

        tensorboard.require()


@contextlib.contextmanager
def open_run(base: train_init.Base | None) -> Iterator["Start"]:
    """Yields the run that the flags describe, locked until the end of the block.

    If the block raises before a new run has its first checkpoint, the run that it replaced is restored.

    Args:
        base: What the run takes over from another one, if from any.

    Raises:
        ValueError: Another process trains the run, the flags do not allow to start or resume it, or its data or
            training states are invalid.
        OSError: Its directory cannot be written, or there is nothing to resume.
    """
    with _lock() as (run_directory, held):
        if line := reset.recover(run_directory):
            program.note(line)
            held.lock_directory(run_directory)
        start = Start(run_directory, held, base)
        try:
            yield start
        except BaseException as error:
            start.restore_replaced_run()
            if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
                raise OSError(f"{run_directory} cannot be written: {error.strerror}. Free some space") from error
            raise


@contextlib.contextmanager
def _lock() -> Iterator[tuple[Path, lock.Lock]]:
    """Yields the run's directory and its lock; a run without a name gets a unique one."""
    if train_flags.RUN_NAME.value is not None:
        run_directory = directory.new(train_flags.RUN_NAME.value, train_flags.FLAGS.steps)
        with lock.Lock(run_directory) as held:
            yield run_directory, held
        return
    stem = time.strftime("run_%Y%m%d-%H%M%S")
    for name in itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2))):
        run_directory = directory.CHECKPOINTS / name
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(lock.Lock(run_directory))
            except lock.HeldError:
                continue
            if not os.path.lexists(run_directory):
                yield run_directory, held
                return


class Start:
    """A run that is locked and has passed the checks.

    Attributes:
        directory: The run's directory.
        held: Its lock.
        resume_step: Step of the training state to resume from; None starts at the first step.
    """

    def __init__(self, run_directory: Path, held: lock.Lock, base: train_init.Base | None) -> None:
        self._base = base
        self.directory = run_directory
        self.held = held
        self.resume_step: int | None = None
        if train_flags.RESUME.value:
            self._check_resumed()
        else:
            self._check_new()

    def prepare(self, length: int) -> None:
        """Prepares the data of a new run beside it, and moves it into place once it is complete.

        Args:
            length: Context length, which the data must fill.
        """
        if train_flags.RESUME.value:
            return
        fresh = directory.beside(self.directory, "new")
        try:
            fresh.mkdir(exist_ok=True)
            reset.remove_temporaries(fresh)
        except OSError as error:
            raise OSError(f"{fresh}, where the data is prepared, cannot be created: {error.strerror}") from error
        try:
            with train_report.preparing() as progress:
                data = preparation.prepare(fresh, **self._sources(), progress=progress, note=program.note)
            data.check_length(length)
            _check_prompt(fresh)
        except BaseException:
            reset.remove(fresh)
            raise
        reset.replace(self.directory)
        self.held.lock_directory(self.directory)

    def save_settings(
        self, model: config.ModelConfig, train: training_config.TrainConfig, init_from: initial.Initial | None
    ) -> None:
        """Writes the settings of a new run, or checks the flags against those of a resumed one."""
        from hipgpt_jax.training import resume

        if not train_flags.RESUME.value:
            resume.write_settings(self.directory, model, train, init_from)
            return
        step = self.resume_step or 0
        for line in resume.check_settings(self.directory, model, train, step=step, extend=train_flags.EXTEND.value):
            program.note(line)
        states.set_damaged_aside(self.directory, self.resume_step)
        resume.extend(self.directory, train, step)

    def delete_replaced_run(self, step: int) -> None:
        """Deletes the run that this one replaced; called when this one has a checkpoint."""
        if problem := reset.finish(self.directory):
            program.note(f"step {step} is saved, but the replaced run could not be deleted: {problem}")

    def restore_replaced_run(self) -> None:
        """Restores the run that this one replaced, if this one has no checkpoint yet."""
        try:
            line = reset.recover(self.directory)
        except (OSError, ValueError) as error:
            line = f"the replaced run could not be restored: {error}"
        if line:
            program.note(line)

    def _check_new(self) -> None:
        """Raises an error if a new run cannot be started, or if --reset would delete anything but a run."""
        here = self.directory
        has_checkpoint = directory.has_checkpoint(here)
        if has_checkpoint and not train_flags.RESET.value:
            if (here / manifest.MANIFEST_NAME).is_file():
                preparation.check_same_data(here, **self._sources())
            raise ValueError(f"run {here.name!r} exists already: --resume continues it, --reset replaces it")
        if here.is_dir():
            # --reset moves the whole directory aside and deletes it later, so it must hold nothing but a run.
            if other := reset.find_foreign(here):
                raise ValueError(
                    f"{here} contains files that no run writes, such as {other.relative_to(here)}: move them, or give "
                    f"another --run-name"
                )
            if not has_checkpoint and not reset.is_leftover(here):
                raise ValueError(f"{here} exists and is not a run: give another --run-name")
            if os.path.ismount(os.path.realpath(here)):
                raise ValueError(f"{here} is a mount point, which cannot be replaced: mount the directory above it")
            reset.check_writable(here)
        if os.path.lexists(old := directory.beside(here, "old")):
            raise ValueError(f"{old} exists, where --reset keeps the old run until the new one is saved: move it away")
        found = documents.find(self._sources()["sources"])
        if train_flags.FLAGS["text-field"].present and not any(file.format.has_fields for file in found):
            raise ValueError("--text-field names a field of .jsonl, .csv and .parquet files: --data-path has none")
        reset.check_outside(here, self._files())

    def _check_resumed(self) -> None:
        """Raises an error if the run cannot be resumed; finds the state to resume from and removes leftovers."""
        here = self.directory
        if not directory.can_resume(here):
            raise FileNotFoundError(f"run {here.name!r} has nothing to resume in {here.parent}/")
        reset.check_writable(here)
        if (here / manifest.MANIFEST_NAME).is_file():
            missing = [path for path in train_flags.DATA_PATH.value if not Path(path).exists()]
            if missing:
                program.note(f"{missing[0]} does not exist and is not compared: resuming with the run's own tokens")
            else:
                # The tokenizer of a run with initial weights is theirs, whatever the flags are.
                preparation.check_same_data(here, **self._sources(), compare_tokenizer=self._base is None)
        _check_prompt(here)
        self.resume_step, lines = states.find_intact(here)
        if self.resume_step is None:
            self._check_unsaved()
            lines = ["no training state was saved yet: starting at the first step"]
        for line in lines:
            program.note(line)
        reset.remove_temporaries(here)
        reset.remove(directory.beside(here, "new"))

    def _check_unsaved(self) -> None:
        """Raises ValueError if the run has lost its training state: ``latest`` exists only if there was one."""
        here = self.directory
        if os.path.lexists(here / directory.LATEST_CONFIG):
            if not (here / manifest.MANIFEST_NAME).is_file():
                raise ValueError(
                    f"run {here.name!r} has weights, but neither training data nor a training state, like every run "
                    f"of hipgpt-import: it cannot be resumed"
                )
            steps = directory.steps(here)
            raise ValueError(
                f"run {here.name!r} has weights{f' of step {steps[-1]}' if steps else ''} but no training state with "
                f"digests in {here / directory.TRAIN_STATE_NAME}: it cannot be resumed. Restore that from a copy, or "
                f"replace the run with --reset"
            )

    def _sources(self) -> dict[str, Any]:
        """Returns the arguments of ``preparation.prepare`` and ``preparation.check_same_data``."""
        given = train_flags.TOKENIZER_PATH.value
        own: dict[str, Any] = {"tokenizer_path": None if given is None else Path(given)}
        if self._base:
            own = {"tokenizer_path": self._base.tokenizer, "end_id": self._base.end_id}
        return {
            "sources": [Path(path) for path in train_flags.DATA_PATH.value],
            "vocab_size": train_flags.FLAGS["vocab-size"].value,
            "text_field": train_flags.TEXT_FIELD.value,
            **own,
        }

    def _files(self) -> list[Path]:
        """Returns the input files of a new run."""
        sources = self._sources()
        given = [file.path for file in documents.find(sources["sources"])]
        return given if sources["tokenizer_path"] is None else [*given, sources["tokenizer_path"]]


def _check_prompt(where: Path) -> None:
    if train_flags.FLAGS["sample-every"].value and (where / manifest.TOKENIZER_NAME).is_file():
        vocabulary = tokenizer.Tokenizer.load(where / manifest.TOKENIZER_NAME)
        if not vocabulary.encode(train_flags.SAMPLE_PROMPT.value):
            raise ValueError(
                f"--sample-prompt {train_flags.SAMPLE_PROMPT.value!r} has no tokens in the run's vocabulary"
            )
