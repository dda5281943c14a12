"""Checkpoints: the weights and config that ``generate`` reads, and the state that training resumes from."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import safetensors

from hipgpt_jax import config, files, training_config, version
from hipgpt_jax.runs import directory, states, weights
from hipgpt_jax.text import manifest
from hipgpt_jax.training import mesh, train_step

KEPT_STATES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointWriter:
    """Writes the weights and config of steps of one run.

    Each file is on disk before anything names it, so a kill at any moment leaves a run that opens.

    Attributes:
        directory: The run's directory.
        model: Shape of the model.
        train: How it is trained.
        manifest: The data it is trained on.
        weights_dtype: Of the ``.bin`` files.
        attention: As of ``transformer.Transformer``; a step with dropout takes ``xla`` whatever it is.
    """

    directory: Path
    model: config.ModelConfig
    train: training_config.TrainConfig
    manifest: manifest.Manifest
    weights_dtype: str
    attention: str

    def write(self, step: int, params: Any, *, latest: bool, best: bool) -> None:
        """Writes a step, points ``latest`` or ``best`` or both at it, and prunes older steps.

        Args:
            step: The step.
            params: Its parameters, on the host.
            latest: Whether training can resume from here already, its state being complete.
            best: Whether no step evaluated so far had a lower validation loss.
        """
        run = self.directory.name
        bin_path = self.directory / directory.weights_name(run, step)
        weights.write(bin_path, params, self.model, self.weights_dtype)
        files.write_json(self.directory / directory.config_name(run, step), self._describe(step, bin_path))
        if latest:
            self._link(step, directory.LATEST_CHECKPOINT, directory.LATEST_CONFIG)
        if best:
            self._link(step, directory.BEST_CHECKPOINT, directory.BEST_CONFIG)
        self._prune(spare=step)

    def link_latest(self, step: int) -> None:
        """Points ``latest`` at a step that was written, and prunes older steps."""
        self._link(step, directory.LATEST_CHECKPOINT, directory.LATEST_CONFIG)
        self._prune(spare=step)

    def rewind(self, step: int, best: int | None) -> None:
        """Points the links at steps up to the one that a run resumes from.

        The files of later steps stay; they are written again when the run has come there.

        Args:
            step: The step, whose weights are there.
            best: The step up to there that has the lowest validation loss.
        """
        self._link(step, directory.LATEST_CHECKPOINT, directory.LATEST_CONFIG)
        if best is not None and self.has(best):
            self._link(best, directory.BEST_CHECKPOINT, directory.BEST_CONFIG)
        elif self._best_linked() > step:
            for name in (directory.BEST_CHECKPOINT, directory.BEST_CONFIG):
                (self.directory / name).unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """Returns whether a step's weights and config are there."""
        path = directory.config_path(self.directory, step)
        return path.is_file() and directory.weights_beside(path).is_file()

    def _link(self, step: int, weights_link: str, config_link: str) -> None:
        path = directory.config_path(self.directory, step)
        files.link(self.directory / weights_link, directory.weights_beside(path).name)
        files.link(self.directory / config_link, path.name)

    def _best_linked(self) -> int:
        """The step that ``best`` names; -1 where there is none."""
        link = self.directory / directory.BEST_CONFIG
        match = re.search(r"_step(\d+)_config\.json$", link.readlink().name) if link.is_symlink() else None
        return int(match[1]) if match else -1

    def _describe(self, step: int, bin_path: Path) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.model),
            "tokenizer": {
                "path": manifest.TOKENIZER_NAME,
                "tokens_path": manifest.TOKENS_NAME,
                "sha256": files.sha256(self.directory / manifest.TOKENIZER_NAME),
            },
            "data": dataclasses.asdict(self.manifest),
            "training": {**training_section(self.train), "attention": self.attention},
            "checkpoint": {
                "latest": bin_path.name,
                "step": step,
                "dtype": self.weights_dtype,
                "sha256": files.sha256(bin_path),
            },
            "version": {"hipgpt_jax": version.__version__, "jax": jax.__version__},
        }

    def _prune(self, spare: int) -> None:
        """Removes all but the newest steps by number, and never ``spare`` or one that a link names.

        A step that was taken again after the directory was renamed has files of both names; the older are removed.
        """
        links = (self.directory / name for name in (directory.LATEST_CONFIG, directory.BEST_CONFIG))
        kept = {link.readlink().name for link in links if link.is_symlink()}
        kept.add(directory.config_path(self.directory, spare).name)
        found = list(directory.configs(self.directory).values())
        old = [path for paths in found[: -self.train.keep_last] for path in paths]
        superseded = [path for paths in found for path in paths[1:]]
        for path in {*old, *superseded}:
            if path.name not in kept:
                path.unlink()
                directory.weights_beside(path).unlink(missing_ok=True)


def training_section(train: training_config.TrainConfig) -> dict[str, Any]:
    """Returns the settings of training as a config has them, no default left out."""
    return {**dataclasses.asdict(train), "min_lr": train.final_learning_rate}


@contextlib.contextmanager
def saving(step: int) -> Iterator[None]:
    """Turns what the disk refuses into one line: the run is as it was before."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {step} could not be written: {error}. The run is as it was at its last whole "
            f"checkpoint; make room, or mend what is wrong, and go on with --resume"
        ) from error


class StateStore:
    """The training states of a run, in Orbax: saved in the background, complete or absent, the newest two kept.

    A state is complete once the digests of its files are on disk; see ``states``.
    """

    def __init__(self, run_directory: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_STATES, enable_async_checkpointing=True)
        self._run = run_directory
        path = (run_directory / directory.TRAIN_STATE_NAME).absolute()
        self._manager = ocp.CheckpointManager(path, options=options)
        self._thread = futures.ThreadPoolExecutor(1, "training-state")
        self._saving: futures.Future[None] | None = None

    def save(self, state: train_step.TrainState) -> None:
        """Begins to save a state under its own step; the state may be donated at once."""
        self.wait()
        step = int(state.step)
        self._manager.save(step, args=ocp.args.StandardSave(state._asdict()), force=True)
        self._saving = self._thread.submit(self._complete, step)

    def restore(self, step: int, like: train_step.TrainState, layout: mesh.Layout) -> train_step.TrainState:
        """Returns the state of a step, with the shapes and types of ``like`` and the sharding of ``layout``.

        The devices that it was saved from do not matter. Compare it with its digests first, see ``states.find_intact``.

        Raises:
            ValueError: Orbax cannot read it.
        """
        tree = like._asdict()
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            layout.shardings_for(tree),
        )
        try:
            restored: Any = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises Exception itself, and what TensorStore and JSON raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the training state {states.path_of(self._run, step)} cannot be read: {type(error).__name__}: {reason}"
            ) from error
        return train_step.TrainState(**restored)

    def is_complete(self) -> bool:
        """Returns whether nothing is being saved any more, be it for an error."""
        return self._saving is None or self._saving.done()

    def wait(self) -> None:
        """Returns when the state being saved is complete; raises what kept it from that."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits, and closes Orbax's manager."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def _complete(self, step: int) -> None:
        """Waits for Orbax, on a thread of its own: reading 1.5 GB for the digests takes about a second."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:  # by then the files of the other processes are on disk too
            states.write_digests(states.path_of(self._run, step))
            states.remove_damaged(self._run)
