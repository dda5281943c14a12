"""Checkpoints: the weights and config that ``generate`` reads, and the state that training resumes from."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hipgpt_jax import config, files, version
from hipgpt_jax.runs import directory, weights
from hipgpt_jax.text import dataset
from hipgpt_jax.training import step

# Settings that change what is told and kept of a run, not its numbers.
_FREE = frozenset({"log_every", "eval_every", "eval_batches", "ckpt_every", "keep_last"})


def write(
    run_directory: Path,
    state: step.TrainState,
    model: config.ModelConfig,
    train: config.TrainConfig,
    manifest: dataset.Manifest,
    *,
    weights_dtype: str,
) -> None:
    """Writes the weights and config of a step, points ``latest`` at them, and prunes older steps.

    Each file is on disk before anything names it, so a kill at any moment leaves a run that opens.
    """
    run, at = run_directory.name, int(state.step)
    bin_path = run_directory / directory.weights_name(run, at)
    weights.write(bin_path, state.params, model, weights_dtype)
    config_path = run_directory / directory.config_name(run, at)
    files.write_json(
        config_path,
        {
            "model": dataclasses.asdict(model),
            "tokenizer": {
                "path": dataset.TOKENIZER_NAME,
                "tokens_path": dataset.TOKENS_NAME,
                "sha256": files.sha256(run_directory / dataset.TOKENIZER_NAME),
            },
            "data": dataclasses.asdict(manifest),
            "training": _training_section(train),
            "checkpoint": {
                "latest": bin_path.name,
                "step": at,
                "dtype": weights_dtype,
                "sha256": files.sha256(bin_path),
            },
            "version": {"hipgpt_jax": version.__version__, "jax": jax.__version__},
        },
    )
    files.link(run_directory / directory.LATEST_CHECKPOINT, bin_path.name)
    files.link(run_directory / directory.LATEST_CONFIG, config_path.name)
    _prune(run_directory, train.keep_last, at)


def _prune(run_directory: Path, keep_last: int, latest: int) -> None:
    """Removes all but the newest checkpoints by step number, never the latest one written."""
    for old in directory.steps(run_directory)[:-keep_last]:
        if old != latest:
            (run_directory / directory.config_name(run_directory.name, old)).unlink()
            (run_directory / directory.weights_name(run_directory.name, old)).unlink(missing_ok=True)


def require_same(run_directory: Path, model: config.ModelConfig, train: config.TrainConfig) -> None:
    """Raises ValueError where a run cannot go on with these settings, which would change its numbers."""
    path = run_directory / directory.LATEST_CONFIG
    if not path.is_file():
        return
    old = files.read_json(path)
    new = {"model": dataclasses.asdict(model), "training": _training_section(train)}
    differences = [
        f"{key} {value} (the run has {_setting(old, section, key)})"
        for section, values in new.items()
        for key, value in values.items()
        if key not in _FREE and _setting(old, section, key) != value
    ]
    if differences:
        raise ValueError(
            f"cannot resume run {run_directory.name!r} with other settings: {', '.join(differences)}. "
            f"Give the run's own, or --reset to start anew"
        )


def _setting(value: dict[str, Any], section: str, key: str) -> Any:
    part = value.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _training_section(train: config.TrainConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(train), "min_lr": train.final_learning_rate}


class StateStore:
    """The training state of a run, in Orbax."""

    def __init__(self, run_directory: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        path = (run_directory / directory.TRAIN_STATE_NAME).absolute()
        self._manager = ocp.CheckpointManager(path, options=options)

    def save(self, state: step.TrainState) -> None:
        """Saves a state under its own step."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state._asdict()), force=True)

    def latest(self) -> int | None:
        """Returns the newest step that was saved whole."""
        return self._manager.latest_step()

    def restore(self, at: int, like: step.TrainState) -> step.TrainState:
        """Returns the state of a step, with the shapes, types and devices of ``like``."""
        abstract = jax.tree.map(functools.partial(ocp.utils.to_shape_dtype_struct), like._asdict())
        restored: Any = self._manager.restore(at, args=ocp.args.StandardRestore(abstract))
        return step.TrainState(**restored)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()
