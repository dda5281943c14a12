"""Command lines and flag files: spellings, values of the wrong type, text that is not UTF-8."""

import os
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from absl import flags

from hipgpt_jax import cli as package
from hipgpt_jax.cli import (
    arguments,
    completion,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    plot,
    records,
    replay,
    train_flags,
)
from hipgpt_jax.cli import flags as shared
from hipgpt_jax.cli import program as running

FLAGS = {
    "doctor": doctor.FLAGS,
    "evaluate": evaluate.FLAGS,
    "export": export.FLAGS,
    "generate": generate.FLAGS,
    "import": import_.FLAGS,
    "inspect": inspect.FLAGS,
    "plot": plot.FLAGS,
    "records": records.FLAGS,
    "replay": replay.FLAGS,
    "train": train_flags.FLAGS,
}
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> flags.FlagValues:
    """Flags of each type, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    made = flags.FlagValues()
    flags.DEFINE_string("prompt", None, "", flag_values=made)
    flags.DEFINE_multi_string("stop", [], "", flag_values=made)
    flags.DEFINE_string("run-name", None, "", flag_values=made)
    flags.DEFINE_string("output", None, "", flag_values=made)
    flags.DEFINE_integer("num_tokens", 50, "", flag_values=made)
    flags.DEFINE_integer("smooth", 1, "", lower_bound=1, flag_values=made)
    flags.DEFINE_float("temp", 1.0, "", flag_values=made)
    flags.DEFINE_enum("unit", None, ["byte", "token"], "", flag_values=made)
    flags.DEFINE_list("ids", None, "", flag_values=made)
    flags.DEFINE_boolean("stream", True, "", flag_values=made)
    return made


def parsed(values: flags.FlagValues, *words: str) -> dict[str, object]:
    """Returns the flags that a command line sets."""
    assert arguments.parse(values, words) is None
    return {name: values[name].value for name in values if values[name].present}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--run_name", "a", "--num-tokens=3"], {"run-name": "a", "num_tokens": 3}),
        (["--stop", "a", "--stop=b", "--nostream"], {"stop": ["a", "b"], "stream": False}),
        (["--no-stream", "--stream"], {"stream": True}),
        (["--temp", "-1", "--prompt", "--temp"], {"temp": -1.0, "prompt": "--temp"}),
        (["--prompt", "--help"], {"prompt": "--help"}),
        (["--prompt", "--"], {"prompt": "--"}),
        (["--prompt", "--flagfile=a.flags"], {"prompt": "--flagfile=a.flags"}),
        (["--prompt", "--flagfile", "--num_tokens", "4"], {"prompt": "--flagfile", "num_tokens": 4}),
        (["--flagfile=a.flags"], {"num_tokens": 7}),
        (["-flagfile", "a.flags", "--num_tokens=8"], {"num_tokens": 8}),
        (["--num_tokens=8", "--flagfile", "a.flags"], {"num_tokens": 7}),
    ],
)
def test_values_of_flags(values: flags.FlagValues, words: list[str], expected: dict[str, object]) -> None:
    Path("a.flags").write_text("--num_tokens=7\n")
    assert parsed(values, *words) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"--run-name shakespeare\n", {"run-name": "shakespeare"}),
        (b"--run-name   shakespeare  \n", {"run-name": "shakespeare"}),
        (b"--run_name\nshakespeare\n", {"run-name": "shakespeare"}),
        (BOM + b"--run-name=a\r\n\r\n# --frob\r\n// --frob\r\n  --nostream  \r\n", {"run-name": "a", "stream": False}),
        (
            b"--prompt=To be,  \n--num_tokens=5  \n--unit=byte \n",
            {"prompt": "To be,  ", "num_tokens": 5, "unit": "byte"},
        ),
        (b"--prompt To be, or not  \n", {"prompt": "To be, or not  "}),
        (b"--prompt==\n--stop=\t# no comment\n", {"prompt": "=", "stop": ["\t# no comment"]}),
        (b"--prompt=caf\xe9 \xc3\xa9\n--output=\xe9.jsonl", {"prompt": "caf\ufffd é", "output": "\udce9.jsonl"}),
        (b"--flagfile=inner.flags\n--num_tokens=9", {"temp": 0.5, "num_tokens": 9}),
        (b"--flagfile inner.flags \n--flagfile=inner.flags\n", {"temp": 0.5, "num_tokens": 3}),
        (b"--prompt=--flagfile=inner.flags\n", {"prompt": "--flagfile=inner.flags"}),
        (b"--prompt\n--flagfile=inner.flags\n", {"prompt": "--flagfile=inner.flags"}),
        ("--prompt=a\u2028b\x0cc\n".encode(), {"prompt": "a\u2028b\x0cc"}),
    ],
)
def test_flag_files(values: flags.FlagValues, content: bytes, expected: dict[str, object]) -> None:
    Path("inner.flags").write_text("--temp=0.5\n--num_tokens=3\n")
    Path("a.flags").write_bytes(content)
    assert parsed(values, "--flagfile=a.flags") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_tokens x", "--num_tokens must be an integer: got 'x'"),
        ("--num_tokens 1e1", "--num_tokens must be an integer: got '1e1'"),
        ("--num_tokens=", "--num_tokens must be an integer: got ''"),
        ("--num_tokens " + "9" * 5000, "--num_tokens must be an integer: got '9+'"),
        ("--smooth 0", "--smooth must be a positive integer: got '0'"),
        ("--temp hot", "--temp must be a number: got 'hot'"),
        ("--unit word", "--unit must be one of byte, token: got 'word'"),
        ("--stream=maybe", "--stream must be true or false: got 'maybe'"),
        ("--nostream=true", "--nostream takes no value: got 'true'"),
        ('--ids="', "--ids must be values separated by commas: got '\"'"),
        ("--frob", "unknown flag --frob: --help lists every flag"),
        ("--undefok=frob --frob", "unknown flag --undefok: --help lists every flag"),
        ("--num_token 3", "unknown flag --num_token: did you mean --num_tokens?"),
        ("--prompt", "--prompt needs a value"),
        ("--flagfile", "--flagfile needs the name of a file"),
        ("--flagfile=", "--flagfile needs the name of a file"),
        ("--flagfile=none.flags", "flag file none.flags cannot be read: No such file or directory"),
        ("--flagfile=.", "flag file . cannot be read: Is a directory"),
        ("--flagfile=/dev/zero", "flag file /dev/zero is too large: at most 1048576 bytes are allowed"),
        ("--flagfile=wide.flags", "flag file wide.flags is not UTF-8 text"),
        ("--flagfile=bad.flags", "bad.flags line 3: --temp must be a number: got 'hot'"),
        ("--flagfile=word.flags", "word.flags line 1: unexpected argument 'word'"),
        ("--flagfile=outer.flags", "circle.flags line 2: flag file ./outer.flags includes itself"),
    ],
)
def test_mistakes_have_clear_messages(values: flags.FlagValues, words: str, message: str) -> None:
    Path("wide.flags").write_text("--temp=1", encoding="utf-16")
    Path("bad.flags").write_text("# comment\n\n--temp=hot\n")
    Path("word.flags").write_text("word\n")
    Path("outer.flags").write_text("--flagfile=circle.flags\n")
    Path("circle.flags").write_text("--temp=1\n--flagfile=./outer.flags\n")
    with pytest.raises((flags.Error, ValueError)) as raised:
        arguments.parse(values, words.split(" "))
    assert str(raised.value).replace("9" * 5000, "9+").startswith(message)


def test_text_flags_are_decoded(values: flags.FlagValues) -> None:
    """Bytes of a command line that are not UTF-8 become U+FFFD in text and stay what they are in paths."""
    smuggled = b"caf\xc3\xa9 \xe9 \xf0\x9f".decode("ascii", "surrogateescape")
    words = (f"--prompt={smuggled}", "--stop", smuggled, f"--ids=a,{smuggled}", f"--output={smuggled}")
    text = "café \ufffd \ufffd"
    assert parsed(values, *words) == {"prompt": text, "stop": [text], "ids": ["a", text], "output": smuggled}


def test_every_flag_is_classified_as_text_or_not() -> None:
    names = {"coordinator", "device", "devices", "dtype", "mesh", "metrics", "numerics", "overflow"}
    names |= {"penalty_scope", "prompt_ids", "seeds", "shard", "split", "step", "unit", "weights-dtype"}
    strings = {
        flag for values in FLAGS.values() for flag in values if "string" in values[flag].flag_type().split("enum")[0]
    }
    assert strings >= arguments.TEXT_FLAGS | arguments.PATH_FLAGS
    assert strings - arguments.TEXT_FLAGS - arguments.PATH_FLAGS <= names, (
        "add the new flag to TEXT_FLAGS or PATH_FLAGS, or to this list if it is neither"
    )


PATHS = [(name, flag) for name, values in FLAGS.items() for flag in values if flag in arguments.PATH_FLAGS]


@pytest.mark.parametrize(("name", "flag"), [*PATHS, *((name, "flagfile") for name in FLAGS)])
def test_url_is_no_path(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("gs://bucket/text", "s3://a/b.jsonl", "https://host/run", "hf://datasets/x", "gs:/bucket", "file:///a"):
        result = programs.call(name, f"--{flag}", url, monkeypatch=monkeypatch, capsys=capsys)
        assert (result.code, result.out) == (2 if name == "replay" else 1, "")
        assert result.err == (
            f"{name}: error: --{flag} must be a path on this machine: got the URL {url}. Copy it to a local or shared "
            f"disk, or mount its store, and give the path there\n"
        )
    assert list(tmp_path.iterdir()) == []


def test_path_with_a_colon_is_no_url(values: flags.FlagValues) -> None:
    for path in ("c:/a", "run:10", "./gs:/a", "a/s3://b", "/x://y"):
        assert parsed(values, "--output", path) == {"output": path}


@pytest.mark.parametrize(
    ("program", "message", "expected"),
    [
        (
            "generate",
            "window must be at least 1 (the window): got 0",
            "--max_seq_len must be at least 1 (the window): got 0",
        ),
        ("generate", "repetition_penalty must be a number: got 'top_k'", "--rep-penalty must be a number: got 'top_k'"),
        (
            "generate",
            "overflow must be one of roll, stop: got 'seed'",
            "--overflow must be one of roll, stop: got 'seed'",
        ),
        ("generate", "device 'cuda': JAX found no device", "--device 'cuda': JAX found no device"),
        ("generate", "the seed must be small", "the seed must be small"),
        ("train", "embed_dim must be a multiple of num_heads: got 3", "--dim must be a multiple of --heads: got 3"),
        ("train", "learning_rate must be above 0: got 0.0", "--lr must be above 0: got 0.0"),
        ("train", "mesh must be such as data=4", "--mesh must be such as data=4"),
        ("train", "max_seq_len must be at most 9: choose max_seq_len 9", "--seq must be at most 9: choose --seq 9"),
        ("evaluate", "num_samples must be at least 1", "num_samples must be at least 1"),
    ],
)
def test_errors_about_fields_name_the_flags_of_the_program(program: str, message: str, expected: str) -> None:
    assert shared.translate(message, FLAGS[program]) == expected


@pytest.mark.parametrize("name", FLAGS)
def test_help_is_ascii(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(FLAGS) == set(programs.MAINS)
    result = programs.call(name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert result.code == 0
    assert result.out.isascii()
    assert all(re.search(rf"^  --(\[no\])?{flag}\b", result.out, re.MULTILINE) for flag in FLAGS[name])
    assert "Other:" not in result.out, "add the flag to a group of cli/flags.py"
    assert not package.interrupted


@pytest.mark.parametrize("word", ["--helpfull", "--helpshort", "-h"])
def test_help_has_groups_placeholders_and_choices(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = programs.call("generate", word, monkeypatch=monkeypatch, capsys=capsys).out
    sampling = out.partition("\nSampling:\n")[2].partition("\n\n")[0]
    assert "  --temp, --temperature X\n        Temperature; 0 takes the most likely token. (default: 1.0)\n" in sampling
    assert "  --penalty_scope {all,output}\n" in sampling
    assert "--num_tokens" not in sampling


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("generate", ["--temperature", "0.5", "--repetition-penalty=1.3"], {"temp": 0.5, "rep-penalty": 1.3}),
        ("generate", ["--window=8"], {"max_seq_len": 8}),
        ("train", ["--learning_rate", "1", "--num-layers", "3"], {"lr": 1.0, "layers": 3}),
        ("generate", ["--max_new_tokens", "3"], "unknown flag --max_new_tokens: did you mean --num_tokens?"),
        ("generate", ["--n=3"], "unknown flag --n: did you mean --num_samples?"),
        ("evaluate", ["--max_tokens"], "unknown flag --max_tokens: --help lists every flag"),
    ],
)
def test_names_in_python_are_accepted_and_those_of_others_recognised(
    name: str, words: list[str], expected: dict[str, object] | str
) -> None:
    values = FLAGS[name]
    names = shared.aliases(values), shared.synonyms(values)
    if isinstance(expected, str):
        with pytest.raises(flags.Error, match=re.escape(expected)):
            arguments.parse(values, words, None, *names)
    else:
        assert arguments.parse(values, words, None, *names) is None
        assert {flag: values[flag].value for flag in values if values[flag].present} == expected
    arguments.parse(values, [])


@pytest.mark.parametrize("name", FLAGS)
def test_completion_scripts_complete_every_flag(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shell in arguments.SHELLS:
        out = programs.call(name, "--completion", shell, monkeypatch=monkeypatch, capsys=capsys).out
        prefix = "-l " if shell == "fish" else "--"
        assert [flag for flag in FLAGS[name] if not re.search(rf"{prefix}{flag}[\s=\[]", out)] == []


def test_bash_completes_flags_choices_and_runs(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "my_run").mkdir(parents=True)
    script = completion.script("bash", "hipgpt-generate", generate.FLAGS)
    tries = ["--te", "--device ", "--device = c", "--run-name ", "--prompt --te", "--nost"]
    script += """
    while IFS= read -r words; do
      IFS=' ' read -ra COMP_WORDS <<<"hipgpt-generate $words"
      if [[ $words == *' ' ]]; then COMP_WORDS+=(''); fi
      COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
      _hipgpt_generate
      echo "${COMPREPLY[*]}"
    done"""
    done = subprocess.run(
        ["bash", "-c", script], input="\n".join(tries) + "\n", cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "--temp",
        "auto cpu rocm cuda",
        "cpu cuda",
        "my_run shakespeare",
        "",
        "--nostream",
    ]


def test_commands_are_printed_as_they_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    other = tmp_path / "hipgpt-generate"
    other.write_text("")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [".venv/bin/hipgpt-train"])
    assert running.with_commands("a:\n\n  hipgpt-generate x") == "a:\n\n  .venv/bin/hipgpt-generate x"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert running.command("generate") == [".venv/bin/hipgpt-generate"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "hipgpt-train")])
    assert running.command("generate") == ["hipgpt-generate"]
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert running.command("generate") == ["uv", "run", "hipgpt-generate"]
