"""The checkpoint of another run that a run starts from."""

import dataclasses
from pathlib import Path
from typing import Any

SCHEMA = {
    "type": "object",
    "required": ["run", "step", "sha256"],
    "properties": {
        "run": {"type": "string"},
        "step": {"type": "integer", "minimum": 0},
        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """Checkpoint of another run whose weights a run starts from.

    Attributes:
        run: Name of the other run.
        step: Step of the checkpoint.
        sha256: Digest of its weights.
        directory: Directory of the other run, which is not recorded; None finds it by its name.
    """

    run: str
    step: int
    sha256: str
    directory: Path | None = dataclasses.field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.run}:{self.step} (sha256 {self.sha256[:12]}…)"


def section(init_from: Initial | None) -> dict[str, Any]:
    """Returns the section of settings and configs that ``parse`` reads; empty for None."""
    return {} if init_from is None else {"init_from": {name: getattr(init_from, name) for name in SCHEMA["required"]}}


def parse(value: dict[str, Any]) -> Initial | None:
    """Returns the checkpoint in settings or a config that agree with ``SCHEMA``; None if there is none."""
    return Initial(**{name: value["init_from"][name] for name in SCHEMA["required"]}) if "init_from" in value else None
