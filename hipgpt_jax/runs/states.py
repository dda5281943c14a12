"""Training states on disk: their digests, and the newest one that is intact.

Orbax writes the state of step N into ``train_state/N``. It has no checksum of its own: a flipped bit in such a file
gives other weights, an empty one an exception of any kind. So a file of SHA-256 digests is added once the state is
whole, and nothing is given to Orbax that does not agree with it.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fastjsonschema

from hipgpt_jax import files
from hipgpt_jax.runs import directory

DIGESTS_NAME = "sha256.json"
DAMAGED_SUFFIX = ".damaged"

_validate = fastjsonschema.compile(
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
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """A saved training state.

    Attributes:
        step: Its step.
        fault: What is wrong with it; None where every file agrees with its digest.
        is_unchecked: Whether it has no digests: an older version saved it, or the process was killed just before
            they were written.
    """

    step: int
    fault: str | None
    is_unchecked: bool = False


def steps(run_directory: Path) -> list[int]:
    """Returns the steps whose training state was saved, ascending; Orbax names those it has not finished otherwise."""
    root = run_directory / directory.TRAIN_STATE_NAME
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if _is_step(path.name) and path.is_dir())


def path_of(run_directory: Path, step: int) -> Path:
    """Returns the directory of a step's training state."""
    return run_directory / directory.TRAIN_STATE_NAME / str(step)


def seal(state: Path) -> None:
    """Writes the digests of a state's files beside them, in one atomic replacement."""
    digests = {name: files.sha256(state / name) for name in _files(state)}
    files.write_json(state / DIGESTS_NAME, {"files": digests})


def verify(run_directory: Path, step: int) -> State:
    """Compares the files of one training state with their digests."""
    state = path_of(run_directory, step)
    try:
        if not os.path.lexists(state / DIGESTS_NAME):
            return State(step=step, fault=f"no {DIGESTS_NAME}: its save was cut short", is_unchecked=True)
        return State(step=step, fault=_fault(state))
    except OSError as error:
        return State(step=step, fault=f"{error.filename or state} cannot be read: {error.strerror or error}")


def verify_states(run_directory: Path) -> list[State]:
    """Compares the files of every training state of a run with their digests, by ascending step."""
    return [verify(run_directory, step) for step in steps(run_directory)]


def choose(run_directory: Path) -> tuple[int | None, list[str]]:
    """Returns the newest step whose training state is intact, and a line for each newer one that is passed over.

    States without digests count as intact only where no state of the run has any, as in a run of an older version.

    Returns:
        The step, or None where the run has saved no state at all; and lines for the user.

    Raises:
        ValueError: States are there and none of them is intact.
    """
    notes: list[str] = []
    unchecked: list[int] = []
    damaged: list[str] = []
    for step in reversed(steps(run_directory)):
        found = verify(run_directory, step)
        if found.fault is None:
            notes += [f"{text}: resuming from the state of step {step}" for text in damaged]
            return step, notes
        damaged.append(f"the training state of step {step} is damaged ({found.fault})")
        if found.is_unchecked:
            unchecked.append(step)
    if unchecked and len(unchecked) == len(damaged):
        return unchecked[0], [f"the training state of step {unchecked[0]} has no digests, so it is not checked"]
    if damaged:
        raise ValueError(
            f"run {run_directory.name!r} cannot be resumed: {'; '.join(damaged)}. Restore "
            f"{run_directory / directory.TRAIN_STATE_NAME} from a copy, or start again with --reset"
        )
    return None, []


def set_damaged_aside(run_directory: Path, after: int | None) -> None:
    """Renames the states of later steps than ``after``, so that Orbax neither reads nor counts them.

    They are kept until the next state is saved, in case the damage was a stray file; leftovers of saves that were
    cut short are removed.
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
    """Removes what ``set_damaged_aside`` renamed."""
    for path in (run_directory / directory.TRAIN_STATE_NAME).glob(f"*{DAMAGED_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def foreign(run_directory: Path) -> Iterator[Path]:
    """Yields what lies among the training states of a run and was not written there by one."""
    root = run_directory / directory.TRAIN_STATE_NAME
    for path in sorted(root.iterdir()):
        if _is_step(path.name) and path.is_dir() and not path.is_symlink():
            known = _digests(path) if (path / DIGESTS_NAME).is_file() else None
            # Without digests there is no telling Orbax's files from others.
            yield from (path / name for name in _files(path) if known and name not in known)
        elif not path.name.endswith(DAMAGED_SUFFIX) and ".orbax-checkpoint-tmp" not in path.name:
            yield path


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _files(state: Path) -> list[str]:
    """The files of a state by their paths in it, links and other special files too, without the digests."""
    found = []
    for folder, folders, names in os.walk(state, onerror=_raise):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [(Path(folder) / name).relative_to(state).as_posix() for name in (*names, *links)]
    return sorted(name for name in found if name != DIGESTS_NAME)


def _raise(error: OSError) -> None:
    raise error


def _digests(state: Path) -> dict[str, str]:
    try:
        value = files.read_json(state / DIGESTS_NAME)
        _validate(value)
    except (ValueError, fastjsonschema.JsonSchemaException):
        return {}
    return value["files"]


def _fault(state: Path) -> str | None:
    expected = _digests(state)
    if not expected:
        return f"{state / DIGESTS_NAME} is not a file of digests"
    found = set(_files(state))
    if missing := sorted(expected.keys() - found):
        return f"{state / missing[0]} is missing"
    if extra := sorted(found - expected.keys()):
        return f"{state / extra[0]} does not belong to it"
    for name, digest in expected.items():
        path = state / name
        if path.is_symlink() or not path.is_file() or files.sha256(path) != digest:
            return f"{path} was changed"
    return None
