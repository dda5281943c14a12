"""What every program shares: absl flags in either spelling, help, and errors of one line."""

import atexit
import gc
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from absl import flags

from hipgpt_jax import devices, version
from hipgpt_jax.text import prompts

# Importing and tracing make many objects and no garbage, and Python looks for it in all of them: of the 1.55 s that
# hipgpt-generate took, 0.12 to start and 0.14 to exit, where they are frozen now.
_GC_THRESHOLD = 1_000_000

# What moves a terminal's cursor, ends a line of a report, or cannot be encoded: control characters, Unicode's line
# separators and bidirectional overrides, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_USAGE = {"--help": "help", "--h": "help", "--version": "version"}


def run(
    name: str,
    summary: str,
    values: flags.FlagValues,
    main: Callable[[], None],
    *,
    operand: str | None = None,
    error_code: int = 1,
) -> None:
    """Parses ``sys.argv`` and runs a program, then exits.

    A mistake of the user's is one line on stderr, ``name: error: …``, and exit code ``error_code``. A
    closed pipe and Ctrl-C end quietly, with the exit codes a shell gives them.

    Args:
        name: The program's name, without ``hipgpt-``.
        summary: What ``--help`` says first.
        values: The program's flags.
        main: The program; it reads its flags from ``values``.
        operand: The flag whose value may be given without the flag's name; one that is defined by
            ``DEFINE_multi_string`` takes any number of them.
        error_code: Exit code of a mistake.
    """
    gc.set_threshold(_GC_THRESHOLD)
    atexit.register(gc.freeze)
    try:
        asked = parse(values, sys.argv[1:], operand)
        if asked is None:
            main()
        else:
            print(version.__version__ if asked == "version" else help_text(name, summary, values, operand))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        sys.exit(128 + 2)
    except (flags.Error, ValueError, ArithmeticError, OSError, RuntimeError, MemoryError) as error:
        sys.stderr.write(f"{name}: error: {' '.join(str(error).split()) or type(error).__name__}\n")
        sys.exit(error_code)


def parse(values: flags.FlagValues, arguments: Sequence[str], operand: str | None = None) -> str | None:
    """Sets ``values`` from a command line; what it does not name takes its default.

    A word that belongs to no flag is the value of the flag ``operand``, if there is one; all such words
    are where that flag may be given several times. Returns ``help`` or ``version`` where that was asked
    for, in which case nothing is set.

    ``--run-name`` and ``--run_name`` are the same flag, as are ``--flag value`` and ``--flag=value``;
    a value may begin with ``-``. ``--flagfile=FILE`` reads flags from a file.

    Raises:
        flags.Error: A flag is unknown, lacks its value or has one of the wrong type.
        ValueError: A word belongs to no flag.
    """
    for flag in values:
        values[flag].unparse()
    words = _respell(values, values.read_flags_from_files(list(arguments), force_gnu=False))
    if asked := [word for word in words if word in _USAGE]:
        return _USAGE[asked[0]]
    rest = values(["program", *words])[1:]
    if operand is not None and rest:
        if _takes_several(values, operand):
            values[operand].parse(rest)
            rest = []
        elif values[operand].value is None:
            values[operand].parse(rest.pop(0))
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: flags begin with '--', and text with blanks needs quotes")
    return None


def help_text(name: str, summary: str, values: flags.FlagValues, operand: str | None = None) -> str:
    """Returns what ``--help`` prints: the summary and every flag with its default."""
    several = " …" if operand is not None and _takes_several(values, operand) else ""
    place = "" if operand is None else f" [{operand.upper()}{several}]"
    lines = [summary.strip(), "", f"usage: hipgpt-{name}{place} [--flag value | --flag=value] …", ""]
    for flag in values:
        holder = values[flag]
        if holder.name != flag:
            continue
        spelled = f"--[no]{flag}" if holder.boolean else f"--{flag}"
        default = "" if holder.default is None else f" (default: {holder.default_as_str})"
        lines.append(f"  {spelled}")
        lines.extend(textwrap.wrap(f"{holder.help}{default}", 90, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


_T = TypeVar("_T")


def note_emulation(platform: str, dtype: str) -> None:
    """Tells that a CPU is slower in half precision."""
    if platform == "cpu" and dtype == "bfloat16":
        note("a CPU emulates bfloat16: float32 is faster")


def required(holder: flags.FlagHolder[_T | None]) -> _T:
    """Returns the value of a flag that has no default; raises ValueError where it was not given."""
    if holder.value is None:
        raise ValueError(f"--{holder.name} is required; --help tells of every flag")
    return holder.value


def read_prompts(prompt: str | None, prompts_file: str | None) -> Iterable[prompts.Prompt]:
    """Returns the prompts that the two flags name: one, one from stdin, or those of a file, read as they are taken."""
    if prompts_file is not None:
        if prompt is not None:
            raise ValueError("--prompt and --prompts_file are both given: give one of them")
        return _open_prompts(prompts_file)
    if prompt is None:
        raise ValueError("--prompt is required, or --prompts_file; --help tells of every flag")
    return [prompts.Prompt(text=sys.stdin.buffer.read().decode("utf-8", errors="replace") if prompt == "-" else prompt)]


def _open_prompts(name: str) -> prompts.File:
    if name == "-" and sys.stdin is None:
        raise ValueError("--prompts_file - reads stdin, which is closed")
    found = prompts.File(Path("stdin"), sys.stdin.buffer) if name == "-" else prompts.File(Path(name))
    if found.hint:
        note(found.hint)
    return found


def printable(text: str) -> str:
    r"""Returns untrusted text as part of one line of a report, with control characters escaped.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def keep_freed_memory() -> None:
    """Has freed memory kept, and tells of it: see ``devices.keep_freed_memory``."""
    if devices.keep_freed_memory():
        note("set glibc's mallopt to keep a step's memory for the next (not with MALLOC_… or GLIBC_TUNABLES)")


def note(line: str) -> None:
    """Writes a fact to stderr; stdout is for text alone."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def keep_stdout_for_text() -> None:
    """Sends to stderr what libraries in C print to stdout, as gloo does of its connections; Python's stdout stays."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def _takes_several(values: flags.FlagValues, flag: str) -> bool:
    return isinstance(values[flag], flags.MultiFlag)


def _respell(values: flags.FlagValues, words: Sequence[str]) -> list[str]:
    """Gives each flag the spelling it was defined with, and joins it and its value by ``=``."""
    known = {flag.replace("-", "_"): flag for flag in values}
    spelled: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--" or not word.startswith("-") or word == "-":
            spelled.append(word)
            continue
        given, equals, value = word.lstrip("-").partition("=")
        plain = given.replace("-", "_")
        negated = plain.removeprefix("no_") if plain.startswith("no_") else plain.removeprefix("no")
        if plain in known:
            flag, off = known[plain], ""
        elif plain.startswith("no") and negated in known and values[known[negated]].boolean:
            flag, off = known[negated], "no"
        else:
            flag, off = given, ""
        if flag in values and not values[flag].boolean and not equals:
            equals, value = "=", next(rest, None)
        spelled.append(f"--{off}{flag}" if value is None else f"--{off}{flag}{equals}{value}")
    return spelled
