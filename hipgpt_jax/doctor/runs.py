"""The runs that ``--run-name`` would find, and whether each is whole."""

import os
from collections.abc import Iterator
from pathlib import Path

from hipgpt_jax import doctor
from hipgpt_jax.runs import directory


def examine(only: str | None = None, *, verify: bool = True) -> Iterator[doctor.Finding]:
    """Looks at every run, of the package and of ``checkpoints/`` in the current directory.

    Args:
        only: The one run to look at.
        verify: Whether to compare digests; else only whether the files are there.

    Raises:
        FileNotFoundError: There is no run of that name.
        ValueError: The name is no run's.
    """
    if only is not None:
        directory.check_name(only)
        if only not in directory.names() and not (directory.CHECKPOINTS / only).exists():
            directory.find(only)
    place = directory.CHECKPOINTS.absolute()
    begun = _begun()
    own = [name for name in directory.names() if directory.find(name).parent == directory.CHECKPOINTS]
    if only is None:
        text = (
            f"{place}: {_count(len(own), 'run')}"
            if place.is_dir()
            else f"{place} is not there: no runs but the package's"
        )
        yield doctor.Finding("checkpoints", text)
    for name in sorted({*directory.names(), *begun}):
        if only in (None, name):
            yield from (_unfinished(name),) if name in begun else _run(name, verify=verify)


def folders() -> dict[str, Path]:
    """Returns the directory of every run by its name, those that have no checkpoint yet too."""
    known = {name: directory.find(name) for name in directory.names()}
    return dict(sorted({**known, **{name: directory.CHECKPOINTS / name for name in _begun()}}.items()))


def _begun() -> list[str]:
    """The directories in ``checkpoints/`` that are named as runs are and have no latest config."""
    known = directory.names()
    folders = (path.name for path in directory.CHECKPOINTS.glob("*") if path.is_dir())
    return [name for name in folders if name not in known and not name.startswith(".") and ".." not in name]


def _unfinished(run: str) -> doctor.Finding:
    folder = directory.CHECKPOINTS / run
    link = folder / directory.LATEST_CONFIG
    if link.is_symlink():
        text = f"{run}: {link} points to {os.readlink(link)}, which is not there"
        if steps := directory.steps(folder):
            return doctor.Finding("run", text, f"ln -sfn {directory.config_path(folder, steps[-1]).name} {link}")
        return doctor.Finding(
            "run", text, f"Restore that file, or begin anew: hipgpt-train --run-name {run} --reset ..."
        )
    if directory.is_begun(folder):
        return doctor.Finding("run", f"{run}: begun, no whole checkpoint yet; --resume goes on with it")
    return doctor.Finding(
        "run", f"{run}: a directory without a checkpoint; hipgpt-train --run-name {run} --reset begins there"
    )


def _run(run: str, *, verify: bool) -> Iterator[doctor.Finding]:
    """Yields one line for a whole run, else one for each thing that is wrong with it."""
    folder = directory.find(run)
    is_shipped = folder.parent == directory.SHIPPED
    latest, wrong = _check(run, None, verify=verify)
    config = folder / directory.LATEST_CONFIG
    others = [at for at in directory.steps(folder) if not config.samefile(directory.config_path(folder, at))]
    broken = {at: error for at in others if at != latest and (error := _check(run, at, verify=verify)[1])}
    if wrong is not None:
        whole = [at for at in others if at != latest and at not in broken]
        named = "the latest step" if latest is None else f"step {latest}, the latest,"
        yield doctor.Finding("run", f"{run}: {named} is damaged: {wrong}", _advice(run, whole, is_shipped=is_shipped))
    for at, error in broken.items():
        yield doctor.Finding("run", f"{run}: step {at} is damaged: {error}", _advice_on_step(run, at))
    link = folder / directory.LATEST_CHECKPOINT
    if wrong is None and link.is_symlink() and not link.exists():
        weights = directory.weights_beside(directory.config_path(folder, latest or 0))
        advice = f"ln -sfn {weights.name} {link}"
        yield doctor.Finding("run", f"{run}: {link} points to {os.readlink(link)}, which is not there", advice)
    elif wrong is None and not broken:
        words = "whole, digests checked" if verify else "complete, digests not checked"
        count = _count(len({*others, latest}), "step")
        yield doctor.Finding("run", f"{run}: {count}, latest {latest}, {words}; in {folder}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _check(run: str, step: int | None, *, verify: bool) -> tuple[int | None, str | None]:
    """The step that was found, and what is wrong with it."""
    found = None
    try:
        found = directory.read_checkpoint(run, step)
        if verify:
            found.verify()
        elif missing := [path for path in (found.tokenizer, found.weights) if not path.is_file()]:
            return found.step, f"{missing[0]} is missing, though the config of step {found.step} names it"
    except (OSError, ValueError) as error:
        return found and found.step, str(error)
    return found.step, None


def _advice(run: str, whole: list[int], *, is_shipped: bool) -> str:
    if is_shipped:
        return "Restore the file (in a clone: git checkout hipgpt_jax/runs/shipped), or install hipgpt-jax anew"
    if whole:
        return f"Restore the file; until then, take --step {whole[-1]}"
    return f"Restore the file, or train the run anew: hipgpt-train --run-name {run} --reset ..."


def _advice_on_step(run: str, step: int) -> str:
    config = directory.config_path(directory.CHECKPOINTS / run, step)
    return f"Restore the file, or give the step up: rm {config} {directory.weights_beside(config)}"
