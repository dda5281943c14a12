"""What ``hipgpt-train`` shows while it works, and how it is told to stop."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hipgpt_jax import config
from hipgpt_jax.cli import program, train_flags
from hipgpt_jax.text import dataset, tokenizer

if TYPE_CHECKING:
    from hipgpt_jax.training import loop, tensorboard

_SAMPLE_TOKENS = 100


@contextlib.contextmanager
def preparing() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, where that is a terminal, for a text that takes its time."""
    from rich import console, progress

    terminal = console.Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description} the text"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM or Ctrl-C came; a second one stops at once."""
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if came:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        came.append(number)
        program.note("stopping after this step; once more to stop at once, without saving")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def reporting(job: "loop.Job", stops: Callable[[], bool]) -> Iterator["loop.Report"]:
    """Log lines on stdout, and a progress bar on stderr where that is a terminal."""
    from rich import console, progress

    from hipgpt_jax.training import loop

    columns = (
        progress.TextColumn("step {task.completed}/{task.total}"),
        progress.BarColumn(),
        progress.TextColumn("loss {task.fields[loss]:.3f}"),
        progress.TextColumn("{task.fields[rate]:.0f} tokens/s"),
        progress.TimeRemainingColumn(),
    )
    terminal = console.Console(stderr=True)
    bar = progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal)
    if terminal.is_terminal and sys.stdout.isatty():  # on one screen the bar must make way for a line
        line = functools.partial(terminal.print, soft_wrap=True, markup=False, highlight=False)
    else:
        line = functools.partial(print, flush=True)
    with bar, _events(job) as events:
        task = bar.add_task("train", total=job.train.steps, loss=float("nan"), rate=0.0)
        yield loop.Report(
            line=line,
            progress=lambda step, loss, rate: bar.update(task, completed=step, loss=loss, rate=rate),
            metrics=events.append if events else lambda line: None,
            sample=_sampling(job, line, events),
            stops=stops,
        )


@contextlib.contextmanager
def _events(job: "loop.Job") -> Iterator["tensorboard.EventFile | None"]:
    """TensorBoard's file, where it was asked for; the steps that a resumed run takes again replace the old ones."""
    import jax

    from hipgpt_jax.training import checkpoint, tensorboard

    if not train_flags.TENSORBOARD.value or jax.process_index() > 0:
        yield None
        return
    with contextlib.closing(checkpoint.StateStore(job.directory)) as store:
        at = (store.latest() or 0) if train_flags.RESUME.value else 0
    with contextlib.closing(tensorboard.EventFile(job.directory / "tensorboard", resumed_at=at)) as events:
        yield events


def _sampling(
    job: "loop.Job", line: Callable[[str], None], board: "tensorboard.EventFile | None"
) -> Callable[[int, Any], None]:
    """Writes a sample of text from the parameters of a step; one sampler serves all steps, and compiles once."""
    vocabulary = tokenizer.Tokenizer.load(job.directory / dataset.TOKENIZER_NAME)
    engines: list[Any] = []

    def sample(at: int, params: Any) -> None:
        from hipgpt_jax.generation import events, sampler

        if not engines:
            engines.append(sampler.Sampler(job.model, params, config.DecodingConfig()))
        engines[0].load(params)
        request = events.Request(
            prompt_ids=tuple(vocabulary.encode(train_flags.SAMPLE_PROMPT.value)),
            sample=0,
            generation=config.GenerationConfig(num_tokens=_SAMPLE_TOKENS, seed=job.train.seed),
            sampling=config.SamplingConfig(),
        )
        ids = [event.token for event in engines[0].run([request]) if event.token is not None]
        text = vocabulary.decode([*request.prompt_ids, *ids])
        line(f"[Step {at}] Sample: {text!r}")
        if board:
            board.text(at, text)

    return sample
