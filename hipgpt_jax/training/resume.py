"""Comparison of the settings of a resumed run with those that it was started with."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hipgpt_jax import config, files, json_files, numerics, training_config
from hipgpt_jax.runs import directory, initial, settings
from hipgpt_jax.training import checkpoint, optimizer

# Settings of logging, evaluation and retention, which do not change the weights.
_FREE = frozenset({"log_every", "eval_every", "eval_batches", "patience", "sample_every", "ckpt_every", "keep_last"})
# Settings that may change with a note: the number of steps with --extend, and --remat, which changes only rounding.
_NOTED = frozenset({"steps", "remat"})


def write_settings(
    run_directory: Path,
    model: config.ModelConfig,
    train: training_config.TrainConfig,
    init_from: initial.Initial | None = None,
) -> None:
    """Writes the settings of a new run, and the hardware and software that the last bits of its weights depend on."""
    value = {**_sections(model, train), **initial.section(init_from), "numerics": _numerics(), "extended": []}
    json_files.write(run_directory / directory.SETTINGS_NAME, value)


def check_settings(
    run_directory: Path, model: config.ModelConfig, train: training_config.TrainConfig, *, step: int, extend: bool
) -> list[str]:
    """Compares the settings of a resumed run with its own.

    Args:
        run_directory: The run.
        model: Shape of the model now.
        train: Settings of training now.
        step: The step that it resumes from.
        extend: Whether the run may get more steps, which stretches the schedule.

    Returns:
        A note for each allowed difference that changes the weights.

    Raises:
        ValueError: A setting that changes the weights differs, the settings of the run cannot be read, or there are
            more steps and ``extend`` is False.
    """
    saved = settings.read(run_directory)
    differences = [
        f"{key} {value} (the run has {_short(saved[section].get(key))})"
        for section, values in _sections(model, train).items()
        for key, value in values.items()
        if key not in _FREE | _NOTED and saved[section].get(key) != value
    ]
    if differences:
        raise ValueError(
            f"cannot resume run {run_directory.name!r} with other settings: {', '.join(differences)}. "
            f"Repeat the flags that the run was started with, such as its --flagfile"
        )
    notes = _note_numerics(saved["numerics"])
    if saved["training"]["remat"] != train.remat:
        notes.append(
            f"the run was started {'without' if train.remat else 'with'} --remat: its results will be equal within "
            f"rounding, but not to the last bit"
        )
    notes += [
        f"the run was extended to {change['to']} steps at step {change['at']}: steps {step + 1} to {change['at']} are "
        f"repeated with the longer schedule, and give other weights than the first time"
        for change in saved["extended"]
        if change["at"] > step
    ]
    steps = saved["training"]["steps"]
    if steps == train.steps:
        return notes
    if train.steps < steps:
        raise ValueError(
            f"run {run_directory.name!r} was started with --steps {steps}: {train.steps} cannot cut it short"
        )
    if not extend:
        raise ValueError(
            f"run {run_directory.name!r} was started with --steps {steps}, and --steps is {train.steps} now: repeat "
            f"--steps {steps}, or give --extend, which stretches the schedule and changes every learning rate to come"
        )
    # Its next checkpoint would replace one that this version may not be able to read.
    if (run_directory / directory.LATEST_CONFIG).is_file():
        directory.read_checkpoint(run_directory.name, directory=run_directory)
    return [*notes, _describe_extension(train, steps, min(steps, step))]


def extend(run_directory: Path, train: training_config.TrainConfig, step: int) -> None:
    """Records the number of steps of a resumed run, and where it changed.

    Args:
        run_directory: The run.
        train: Settings of training now.
        step: The step that it resumes from. Earlier extensions at later steps take effect here too.
    """
    saved = settings.read(run_directory)
    steps, changes = saved["training"]["steps"], saved["extended"]
    if steps == train.steps and all(change["at"] <= step for change in changes):
        return
    saved["extended"] = [{**change, "at": min(change["at"], step)} for change in changes]
    if steps != train.steps:
        saved["extended"].append({"at": step, "from": steps, "to": train.steps})
    saved["training"]["steps"] = train.steps
    json_files.write(run_directory / directory.SETTINGS_NAME, saved)


def _sections(model: config.ModelConfig, train: training_config.TrainConfig) -> dict[str, dict[str, Any]]:
    return {"model": dataclasses.asdict(model), "training": checkpoint.training_section(train)}


def _numerics() -> dict[str, Any]:
    """Returns the hardware and software that the last bits of weights depend on; JAX has started."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processor": numerics.processor(),
        "instruction_sets": list(numerics.instruction_sets()),
        # XLA splits reductions among the cores, so their number changes the order of sums.
        "cores": numerics.cores(),
        "jax": jax.__version__,
        "xla_flags": numerics.xla_flags(),
        "environment": list(numerics.environment()),
    }


def _note_numerics(saved: dict[str, Any]) -> list[str]:
    changes = [
        f"{name} {_short(now)} (it was {_short(saved.get(name))})"
        for name, now in _numerics().items()
        if saved.get(name) != now
    ]
    if not changes:
        return []
    return [
        f"the run was started with other numerics: {', '.join(changes)}. Its weights will equal those of the "
        f"uninterrupted run within rounding, but not to the last bit"
    ]


def _describe_extension(train: training_config.TrainConfig, steps: int, step: int) -> str:
    schedules = (optimizer.learning_rate(dataclasses.replace(train, steps=end)) for end in (steps, train.steps))
    old_rate, new_rate = (float(jnp.asarray(schedule(step))) for schedule in schedules)
    return (
        f"extended from {steps} to {train.steps} steps: the schedule now ends at step {train.steps}, and after step "
        f"{step} the learning rate is {new_rate:.3g} instead of {old_rate:.3g}"
    )


def _short(value: Any) -> str:
    return files.shortened(str(value), 60)
