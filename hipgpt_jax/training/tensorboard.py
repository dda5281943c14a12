"""TensorBoard event files with the lines of ``metrics.jsonl`` and samples of text, through tensorboardX."""

import time
from pathlib import Path
from typing import Any

_LARGEST = 3.4e38  # scalars of events are float32


def require() -> None:
    """Raises ValueError, with the command that installs it, if tensorboardX cannot be imported."""
    _library()


class EventFile:
    """An event file to append to; each call returns once its events are on disk.

    A resumed run writes another file into the same directory, which begins with TensorBoard's session start at the
    first repeated step: TensorBoard then drops the events of older files from there on, so that none shows twice.
    """

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        """Creates the file.

        Args:
            directory: Directory of the run's event files; created if missing.
            resume_step: Step of the state that the run resumes from; 0 for a new run.
        """
        writer, self._summary, self._event = _library()
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, which begin with the time in seconds.
        earlier = len(list(directory.glob("events.out.tfevents.*")))
        self._writer = writer.EventsWriter(str(directory / "events"), f".{earlier:04}")
        # TensorBoard ignores the first session start of a directory, so a new run's file needs one too.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(self._event.Event(step=resume_step + 1, session_log=start))
        self._writer.flush()

    def append(self, line: dict[str, Any]) -> None:
        """Writes the numbers of a line of metrics at its ``step``, tagged ``train/…`` or ``validation/…``."""
        for key, number in line.items():
            if key != "step":
                scalar = self._summary.scalar(_tag(key), _clip(number))
                self._write(self._event.Event(step=line["step"], summary=scalar))
        self._writer.flush()

    def text(self, step: int, text: str) -> None:
        """Writes a sample of text."""
        # TensorBoard renders Markdown; an indented block is shown verbatim.
        block = "\n".join(f"    {line}" for line in text.split("\n"))
        self._write(self._event.Event(step=step, summary=self._summary.text("sample", block)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def _library() -> tuple[Any, Any, Any]:
    """Returns the modules of tensorboardX in use."""
    # Its SummaryWriter keeps events in a queue that a kill would lose.
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise ValueError(f"--tensorboard needs tensorboardX ({error}): pip install -e '.[tensorboard]'") from error
    return event_file_writer, summary, event_pb2


def _tag(key: str) -> str:
    split, _, name = key.partition("_")
    return f"validation/{name}" if split == "validation" else f"train/{key}"


def _clip(number: float) -> float:
    return max(-_LARGEST, min(_LARGEST, number))
