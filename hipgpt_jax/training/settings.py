"""What a run was begun with, kept beside it from its first moment, so that it cannot go on with anything else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hipgpt_jax import config, files, training_config
from hipgpt_jax.runs import directory
from hipgpt_jax.training import checkpoint, optimizer

# What is told and kept of a run, and how its work is spread: none of it changes its numbers.
_FREE = frozenset({"log_every", "eval_every", "eval_batches", "sample_every", "ckpt_every", "keep_last", "remat"})
_HORIZON = "steps"


def begin(run_directory: Path, model: config.ModelConfig, train: training_config.TrainConfig) -> None:
    """Notes what a run begins with."""
    files.write_json(run_directory / directory.SETTINGS_NAME, {**_sections(model, train), "extended": []})


def require_same(
    run_directory: Path, model: config.ModelConfig, train: training_config.TrainConfig, *, extend: bool
) -> str | None:
    """Holds the settings of a resumed run against those it was begun with.

    Args:
        run_directory: The run.
        model: Shape of the model now.
        train: How it is to be trained now.
        extend: Whether the run may have more steps than it was begun with, which stretches the schedule.

    Returns:
        What an extension changes, or None where nothing changes.

    Raises:
        ValueError: A setting that changes the numbers differs, the run has no settings that can be read,
            or it is longer than it was and ``extend`` is not set.
    """
    old = _read(run_directory)
    differences = [
        f"{key} {value} (the run has {old[section].get(key)})"
        for section, values in _sections(model, train).items()
        for key, value in values.items()
        if key not in _FREE and key != _HORIZON and old[section].get(key, _default(key)) != value
    ]
    if differences:
        raise ValueError(
            f"cannot resume run {run_directory.name!r} with other settings: {', '.join(differences)}. "
            f"Give the run's own, or --reset to start anew"
        )
    before = old["training"].get(_HORIZON)
    if before == train.steps:
        return None
    if not isinstance(before, int) or train.steps < before:
        raise ValueError(
            f"run {run_directory.name!r} was begun with --steps {before}: {train.steps} cannot cut it short"
        )
    if not extend:
        raise ValueError(
            f"run {run_directory.name!r} was begun with --steps {before}, where its schedule ends: {train.steps} need "
            f"--extend, which stretches the schedule, and so changes the learning rate of every step to come"
        )
    at = min(before, directory.read_checkpoint(run_directory.name).step)
    old_rate, new_rate = (
        float(jnp.asarray(optimizer.learning_rate(dataclasses.replace(train, steps=steps))(at)))
        for steps in (before, train.steps)
    )
    return (
        f"extended from {before} to {train.steps} steps: the schedule now ends at step {train.steps}, and after step "
        f"{at} the learning rate is {new_rate:.3g} instead of {old_rate:.3g}"
    )


def extend(run_directory: Path, train: training_config.TrainConfig) -> None:
    """Notes that a run has more steps from its latest checkpoint on than it was begun with."""
    old = _read(run_directory)
    before = old["training"][_HORIZON]
    at = directory.read_checkpoint(run_directory.name).step
    old["extended"] = [*old.get("extended", []), {"at": at, "from": before, "to": train.steps}]
    old["training"][_HORIZON] = train.steps
    files.write_json(run_directory / directory.SETTINGS_NAME, old)


def _sections(model: config.ModelConfig, train: training_config.TrainConfig) -> dict[str, dict[str, Any]]:
    return {"model": dataclasses.asdict(model), "training": checkpoint.training_section(train)}


def _default(key: str) -> Any:
    """The value of a setting that older versions did not know, and so did not write."""
    fields = {field.name: field.default for field in dataclasses.fields(training_config.TrainConfig)}
    return fields.get(key)


def _read(run_directory: Path) -> dict[str, Any]:
    """The settings of a run; those of its latest config where an older version began it."""
    path = run_directory / directory.SETTINGS_NAME
    if not path.is_file():
        path = run_directory / directory.LATEST_CONFIG
    if not path.is_file():
        raise ValueError(
            f"run {run_directory.name!r} has neither {directory.SETTINGS_NAME} nor {directory.LATEST_CONFIG}: what it "
            f"was begun with is not known. Use --reset to start it anew"
        )
    value = files.read_json(path)
    for section in ("model", "training"):
        if not isinstance(value.get(section), dict):
            raise ValueError(f"{path} must hold the section {section!r}: got {json.dumps(value.get(section))}")
    directory.require_known(path, value)
    return value
