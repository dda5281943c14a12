"""``hipgpt-doctor --deep``: everything on disk that has a digest, read whole, beside the runs' weights."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from hipgpt_jax import compilation, doctor, files
from hipgpt_jax.doctor import runs
from hipgpt_jax.runs import directory, states
from hipgpt_jax.text import manifest

# As in `text.dataset`, which imports NumPy and tokenizers; the doctor works where they do not.
TOKENS_NAME, MANIFEST_NAME = "tokens.bin", "data.json"


def examine(only: str | None = None) -> Iterator[doctor.Finding]:
    """Reads the cache of compiled programs and the training files of every run.

    Args:
        only: The one run to look at.
    """
    yield from _cache()
    for run, folder in runs.folders().items():
        if only in (None, run):
            for check in RUN_CHECKS:
                yield from check(run, folder)


def _cache() -> Iterator[doctor.Finding]:
    """Compares every entry, XLA's executables and exported programs, with its digest."""
    try:
        cache = compilation.cache_in(compilation.cache_directory().absolute())
        if not cache.directory.exists():
            return
        damaged = list(cache.find_damaged())
        count = sum(1 for _ in cache.entries())
    except (OSError, RuntimeError, ValueError):  # `machine.cache` reports it
        return
    for name, reason in damaged:
        path = cache.directory / name
        yield doctor.Finding("compile cache", f"{path}: {reason}", f"rm {shlex.quote(str(path))}")
    if not damaged:
        yield doctor.Finding("compile cache", f"{count} programs, all as their digests say")


def _tokens(run: str, folder: Path) -> Iterator[doctor.Finding]:
    """Compares ``tokens.bin`` with what ``data.json`` says of it."""
    path = folder / TOKENS_NAME
    if not path.exists():
        return
    try:
        held = manifest.Manifest.read(folder / MANIFEST_NAME)
        expected, size = (held.train_tokens + held.validation_tokens) * held.token_bytes, path.stat().st_size
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, and {MANIFEST_NAME} says {expected}")
        if (digest := files.sha256(path)) != held.tokens_sha256:
            raise ValueError(f"{path} was changed: its sha256 is {digest[:12]}..., not {held.tokens_sha256[:12]}...")
    except (OSError, ValueError) as error:
        advice = f"Restore the file, or prepare the text anew: hipgpt-train --run-name {run} --reset ..."
        yield doctor.Finding(TOKENS_NAME, f"{run}: {error}", advice)
        return
    yield doctor.Finding(TOKENS_NAME, f"{run}: {size / 1e6:.1f} MB, as the digest in {MANIFEST_NAME} says")


def _states(run: str, folder: Path) -> Iterator[doctor.Finding]:
    """Compares the training states, which ``--resume`` reads, with their digests."""
    name = directory.TRAIN_STATE_NAME
    try:
        found = states.verify_states(folder)
    except OSError as error:
        yield doctor.Finding(name, f"{run}: {error}", "Make the directory readable")
        return
    whole = [state.step for state in found if state.fault is None]
    for state in found:
        if state.is_unchecked and not whole:
            yield doctor.Finding(name, f"{run}: the state of step {state.step} has no digests and cannot be checked")
        elif state.fault:
            again = f"train the run anew: hipgpt-train --run-name {shlex.quote(run)} --reset ..."
            instead = f"leave it: --resume goes on from step {whole[-1]}" if whole else again
            advice = f"Restore it from a copy, or {instead}"
            yield doctor.Finding(name, f"{run}: the state of step {state.step} is damaged: {state.fault}", advice)
    if whole:
        steps = ", ".join(map(str, whole))
        yield doctor.Finding(name, f"{run}: {'states' if len(whole) > 1 else 'state'} of step {steps}, digests checked")


# One function per kind of training file: from a run's name and directory to what is found, nothing where the run has
# no such file.
RUN_CHECKS: tuple[Callable[[str, Path], Iterator[doctor.Finding]], ...] = (_tokens, _states)
