"""scripts/verify.py verifies true records, finds a changed token, and needs no JAX."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verify

import hipgpt_jax
from hipgpt_jax import config

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests/data/tiny"
RECORDS = ROOT / "tests/data/records.jsonl"


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/verify.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_committed_records_are_verified() -> None:
    done = _run(TINY, RECORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = sum(len(one["ids"]) for one in _records())
    *differing, summary = done.stdout.splitlines()
    assert summary == f"{RECORDS}: {tokens} tokens, {tokens - len(differing)} equal, {len(differing)} differ: verified"
    bfloat16 = {number for number, one in enumerate(_records(), 1) if one["numerics"]["dtype"] == "bfloat16"}
    assert {int(line.split(" line ")[1].split()[0]) for line in differing} <= bfloat16


def test_a_new_record_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = hipgpt_jax.load_run("tiny", where=TINY, decoding=config.DecodingConfig(window_stride=4))
    new = run.generate("my lord", seed=12, num_samples=2, num_tokens=40, temperature=1.2, min_p=0.02)
    path = tmp_path / "new.jsonl"
    path.write_text("".join(one.to_json() + "\n" for one in new))
    assert verify.verify(TINY, path) == 0
    assert capsys.readouterr().out == f"{path}: 80 tokens, 80 equal, 0 differ: verified\n"


def test_a_changed_token_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The token that came nearest to being drawn instead, at every position; none of them is a near tie."""
    plain = _records()[0]
    draws = verify.redraw(TINY, plain)
    for index, draw in enumerate(draws):
        second = int(np.argsort(draw.distances)[1])
        assert draw.lead > 0.01
        assert draw.lead == pytest.approx(plain["leads"][index], abs=1e-4)
        path = _write(tmp_path / "changed.jsonl", {**plain, "ids": [*plain["ids"][:index], second]})
        assert verify.verify(TINY, path) == 1
        found, summary = capsys.readouterr().out.splitlines()
        assert f"line 1 token {index}: {second} recorded, {draw.token} drawn, lead {draw.lead:.2g}" in found
        assert summary.endswith(f"{index + 1} tokens, {index} equal, 1 differ: 1 not explained by rounding")


def test_texts_may_have_line_separators_and_a_torn_last_line_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = _records()[0]
    lines = [json.dumps({**one, "id": each}, ensure_ascii=False) for each in ("\u2028", "\u2029\x85", "ï")]
    path = tmp_path / "new.jsonl"
    for whole, end in ((2, ""), (2, "\n"), (2, "\n" + lines[2][:8]), (3, "")):
        path.write_text("\n".join(lines[:whole]) + end)
        assert verify.verify(TINY, path) == 0
        assert capsys.readouterr().out.startswith(f"{path}: {whole * len(one['ids'])} tokens, ")
    path.write_bytes(f"{lines[0]}\n{lines[2]}".encode().partition("ï".encode())[0] + b"\xc3")
    assert verify.verify(TINY, path) == 0
    path.write_text("")
    with pytest.raises(ValueError, match="line 1: JSONDecodeError"):
        verify.verify(TINY, path)


@pytest.mark.parametrize("field", ["seed", "sample"])
def test_another_seed_or_sample_is_found(field: str, tmp_path: Path) -> None:
    changed = _records()[0]
    changed[field] += 1
    done = _run(TINY, _write(tmp_path / "changed.jsonl", changed))
    assert done.returncode == 1
    assert "not explained by rounding" in done.stdout


_BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "contract": lambda one: one.update(contract=1),
    "rule": lambda one: one["settings"].update(rule="f sha256:0"),
    "id": lambda one: one["ids"].append(300),
    "negative": lambda one: one["prompt_ids"].append(-1),
    "weights": lambda one: one["run"].update(weights_sha256="0" * 64),
    "missing": lambda one: one.pop("seed"),
    "dtype": lambda one: one["numerics"].update(dtype="int8"),
}


@pytest.mark.parametrize("name", _BAD)
def test_records_that_cannot_be_verified_are_refused_by_line(name: str, tmp_path: Path) -> None:
    good, bad = _records()[0], _records()[0]
    _BAD[name](bad)
    path = _write(tmp_path / "bad.jsonl", good, bad)
    done = _run(TINY, path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"verify: error: {path} line 2: ")
    assert done.stderr.count("\n") == 1


def test_a_wrong_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text("{")
    for arguments in ((), (TINY,), (TINY, tmp_path / "none.jsonl"), (TINY, tmp_path / "torn.jsonl")):
        done = _run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("verify: error: ")
        assert done.stderr.count("\n") == 1


def test_the_script_is_short_and_imports_neither_jax_nor_the_package() -> None:
    assert len((ROOT / "scripts/verify.py").read_text().splitlines()) <= 200
    code = "import sys, verify; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert "'numpy'" in done.stdout
    assert not any(name in done.stdout for name in ("'jax'", "'hipgpt_jax'", "'flax'", "'tokenizers'"))
