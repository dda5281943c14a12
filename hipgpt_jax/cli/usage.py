"""Text of ``--help``."""

import textwrap

import absl.flags

from hipgpt_jax.cli import arguments, flags

_WIDTH = 100
_PLACEHOLDERS = {"run-name": "RUN", "init-from": "RUN[:STEP]", "step": "STEP", "mesh": "AXES", "coordinator": "ADDRESS"}
_PLACEHOLDERS |= {"devices": "N"}
_PLACEHOLDERS |= {"metrics": "A,B", "ids": "A,B", "seeds": "A,B", "prompt_ids": "A,B"}
_PLACEHOLDERS |= {"logit_bias": "TOKEN=X", "ban": "TOKEN", "allow": "TOKEN"}
# Flags of every program, with a placeholder of their value and their help.
BUILTIN: dict[str, tuple[str, str]] = {
    "help": ("", "Show this help."),
    "version": ("", "Show the version."),
    "flagfile": ("PATH", "Read flags from a file, one --flag=value per line."),
    "completion": (f"{{{','.join(arguments.SHELLS)}}}", "Print a script that completes flags in a shell."),
}


def help_text(command: str, summary: str, values: absl.flags.FlagValues, operand: str | None = None) -> str:
    """Returns the text of ``--help``: the summary, and the flags in groups with their defaults.

    Args:
        command: The command that starts the program.
        summary: The beginning of the text.
        values: The program's flags.
        operand: The flag whose name may be omitted.
    """
    more = " ..." if operand is not None and arguments.takes_several(values, operand) else ""
    word = "" if operand is None else f" [{operand.upper()}{more}]"
    lines = [summary.strip(), "", f"usage: {command}{word} [--flag value | --flag=value] ..."]
    other_names = {flag: name for name, flag in flags.aliases(values).items()}
    for title, names in flags.groups(values).items():
        lines += ["", f"{title}:"]
        for name in names:
            spellings = [name, other_names[name]] if name in other_names else [name]
            negation = "[no]" if values[name].boolean else ""
            head = ", ".join(f"--{negation}{spelling}" for spelling in spellings)
            lines += _entry(f"{head} {_placeholder(values[name])}", f"{about(values[name])}{_default(values[name])}")
    lines += ["", "General:"]
    for name, (placeholder, text) in BUILTIN.items():
        lines += _entry(f"--{name} {placeholder}", text)
    return "\n".join(lines)


def _entry(head: str, about: str) -> list[str]:
    return [f"  {head.rstrip()}", *textwrap.wrap(about, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def about(flag: absl.flags.Flag) -> str:
    """Returns the help of a flag without what absl adds."""
    text = str(flag.help).partition(";\n    repeat this option")[0]
    return text.removeprefix(f"<{'|'.join(arguments.choices(flag))}>: ")


def _placeholder(flag: absl.flags.Flag) -> str:
    """Returns the name of a flag's value; nothing for a boolean."""
    if flag.boolean:
        return ""
    if values := arguments.choices(flag):
        return f"{{{','.join(values)}}}"
    if flag.name in _PLACEHOLDERS:
        return _PLACEHOLDERS[flag.name]
    if isinstance(flag.parser, absl.flags.IntegerParser):
        return "N"
    if isinstance(flag.parser, absl.flags.FloatParser):
        return "X"
    return "TEXT" if flag.name in arguments.TEXT_FLAGS else "PATH"


def _default(flag: absl.flags.Flag) -> str:
    """Returns the default of a flag for its help."""
    value = flag.default
    if value is None or value == []:
        return ""
    if flag.boolean:
        return f" (default: {'on' if value else 'off'})"
    text = ",".join(value) if isinstance(value, list) else str(value)
    return f" (default: {text if text.isprintable() else repr(text)})"
