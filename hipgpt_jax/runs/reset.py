"""Replaces a run so that a kill at any moment leaves the old run or the new one, and deletes nobody else's files.

The new run is prepared in ``.NAME.new``. The old run is moved to ``.NAME.old`` until the new one has a checkpoint; if
it never gets one, the old run is moved back. Only files that a run writes are deleted, one by one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hipgpt_jax.runs import directory, states

TENSORBOARD_NAME = "tensorboard"

# Written by ``text.dataset``, which is on this floor; a test compares the names.
_DATA = frozenset({"tokenizer.json", "tokens.bin", "data.json"})
_MANIFEST = "data.json"
_LINKS = (directory.LATEST_CONFIG, directory.LATEST_CHECKPOINT, directory.BEST_CONFIG, directory.BEST_CHECKPOINT)
_FILES = frozenset({*_LINKS, directory.SETTINGS_NAME, directory.METRICS_NAME})
_STEP_FILE = re.compile(r"(?!\.).+_step\d+(\.bin|_config\.json)", re.DOTALL)
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp", re.DOTALL)  # named by ``files.replacing`` and ``files.link``
_EVENTS = re.compile(r"events\.out\.tfevents\..+")


def find_foreign(run_directory: Path) -> Path | None:
    """Returns a file in a directory that no run writes, or None."""
    return next(_foreign(run_directory), None) if run_directory.is_dir() else None


def is_leftover(run_directory: Path) -> bool:
    """Returns whether a directory is empty or holds a run killed before its first checkpoint, and nothing else."""
    is_empty = not any(run_directory.iterdir())
    is_run = (run_directory / _MANIFEST).is_file() and not directory.has_checkpoint(run_directory)
    return (is_empty or is_run) and find_foreign(run_directory) is None


def check_outside(run_directory: Path, inputs: Sequence[Path]) -> None:
    """Raises ValueError if a new run would replace one of the files that it is made from."""
    replaced = [Path(os.path.realpath(path)) for path in _paths(run_directory)]
    for path in inputs:
        if any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in replaced):
            raise ValueError(
                f"{path} lies in the directory of the run, which a new run replaces: move it elsewhere, or give "
                f"another --run-name"
            )


def check_writable(run_directory: Path) -> None:
    """Raises OSError if a run could not write its files, or if something else has the name of one of them."""
    folders = [run_directory, *(run_directory / name for name in (directory.TRAIN_STATE_NAME, TENSORBOARD_NAME))]
    for path in filter(os.path.lexists, folders):
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a directory, which a run needs there: move it away")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written: a run writes its checkpoints there")
    for name in sorted(_FILES):
        path = run_directory / name
        if path.exists() and not path.is_file():
            raise IsADirectoryError(f"{path} is not a file, which a run needs there: move it away")
    metrics = run_directory / directory.METRICS_NAME
    if metrics.exists() and not os.access(metrics, os.W_OK):
        raise PermissionError(f"{metrics} cannot be written: a run appends to it")


def remove_temporaries(run_directory: Path) -> None:
    """Removes temporary files of killed writers; nothing else may write while the run is locked."""
    for path in run_directory.iterdir():
        if (match := _TEMPORARY.fullmatch(path.name)) and _is_run_file(match[1]):
            path.unlink()


def remove(run_directory: Path) -> str | None:
    """Deletes a run's files, and its directory if nothing else is in it.

    Returns:
        The paths that could not be deleted and why; None if all are deleted.
    """
    if not run_directory.is_dir():
        return None
    others = list(_foreign(run_directory))
    problems = [f"{other} is not a file of a run" for other in others]
    for path in run_directory.iterdir():
        if not any(other == path or path in other.parents for other in others):
            problems += _delete(path)
    return "; ".join(problems or _delete(run_directory)) or None


def replace(run_directory: Path) -> None:
    """Moves the prepared run into place, and the old one, if any, aside, by two atomic renames.

    Raises:
        OSError: One of them failed; the old run is in its place.
    """
    real, new, old = _paths(run_directory)
    # ``recover`` may have moved a failed new run back here, whose data is reused.
    for path in new.iterdir():
        if path.name not in _DATA:
            _delete(path)
    if real.is_dir() and not is_leftover(real):
        real.rename(old)
    elif problem := remove(real):
        raise OSError(f"what an earlier run left in {run_directory} could not be deleted: {problem}")
    try:
        new.rename(real)
    except OSError:
        if old.exists():
            old.rename(real)
        raise


def recover(run_directory: Path) -> str | None:
    """Finishes or undoes a replacement that was cut short; an undone new run's data stays prepared.

    Returns:
        A note for the user, or None if there was nothing to do.
    """
    real, new, old = _paths(run_directory)
    if not old.is_dir():
        return None
    if (real / directory.LATEST_CONFIG).is_file():
        problem = finish(run_directory)
        return problem and f"the run that --reset replaced could not be deleted entirely: {problem}"
    if other := find_foreign(real):
        raise ValueError(
            f"{run_directory} holds {other.name}, which no run writes, and the run that --reset set aside is in {old}: "
            f"move one of the two elsewhere"
        )
    if real.is_dir():
        if problem := remove(new):
            raise OSError(f"{new} could not be deleted: {problem}")
        real.rename(new)
    old.rename(real)
    return (
        f"run {run_directory.name!r} is again what it was before --reset: the new run ended before its first checkpoint"
    )


def finish(run_directory: Path) -> str | None:
    """Deletes the old run, once the new one has a checkpoint; returns as ``remove`` does."""
    return remove(_paths(run_directory)[2])


def _paths(run_directory: Path) -> tuple[Path, Path, Path]:
    """The run's directory, links followed, and those of the new and the old run beside it."""
    real = Path(os.path.realpath(run_directory))
    return real, directory.beside(run_directory, "new"), directory.beside(run_directory, "old")


def _delete(path: Path) -> list[str]:
    """Deletes a file, a link or a whole tree; returns the paths that could not be deleted, and why."""
    problems = []
    targets = [path]
    if path.is_dir() and not path.is_symlink():
        walk = os.walk(path, topdown=False)
        targets = [Path(folder) / name for folder, folders, names in walk for name in (*names, *folders)] + targets
    for target in targets:
        try:
            if target.is_dir() and not target.is_symlink():
                target.rmdir()
            else:
                target.unlink()
        except OSError as error:
            problems.append(f"{target}: {error.strerror}")
    return problems


def _is_run_file(name: str) -> bool:
    return name in _DATA or name in _FILES or _STEP_FILE.fullmatch(name) is not None


def _foreign(run_directory: Path) -> Iterator[Path]:
    for path in sorted(run_directory.iterdir()):
        is_tree = path.is_dir() and not path.is_symlink()
        match = _TEMPORARY.fullmatch(path.name)
        if is_tree and path.name == directory.TRAIN_STATE_NAME:
            yield from states.foreign(run_directory)
        elif is_tree and path.name == TENSORBOARD_NAME:
            yield from (file for file in sorted(path.iterdir()) if not _EVENTS.fullmatch(file.name) or file.is_dir())
        elif is_tree or not _is_run_file(match[1] if match else path.name):
            yield path
