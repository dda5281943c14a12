"""Output of ``hipgpt-generate``: text, records, a progress bar, and statistics at the end."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

from hipgpt_jax import api, compilation
from hipgpt_jax.cli import program
from hipgpt_jax.records import writer

if TYPE_CHECKING:
    from hipgpt_jax.generation import requests
    from hipgpt_jax.records import planning
    from hipgpt_jax.runs import loading
    from hipgpt_jax.text import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """Form of the text on stdout.

    Attributes:
        stream: Whether to print each token at once.
        echo: Whether to print the prompt before its text.
        separator: Line between two samples; None for none.
    """

    stream: bool
    echo: bool
    separator: str | None


def write(run: api.Run, plan: "planning.Plan", out: writer.RecordFile | TextIO | None, style: Style | None) -> None:
    """Generates the samples of a plan and writes them.

    Args:
        run: The run.
        plan: The prompts and their samples.
        out: Destination of the records.
        style: Form of the text; None prints none.

    Raises:
        ValueError: A sample ended in an error; the others are complete.
    """
    from hipgpt_jax.generation import requests

    if isinstance(out, writer.RecordFile):
        if plan.left < plan.samples:
            left = f"{plan.left} are left" if plan.left else "nothing is left to do"
            program.note(f"{out.path} has {plan.samples - plan.left} of the samples: {left}")
        if plan.repeated:
            program.note(f"{plan.repeated} prompts repeat earlier ones: their equal samples are generated once")
    statistics = _Statistics(load=run.load_seconds, programs=compilation.Compilations())
    with _progress(plan.left, shows_text=style is not None and sys.stdout.isatty()) as advance:
        samples = run.requests_of(_note_prompts(plan, run.files, has_records=out is not None))
        outputs = _record(run, run.outputs(samples, measure=out is not None), out, statistics, advance)
        if style:
            _print_text(requests.in_order(outputs), style, plan.left)
        else:
            for _ in outputs:
                pass
    program.note(str(statistics))
    if statistics.errors:
        raise ValueError(
            f"{statistics.errors} of {statistics.samples} samples ended in an error; the last: {statistics.last_error}"
        )


def _note_prompts(
    plan: "planning.Plan", files: "loading.RunFiles", *, has_records: bool
) -> "Iterator[loading.ResolvedPrompt]":
    """Yields the prompts of a plan, and prints a note about the first of each kind of unusual ones."""
    number, window, noted = 0, files.window, set[str]()
    for prompt in plan:
        name = "the prompt" if plan.prompts == 1 else f"prompt {prompt.id}"
        length = len(prompt.prompt_ids)
        number += length > window
        if length > window and number == 1:
            program.note(f"{name} has {length} tokens: the first {length - window} are beyond the window and not read")
        for kind, text in _unusual(prompt, files.vocabulary, has_records=has_records):
            if kind not in noted:
                noted.add(kind)
                program.note(f"{name} {text}")
        yield prompt
    if number > 1:
        program.note(f"{number} of {plan.prompts} prompts are longer than the window: only their ends are read")


def _unusual(
    prompt: "loading.ResolvedPrompt", vocabulary: "tokenizer.Tokenizer", *, has_records: bool
) -> Iterator[tuple[str, str]]:
    """Yields kinds and descriptions of what is unusual about a prompt."""
    if prompt.generation.top_logprobs and not has_records:
        yield "top_logprobs", "has top_logprobs, which are only recorded: --output writes records"
    for token, token_id in vocabulary.special_tokens.items():
        if token in prompt.prompt and token_id not in prompt.prompt_ids:
            text = f"spells the special token {token!r} and is read as ordinary text: --parse_special reads the token"
            yield "special", text
    # Ids of which no text is made may end in a space on purpose.
    if prompt.prompt.endswith(" ") and list(prompt.prompt_ids) == vocabulary.encode(prompt.prompt):
        yield "space", "ends with a space, and tokens mostly begin with theirs: the text may be better without it"


_SECONDS_OF_ONE_FETCH = 2e-3


@dataclasses.dataclass(kw_only=True)
class _Statistics:
    """Times of a command in seconds, and numbers of samples and tokens.

    Attributes:
        load: Time to load the run.
        programs: Counts of compilations.
        start: Start of the generation on the clock.
        first_token: Time from the start to the first token.
        first_programs: Compilations before it.
        last_token: Time from the start to the newest token.
        first_tokens: Tokens that were fetched together with the first.
        tokens: Tokens.
        samples: Finished samples.
        errors: Samples that ended in an error.
        last_error: The last error.
    """

    load: float
    programs: compilation.Compilations
    start: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float = 0.0
    first_programs: str = ""
    last_token: float = 0.0
    first_tokens: int = 0
    tokens: int = 0
    samples: int = 0
    errors: int = 0
    last_error: str = ""

    def add(self, output: "requests.Output") -> None:
        if output.token is not None:
            self.last_token = time.perf_counter() - self.start
            if not self.tokens:
                self.first_token, self.first_programs = self.last_token, str(self.programs)
            self.tokens += 1
            self.first_tokens += self.last_token - self.first_token < _SECONDS_OF_ONE_FETCH
        self.samples += output.finish_reason is not None
        if output.finish_reason == "error":
            self.errors += 1
            self.last_error = str(output.sequence.error)

    def __str__(self) -> str:
        counts = f"{self.tokens} tokens" if self.samples < 2 else f"{self.samples} samples, {self.tokens} tokens"
        parts = [f"loaded in {self.load:.2f} s"]
        if self.tokens:
            parts.append(f"first token {self.first_token:.2f} s later ({self.first_programs})")
        if later := self.tokens - self.first_tokens:
            parts.append(f"then {later / (self.last_token - self.first_token):.0f} tokens/s")
        total = self.load + time.perf_counter() - self.start
        return f"{counts}: {', '.join(parts)}, {total:.2f} s in total"


def _record(
    run: api.Run,
    outputs: "Iterable[requests.Output]",
    out: writer.RecordFile | TextIO | None,
    statistics: _Statistics,
    advance: Callable[[_Statistics], None],
) -> "Iterator[requests.Output]":
    """Yields outputs after counting them and writing the records of finished samples."""
    for output in outputs:
        statistics.add(output)
        if output.finish_reason is not None and out is not None:
            record = run.recorder.build(output.sequence)
            if isinstance(out, writer.RecordFile):
                out.append(record)
            else:
                out.flush()
                out.buffer.write(record.to_json().encode() + b"\n")  # UTF-8, whatever the locale
                out.buffer.flush()
        elif isinstance(out, writer.RecordFile):
            out.flush_if_due()
        advance(statistics)
        yield output


def _print_text(outputs: "Iterable[requests.Output]", style: Style, total: int) -> None:
    is_start, number = True, 0
    for output in outputs:
        if is_start:
            number += 1
            if style.separator is not None and number > 1:
                sys.stdout.write(f"{program.displayable(style.separator)}\n")
            elif style.separator is None and total > 1:
                _print_heading(f"--- sample {number} of {total} ---")
        if is_start and style.echo:
            sys.stdout.write(program.displayable(output.sequence.request.prompt))
        sys.stdout.write(program.displayable(output.text))
        is_start = output.finish_reason is not None
        if is_start:
            sys.stdout.write("\n")
        if style.stream:
            sys.stdout.flush()


def _print_heading(text: str) -> None:
    """Prints a dim line on stderr if text and stderr are on a terminal, where samples would run together."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        sys.stdout.flush()
        program.dim_note(text)


@contextlib.contextmanager
def _progress(total: int, *, shows_text: bool) -> Iterator[Callable[[_Statistics], None]]:
    """Yields a callback for each output, which updates a progress bar on stderr if that is a terminal.

    Text on the terminal is its own progress; before it there is a spinner.
    """
    if not sys.stderr.isatty():
        yield lambda statistics: None
        return
    if shows_text:
        with program.spinner("compiling") as stop:
            yield lambda statistics: stop()
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.completed}/{task.total} samples"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[rate]:.0f} tokens/s"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=total, rate=0.0)

        def advance(statistics: _Statistics) -> None:
            rate = statistics.tokens / max(statistics.last_token, 1e-9)
            bar.update(task, completed=statistics.samples, rate=rate)

        yield advance
