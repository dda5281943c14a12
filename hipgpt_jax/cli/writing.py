"""What ``hipgpt-generate`` writes while samples are made: text, records, a progress bar, the facts at the end."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hipgpt_jax import api, compilation
from hipgpt_jax.cli import program
from hipgpt_jax.runs import output

if TYPE_CHECKING:
    from hipgpt_jax.generation import samples, source


@contextlib.contextmanager
def open_output(name: str | None, *, overwrite: bool) -> Iterator[output.Output | TextIO | None]:
    """Opens what ``--output`` names: a record file, stdout where it is ``-``, or nothing."""
    if name is None or name == "-":
        yield None if name is None else sys.stdout
        return
    out = output.Output(Path(name), overwrite=overwrite)
    try:
        if out.dropped:
            program.note(f"{name}: dropped a torn last line of {out.dropped} bytes, left by a command that was killed")
        yield out
    finally:
        out.close()


def write(
    run: api.Run,
    asked: "Iterable[source.Ask]",
    out: output.Output | TextIO | None,
    *,
    shows_text: bool,
    stream: bool,
    echo: bool,
) -> None:
    """Makes the samples that are asked for and not done yet, and writes them.

    Args:
        run: What is generated from.
        asked: The prompts.
        out: Where each sample's record goes when it ends.
        shows_text: Whether the text goes to stdout, sample after sample.
        stream: Whether each token is written there at once.
        echo: Whether the prompt stands before its text.
    """
    from hipgpt_jax.generation import events

    asked = list(asked)
    jobs, wanted = run.jobs(asked), sum(one.generation.num_samples for one in asked)
    if isinstance(out, output.Output):
        jobs = _undone(jobs, set(out.done))
        keys = {(one.id, sample) for one in asked for sample in range(one.generation.num_samples)}
        wanted = len(keys - out.done.keys())
        if wanted < len(keys):
            program.note(f"{out.path} has {len(keys) - wanted} of the samples: {wanted} are left")
        if repeated := len(asked) - len({one.id for one in asked}):
            program.note(f"{repeated} prompts repeat an earlier one: their samples would be the same and are made once")
    clock = _Clock(load=run.load_seconds, programs=compilation.Compilations())
    with _progress(wanted, is_shown=not (shows_text and sys.stdout.isatty())) as advance:
        updates = _recorded(run, run.make(jobs, measure=out is not None), out, clock, advance)
        if shows_text:
            _write_text(events.in_order(updates), stream=stream, echo=echo)
        else:
            for _ in updates:
                pass
    program.note(clock.summary())
    if clock.errors:
        raise ValueError(f"{clock.errors} of {clock.samples} samples ended in an error; the last: {clock.last_error}")


@dataclasses.dataclass(kw_only=True)
class _Clock:
    """Times of one command, in seconds, and what it made."""

    load: float
    programs: compilation.Compilations
    began: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float = 0.0
    first_programs: str = ""
    last_token: float = 0.0
    tokens: int = 0
    samples: int = 0
    errors: int = 0
    last_error: str = ""

    def count(self, update: "samples.Update") -> None:
        if update.drew:
            self.last_token = time.perf_counter() - self.began
            if not self.tokens:
                self.first_token, self.first_programs = self.last_token, str(self.programs)
            self.tokens += 1
        if update.finish_reason is not None:
            self.samples += 1
        if update.finish_reason == "error":
            self.errors += 1
            self.last_error = str(update.sample.error)

    def summary(self) -> str:
        facts = [f"loaded in {self.load:.2f} s"]
        if self.tokens:
            facts.append(f"first token {self.first_token:.2f} s later ({self.first_programs})")
        if self.tokens > 1:
            facts.append(f"then {(self.tokens - 1) / (self.last_token - self.first_token):.0f} tokens/s")
        total = self.load + time.perf_counter() - self.began
        made = f"{self.tokens} tokens" if self.samples < 2 else f"{self.samples} samples, {self.tokens} tokens"
        return f"{made}: {', '.join(facts)}, {total:.2f} s in all"


def _undone(jobs: "Iterable[samples.Job]", done: set[tuple[str, int]]) -> "Iterator[samples.Job]":
    for job in jobs:
        key = (job.id, job.request.sample)
        if key not in done:
            done.add(key)
            yield job


def _recorded(
    run: api.Run,
    updates: "Iterable[samples.Update]",
    out: output.Output | TextIO | None,
    clock: _Clock,
    advance: Callable[[_Clock], None],
) -> "Iterator[samples.Update]":
    """Passes updates on and, where a sample has ended, writes its record first."""
    for update in updates:
        clock.count(update)
        if update.finish_reason is not None and out is not None:
            made = run.recorder.describe(update.sample)
            if isinstance(out, output.Output):
                out.append(made)
            else:
                out.flush()
                out.buffer.write(made.to_json().encode() + b"\n")  # UTF-8, whatever the terminal's encoding
                out.buffer.flush()
        advance(clock)
        yield update


def _write_text(updates: "Iterable[samples.Update]", *, stream: bool, echo: bool) -> None:
    begun = False
    for update in updates:
        if not begun and echo:
            sys.stdout.write(update.sample.job.prompt)
        sys.stdout.write(update.text)
        begun = update.finish_reason is None
        if not begun:
            sys.stdout.write("\n")
        if stream:
            sys.stdout.flush()


@contextlib.contextmanager
def _progress(wanted: int, *, is_shown: bool) -> Iterator[Callable[[_Clock], None]]:
    """A bar on stderr, where that is a terminal: samples, tokens a second, time left."""
    if not (is_shown and sys.stderr.isatty()):
        yield lambda clock: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.completed}/{task.total} samples"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[rate]:.0f} tokens/s"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=wanted, rate=0.0)

        def advance(clock: _Clock) -> None:
            rate = clock.tokens / max(clock.last_token, 1e-9)
            bar.update(task, completed=clock.samples, rate=rate)

        yield advance
