"""Standard streams: printing that does not fail, and escapes for untrusted text."""

import contextlib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any, TextIO, cast

# Control characters, which move a terminal's cursor or end a line; Unicode line separators and bidirectional
# overrides; lone surrogates, which cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# A message may quote the whole content of a file. Its end often has the remedy, so it is cut in the middle.
_MESSAGE_HEAD, _MESSAGE_TAIL = 700, 300


class _Stdout(io.FileIO):
    """The descriptor of stdout.

    Attributes:
        error: The first failed write; None if there was none.
        is_expendable: Whether output is dropped after a failed write, instead of raising OSError.
        matters: Whether dropped output makes the exit code that of a failure.
    """

    error: OSError | None = None
    is_expendable = False
    matters = True

    def write(self, data: Any) -> int:
        """Writes bytes, or drops them."""
        if self.error is None or not self.is_expendable:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.error = error
                if isinstance(error, BrokenPipeError) and not self.is_expendable:
                    raise
                if not self.is_expendable:
                    raise OSError(f"stdout: {error.strerror}") from error
                note(f"stdout: {error.strerror}: continuing without it")
        return memoryview(data).nbytes


_stdout: _Stdout | None = None


def prepare() -> None:
    """Makes stdout and stderr accept any text, and replaces closed ones by the null device.

    Text that a stream cannot encode is escaped, as in Python's own tracebacks. An OSError of stdout names stdout.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        replace_stdout(1)


def is_closed(stream: TextIO) -> bool:
    """Returns whether ``prepare`` replaced a stream because it was closed."""
    return getattr(stream, "name", None) == os.devnull


def printable(text: str) -> str:
    r"""Returns untrusted text with control characters escaped, so that it stays on one line.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def displayable(text: str) -> str:
    """Returns generated text for stdout: unchanged, but with control characters escaped on a terminal."""
    if not sys.stdout.isatty():
        return text
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in "\n\t" else printable(match[0]), text)


def shell_command(words: Sequence[str]) -> str:
    r"""Returns a command to paste into a shell, on one line even if words have line breaks or control characters.

    >>> shell_command(["hipgpt-train", "--run-name", "my run", "--sample-prompt=it's\n"])
    "hipgpt-train --run-name 'my run' $'--sample-prompt=it\\'s\\n'"
    """
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if not _UNPRINTABLE.search(word):
        return shlex.quote(word)
    # ANSI-C quoting of bash and zsh: an undecodable byte is a surrogate here and \xNN there; U+009B is \u009b.
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_UNPRINTABLE.sub(_ansi_c, plain)}'"


def _ansi_c(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0], f"\\u{code:04x}")


def dim_note(line: str) -> None:
    """Writes a line to stderr, dim on a terminal."""
    is_dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    note(line, *("\x1b[2m", "\x1b[0m") if is_dim else ())


def note(line: str, before: str = "", after: str = "") -> None:
    """Writes an escaped line to stderr, with control sequences around it; failures are ignored."""
    try:
        sys.stderr.write(f"{before}{printable(line)}{after}\n")
        sys.stderr.flush()
    except OSError:  # redirect to the null device, so that Python's flush at exit does not fail
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stderr.fileno())
            os.close(null)


def report(program: str, kind: str, error: BaseException | str) -> None:
    """Writes an error or a warning as one line of limited length, ``program: kind: message``."""
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        error = error.strerror  # without the error number; there is no file to name
    message = " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError) else "")
    message = message or type(error).__name__
    if len(message) > _MESSAGE_HEAD + _MESSAGE_TAIL:
        message = f"{message[:_MESSAGE_HEAD]} ... {message[-_MESSAGE_TAIL:]}"
    note(f"{program}: {kind}: {message}")


def replace_stdout(descriptor: int) -> None:
    """Makes ``sys.stdout`` write to a descriptor, with its present encoding and buffering."""
    global _stdout
    old = sys.stdout
    assert isinstance(old, io.TextIOWrapper)
    old.flush()
    _stdout = _Stdout(descriptor, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        # Under `python -u` there is no buffer.
        cast(io.BufferedWriter, _stdout) if old.write_through else io.BufferedWriter(_stdout),
        encoding=old.encoding,
        errors=old.errors,
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def outlive_stdout(*, matters: bool) -> None:
    """Lets a program that writes files continue when stdout is full or its reader has exited.

    Args:
        matters: Whether the exit code is that of a failure then.
    """
    if _stdout is not None:
        _stdout.is_expendable, _stdout.matters = True, matters


def give_up_stdout() -> None:
    """Drops the buffer of a broken stdout, so that Python's flush at exit does not fail."""
    if _stdout is not None and _stdout.error is not None:
        _stdout.is_expendable = True


def exit_code() -> int:
    """Returns the exit code for output dropped by ``outlive_stdout``; 0 if there is none or it does not matter."""
    if _stdout is None or _stdout.error is None or not (_stdout.is_expendable and _stdout.matters):
        return 0
    return 128 + signal.SIGPIPE if isinstance(_stdout.error, BrokenPipeError) else 1
