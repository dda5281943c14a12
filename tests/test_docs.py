"""README.md and docs/: their commands and examples run, their tables are complete, and their links resolve.

Commands run as a user would type them, in order, in a directory of their own, by one rule: ``hipgpt-generate`` and
``hipgpt-train`` get smaller numbers after their own flags, the last value of a flag counting, and a run of the same
name is replaced. Scripts that install, download, test or measure are only looked up.
"""

import ast
import doctest
import functools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import programs
import pytest
import test_floors

from hipgpt_jax.records import record

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(rf"(?:hipgpt-|\./scripts/run_)({'|'.join(programs.MAINS)})(?:\.sh)?\b(.*)")


def _blocks(page: str, language: str) -> list[str]:
    return [body for name, body in _BLOCK.findall(PAGES[page]) if name == language]


def _commands(page: str) -> str:
    """Returns the commands of a page: its bash blocks, and the typed lines of its console blocks."""
    typed = [re.findall(r"^\$ (.*\n)", block, re.MULTILINE) for block in _blocks(page, "console")]
    return "".join([*_blocks(page, "bash"), *("".join(lines) for lines in typed)])


# Sizes.


def test_the_readme_is_short_and_begins_with_its_two_commands() -> None:
    assert len(README.encode()) <= 9000
    assert _blocks("README.md", "bash")[0] == (
        './scripts/run_generate.sh --prompt "To be, or not to be:" --run-name shakespeare\n./scripts/run_tests.sh\n'
    )


def test_rows_about_speed_are_short() -> None:
    pages = [page for page in PAGES if "speed" in page]
    assert len(pages) == 8
    long = [line for page in pages for line in PAGES[page].splitlines() if len(line) > 160]
    assert long == []


# Links and names.


def _anchors(page: str) -> set[str]:
    prose = _BLOCK.sub("", PAGES[page])
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)]
    return {title.replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _BLOCK.sub("", PAGES[page])):
        name, _, anchor = target.partition("#")
        if name.startswith(("https://", "http://")):
            continue
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(str(path.relative_to(ROOT))), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    names = re.findall(
        r"\b(?:tests|docs|configs|scripts|hipgpt_jax)/[\w./-]*\.(?:py|md|sh|flags|json|svg)\b", PAGES[page]
    )
    assert [name for name in names if not (ROOT / name).exists() and "MODULE" not in name] == []


def test_every_page_is_linked_from_another() -> None:
    targets = {
        str(((ROOT / page).parent / name).resolve().relative_to(ROOT))
        for page, text in PAGES.items()
        for name in re.findall(r"\]\(([^)#\s:]+)", text)
    }
    assert set(PAGES) - targets == {"README.md"}


def test_the_page_of_the_architecture_names_what_exists() -> None:
    rows = re.findall(r"^\| [^|]* \| `([\w/]+\.py)` \| (.*) \|$", PAGES["docs/architecture.md"], re.MULTILINE)
    assert len(rows) > 15
    for name, symbols in rows:
        tree = ast.parse((ROOT / "hipgpt_jax" / name).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(re.findall(r"`(\w+)`", symbols)) <= defined, name


def test_the_page_of_the_architecture_shows_the_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (`.*?`) \|", PAGES["docs/architecture.md"], re.MULTILINE)
    shown = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)[/.]", names)}
    wanted = {name: floor for row, (floor, names) in test_floors.FLOORS.items() for name in names or {row}}
    assert shown == {name: floor for name, floor in wanted.items() if name != "version"}


# Flags.


class _Flag(NamedTuple):
    name: str
    default: str | None


Flags = Callable[[str], dict[str, _Flag]]


@pytest.fixture(scope="module")
def flags_of() -> Flags:
    """Returns a function from a program's name to its flags, by its ``--help``."""

    @functools.cache
    def read(program: str) -> dict[str, _Flag]:
        done = subprocess.run([*programs.command(program), "--help"], capture_output=True, text=True, check=True)
        own = re.sub(r"^\w.*\n?", "", done.stdout.partition("\nGeneral:\n")[0], flags=re.MULTILINE)
        parts = re.split(r"^  --(?:\[no\])?([\w-]+)", own, flags=re.MULTILINE)[1:]
        found = {}
        for name, about in zip(parts[::2], parts[1::2], strict=True):
            default = re.search(r"\(default:\s+(.*?)\)$", about.strip(), re.DOTALL)
            found[name.replace("_", "-")] = _Flag(name, None if default is None else default[1].strip("\"'[]"))
        return found

    return read


TABLES = [
    ("docs/generate.md", "generate"),
    ("docs/records.md", "replay"),
    ("docs/records.md", "inspect"),
    ("docs/records.md", "records"),
    ("docs/training.md", "train"),
    ("docs/training.md", "evaluate"),
    ("docs/training.md", "plot"),
    ("docs/installing.md", "doctor"),
    ("docs/huggingface.md", "import"),
    ("docs/huggingface.md", "export"),
]


@pytest.mark.parametrize(("page", "program"), TABLES, ids=lambda value: value)
def test_tables_of_flags_are_complete(page: str, program: str, flags_of: Flags) -> None:
    section = re.search(rf"^#+ Flags of hipgpt-{program}$(.*?)(?:^#|\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| `--([\w-]+)` \| *(.*?) *\|", section[1], re.MULTILINE)
    flags = flags_of(program)
    assert [name for name, _ in rows if name not in (flag.name for flag in flags.values())] == []
    assert len(rows) == len(flags)
    words = {"true": "on", "false": "off", "": ""}
    for name, shown in rows:
        default = flags[name.replace("_", "-")].default
        if default is None:
            assert not re.fullmatch(r"`[^`]*`|on|off", shown), (name, shown)
        elif not default.startswith("\\"):  # a line break is described in words
            assert shown.strip("`") == words.get(default, default), name


def test_the_readmes_table_agrees_with_the_page_of_all_flags() -> None:
    rows = re.findall(r"^\| (`--[\w-]+` \|.*?) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    assert [row for row in rows if f"| {row} |" not in PAGES["docs/generate.md"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_use_flags_that_exist(page: str, flags_of: Flags) -> None:
    text = _commands(page) + "\n".join(re.findall(r"`((?:hipgpt-|\./scripts/run_)[^`]*)`", PAGES[page]))
    for program, rest in _PROGRAM.findall(text.replace("\\\n", " ")):
        names = re.findall(r"(?:^|\s)--(?:no)?([a-z][\w-]*)", rest.partition("#")[0].partition("|")[0])
        known = {*flags_of(program), "flagfile", "help", "completion", "temperature"}
        assert [name for name in names if name.replace("_", "-") not in known] == [], (program, rest)


def test_the_page_of_records_names_every_field() -> None:
    schema = json.loads(record.SCHEMA_FILE.read_text())
    assert [name for name in schema["required"] if f"`{name}`" not in PAGES["docs/records.md"]] == [
        "schema",
        "contract",
    ]


# Examples.


def test_the_readmes_sample_is_what_its_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--prompt", "To be, or not to be:", "--run-name", "shakespeare", "--num_tokens", "150", "--echo")
    result = programs.call("generate", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert result.code == 0
    assert _blocks("README.md", "text")[0] == f"{result.out.rstrip()}\n"


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/python.md", marks=pytest.mark.slow)])
def test_python_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=options)
    assert result.attempted > 3
    assert result.failed == 0


_SMALL_MODEL = "--vocab-size 256 --seq 32 --dim 16 --heads 2 --ff 16 --layers 1"


def _shim(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{lines}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like a clone, in which the programs run with smaller numbers."""
    here = tmp_path_factory.mktemp("clone")
    for name in ("data", "bin", ".venv/bin", ".venv-peers/bin"):
        (here / name).mkdir(parents=True)
    (here / "data/data.txt").write_text(programs.TEXT)
    (here / "prompts.txt").write_text("ROMEO:\nJULIET:\nWhat, what says my lord?\n")
    (here / ".venv/bin/activate").write_text("")
    shutil.copytree(ROOT / "configs", here / "configs")
    for script in (ROOT / "scripts").glob("*.sh"):
        _shim(here / "scripts" / script.name, "")
    for name in ("benchmark.py", "verify.py"):
        shutil.copy(ROOT / "scripts" / name, here / "scripts")
    for program in programs.MAINS:
        own = {
            "generate": "--num_tokens 4",
            "train": f"$([[ $* == *tuned* ]] || echo {_SMALL_MODEL}) --batch 2 --warmup-steps 1 "
            '--steps "$([[ $* == *--extend* ]] && echo 6 || echo 4)" '
            "$([[ $* == *--resume* ]] || echo --reset)",
        }.get(program, "")
        ending = "|| (($? == 1))" if program == "doctor" else ""  # it may find problems on this machine
        command = shlex.join(programs.command(program))
        _shim(here / "bin" / f"hipgpt-{program}", f'{command} "$@" {own} {ending}')
    for program in ("generate", "train"):
        _shim(here / "scripts" / f"run_{program}.sh", f'exec hipgpt-{program} "$@"')
    for name in ("docker", "pip"):
        _shim(here / "bin" / name, "")
    _shim(here / "bin/uv", '[[ $1 != run ]] || exec "${@:2}"')
    _shim(here / "bin/python", f'exec {sys.executable} "$@"')
    _shim(here / ".venv-peers/bin/python", "[[ -e $1 ]]")
    return here


def _run(commands: str, here: Path) -> str:
    env = {**programs.environment(), "PATH": f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = f"set -euo pipefail\n{commands}"
    done = subprocess.run(["bash", "-c", script], cwd=here, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)])
def test_commands_run(page: str, workplace: Path) -> None:
    if not (workplace / "checkpoints/my_run").exists():
        _run("hipgpt-train --run-name my_run", workplace)
    for path in workplace.glob("*.jsonl"):
        path.unlink()
    out = _run(_commands(page), workplace)
    for block in _blocks(page, "console"):
        shown = re.sub(r"\d+", r"\\d+", re.escape(block.splitlines()[-1]).replace(r"\ ", " "))
        assert re.search(f"^{shown}$", out, re.MULTILINE)


@pytest.mark.slow
def test_prompts_in_json_are_accepted(workplace: Path) -> None:
    (line,) = _blocks("docs/generate.md", "json")
    (workplace / "p.jsonl").write_text(line)
    out = _run("hipgpt-generate --run-name shakespeare --prompts_file p.jsonl --output - --batch_size 4", workplace)
    assert len(out.splitlines()) == json.loads(line)["num_samples"]
