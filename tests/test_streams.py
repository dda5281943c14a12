"""Standard streams that are closed, full, or not UTF-8; Ctrl-C and missing libraries; untrusted text on a terminal."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
from absl import flags

import hipgpt_jax as package
from hipgpt_jax.cli import program

Shell = Callable[..., programs.Result]
PLAIN = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a program through a shell, with redirections and variables, in an empty directory."""

    def run(name: str, *words: str, redirect: str = "", **variables: str) -> programs.Result:
        line = subprocess.list2cmdline(["exec", *programs.command(name)])
        env = {**programs.environment(), **variables}
        done = subprocess.run(
            ["bash", "-c", f'{line} "$@" {redirect}', "bash", *words],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        assert b"Traceback" not in done.stderr, done.stderr
        return programs.Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


HI = ("--run-name", "shakespeare", "--prompt", "ROMEO:", "--num_tokens", "0", "--echo")  # nothing is compiled


def test_a_broken_stdout_does_not_end_a_program_that_writes_a_file(shell: Shell, tmp_path: Path) -> None:
    several = (*HI, "--num_samples", "3", "--output")
    full = shell("generate", *several, "full.jsonl", redirect=">/dev/full")
    assert full.code == 1, "the text is lost"
    assert "stdout: No space left on device: continuing without it\n" in full.err
    closed = shell("generate", *several, "closed.jsonl", redirect=">&- 2>&- <&-")
    assert closed.code == 0, "the records are complete"
    for name in ("full", "closed"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["sample"] for line in lines] == [0, 1, 2]


def test_text_that_stdout_cannot_encode_is_escaped(shell: Shell, tmp_path: Path) -> None:
    words = (*HI, "--prompt", "é\U0001f642", "--output")
    ascii_locale = shell("generate", *words, "a.jsonl", "--stop", "é", **PLAIN)
    assert (ascii_locale.code, ascii_locale.out) == (0, "\\xe9\\U0001f642\n"), ascii_locale.err
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "é\U0001f642"
    assert json.loads((tmp_path / "a.jsonl").read_text())["settings"]["stop"] == ["é"]
    made = shell("generate", *words, "-", "--noecho", PYTHONIOENCODING="latin-1")
    assert '"prompt":"é\U0001f642"' in made.out, "a record is UTF-8"


@pytest.mark.parametrize(
    ("redirect", "code", "err"),
    [
        (">/dev/full", 1, "plot: error: stdout: No space left on device\n"),
        (">/dev/full 2>/dev/full", 1, ""),
        (">&- 2>&- <&-", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
def test_the_exit_code_depends_on_stdout(shell: Shell, redirect: str, code: int, err: str) -> None:
    result = shell("plot", "--help", redirect=redirect, PYTHONUNBUFFERED="1")
    assert (result.code, result.err) == (code, err)
    if "|" not in redirect:
        assert shell("plot", "--help", redirect=redirect).code == code, "with a buffer"


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_a_program_that_only_writes_to_stdout_fails_if_it_is_closed(name: str, shell: Shell) -> None:
    for output in ((), ("--output", "-")):
        result = shell(name, "--run-name", "none", "--prompt", "ROMEO:", *output, redirect=">&-")
        assert result.code == 1
        assert re.fullmatch(f"{name}: error: stdout is closed: .* would be lost\n", result.err)


def test_a_closed_stdin_is_an_error(shell: Shell) -> None:
    result = shell("generate", "--run-name", "shakespeare", "--prompt", "-", redirect="<&-")
    assert (result.code, result.err) == (
        1,
        "generate: error: --prompt - reads the prompt from stdin, which is closed\n",
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"ROMEO:\n", "ROMEO:"),
        (b"ROMEO:\r\n", "ROMEO:"),
        (b"ROMEO:", "ROMEO:"),
        (b"ROMEO:\n\n", "ROMEO:\n"),
        (b"ROMEO:\r", "ROMEO:\r"),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\xe9", "a\n\ufeffb\ufffd"),
        (b"\n", ""),
        (b"", ""),
    ],
)
def test_a_prompt_on_stdin_loses_one_final_line_break(
    content: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (prompt,) = program.read_prompts("-", None)
    assert prompt.text == text


def test_a_prompt_on_stdin_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a" * 11)))
    monkeypatch.setattr(program, "_MAX_STDIN", 10)
    with pytest.raises(ValueError, match="the prompt on stdin is too long: at most 10 bytes are allowed"):
        program.read_prompts("-", None)


LIBRARIES = {
    "absent": "raise ImportError('libx.so: failed to map segment\\n  from shared object \\x1b[2J')",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise ImportError('numpy._core failed')",
}


@pytest.mark.parametrize("library", ["tokenizers", "jax"], ids=["before the program", "in the program"])
@pytest.mark.usefixtures("ctrl_c_heeded")
def test_ctrl_c_and_failures_during_imports_end_without_a_traceback(library: str, shell: Shell, tmp_path: Path) -> None:
    """A fake library interrupts its own import and turns that into ImportError, as NumPy does."""
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(package.__file__).parents[1]}"}
    words = (*HI, "--output", "a.jsonl")
    (tmp_path / f"{library}.py").write_text(LIBRARIES["interrupted"])
    result = shell("generate", *words, **variables)
    assert (result.code, result.out, result.err.strip()) == (130, "", "")
    assert not (tmp_path / "a.jsonl").exists()
    (tmp_path / f"{library}.py").write_text(LIBRARIES["absent"])
    result = shell("generate", *words, **variables)
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith("generate: error: libx.so: failed to map segment from shared object \\x1b[2J\n")
    assert result.err.count("\n") == 1


def test_replay_does_not_call_a_record_different_because_a_library_is_missing(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "tokenizers.py").write_text(LIBRARIES["absent"])
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(package.__file__).parents[1]}"}
    assert shell("replay", "a.jsonl", **variables).code == 2


def run_as(name: str, main: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    program.run(name, "", flags.FlagValues(), main)


def test_an_error_is_one_printable_line_of_limited_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(message: str) -> str:
        def main() -> None:
            raise ValueError(message)

        with pytest.raises(SystemExit, match="1"):
            run_as("x", main, monkeypatch)
        return capsys.readouterr().err

    assert fail("a\n\x1b[2J\x9b\0\u202eb\udcff\nidentical  c") == (
        "x: error: a \\x1b[2J\\x9b\\x00\\u202eb\\udcff identical c\n"
    )
    long = fail(f"the value {'v' * 5000} is wrong: use --overwrite")
    assert len(long) < 1100
    assert long.startswith("x: error: the value vvv")
    assert long.endswith("v is wrong: use --overwrite\n")
    assert " ... " in long


def test_generated_text_is_escaped_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\tb\n\x1b[2J\r\x9bc é\ufffd"
    for is_terminal, expected in ((False, text), (True, "a\tb\n\\x1b[2J\\r\\x9bc é\ufffd")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert program.displayable(text) == expected


def test_a_command_can_be_pasted_with_any_characters() -> None:
    words = ["plain", "two words", "it's", "$HOME `x` \\n", "", "a\n\t'\\x", "\x1b[2J\x9b\u2028\u202eé", "\udcff\\"]
    command = program.shell_command(words)
    assert program.printable(command) == command
    done = subprocess.run(
        ["bash", "-c", f'printf "%s\\0" {command}'], env={**os.environ, "LC_ALL": "C.UTF-8"}, capture_output=True
    )
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def test_a_note_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    program.note("a\x1b[1A\r\nidentical  b")
    assert capsys.readouterr().err == "a\\x1b[1A\\r\\nidentical  b\n"


def test_a_warning_is_one_line_without_a_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        warnings.simplefilter("always")
        warnings.warn("cache entry\n\x1b broken", UserWarning, stacklevel=1)

    run_as("x", main, monkeypatch)
    assert capsys.readouterr().err == "x: warning: cache entry \\x1b broken\n"

    def fail() -> None:
        warnings.simplefilter("error")
        warnings.warn("cache entry", UserWarning, stacklevel=1)

    with pytest.raises(SystemExit, match="1"):
        run_as("x", fail, monkeypatch)
    assert capsys.readouterr().err == "x: error: cache entry\n"
