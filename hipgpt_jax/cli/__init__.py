"""Command-line programs.

A program imports this package first, before NumPy and JAX. In such a process, Ctrl-C and failing imports are handled
from here on, without a traceback.
"""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType

_REPORTED = (ImportError, MemoryError, OSError, Warning)  # raised by imports, also without memory or under -W error

interrupted = False
"""Whether Ctrl-C was pressed. Native code may replace the KeyboardInterrupt by another exception or drop it."""


def _program() -> str | None:
    """Returns the name of the program that this process runs; None if something else imports this package."""
    script = sys.argv[0] if sys.argv else ""
    if script == "-m":  # while `python -m` looks for the module
        module = next((word for word in sys.orig_argv if "hipgpt_jax.cli." in word), None)
        return module and module.rpartition(".")[2].rstrip("_")  # import_, because import is a keyword
    name = os.path.basename(script)
    return name.removeprefix("hipgpt-") if name.startswith("hipgpt-") else None


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT during imports and at exit: there is nothing to clean up."""
    del number, frame
    with contextlib.suppress(OSError):
        os.write(2, b"\n")
    os._exit(128 + signal.SIGINT)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT while a program runs: raises KeyboardInterrupt, so that files are closed.

    JAX's native modules abort the process if Python code that they call during their import raises. During imports
    this therefore retries every 20 ms.
    """
    global interrupted
    if interrupted and number == signal.SIGINT:
        end_at_once(number, frame)
    interrupted = True
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Prints an exception raised by an import."""
    if issubclass(kind, KeyboardInterrupt):
        if traceback is not None and traceback.tb_frame.f_back is None:
            end_at_once(signal.SIGINT, None)
        return  # native code prints it and continues with another exception
    if not issubclass(kind, _REPORTED):
        sys.__excepthook__(kind, error, traceback)
        return
    from hipgpt_jax.cli import streams

    program = _PROGRAM or "hipgpt"
    streams.prepare()
    streams.report(program, "error", error)
    os._exit(2 if program == "replay" else 1)  # for hipgpt-replay, 1 means that a record differs


_PROGRAM = _program()
if _PROGRAM is not None:
    # Reserve descriptors 0 to 2 if they are closed: native code may print to them, into the next file opened.
    while (_null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(_null)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    sys.excepthook = _report
