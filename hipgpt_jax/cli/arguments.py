"""Parsing of command lines and flag files."""

import codecs
import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import flags

from hipgpt_jax import config, files

# Flags with text values, which ``config.valid_text`` decodes; other values, such as paths, are left unchanged.
TEXT_FLAGS = frozenset(
    {"allow", "ban", "ids", "logit_bias", "prompt", "sample-prompt", "separator", "stop", "text-field", "title"}
)

# Flags whose values are paths, or may be.
PATH_FLAGS = frozenset(
    {
        *("choices", "command", "data-path", "folder", "html", "init-from", "missing", "only", "output"),
        *("prompts_file", "records", "run-dir", "run-name", "tokenizer-path"),
    }
)

SHELLS = ("bash", "zsh", "fish")

_FLAG_FILE = "flagfile"
_COMPLETION = "completion"
_USAGE = {"help": "help", "h": "help", "helpfull": "help", "helpshort": "help", "version": "version"}
_MAX_FLAG_FILE = 2**20


class _Word(NamedTuple):
    """A word of a command line, or a line of a flag file.

    Attributes:
        text: The word.
        location: Prefix of error messages, such as ``a.flags line 3: ``; empty for a command line.
    """

    text: str
    location: str = ""


@dataclasses.dataclass(frozen=True)
class _Argument:
    """A flag with its value, or an operand.

    Attributes:
        word: The word.
        flag: The flag's name as defined, or as given if the flag is unknown; None for an operand.
        value: The flag's value; None if absent.
        negated: Whether it has the form ``--noflag``.
    """

    word: _Word
    flag: str | None = None
    value: str | None = None
    negated: bool = False


def parse(
    values: flags.FlagValues,
    arguments: Sequence[str],
    operand: str | None = None,
    aliases: Mapping[str, str] | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> str | None:
    """Sets ``values`` from a command line; absent flags get their defaults.

    ``--run-name`` and ``--run_name`` are the same flag, and ``--flag value`` and ``--flag=value`` are equivalent; a
    value may begin with ``-``. Words after ``--`` are operands. ``--flagfile=FILE`` inserts the lines of a file: one
    flag per line, without quotes; comments begin with ``#`` or ``//``.

    Args:
        values: The program's flags.
        arguments: The command line, without the program's name.
        operand: The flag that takes operands: all if it may be repeated, otherwise one.
        aliases: Other names of flags.
        synonyms: Names that are not accepted, with the flags that the error message suggests.

    Returns:
        ``help``, ``version``, or the shell that was given with ``--completion``, and then no flag is set; otherwise
        None.

    Raises:
        flags.Error: A flag is unknown, lacks its value or has an invalid one; or a flag file cannot be read.
        ValueError: There is an operand too many, or a path is a URL.
    """
    for flag in values:
        values[flag].unparse()
    names = {**(aliases or {}), **{flag: flag for flag in values}}
    known = {name.replace("-", "_"): flag for name, flag in names.items()}
    given = list(_read(values, known, [_Word(text) for text in arguments]))
    for one in given:
        if one.flag in _USAGE and one.flag not in values and one.value is None:
            return _USAGE[one.flag]
        if one.flag == _COMPLETION:
            if one.value not in SHELLS:
                raise flags.Error(f"--completion must be one of {', '.join(SHELLS)}: got {one.value!r}")
            return one.value
    for one in sorted(given, key=lambda one: one.flag is None):  # operands last: their flag may be given by name
        if one.flag is not None and one.flag not in values:
            raise flags.Error(f"{one.word.location}{_unknown(one, known, synonyms or {})}")
        _set(values, one, operand)
    values.mark_as_parsed()
    return None


def takes_several(values: flags.FlagValues, flag: str) -> bool:
    """Returns whether a flag may be repeated."""
    return isinstance(values[flag], flags.MultiFlag)


def choices(flag: flags.Flag) -> Sequence[str]:
    """Returns the values of a flag if they are few; otherwise nothing."""
    return flag.parser.enum_values if isinstance(flag.parser, flags.EnumParser) else ()


def _unknown(given: _Argument, known: Mapping[str, str], synonyms: Mapping[str, str]) -> str:
    """Describes a flag that does not exist, and those that may be meant."""
    name = str(given.flag)
    plain = name.replace("-", "_")
    near = [known[one] for one in difflib.get_close_matches(plain, known, n=3)]
    near = list(dict.fromkeys([synonyms[plain]] if plain in synonyms else near))
    hint = f"did you mean {' or '.join(f'--{flag}' for flag in near)}?" if near else "--help lists every flag"
    return f"unknown flag --{name}: {hint}"


def _read(
    values: flags.FlagValues, known: Mapping[str, str], words: list[_Word], opened: tuple[str, ...] = ()
) -> Iterator[_Argument]:
    """Splits words into flags and operands, and replaces ``--flagfile`` by the arguments in the file."""
    rest = iter(words)
    for word in rest:
        if word.text == "--":
            yield from (_Argument(operand) for operand in rest)
            return
        if not word.text.startswith("-") or word.text == "-":
            yield _Argument(word)
            continue
        name, equals, value = word.text.lstrip("-").partition("=")
        if opened and len(parts := name.split(maxsplit=1)) > 1:
            name, equals, value = parts[0], "=", word.text.lstrip("-")[len(parts[0]) :].lstrip()
        name = name.rstrip() if opened else name
        plain = name.replace("-", "_")
        negated = plain.removeprefix("no_") if plain.startswith("no_") else plain.removeprefix("no")
        if plain not in known and negated != plain and negated in known and values[known[negated]].boolean:
            yield _Argument(word, known[negated], value if equals else None, negated=True)
            continue
        flag = known.get(plain, name)
        takes_value = flag in (_FLAG_FILE, _COMPLETION) or (flag in values and not values[flag].boolean)
        if takes_value and not equals:
            following = next(rest, None)
            equals, value = ("=", following.text) if following else ("", "")
        if flag == _FLAG_FILE:
            yield from _read_file(values, known, word, value, opened)
        else:
            yield _Argument(word, flag, value if equals else None)


def _read_file(
    values: flags.FlagValues, known: Mapping[str, str], word: _Word, name: str, opened: tuple[str, ...]
) -> Iterator[_Argument]:
    """Reads the arguments in a flag file."""
    files.require_local(f"{word.location}--flagfile", name.strip())
    path = os.path.expanduser(name.strip())
    if not path:
        raise flags.Error(f"{word.location}--flagfile needs the name of a file")
    if any(os.path.exists(one) and os.path.exists(path) and os.path.samefile(one, path) for one in opened):
        raise flags.Error(f"{word.location}flag file {name} includes itself")
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FLAG_FILE + 1)
    except OSError as error:
        raise flags.Error(f"{word.location}flag file {name} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FLAG_FILE:
        raise flags.Error(f"{word.location}flag file {name} is too large: at most {_MAX_FLAG_FILE} bytes are allowed")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise flags.Error(f"{word.location}flag file {name} is not UTF-8 text")
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
    lines = (line.removesuffix("\r").lstrip() for line in text.split("\n"))
    words = [_Word(line, f"{name} line {number}: ") for number, line in enumerate(lines, 1)]
    words = [one for one in words if one.text and not one.text.startswith(("#", "//"))]
    yield from _read(values, known, words, (*opened, path))


def _set(values: flags.FlagValues, given: _Argument, operand: str | None) -> None:
    """Sets a flag. The last value wins; a flag that may be repeated collects its values."""
    flag, value, (text, location) = given.flag, given.value, given.word
    if flag is None:
        if operand is None or not (takes_several(values, operand) or values[operand].value is None):
            raise ValueError(
                f"{location}unexpected argument {text!r}: flags begin with '--', and text with spaces needs quotes"
            )
        flag, value = operand, text
    elif given.negated and value is not None:
        raise flags.Error(f"{location}--no{flag} takes no value: got {value!r}")
    elif values[flag].boolean and value is None:
        value = "false" if given.negated else "true"
    if value is None:
        raise flags.Error(f"{location}--{flag} needs a value")
    value = config.valid_text(value) if flag in TEXT_FLAGS else value.strip() if location else value
    if flag in PATH_FLAGS:
        files.require_local(f"{location}--{flag}" if given.flag else f"{location}the argument", value)
    try:
        values[flag].parse(value)
    except flags.IllegalFlagValueError as error:
        raise flags.Error(f"{location}--{flag} must be {_kind(values[flag])}: got {value!r}") from error
    values[flag].using_default_value = False


def _kind(holder: flags.Flag) -> str:
    """Describes the valid values of a flag."""
    if holder.boolean:
        return "true or false"
    if choices(holder):
        return f"one of {', '.join(choices(holder))}"
    return holder.parser.syntactic_help.replace("a comma separated list", "values separated by commas")
