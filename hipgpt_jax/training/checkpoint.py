"""Checkpoints: the weights and config that ``generate`` reads, and the state that training resumes from."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import safetensors

from hipgpt_jax import config, files, training_config, version
from hipgpt_jax.runs import directory, weights
from hipgpt_jax.text import dataset
from hipgpt_jax.training import mesh, step

KEPT_STATES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer:
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
    manifest: dataset.Manifest
    weights_dtype: str
    attention: str

    def write(self, at: int, params: Any, *, latest: bool, best: bool) -> None:
        """Writes a step, points ``latest`` or ``best`` or both at it, and prunes older steps.

        Args:
            at: The step.
            params: Its parameters, on the host.
            latest: Whether training can go on from here.
            best: Whether no step evaluated so far had a lower validation loss.
        """
        run = self.directory.name
        bin_path = self.directory / directory.weights_name(run, at)
        config_path = self.directory / directory.config_name(run, at)
        weights.write(bin_path, params, self.model, self.weights_dtype)
        files.write_json(config_path, self._describe(at, bin_path))
        for wanted, weights_link, config_link in (
            (latest, directory.LATEST_CHECKPOINT, directory.LATEST_CONFIG),
            (best, directory.BEST_CHECKPOINT, directory.BEST_CONFIG),
        ):
            if wanted:
                files.link(self.directory / weights_link, bin_path.name)
                files.link(self.directory / config_link, config_path.name)
        self._prune()

    def has(self, at: int) -> bool:
        """Returns whether a step's weights and config are there."""
        run = self.directory.name
        names = directory.weights_name(run, at), directory.config_name(run, at)
        return all((self.directory / name).is_file() for name in names)

    def _describe(self, at: int, bin_path: Path) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.model),
            "tokenizer": {
                "path": dataset.TOKENIZER_NAME,
                "tokens_path": dataset.TOKENS_NAME,
                "sha256": files.sha256(self.directory / dataset.TOKENIZER_NAME),
            },
            "data": dataclasses.asdict(self.manifest),
            "training": {**training_section(self.train), "attention": self.attention},
            "checkpoint": {
                "latest": bin_path.name,
                "step": at,
                "dtype": self.weights_dtype,
                "sha256": files.sha256(bin_path),
            },
            "version": {"hipgpt_jax": version.__version__, "jax": jax.__version__},
        }

    def _prune(self) -> None:
        """Removes all but the newest steps by number, and never one that a link names."""
        links = (self.directory / name for name in (directory.LATEST_CONFIG, directory.BEST_CONFIG))
        linked = {link.readlink().name for link in links if link.is_symlink()}
        run = self.directory.name
        for old in directory.steps(self.directory)[: -self.train.keep_last]:
            if directory.config_name(run, old) not in linked:
                (self.directory / directory.config_name(run, old)).unlink()
                (self.directory / directory.weights_name(run, old)).unlink(missing_ok=True)


def training_section(train: training_config.TrainConfig) -> dict[str, Any]:
    """Returns the settings of training as a config has them, no default left out."""
    return {**dataclasses.asdict(train), "min_lr": train.final_learning_rate}


@contextlib.contextmanager
def saving(at: int) -> Iterator[None]:
    """Turns what the disk refuses into one line: the run is as it was before."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {at} could not be written: {error}. The run is as it was at its last whole "
            f"checkpoint; make room, or mend what is wrong, and go on with --resume"
        ) from error


class StateStore:
    """The training state of a run, in Orbax: written in the background, whole or not there, the newest two kept."""

    def __init__(self, run_directory: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_STATES, enable_async_checkpointing=True)
        path = (run_directory / directory.TRAIN_STATE_NAME).absolute()
        self._manager = ocp.CheckpointManager(path, options=options)

    def save(self, state: step.TrainState) -> None:
        """Begins to save a state under its own step; the state may be given away at once."""
        self._manager.wait_until_finished()
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state._asdict()), force=True)

    def latest(self) -> int | None:
        """Returns the newest step that was saved whole."""
        return self._manager.latest_step()

    def restore(self, at: int, like: step.TrainState, layout: mesh.Layout) -> step.TrainState:
        """Returns the state of a step, with the shapes and types of ``like`` and laid out as ``layout`` says.

        Which devices it was saved from does not matter.
        """
        tree = like._asdict()
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, layout.of(tree)
        )
        restored: Any = self._manager.restore(at, args=ocp.args.StandardRestore(abstract))
        return step.TrainState(**restored)

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._manager.close()
