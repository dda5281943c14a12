"""Training states on disk: their digests, and the newest intact one.

Orbax writes the state of step N into ``train_state/N`` and keeps no checksums: a flipped bit gives other weights, an
empty file an arbitrary exception. So a file of SHA-256 digests is added once a state is complete, and only a state that
agrees with its digests is passed to Orbax.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hipgpt_jax import files, json_files
from hipgpt_jax.runs import directory

DIGESTS_NAME = "sha256.json"
DAMAGED_SUFFIX = ".damaged"

_SCHEMA = json_files.Schema(
    "file of digests",
    {
        "type": "object",
        "required": ["files"],
        "additionalProperties": False,
        "properties": {
            "files": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            }
        },
    },
)


class State(NamedTuple):
    """A saved training state: its step, and its fault, None if every file agrees with its digest."""

    step: int
    fault: str | None


def steps(run_directory: Path) -> list[int]:
    """Returns the steps that have a training state, ascending; unfinished saves of Orbax have other names."""
    root = run_directory / directory.TRAIN_STATE_NAME
    return sorted(int(path.name) for path in root.iterdir() if _is_state(path)) if root.is_dir() else []


def path_of(run_directory: Path, step: int) -> Path:
    """Returns the directory of a step's training state."""
    return run_directory / directory.TRAIN_STATE_NAME / str(step)


def write_digests(state: Path) -> None:
    """Writes the digests of a complete state beside its files, in one atomic replacement."""
    digests = {name: files.sha256(state / name) for name in sorted(_files(state))}
    json_files.write(state / DIGESTS_NAME, {"files": digests})


def verify(run_directory: Path, step: int) -> State:
    """Compares the files of one training state with their digests."""
    state = path_of(run_directory, step)
    try:
        return State(step, _fault(state))
    except OSError as error:
        return State(step, f"{error.filename or state} cannot be read: {error.strerror or error}")


def verify_states(run_directory: Path) -> list[State]:
    """Compares the files of every training state of a run with their digests, by ascending step."""
    return [verify(run_directory, step) for step in steps(run_directory)]


def find_intact(run_directory: Path) -> tuple[int | None, list[str]]:
    """Finds the newest intact training state.

    Returns:
        Its step, or None if no state of the run was saved completely; and a note for each newer state skipped.

    Raises:
        ValueError: The run has states and none of them is intact.
    """
    damaged: list[str] = []
    for step in reversed(steps(run_directory)):
        fault = verify(run_directory, step).fault
        if fault is None:
            return step, [f"{text}: resuming from the state of step {step}" for text in damaged]
        damaged.append(f"the training state of step {step} is damaged ({fault})")
    # A kill just before the digests of the first state leaves a run that has saved nothing yet.
    if not any(_has_digests(path_of(run_directory, step)) for step in steps(run_directory)):
        return None, []
    raise ValueError(
        f"run {run_directory.name!r} cannot be resumed: {'; '.join(damaged)}. Restore "
        f"{run_directory / directory.TRAIN_STATE_NAME} from a copy, or start again with --reset"
    )


def set_damaged_aside(run_directory: Path, after: int | None) -> None:
    """Renames the states after a step (None: all), so that Orbax neither reads nor counts them.

    They are kept until the next state is saved, in case a stray file was the only damage. Unfinished saves are removed.
    """
    root = run_directory / directory.TRAIN_STATE_NAME
    for step in steps(run_directory):
        if after is None or step > after:
            target = root / f"{step}{DAMAGED_SUFFIX}"
            shutil.rmtree(target, ignore_errors=True)
            path_of(run_directory, step).rename(target)
    for unfinished in root.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_damaged(run_directory: Path) -> None:
    """Removes the states that ``set_damaged_aside`` renamed."""
    for path in (run_directory / directory.TRAIN_STATE_NAME).glob(f"*{DAMAGED_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def foreign(run_directory: Path) -> Iterator[Path]:
    """Yields the files among the training states of a run that no run writes."""
    for path in sorted((run_directory / directory.TRAIN_STATE_NAME).iterdir()):
        if _is_state(path) and not path.is_symlink():
            # Without digests, files of Orbax cannot be told from others.
            known = _read_digests(path)
            yield from (path / name for name in sorted(_files(path)) if known and name not in known)
        elif not path.name.endswith(DAMAGED_SUFFIX) and ".orbax-checkpoint-tmp" not in path.name:
            yield path


def _is_state(path: Path) -> bool:
    name = path.name
    return name.isascii() and name.isdecimal() and str(int(name)) == name and path.is_dir()


def _has_digests(state: Path) -> bool:
    return os.path.lexists(state / DIGESTS_NAME)


def _files(state: Path) -> set[str]:
    """Relative paths of a state's files, links and special files, without the digests."""
    found: set[str] = set()
    for folder, folders, names in os.walk(state, onerror=_raise):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found.update((Path(folder) / name).relative_to(state).as_posix() for name in (*names, *links))
    return found - {DIGESTS_NAME}


def _raise(error: OSError) -> None:
    raise error


def _read_digests(state: Path) -> dict[str, str]:
    """Digest by relative path; empty if there is no valid file of digests."""
    try:
        return _SCHEMA.read(state / DIGESTS_NAME)["files"]
    except (FileNotFoundError, ValueError):
        return {}


def _fault(state: Path) -> str | None:
    if not _has_digests(state):
        return f"no {DIGESTS_NAME}: its save was cut short"
    digests, found = _read_digests(state), _files(state)
    if not digests:
        return f"{state / DIGESTS_NAME} is not a file of digests"
    if missing := sorted(digests.keys() - found):
        return f"{state / missing[0]} is missing"
    if extra := sorted(found - digests.keys()):
        return f"{state / extra[0]} does not belong to it"
    for name, digest in digests.items():
        path = state / name
        if path.is_symlink() or not path.is_file() or files.sha256(path) != digest:
            return f"{path} was changed"
    return None
