"""Files of prompts, good ones and broken ones."""

import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import zstandard
from hypothesis import strategies as st

from hipgpt_jax.text import prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[prompts.Prompt]:
    return list(prompts.PromptFile(path))


def test_plain_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "\ufeffFirst\n\n  two words \r\nünï\u2028code\x0bhere\n{}")
    assert [prompt.text for prompt in read(path)] == ["First", "  two words ", "ünï\u2028code\x0bhere", "{}"]


def test_json_lines_have_settings(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a\nb"},
        {"prompt": "c", "id": "x", "seed": 7, "num_samples": 3, "num_tokens": 9, "eos_id": 5, "stop": ["\n", "."]},
        {"prompt": "d", "temp": 0, "top_k": 3, "top_p": 0.5, "rep_penalty": 1, "stop": "!"},
    ]
    first, second, third = read(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines))))
    assert (first.text, first.id, dict(first.generation), dict(first.sampling)) == ("a\nb", None, {}, {})
    assert second.id == second.name == "x"
    assert second.generation == {"seed": 7, "num_samples": 3, "num_tokens": 9, "eos_id": 5, "stop": ("\n", ".")}
    assert third.generation == {"stop": ("!",)}
    assert third.sampling == {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.0}


def test_a_name_depends_on_the_prompt_and_not_on_its_line(tmp_path: Path) -> None:
    plain = read(write(tmp_path / "p.txt", "one\ntwo\none\n"))
    (as_json,) = read(write(tmp_path / "p.jsonl", '{"num_samples": 9, "prompt": "one"}'))
    seeded = read(write(tmp_path / "q.jsonl", '{"prompt": "one", "seed": 1}\n{"prompt": "one", "temp": 2}'))
    assert plain[0].name == plain[2].name == as_json.name == "00c6ef9ef6f5d622"
    assert len({prompt.name for prompt in [*plain, *seeded]}) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompt"),
        (b"\n\n", "has no prompt"),
        (b"{}", r"line 1: a line needs either prompt, a text, or prompt_ids, a list of token ids"),
        (b'\n{"prompt": "", "prompt_ids": [1]}', r"line 2: a line needs either prompt, a text, or prompt_ids"),
        (b'{"prompt": "a", "parse_special": 1}', "line 1: parse_special must be true or false: got 1"),
        (b'{"prompt_ids": []}', r"line 1: ids must be a list of at least one token id: got \[\]"),
        (b'{"prompt_ids": "12"}', "line 1: ids must be a list of at least one token id: got '12'"),
        (b'{"prompt_ids": [1, -1]}', r"line 1: ids must be an integer of at least 0 \(each is a token id\): got -1"),
        (b'{"prompt_ids": [1.0]}', r"line 1: ids must be an integer of at least 0"),
        (b'{"prompt": "a"}\n{"prompt": 3}', "line 2: prompt must be a text: got 3"),
        (b'{"prompt": "a"', r"line 1: not JSON: Expecting ',' delimiter at column 15"),
        (b'["a"]', "line 1: must be a JSON object with a prompt: got list"),
        (
            b'{"prompt": "a", "heat": 1}',
            "line 1: unknown key 'heat': the keys are id, prompt, prompt_ids, parse_special, num_tokens",
        ),
        (
            b'{"prompt": "a", "temp": 1, "temperature": 1}',
            "line 1: temperature is given twice, under two names: temp, temperature",
        ),
        (b'{"prompt": "a", "prompt": "b"}', "line 1: not JSON: key 'prompt' appears twice"),
        (b'{"prompt": "a", "id": 3}', "line 1: id must be a text .*: got 3"),
        (b'{"prompt": "a", "id": "\\ud800"}', "line 1: id must be a text .* in UTF-8"),
        (b'{"prompt": "a", "stop": "\\ud800"}', "line 1: stop must be a text .* in UTF-8"),
        (
            b'{"prompt": "a", "temp": 1' + b"0" * 400 + b"}",
            "line 1: not JSON: the number 10000000000000000... has 401 digits",
        ),
        (b'{"prompt": "a", "temp": -1}', "line 1: temperature must be at least 0"),
        (b'{"prompt": "a", "temp": "hot"}', "line 1: temp.* must be a number: got 'hot'"),
        (b'{"prompt": "a", "temp": NaN}', "line 1: not JSON: NaN is not a JSON number"),
        (b'{"prompt": "a", "top_k": 1.5}', "line 1: top_k must be an integer"),
        (b'{"prompt": "a", "top_k": true}', "line 1: top_k must be an integer .*: got True"),
        (b'{"prompt": "a", "seed": -1}', "line 1: seed must be an integer of at least 0"),
        (b'{"prompt": "a", "seed": 4294967296}', "line 1: seed must be at most 4294967295"),
        (b'{"prompt": "a", "num_samples": 0}', "line 1: num_samples must be an integer of at least 1"),
        (b'{"prompt": "a", "stop": [""]}', "line 1: stop must be a text of at least one character"),
        (b'{"prompt": "a", "stop": 3}', "line 1: stop must be a text"),
        (b'{"prompt": "a", "min_p": 1}', "line 1: min_p must be at least 0 and below 1 .*: got 1"),
        (b'{"prompt": "a"}\n{"prompt": "a", "ban": [-1]}', "line 2: ban must be an integer of at least 0"),
        (b'{"prompt": "a", "logit_bias": {"3": "x"}}', "line 1: logit_bias must be given as ID=VALUE"),
        (b'{"prompt": "a", "penalty_scope": "prompt"}', "line 1: penalty_scope must be one of all, output"),
        (b'{"prompt": "a", "min_tokens": -1}', "line 1: min_tokens must be an integer of at least 0"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}', r"line 2 is not UTF-8 text \(byte 13 is 0xe9\).*iconv -f LATIN1"),
        ("hi".encode("utf-16"), "is UTF-16 text: it must be UTF-8"),
    ],
)
def test_a_broken_file_is_reported_with_line_and_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "p.jsonl", content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("suffix", [".ndjson", ".json", ".JSONL"])
def test_other_suffixes_of_json_lines(tmp_path: Path, suffix: str) -> None:
    (prompt,) = read(write(tmp_path / f"p{suffix}", '{"prompt": "a", "top_logprobs": 3}'))
    assert (prompt.text, prompt.generation["top_logprobs"]) == ("a", 3)


def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    lines = r'{"prompt": "a\ud83d"}', r'{"prompt": "\udcc3\udca9"}', r'{"prompt": "\ud83d\ude00"}'
    found = read(write(tmp_path / "p.jsonl", "\n".join(lines)))
    assert [prompt.text for prompt in found] == ["a\ufffd", "\ufffd\ufffd", "\U0001f600"]


def test_the_names_of_settings_in_records_are_keys_too(tmp_path: Path) -> None:
    line = '{"prompt": "a", "temperature": 0.5, "repetition_penalty": 1.5}'
    (prompt,) = read(write(tmp_path / "p.jsonl", line))
    assert prompt.sampling == {"temperature": 0.5, "repetition_penalty": 1.5}
    assert prompt.name == prompts.Prompt(text="a", sampling={"temperature": 0.5, "repetition_penalty": 1.5}).name


@pytest.mark.parametrize(("packing", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_file_may_be_compressed(tmp_path: Path, packing: str, pack: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / f"p.jsonl{packing}", pack(b'{"prompt": "a"}\n   \n{"prompt": "b"}\n'))
    assert [prompt.text for prompt in read(path)] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        read(path)


def test_the_first_line_of_a_pipe_determines_its_format() -> None:
    for content, texts in ((b'{"prompt": "a"}\n', ["a"]), (b"a\nb\n", ["a", "b"])):
        found = prompts.PromptFile(Path("stdin"), io.BytesIO(content))
        for _ in range(2):
            assert [prompt.text for prompt in found] == texts


def test_a_name_that_hides_json_lines_gets_a_hint(tmp_path: Path) -> None:
    found = prompts.PromptFile(write(tmp_path / "p.txt", '{"prompt": "a"}\n'))
    assert [prompt.text for prompt in found] == ['{"prompt": "a"}']
    assert "the name of a file of JSON lines must end in .jsonl" in str(found.hint)
    assert prompts.PromptFile(write(tmp_path / "q.txt", "a\n")).hint is None


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "one\ntwo\n")
    found = prompts.PromptFile(path)
    assert len(list(found)) == 2
    path.write_text("one\ntwo\nthree\n")
    with pytest.raises(ValueError, match="was changed while it was being read"):
        list(found)


def test_a_line_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt.gz", gzip.compress(b"a" * (prompts.MAX_LINE_BYTES + 1) + b"\n"))
    with pytest.raises(ValueError, match="line 1 is longer than 16 MiB"):
        read(path)


def test_a_prompt_has_its_location(tmp_path: Path) -> None:
    found = read(write(tmp_path / "p.txt", "one\n\ntwo"))
    assert [prompt.location for prompt in found] == [f"{tmp_path}/p.txt line 1", f"{tmp_path}/p.txt line 3"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prompts file not found: .*none\.txt"):
        read(tmp_path / "none.txt")


PIECES = st.sampled_from(
    [b'{"prompt"', b": ", b'"a"', b"}", b"\n", b"\r", b"\x00", b"\xff", b'"id"', b",", b"1e999", b"\xef\xbb\xbf"]
)


@hypothesis.given(
    st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join), st.sampled_from(["p.txt", "p.jsonl"])
)
@hypothesis.settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_bytes_give_prompts_or_a_value_error(tmp_path: Path, content: bytes, name: str) -> None:
    try:
        found = read(write(tmp_path / name, content))
    except ValueError:
        return
    assert all((prompt.text and "\n" not in prompt.text) or name == "p.jsonl" for prompt in found)


def test_a_prompt_has_a_text_or_ids() -> None:
    valid: list[Any] = [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint16)]
    for ids in valid:
        assert prompts.Prompt(ids=ids).ids == (1, 2)
    several: list[dict[str, Any]] = [
        {},
        {"ids": (1, 2)},
        {"ids": (12,)},
        {"text": "1,2"},
        {"text": "1,2", "parse_special": True},
    ]
    assert len({prompts.Prompt(**each).digest for each in several}) == len(several)
    assert prompts.Prompt(ids=(1,), parse_special=True).name == prompts.Prompt(ids=(1,)).name
    with pytest.raises(ValueError, match="a prompt has a text or ids, not both"):
        prompts.Prompt(text="a", ids=(1,))
    invalid: list[Any] = [(), 3, "12", [True], [1.0], [-1], np.array([[1]]), [None]]
    for ids in invalid:
        with pytest.raises(ValueError, match=r"^ids must"):
            prompts.Prompt(ids=ids)
