"""``settings.json``: the settings that a run was started with, which ``--resume`` must match."""

import dataclasses
from pathlib import Path
from typing import Any

from hipgpt_jax import config, json_files, training_config
from hipgpt_jax.runs import directory, initial

_COUNT = {"type": "integer", "minimum": 0}


def _object_of(names: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": names, "properties": properties}


def _fields(section: type[config.ModelConfig | training_config.TrainConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


_EXTENSION: dict[str, Any] = dict.fromkeys(("at", "from", "to"), _COUNT)
_SECTIONS = {
    "model": _object_of(_fields(config.ModelConfig), {}),
    "training": _object_of(_fields(training_config.TrainConfig), {"steps": _COUNT, "remat": {"type": "boolean"}}),
    "numerics": {"type": "object"},
    "extended": {"type": "array", "items": _object_of(list(_EXTENSION), _EXTENSION)},
}
_SCHEMA = json_files.Schema("settings file", _object_of(list(_SECTIONS), {**_SECTIONS, "init_from": initial.SCHEMA}))


def read(run_directory: Path) -> dict[str, Any]:
    """Reads the settings of a run.

    Raises:
        ValueError: There are none, or they are invalid.
    """
    path = run_directory / directory.SETTINGS_NAME
    if not path.is_file():
        raise ValueError(
            f"run {run_directory.name!r} has no {path.name}: its settings are unknown. Start again with --reset"
        )
    value = _SCHEMA.read(path)
    directory.require_known(path, value)
    return value
