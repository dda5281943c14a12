"""``settings.json``: what a run was begun with, so that it is not resumed with other settings by mistake."""

import dataclasses
from pathlib import Path
from typing import Any

import fastjsonschema
import jax
import jax.numpy as jnp

from hipgpt_jax import config, files, numerics, training_config
from hipgpt_jax.runs import directory
from hipgpt_jax.training import checkpoint, optimizer

# Settings of the log and of what is kept of a run, which do not enter its numbers.
_FREE = frozenset({"log_every", "eval_every", "eval_batches", "sample_every", "ckpt_every", "keep_last"})
_HORIZON = "steps"
_REMAT = "remat"

_SECTION = {"type": "object"}
_COUNT = {"type": "integer", "minimum": 0}
_validate = fastjsonschema.compile(
    {
        "type": "object",
        "required": ["model", "training"],
        "properties": {
            "model": _SECTION,
            "training": {
                "type": "object",
                "required": [_HORIZON],
                "properties": {_HORIZON: _COUNT, _REMAT: {"type": "boolean"}},
            },
            "numerics": _SECTION,
            "extended": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["at", "from", "to"],
                    "properties": {"at": _COUNT, "from": _COUNT, "to": _COUNT},
                },
            },
        },
    }
)


def write_settings(run_directory: Path, model: config.ModelConfig, train: training_config.TrainConfig) -> None:
    """Writes the settings of a new run, and the hardware and software that its last bits depend on."""
    value = {**_sections(model, train), "numerics": _numerics(), "extended": []}
    files.write_json(run_directory / directory.SETTINGS_NAME, value)


def check_settings(
    run_directory: Path, model: config.ModelConfig, train: training_config.TrainConfig, *, step: int, extend: bool
) -> list[str]:
    """Compares the settings of a resumed run with those it was begun with.

    Args:
        run_directory: The run.
        model: Shape of the model now.
        train: How it is to be trained now.
        step: The step that it resumes from.
        extend: Whether the run may have more steps than it was begun with, which stretches the schedule.

    Returns:
        A line for each difference that is allowed and changes the numbers.

    Raises:
        ValueError: A setting that changes the numbers differs, the run has no settings that can be read,
            or it is longer than it was and ``extend`` is not set.
    """
    old = _read(run_directory)
    differences = [
        f"{key} {value} (the run has {_short(old[section].get(key))})"
        for section, values in _sections(model, train).items()
        for key, value in values.items()
        if key not in _FREE and key not in (_HORIZON, _REMAT) and old[section].get(key, _default(key)) != value
    ]
    if differences:
        raise ValueError(
            f"cannot resume run {run_directory.name!r} with other settings: {', '.join(differences)}. "
            f"Give the run's own, or --reset to start anew"
        )
    notes = _note_numerics(old.get("numerics", {}))
    if old["training"].get(_REMAT, _default(_REMAT)) != train.remat:
        begun = "with" if not train.remat else "without"
        notes.append(
            f"the run was begun {begun} --remat: its results will be equal within rounding, but not to the last bit"
        )
    notes += [
        f"the run was extended to {change['to']} steps at step {change['at']}: steps {step + 1} to {change['at']} are "
        f"taken again with the longer schedule, and give other weights than the first time"
        for change in old.get("extended", [])
        if change["at"] > step
    ]
    before = old["training"][_HORIZON]
    if before == train.steps:
        return notes
    if train.steps < before:
        raise ValueError(
            f"run {run_directory.name!r} was begun with --steps {before}: {train.steps} cannot cut it short"
        )
    if not extend:
        raise ValueError(
            f"run {run_directory.name!r} was begun with --steps {before}, where its schedule ends: {train.steps} need "
            f"--extend, which stretches the schedule, and so changes the learning rate of every step to come"
        )
    if (run_directory / directory.LATEST_CONFIG).is_file():  # a newer version may have written it
        directory.read_checkpoint(run_directory.name, directory=run_directory)
    return [*notes, _describe_extension(train, before, min(before, step))]


def _short(value: Any) -> str:
    return files.shortened(str(value), 60)


def _numerics() -> dict[str, Any]:
    """Returns what the last bits of weights depend on besides the settings; JAX has started."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processor": numerics.processor(),
        "instruction_sets": list(numerics.instruction_sets()),
        "cores": numerics.cores(),
        "jax": jax.__version__,
        "xla_flags": numerics.xla_flags(),
        "environment": list(numerics.environment()),
    }


def _note_numerics(old: dict[str, Any]) -> list[str]:
    """Returns a line if the numerics are not those that the run was begun with."""
    changes = [
        f"{name} {_short(now)} (it was {_short(old[name])})"
        for name, now in _numerics().items()
        if name in old and old[name] != now
    ]
    if not changes:
        return []
    return [
        f"the run was begun with other numerics: {', '.join(changes)}. Its weights will equal those of the "
        f"uninterrupted run within rounding, but not to the last bit"
    ]


def _describe_extension(train: training_config.TrainConfig, before: int, step: int) -> str:
    old_rate, new_rate = (
        float(jnp.asarray(optimizer.learning_rate(dataclasses.replace(train, steps=steps))(step)))
        for steps in (before, train.steps)
    )
    return (
        f"extended from {before} to {train.steps} steps: the schedule now ends at step {train.steps}, and after step "
        f"{step} the learning rate is {new_rate:.3g} instead of {old_rate:.3g}"
    )


def extend(run_directory: Path, train: training_config.TrainConfig, step: int) -> None:
    """Writes down from which step on a run has more steps than it was begun with.

    Args:
        run_directory: The run.
        train: How it is to be trained now.
        step: The step that it resumes from. What was written of later steps holds from there on.
    """
    old = _read(run_directory)
    before, changes = old["training"][_HORIZON], old.get("extended", [])
    if before == train.steps and all(change["at"] <= step for change in changes):
        return
    old["extended"] = [{**change, "at": min(change["at"], step)} for change in changes]
    if before != train.steps:
        old["extended"].append({"at": step, "from": before, "to": train.steps})
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
    try:
        _validate(value)
    except fastjsonschema.JsonSchemaValueException as error:
        raise ValueError(f"{path} does not hold the settings of a run: {error.message}") from error
    directory.require_known(path, value)
    return value
