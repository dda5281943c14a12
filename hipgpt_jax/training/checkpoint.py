"""Checkpoints: the weights and config that generation reads, and the state that training resumes from."""

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

from hipgpt_jax import config, files, json_files, training_config, version
from hipgpt_jax.model import mesh
from hipgpt_jax.runs import directory, initial, states, weights
from hipgpt_jax.text import manifest
from hipgpt_jax.training import train_step

KEPT_STATES = 2

_LATEST = (directory.LATEST_CHECKPOINT, directory.LATEST_CONFIG)
_BEST = (directory.BEST_CHECKPOINT, directory.BEST_CONFIG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointWriter:
    """Writes the weights and configs of a run's steps.

    Each file is on disk before another refers to it, so that a kill at any moment leaves a run that opens.

    Attributes:
        directory: The run's directory.
        model: Shape of the model.
        train: Settings of training.
        manifest: Description of the data.
        init_from: Checkpoint that training started from; None if it started from random weights.
        weights_dtype: Type of the weights on disk, one of ``training_config.WEIGHTS_DTYPES``.
        attention: Attention of ``transformer.Transformer``; a step with dropout uses ``xla`` whatever it is.
    """

    directory: Path
    model: config.ModelConfig
    train: training_config.TrainConfig
    manifest: manifest.Manifest
    init_from: initial.Initial | None
    weights_dtype: str
    attention: str

    def write(self, step: int, params: Any, *, best: bool) -> None:
        """Writes the weights and config of a step, links ``best`` to them if it is the best, and prunes older steps.

        Args:
            step: The step.
            params: Its parameters, on the host.
            best: Whether its validation loss is the lowest so far.
        """
        run = self.directory.name
        weights_path = self.directory / directory.weights_name(run, step)
        weights.write(weights_path, params, self.model, self.weights_dtype)
        json_files.write(self.directory / directory.config_name(run, step), self._describe(step, weights_path))
        if best:
            self._link(step, _BEST)
        self._prune(step)

    def link_latest(self, step: int) -> None:
        """Links ``latest`` to a step that was written, and prunes older steps."""
        self._link(step, _LATEST)
        self._prune(step)

    def rewind(self, step: int, best: int | None) -> None:
        """Moves the links back to the step that a run resumes from; files of later steps are overwritten in time.

        Args:
            step: The step, which was written.
            best: The step up to there that has the lowest validation loss, if any was evaluated.
        """
        self._link(step, _LATEST)
        if best is not None and self.has(best):
            self._link(best, _BEST)
        elif self._best_linked() > step:
            for name in _BEST:
                (self.directory / name).unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """Returns whether the weights and config of a step exist."""
        path = directory.config_path(self.directory, step)
        return path.is_file() and directory.weights_beside(path).is_file()

    def dtype_of(self, step: int) -> str | None:
        """Returns the type of a step's weights on disk; None if its config lacks it."""
        return json_files.read(directory.config_path(self.directory, step)).get("checkpoint", {}).get("dtype")

    def _link(self, step: int, names: tuple[str, str]) -> None:
        path = directory.config_path(self.directory, step)
        # The config last, because a run with ``latest_config.json`` counts as complete.
        files.link(self.directory / names[0], directory.weights_beside(path).name)
        files.link(self.directory / names[1], path.name)

    def _best_linked(self) -> int:
        """The step that ``best`` is linked to; -1 if there is none."""
        link = self.directory / directory.BEST_CONFIG
        match = re.search(r"_step(\d+)_config\.json$", link.readlink().name) if link.is_symlink() else None
        return int(match[1]) if match else -1

    def _describe(self, step: int, weights_path: Path) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.model),
            "tokenizer": {
                "path": manifest.TOKENIZER_NAME,
                "tokens_path": manifest.TOKENS_NAME,
                "sha256": files.sha256(self.directory / manifest.TOKENIZER_NAME),
            },
            "data": dataclasses.asdict(self.manifest),
            **initial.section(self.init_from),
            "training": {**training_section(self.train), "attention": self.attention},
            "checkpoint": {
                "latest": weights_path.name,
                "step": step,
                "dtype": self.weights_dtype,
                "sha256": files.sha256(weights_path),
            },
            "version": {"hipgpt_jax": version.__version__, "jax": jax.__version__},
        }

    def _prune(self, spare: int) -> None:
        """Removes all steps but the newest by number; keeps ``spare`` and the linked ones."""
        links = (self.directory / name for name in (directory.LATEST_CONFIG, directory.BEST_CONFIG))
        kept = {link.readlink().name for link in links if link.is_symlink()}
        kept.add(directory.config_path(self.directory, spare).name)
        found = list(directory.configs(self.directory).values())
        old = [path for paths in found[: -self.train.keep_last] for path in paths]
        # A step repeated after the directory was renamed has files of both names.
        superseded = [path for paths in found for path in paths[1:]]
        for path in {*old, *superseded}:
            if path.name not in kept:
                path.unlink()
                directory.weights_beside(path).unlink(missing_ok=True)


def training_section(train: training_config.TrainConfig) -> dict[str, Any]:
    """Returns the settings of training for a config file, with the final learning rate resolved."""
    return {**dataclasses.asdict(train), "min_lr": train.final_learning_rate}


@contextlib.contextmanager
def reporting_failure(step: int) -> Iterator[None]:
    """Raises OSError with advice in place of an error of the disk or of Orbax."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {step} could not be written: {error}. The run is as it was at its last complete "
            f"checkpoint; make room, or fix what is wrong, and continue with --resume"
        ) from error


class StateStore:
    """The training states of a run, saved in the background by Orbax; the newest two are kept.

    A state is complete once the digests of its files are on disk; see ``states``.
    """

    def __init__(self, run_directory: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_STATES, enable_async_checkpointing=True)
        self._run = run_directory
        path = (run_directory / directory.TRAIN_STATE_NAME).absolute()
        self._manager = ocp.CheckpointManager(path, options=options)
        # Orbax saves in the background, but its digests would not: reading 1.5 GB takes about a second.
        self._thread = futures.ThreadPoolExecutor(1, "training-state")

    def save(self, state: train_step.TrainState) -> "futures.Future[None]":
        """Starts to save a state under its step; it may be donated at once.

        Returns:
            A future that is done once the state is complete, or raises what prevented that.
        """
        step = int(state.step)
        self._manager.save(step, args=ocp.args.StandardSave(state._asdict()), force=True)
        return self._thread.submit(self._complete, step)

    def restore(self, step: int, like: train_step.TrainState, layout: mesh.Layout) -> train_step.TrainState:
        """Returns the state of a step, with the shapes and types of ``like`` and the shardings of ``layout``.

        It may have been saved from other devices. Its digests must have been checked, see ``states.find_intact``.

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
        except Exception as error:  # Orbax raises Exception itself, and passes on errors of TensorStore and JSON
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the training state {states.path_of(self._run, step)} cannot be read: {type(error).__name__}: {reason}"
            ) from error
        return train_step.TrainState(**restored)

    def close(self) -> None:
        """Waits for a save in progress, and closes Orbax's manager."""
        self._thread.shutdown()
        self._manager.close()

    def _complete(self, step: int) -> None:
        self._manager.wait_until_finished()
        # By now the files of all processes are on disk.
        if jax.process_index() == 0:
            states.write_digests(states.path_of(self._run, step))
            states.remove_damaged(self._run)
