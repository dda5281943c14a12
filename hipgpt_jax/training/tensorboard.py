"""TensorBoard event files: the lines of ``metrics.jsonl`` and samples of text, through tensorboardX."""

import time
from pathlib import Path
from typing import Any

_LARGEST = 3.4e38  # a scalar of an event is a float32


def require() -> None:
    """Raises ValueError, with the command that installs it, where tensorboardX cannot be imported."""
    _library()


class EventFile:
    """An event file to append to; each call returns once its events are on disk.

    A run resumed writes a further file into the same directory. It begins with TensorBoard's mark of a start at
    the first step that is taken anew: TensorBoard drops the older files' events from there on, so that none shows
    twice. The older files themselves are left as they are.
    """

    def __init__(self, directory: Path, resumed_at: int = 0) -> None:
        """Creates the file.

        Args:
            directory: Where the event files of the run lie; made where it is missing.
            resumed_at: Step of the state that the run goes on from; 0 for a new run.
        """
        writer, self._summary, self._event = _library()
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, which begin with the second.
        earlier = len(list(directory.glob("events.out.tfevents.*")))
        self._writer = writer.EventsWriter(str(directory / "events"), f".{earlier:04}")
        # Of the marks in a directory TensorBoard passes over the first, so a new run's file begins with one too.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(self._event.Event(step=resumed_at + 1, session_log=start))
        self._writer.flush()

    def append(self, line: dict[str, Any]) -> None:
        """Writes the numbers of a line of metrics at its ``step``: ``train/loss``, ``validation/loss``, ….

        What the line calls ``validation_…`` goes to ``validation/``, all else to ``train/``.
        """
        for key, number in line.items():
            if key != "step":
                scalar = self._summary.scalar(_tag(key), _clip(number))
                self._write(self._event.Event(step=line["step"], summary=scalar))
        self._writer.flush()

    def text(self, step: int, text: str) -> None:
        """Writes a sample of text, which TensorBoard shows as it is and not as Markdown."""
        block = "\n".join(f"    {line}" for line in text.split("\n"))
        self._write(self._event.Event(step=step, summary=self._summary.text("sample", block)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file, after which nothing can be appended."""
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def _library() -> tuple[Any, Any, Any]:
    """The parts of tensorboardX in use. Its ``SummaryWriter`` holds events back in a queue that a kill would lose."""
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs tensorboardX ({error}): pip install 'hipgpt-jax[tensorboard]'"
        ) from error
    return event_file_writer, summary, event_pb2


def _tag(key: str) -> str:
    split, _, name = key.partition("_")
    return f"validation/{name}" if split == "validation" else f"train/{key}"


def _clip(number: float) -> float:
    return max(-_LARGEST, min(_LARGEST, number))
