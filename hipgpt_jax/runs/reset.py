"""Replacing a run, so that a kill at any moment leaves the old run or the new one, and never a file of another's.

The new run is prepared in ``.NAME.new``. The old run is moved to ``.NAME.old`` and stays there until the new one has a
checkpoint; if that never comes, it is moved back. Only files that a run writes are deleted, one by one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hipgpt_jax.runs import directory, states

# The names that the package's own modules write. Those of the data are written by ``text.dataset``.
_DATA = frozenset({"tokenizer.json", "tokens.bin", "data.json", "prepare.json"})
_OTHERS = frozenset(
    {
        *(directory.LATEST_CONFIG, directory.LATEST_CHECKPOINT, directory.BEST_CONFIG, directory.BEST_CHECKPOINT),
        *(directory.SETTINGS_NAME, directory.METRICS_NAME),
    }
)
TENSORBOARD_NAME = "tensorboard"
_MANIFEST = "data.json"

_STEP_FILE = re.compile(r"(?!\.).+_step\d+(\.bin|_config\.json)", re.DOTALL)
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp", re.DOTALL)  # as ``files.replacing`` and ``files.link`` name them
_EVENTS = re.compile(r"events\.out\.tfevents\..+")


def foreign(run_directory: Path) -> Path | None:
    """Returns something in a directory that no run writes, or None."""
    return next(_foreign(run_directory), None) if run_directory.is_dir() else None


def is_leftover(run_directory: Path) -> bool:
    """Returns whether a directory is empty, or what a run leaves that was killed before its first checkpoint."""
    is_empty = not any(run_directory.iterdir())
    is_run = (run_directory / _MANIFEST).is_file() and not directory.is_begun(run_directory)
    return (is_empty or is_run) and foreign(run_directory) is None


def require_outside(run_directory: Path, given: Sequence[Path]) -> None:
    """Raises ValueError where one of the files that a new run is made from would be replaced by it."""
    own = [
        os.path.realpath(run_directory),
        *(os.fspath(directory.beside(run_directory, end)) for end in ("new", "old")),
    ]
    for path in given:
        if any(Path(os.path.realpath(path)).is_relative_to(place) for place in own):
            raise ValueError(
                f"{path} lies in the directory of the run, which a new run replaces: move it elsewhere, or give "
                f"another --run-name"
            )


def remove_temporaries(run_directory: Path) -> None:
    """Removes the files that killed writers left under temporary names; nobody else writes while the run is locked."""
    for path in run_directory.iterdir():
        if (match := _TEMPORARY.fullmatch(path.name)) and _is_own_file(match[1]):
            path.unlink()


def require_writable(run_directory: Path) -> None:
    """Raises OSError where a run could not write its files, or something else has the name of one of them."""
    folders = [run_directory, *(run_directory / name for name in (directory.TRAIN_STATE_NAME, TENSORBOARD_NAME))]
    for path in filter(os.path.lexists, folders):
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a directory, which a run needs there: move it away")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written: a run writes its checkpoints there")
    for name in sorted(_OTHERS):
        path = run_directory / name
        if path.exists() and not path.is_file():
            raise IsADirectoryError(f"{path} is not a file, which a run needs there: move it away")
    metrics = run_directory / directory.METRICS_NAME
    if metrics.exists() and not os.access(metrics, os.W_OK):
        raise PermissionError(f"{metrics} cannot be written: a run appends to it")


def remove(path: Path) -> str | None:
    """Deletes a run's files, and its directory where nothing else is in it.

    Returns:
        What could not be deleted, and why; None where all is gone.
    """
    if not path.is_dir():
        return None
    others = list(_foreign(path))
    problems = [f"{other} is not a file of a run" for other in others]
    for entry in path.iterdir():
        if not any(other == entry or entry in other.parents for other in others):
            problems += _delete(entry)
    return "; ".join(problems or _delete(path)) or None


def _delete(path: Path) -> list[str]:
    """Deletes a file, a link or a whole tree; returns what could not be deleted, and why."""
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


def replace(run_directory: Path) -> None:
    """Moves the prepared run into place, and the old one, if any, aside. The two renames are atomic each.

    Raises:
        OSError: One of them failed; the old run is in its place.
    """
    real, new, old = _places(run_directory)
    _strip(new)
    if real.is_dir() and not is_leftover(real):
        real.rename(old)
    elif real.is_dir() and (problem := remove(real)):
        raise OSError(f"what an earlier run left in {run_directory} could not be deleted: {problem}")
    try:
        new.rename(real)
    except OSError:
        if old.exists():
            old.rename(real)
        raise


def recover(run_directory: Path) -> str | None:
    """Finishes or undoes a replacement that a kill cut short.

    Returns:
        A line for the user, or None where there was nothing to do.
    """
    real, _, old = _places(run_directory)
    if not old.is_dir():
        return None
    if (real / directory.LATEST_CONFIG).is_file():
        return _describe(finish(run_directory))
    if other := foreign(real):
        raise ValueError(
            f"{run_directory} holds {other.name}, which no run writes, and the run that --reset set aside is in {old}: "
            f"move one of the two elsewhere"
        )
    undo(run_directory)
    return (
        f"run {run_directory.name!r} is again what it was before --reset: the new run ended before its first checkpoint"
    )


def undo(run_directory: Path) -> None:
    """Moves the old run back into its place; the data of the new one stays prepared."""
    real, new, old = _places(run_directory)
    if not old.is_dir():
        return
    if real.is_dir():
        if problem := remove(new):
            raise OSError(f"{new} could not be deleted: {problem}")
        real.rename(new)
    old.rename(real)


def finish(run_directory: Path) -> str | None:
    """Deletes the old run, once the new one has a checkpoint; returns what could not be deleted, and why."""
    return remove(_places(run_directory)[2])


def _describe(problem: str | None) -> str | None:
    return f"the run that --reset replaced could not be deleted entirely: {problem}" if problem else None


def _strip(new: Path) -> None:
    """Deletes all but the data of a new run that ``undo`` moved back, whose data is taken again."""
    for path in new.iterdir():
        if path.name not in _DATA:
            _delete(path)


def _places(run_directory: Path) -> tuple[Path, Path, Path]:
    """The run's directory, links followed, and where the new run and the old one lie."""
    real = Path(os.path.realpath(run_directory))
    return real, directory.beside(run_directory, "new"), directory.beside(run_directory, "old")


def _is_own_file(name: str) -> bool:
    return name in _DATA or name in _OTHERS or _STEP_FILE.fullmatch(name) is not None


def _foreign(run_directory: Path) -> Iterator[Path]:
    for path in sorted(run_directory.iterdir()):
        is_tree = path.is_dir() and not path.is_symlink()
        match = _TEMPORARY.fullmatch(path.name)
        if is_tree and path.name == directory.TRAIN_STATE_NAME:
            yield from states.foreign(run_directory)
        elif is_tree and path.name == TENSORBOARD_NAME:
            yield from (file for file in sorted(path.iterdir()) if not _EVENTS.fullmatch(file.name) or file.is_dir())
        elif is_tree or not _is_own_file(match[1] if match else path.name):
            yield path
