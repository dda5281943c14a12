"""Output of ``hipgpt-generate`` while samples are made: text, records, a progress bar, and figures at the end."""

import contextlib
import dataclasses
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hipgpt_jax import api, compilation
from hipgpt_jax.cli import program
from hipgpt_jax.records import writer

if TYPE_CHECKING:
    from hipgpt_jax.generation import requests
    from hipgpt_jax.records import planning
    from hipgpt_jax.runs import loading

_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@contextlib.contextmanager
def open_output(
    name: str | None, *, overwrite: bool, inputs: Iterable[str | None]
) -> Iterator[writer.RecordFile | TextIO | None]:
    """Opens the file that ``--output`` names.

    Args:
        name: The flag's value.
        overwrite: Whether the records in it are replaced.
        inputs: Files that the same command reads, of which it must be none.

    Yields:
        A record file, stdout where it is ``-`` or another name of stdout, or None where there is no name.
    """
    if name is None or is_stdout(name):
        yield None if name is None else sys.stdout
        return
    for path in filter(None, inputs):
        if os.path.exists(name) and os.path.exists(path) and os.path.samefile(name, path):
            raise ValueError(f"--output {name} is a file that this command reads: use another --output")
    out = writer.RecordFile(Path(name), overwrite=overwrite)
    try:
        if out.dropped:
            program.note(f"{name}: dropped a torn last line of {out.dropped} bytes, left by a command that was killed")
        yield out
    finally:
        out.close()


def is_stdout(name: str) -> bool:
    """Returns whether a file name stands for stdout, and not for a file that stdout was redirected to."""
    if name in _STDOUT:
        return True
    try:
        target, stdout = os.stat(name), os.fstat(1)
    except (OSError, ValueError):
        return False
    if not os.path.samestat(target, stdout) or stat.S_ISCHR(target.st_mode):
        return False
    if stat.S_ISREG(target.st_mode):
        raise ValueError(f"--output {name} is the file that stdout goes to: use another one, or --output -")
    return True


def write(
    run: api.Run,
    plan: "planning.Plan",
    out: writer.RecordFile | TextIO | None,
    *,
    shows_text: bool,
    stream: bool,
    echo: bool,
) -> None:
    """Makes the samples of a plan, and writes them.

    Args:
        run: The run to generate from.
        plan: The prompts and their samples.
        out: Destination of each sample's record, when it has ended.
        shows_text: Whether the text goes to stdout, sample after sample.
        stream: Whether each token is written there at once.
        echo: Whether the prompt stands before its text.
    """
    from hipgpt_jax.generation import requests

    if isinstance(out, writer.RecordFile):
        if plan.left < plan.samples:
            program.note(f"{out.path} has {plan.samples - plan.left} of the samples: {plan.left} are left")
        if plan.repeated:
            program.note(
                f"{plan.repeated} prompts repeat an earlier one: their samples would be the same and are made once"
            )
    clock, cut = _Clock(load=run.load_seconds, programs=compilation.Compilations()), _Cut(run.files.window)
    with _progress(plan.left, is_shown=not (shows_text and sys.stdout.isatty())) as advance:
        samples = run.requests(cut.noted(plan))
        outputs = _recorded(run, run.outputs(samples, measure=out is not None), out, clock, advance)
        if shows_text:
            _write_text(requests.in_order(outputs), stream=stream, echo=echo)
        else:
            for _ in outputs:
                pass
    if cut.count > 1:
        program.note(f"{cut.count} of {plan.prompts} prompts are longer than the window, of which the end was read")
    program.note(clock.summary())
    if clock.errors:
        raise ValueError(f"{clock.errors} of {clock.samples} samples ended in an error; the last: {clock.last_error}")


class _Cut:
    """Count of the prompts that are longer than the window, with a note about the first."""

    def __init__(self, window: int) -> None:
        self.count = 0
        self._window = window

    def noted(self, plan: "planning.Plan") -> "Iterator[loading.ResolvedPrompt]":
        """Yields the prompts of a plan and counts those that are too long."""
        for one in plan:
            if len(one.prompt_ids) > self._window:
                self.count += 1
                if self.count == 1:
                    program.note(
                        f"{'the prompt' if plan.prompts == 1 else f'prompt {one.id}'} has {len(one.prompt_ids)} "
                        f"tokens: the first {len(one.prompt_ids) - self._window} are beyond the window and not read"
                    )
            yield one


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

    def count(self, output: "requests.Output") -> None:
        if output.token is not None:
            self.last_token = time.perf_counter() - self.began
            if not self.tokens:
                self.first_token, self.first_programs = self.last_token, str(self.programs)
            self.tokens += 1
        if output.finish_reason is not None:
            self.samples += 1
        if output.finish_reason == "error":
            self.errors += 1
            self.last_error = str(output.sequence.error)

    def summary(self) -> str:
        facts = [f"loaded in {self.load:.2f} s"]
        if self.tokens:
            facts.append(f"first token {self.first_token:.2f} s later ({self.first_programs})")
        if self.tokens > 1:
            facts.append(f"then {(self.tokens - 1) / (self.last_token - self.first_token):.0f} tokens/s")
        total = self.load + time.perf_counter() - self.began
        made = f"{self.tokens} tokens" if self.samples < 2 else f"{self.samples} samples, {self.tokens} tokens"
        return f"{made}: {', '.join(facts)}, {total:.2f} s in all"


def _recorded(
    run: api.Run,
    outputs: "Iterable[requests.Output]",
    out: writer.RecordFile | TextIO | None,
    clock: _Clock,
    advance: Callable[[_Clock], None],
) -> "Iterator[requests.Output]":
    """Passes outputs on and, where a sample has ended, writes its record first."""
    for output in outputs:
        clock.count(output)
        if output.finish_reason is not None and out is not None:
            made = run.recorder.build(output.sequence)
            if isinstance(out, writer.RecordFile):
                out.append(made)
            else:
                out.flush()
                out.buffer.write(made.to_json().encode() + b"\n")  # UTF-8, whatever the terminal's encoding
                out.buffer.flush()
        advance(clock)
        yield output


def _write_text(outputs: "Iterable[requests.Output]", *, stream: bool, echo: bool) -> None:
    begun = False
    for output in outputs:
        if not begun and echo:
            sys.stdout.write(program.displayable(output.sequence.request.prompt))
        sys.stdout.write(program.displayable(output.text))
        begun = output.finish_reason is None
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
