"""Log lines, progress bars and text samples of ``hipgpt-train``, and the signals that stop it."""

import contextlib
import functools
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from hipgpt_jax import config
from hipgpt_jax.cli import program, train_flags
from hipgpt_jax.report import curves
from hipgpt_jax.runs import directory, reset
from hipgpt_jax.text import manifest, tokenizer

if TYPE_CHECKING:
    from rich import console

    from hipgpt_jax.training import loop, tensorboard

_SAMPLE_TOKENS = 100
_SECONDS_BETWEEN_LINES = 60
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def preparing() -> Iterator[Callable[[int, int, str], None]]:
    """Yields a callback for the progress of tokenising: a bar on a terminal, otherwise a line per minute."""
    from rich import progress

    terminal = _console()
    columns = (
        progress.TextColumn("{task.description} the text"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        if terminal.is_terminal:
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
        else:
            yield _lines(time.monotonic)


def _lines(clock: Callable[[], float]) -> Callable[[int, int, str], None]:
    written = clock()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal written
        if clock() - written >= _SECONDS_BETWEEN_LINES:
            written = clock()
            program.note(f"{what} the text: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    return progress


class _Terminal:
    """stderr for the progress bar; writes to a terminal that is gone are ignored."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM, SIGHUP or Ctrl-C was received; a second one stops at once.

    SIGHUP stays ignored if it was, as under ``nohup``.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if received and number != signal.SIGHUP:  # a closing terminal may send several
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        program.note("stopping after this step; repeat to stop at once, without saving")

    is_main = threading.current_thread() is threading.main_thread()  # no other may handle signals
    numbers = [number for number in _STOPPING if is_main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def reporting(job: "loop.Job", should_stop: Callable[[], bool], resume_step: int | None) -> Iterator["loop.Report"]:
    """Yields callbacks for log lines on stdout and a progress bar on stderr, if that is a terminal."""
    from rich import progress

    from hipgpt_jax.training import loop

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("step {task.completed}/{task.total}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeRemainingColumn(),
    )
    terminal = _console()
    bar = progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal)
    if terminal.is_terminal and sys.stdout.isatty():  # on the same screen, a line must move the bar
        log = functools.partial(terminal.print, soft_wrap=True, markup=False, highlight=False)
    else:
        log = functools.partial(print, flush=True)
    with bar, _events(job, resume_step) as events:
        task = bar.add_task("train", total=job.train.steps, status="compiling")

        def advance(step: int, loss: float, rate: float) -> None:
            bar.update(task, completed=step, status=f"loss {loss:.3f} nats/token, {rate:.0f} tokens/s")

        yield loop.Report(
            log=log,
            progress=advance,
            metrics=events.append if events else lambda line: None,
            sample=_sampling(job, log, events),
            should_stop=should_stop,
        )


def compare(runs: Sequence[str]) -> Iterator[str]:
    """Yields a table of the lowest validation loss of each run, and their mean and standard deviation."""
    found = [curves.read(directory.new(run, 0) / directory.METRICS_NAME, run) for run in runs]
    columns = [(unit, [run.validation("loss", unit) for run in found]) for unit in reversed(curves.UNITS)]
    width = max(len("lowest validation loss"), *map(len, runs))
    yield f"{'lowest validation loss':{width}}  {'step':>6}" + "".join(f"  nats/{unit}" for unit, _ in columns)
    for number, run in enumerate(runs):
        lowest = [min(each[number].values) for _, each in columns]
        step = columns[0][1][number].steps[columns[0][1][number].values.index(lowest[0])]
        yield f"{run:{width}}  {step:>6}" + "".join(
            f"  {value:>{len(unit) + 5}.4f}" for value, (unit, _) in zip(lowest, columns, strict=True)
        )
    if len(runs) > 1:
        means = [[min(curve.values) for curve in each] for _, each in columns]
        yield f"mean of {len(runs)} runs ± standard deviation: " + ", ".join(
            f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} nats per {unit}"
            for values, (unit, _) in zip(means, columns, strict=True)
        )


def _console() -> "console.Console":
    from rich import console

    stream: Any = _Terminal(sys.stderr)
    return console.Console(file=stream)


@contextlib.contextmanager
def _events(job: "loop.Job", resume_step: int | None) -> Iterator["tensorboard.EventFile | None"]:
    """Yields the file of ``--tensorboard``; steps that a resumed run repeats replace the old ones."""
    import jax

    from hipgpt_jax.training import tensorboard

    if not train_flags.TENSORBOARD.value or jax.process_index() > 0:
        yield None
        return
    folder = job.directory / reset.TENSORBOARD_NAME
    with contextlib.closing(tensorboard.EventFile(folder, resume_step=resume_step or 0)) as events:
        yield events


def _sampling(
    job: "loop.Job", log: Callable[[str], None], event_file: "tensorboard.EventFile | None"
) -> Callable[[int, Any], None]:
    """Returns a function that writes a text sample from parameters. One sampler serves all steps and compiles once."""
    vocabulary = tokenizer.Tokenizer.load(job.directory / manifest.TOKENIZER_NAME)
    engines: list[Any] = []

    def sample(step: int, params: Any) -> None:
        from hipgpt_jax.generation import requests, scheduler

        if not engines:
            engines.append(scheduler.Scheduler(job.model, params, config.DecodingConfig()))
        engines[0].load(params)
        request = requests.Request(
            prompt_ids=tuple(vocabulary.encode(train_flags.SAMPLE_PROMPT.value)),
            sample=0,
            generation=config.GenerationConfig(num_tokens=_SAMPLE_TOKENS, seed=job.train.seed),
            sampling=config.SamplingConfig(),
        )
        ids = [output.token for output in engines[0].run([request]) if output.token is not None]
        text = vocabulary.decode([*request.prompt_ids, *ids])
        log(f"[Step {step}] Sample: {text!r}")
        if event_file:
            event_file.text(step, text)

    return sample
