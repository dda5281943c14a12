"""Scripts that complete a program's flags in bash, zsh and fish, generated from the flags."""

import shlex

import absl.flags

from hipgpt_jax.cli import arguments, flags, usage
from hipgpt_jax.runs import directory

_SHIPPED = " ".join(path.name for path in sorted(directory.SHIPPED.iterdir()))
_RUNS = f"$(ls {directory.CHECKPOINTS} 2>/dev/null; echo {_SHIPPED})"

_BASH = """\
{function}() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flag=${{COMP_WORDS[COMP_CWORD - 1]}}
  # bash splits --flag=value into three words.
  if [[ $flag == = ]]; then flag=${{COMP_WORDS[COMP_CWORD - 2]}}; fi
  if [[ $word == = ]]; then word=; fi
  COMPREPLY=()
  case $flag in
{cases}
    {others}) return ;;
  esac
  if [[ $word == -* ]]; then COMPREPLY=($(compgen -W "{words}" -- "$word")); fi
}}
complete -o default -F {function} {program}"""


def script(shell: str, program: str, values: absl.flags.FlagValues) -> str:
    """Returns a script that completes the names of a program's flags, runs, choices and files.

    Args:
        shell: One of ``arguments.SHELLS``.
        program: The program's name.
        values: Its flags.
    """
    about = {flag: usage.about(values[flag]) for names in flags.groups(values).values() for flag in names}
    about |= {flag: text for flag, (_, text) in usage.BUILTIN.items()}
    switches = {flag for flag in about if flag in ("help", "version") or (flag in values and values[flag].boolean)}
    about |= {f"no{flag}": f"Negates --{flag}." for flag in sorted(switches & set(values))}
    switches |= {f"no{flag}" for flag in switches}
    choices = {flag: " ".join(arguments.choices(values[flag])) for flag in values if arguments.choices(values[flag])}
    choices |= {"completion": " ".join(arguments.SHELLS), **({"run-name": _RUNS} if "run-name" in values else {})}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](program, about, switches, choices)


def _bash(program: str, about: dict[str, str], switches: set[str], choices: dict[str, str]) -> str:
    case = '    --{}) COMPREPLY=($(compgen -W "{}" -- "$word")) && return ;;'
    return _BASH.format(
        program=program,
        function=f"_{program.replace('-', '_')}",
        cases="\n".join(case.format(flag, text) for flag, text in choices.items()),
        others="|".join(f"--{flag}" for flag in about if flag not in choices and flag not in switches),
        words=" ".join(f"--{flag}" for flag in about),
    )


def _zsh(program: str, about: dict[str, str], switches: set[str], choices: dict[str, str]) -> str:
    lines = [f"#compdef {program}", f"_{program}() {{", "  _arguments \\"]
    for flag, text in about.items():
        text = text.partition(". ")[0].replace("[", "(").replace("]", ")").replace(":", " -")
        values = f"({choices[flag]})" if flag in choices and flag != "run-name" else "_files"
        values = '{compadd -- ${(f)"' + _RUNS + '"}; _files -/}' if flag == "run-name" else values
        value = "" if flag in switches else f":{flag}:{values}"
        lines.append(f"    {shlex.quote(f'*--{flag}' + '=' * (flag not in switches) + f'[{text}]{value}')} \\")
    return "\n".join([*lines, "    '*:file:_files'", "}", f"compdef _{program} {program}"])


def _fish(program: str, about: dict[str, str], switches: set[str], choices: dict[str, str]) -> str:
    lines = []
    for flag, text in about.items():
        text = text.partition(". ")[0].replace("\\", "\\\\").replace("'", "\\'")
        listed = choices.get(flag, "").replace("$(", "(")
        kind = "-r" if flag == "run-name" else "-x"
        value = "" if flag in switches else f' {kind} -a "{listed}"' if listed else " -r"
        lines.append(f"complete -c {program} -l {flag}{value} -d '{text}'")
    return "\n".join(lines)
