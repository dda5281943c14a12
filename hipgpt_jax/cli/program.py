"""Running a program: command line, help, errors, exit codes, and what several programs do alike."""

import atexit
import contextlib
import functools
import gc
import keyword
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import absl.flags

from hipgpt_jax import cli, compilation, devices, version
from hipgpt_jax.cli import arguments, flags, streams, usage
from hipgpt_jax.text import prompts

# Imports and tracing create many objects and no garbage, but Python searches all of them for it: of the 1.55 s of
# hipgpt-generate, 0.12 s at the start and 0.14 s at exit, where they are frozen now.
_GC_THRESHOLD = 1_000_000
_MAX_STDIN = 2**26

# Mistakes of the user and faults of the machine. All other exceptions are bugs and show a traceback. Warnings are
# exceptions under `python -W error`.
_REPORTED = (absl.flags.Error, ValueError, ArithmeticError, OSError, RuntimeError, MemoryError, ImportError, Warning)

# A program's name at the beginning of an indented line, or after a colon or an environment variable.
_COMMAND = re.compile(r"((?:^  |: |=\w+ ))hipgpt-([a-z]+)", re.MULTILINE)

# Programs print only through these.
note = streams.note
dim_note = streams.dim_note
printable = streams.printable
displayable = streams.displayable
shell_command = streams.shell_command
outlive_stdout = streams.outlive_stdout


_T = TypeVar("_T")


def run(
    name: str,
    summary: str,
    values: absl.flags.FlagValues,
    main: Callable[[], None],
    *,
    operand: str | None = None,
    error_code: int = 1,
) -> None:
    """Parses ``sys.argv`` and runs a program, then exits.

    A user's mistake is one line on stderr, ``name: error: ...``, and exit code ``error_code``. A closed pipe and Ctrl-C
    end silently with the exit codes that a shell expects. Text that stdout or stderr cannot encode is escaped.

    Args:
        name: The program's name, without ``hipgpt-``.
        summary: The beginning of ``--help``.
        values: The program's flags.
        main: The program; it reads ``values``.
        operand: The flag whose name may be omitted; one defined by ``DEFINE_multi_string`` takes any number of values.
        error_code: Exit code of a mistake.
    """
    gc.set_threshold(_GC_THRESHOLD)
    atexit.register(gc.freeze)
    streams.prepare()

    def work() -> None:
        request = arguments.parse(values, sys.argv[1:], operand, flags.aliases(values), flags.synonyms(values))
        if request is None:
            main()
        elif request == "version":
            print(version.__version__)
        elif request == "help":
            print(usage.help_text(shell_command(command(name)), with_commands(summary), values, operand))
        else:
            from hipgpt_jax.cli import completion

            print(completion.script(request, f"hipgpt-{name}", values))

    # The early handler of Ctrl-C is installed only if this process is a program, not if a test runs one.
    is_process = signal.getsignal(signal.SIGINT) is cli.end_at_once
    if is_process:
        signal.signal(signal.SIGINT, cli.interrupt)
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, name)
        code = _attempt(name, error_code, work, values)
        code = _attempt(name, error_code, sys.stdout.flush, values) or code or streams.exit_code()
    if is_process:
        signal.setitimer(signal.ITIMER_REAL, 0)  # which cli.interrupt may have set
        signal.signal(signal.SIGINT, cli.end_at_once)
    if code:
        sys.exit(code)


def _attempt(name: str, error_code: int, work: Callable[[], None], values: absl.flags.FlagValues) -> int:
    """Does work and returns the exit code."""
    try:
        work()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BrokenPipeError:
        streams.give_up_stdout()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        streams.note("")
        return 128 + signal.SIGINT
    except _REPORTED as error:
        if cli.interrupted:
            streams.note("")
            return 128 + signal.SIGINT
        has_fields = isinstance(error, (ValueError, MemoryError)) and str(error)
        streams.report(name, "error", flags.translate(str(error), values) if has_fields else error)
        streams.give_up_stdout()
        return error_code
    return 0


def _show_warning(name: str, message: Warning | str, *place: Any) -> None:
    """Shows a library's warning on one line, instead of Python's two with a source path."""
    del place
    streams.report(name, "warning", message)


def command(name: str) -> list[str]:
    """Returns the words that start a program in the way in which this one was started.

    They are ``hipgpt-NAME`` only if that is found on ``PATH``, as it is in an activated environment.
    """
    program, script = f"hipgpt-{name}", sys.argv[0]
    folder = os.path.dirname(script)
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`, only for the program that it starts
        return ["uv", "run", program]
    if os.path.basename(script).startswith("hipgpt-"):
        return [program if os.path.dirname(shutil.which(program) or "") == folder else os.path.join(folder, program)]
    if script.endswith(".py") and any(word.startswith("hipgpt_jax.cli.") for word in sys.orig_argv):
        return [sys.orig_argv[0], "-m", f"hipgpt_jax.cli.{name}{'_' if keyword.iskeyword(name) else ''}"]
    return [program]


def with_commands(text: str) -> str:
    """Returns a text with the names of programs replaced by ``command``, where they begin a command line."""
    return _COMMAND.sub(lambda match: f"{match[1]}{shell_command(command(match[2]))}", text)


def start_device(name: str, dtype: str | None = None, *, deterministic: bool = True) -> devices.Device:
    """Starts JAX with the compile cache, and notes a dtype that the device emulates; see ``devices.start``."""
    device = devices.start(name, note, deterministic=deterministic)
    compilation.use_cache(note)
    if device.platform == "cpu" and dtype == "bfloat16":
        note("CPUs emulate bfloat16: float32 is faster")
    return device


def required(holder: absl.flags.FlagHolder[_T | None]) -> _T:
    """Returns the value of a flag without a default; raises ValueError if it was not given."""
    if holder.value is None:
        raise ValueError(f"--{holder.name} is required; --help lists every flag")
    return holder.value


def read_prompts(
    prompt: str | None, prompts_file: str | None, ids: str | None = None, *, parse_special: bool = False
) -> Iterable[prompts.Prompt]:
    """Returns the prompts of three flags: one, one from stdin, or those of a file, which is read lazily.

    Args:
        prompt: Value of ``--prompt``.
        prompts_file: Value of ``--prompts_file``.
        ids: Value of ``--prompt_ids``.
        parse_special: Whether text that spells a special token is read as that token.
    """
    flags = {"--prompt": prompt, "--prompts_file": prompts_file, "--prompt_ids": ids}
    first, second, *_ = [*(flag for flag, value in flags.items() if value is not None), None, None]
    if second is not None:
        raise ValueError(f"{first} and {second} are both given: give one of them")
    if prompts_file is not None:
        return _open_prompts(prompts_file, parse_special)
    if ids is not None:
        try:
            return [prompts.Prompt(ids=prompts.parse_ids(ids))]
        except ValueError as error:
            raise ValueError(f"--prompt_ids {error}") from error
    if prompt is None:
        raise ValueError("--prompt or --prompts_file is required; --help lists every flag")
    return [prompts.Prompt(text=_read_stdin() if prompt == "-" else prompt, parse_special=parse_special)]


def _open_prompts(name: str, parse_special: bool) -> prompts.PromptFile:
    if name == "-" and sys.stdin is None:
        raise ValueError("--prompts_file - reads stdin, which is closed")
    path, stream = (Path("stdin"), sys.stdin.buffer) if name == "-" else (Path(name), None)
    found = prompts.PromptFile(path, stream, parse_special=parse_special)
    if found.hint:
        note(found.hint)
    return found


def _read_stdin() -> str:
    """Returns the text on stdin without one final line break, which ``echo`` and editors add."""
    if sys.stdin is None:
        raise ValueError("--prompt - reads the prompt from stdin, which is closed")
    content = sys.stdin.buffer.read(_MAX_STDIN + 1)
    if len(content) > _MAX_STDIN:
        raise ValueError(f"the prompt on stdin is too long: at most {_MAX_STDIN} bytes are allowed")
    text = content.decode("utf-8", errors="replace").removeprefix("\ufeff")
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


@contextlib.contextmanager
def spinner(text: str) -> Iterator[Callable[[], None]]:
    """Shows a spinner on stderr, if that is a terminal, until the end of the block or a call of what it yields."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich import console

    status = console.Console(stderr=True).status(text)
    with status:
        yield status.stop


def require_stdout(product: str) -> None:
    """Raises ValueError if stdout is closed, for a program whose output goes there."""
    if streams.is_closed(sys.stdout):
        raise ValueError(f"stdout is closed: {product} would be lost")


def keep_freed_memory(*, verbose: bool) -> None:
    """Calls ``devices.keep_freed_memory``, and prints a note if ``verbose``."""
    if devices.keep_freed_memory() and verbose:
        note("set glibc's mallopt to keep freed memory between steps (not with MALLOC_* or GLIBC_TUNABLES)")


def keep_stdout_for_text() -> None:
    """Redirects to stderr what C libraries print to stdout, such as gloo's connections; Python's stdout stays."""
    streams.replace_stdout(os.dup(1))
    os.dup2(2, 1)
