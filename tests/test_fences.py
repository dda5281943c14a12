"""Regression tests: committed records stay reproducible, and lowered programs stay unchanged."""

import hashlib
import itertools
import re
from pathlib import Path

import fakes
import jax
import pytest

import hipgpt_jax
from hipgpt_jax import compilation, config
from hipgpt_jax.generation import backends, executables
from hipgpt_jax.records import record, replay

DATA = Path(__file__).parent / "data"
RECORDS = list(record.read(DATA / "records.jsonl"))
GROUPS = {
    f"{decoding.width}-{decoding.window_stride}-{decoding.dtype}": (decoding, list(group))
    for decoding, group in itertools.groupby(RECORDS, replay.decoding_config)
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("16" in name or "2-4" in name)) for name in GROUPS],
)
def test_committed_records_are_reproduced(name: str) -> None:
    decoding, recorded = GROUPS[name]
    run = hipgpt_jax.load_run("tiny", decoding=decoding, where=DATA / "tiny")
    found = run.records_of(map(run.request_of, recorded))
    verdicts = [run.compare(old, new) for old, new in zip(recorded, found, strict=True)]
    assert len(verdicts) == 6
    assert all(verdict.is_identical or verdict.is_rounding for verdict in verdicts)
    assert sum(verdict.is_identical for verdict in verdicts) >= 5  # on another processor one may fork by rounding


def test_committed_records_cover_widths_strides_dtypes_and_finish_reasons() -> None:
    assert {(one.numerics.decode_width, one.settings.window_stride) for one in RECORDS} == {
        (width, stride) for width in (1, 2, 16) for stride in (1, 4)
    }
    assert {one.numerics.dtype for one in RECORDS} == {"float32", "bfloat16"}
    assert {one.finish_reason for one in RECORDS} == {"length", "stop"}
    assert any(one.prompt_dropped for one in RECORDS)
    assert all(len(one.prompt_ids) + len(one.ids) > 32 for one in RECORDS if one.id in ("plain", "greedy"))


# First 16 digits of the SHA-256 of the StableHLO of all programs of a shape. A commit that changes a program on
# purpose updates its hash here; one that only moves or renames code must not.
SHAPES = {
    "a row": (fakes.MODEL, 1, 11, 1, "float32", "cpu"),
    "rows": (config.ModelConfig(), 4, 32, 4, "float32", "cpu"),
    "rows on a GPU": (fakes.MODEL, 2, 11, 1, "bfloat16", "cuda"),
}
HASHES = {"a row": "491156bf69d43d01", "rows": "05ba03819701ad3d", "rows on a GPU": "ce3e99efb0e0afd5"}


@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="the text of a program depends on JAX's version")
@pytest.mark.parametrize("shape", SHAPES)
def test_lowered_programs_are_unchanged(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With a cache, which another test of this process may have set, a program is traced from its exported form.
    monkeypatch.setattr(compilation, "active", lambda: None)
    model, slots, window, stride, dtype, platform = SHAPES[shape]
    programs = executables.Executables(
        model, dtype, window, stride, "xla", backends.backend_for(platform, model, window, slots)
    )
    programs.load(fakes.random_params(model))
    needed = [
        executables.Program("prefill", rows=slots, length=8),
        *programs.programs_for(3, window + 2, top_logprobs=True),
    ]
    texts = [programs.lower(program).as_text() for program in needed]
    assert hashlib.sha256("\n".join(map(_without_names, texts)).encode()).hexdigest()[:16] == HASHES[shape]


def _without_names(program: str) -> str:
    """Returns a program's text with its functions numbered, and without the names of fields that JAX notes in it."""
    numbers: dict[str, str] = {}
    program = re.sub(r' *jax\.(result_info|arg_info) = "[^"]*",?', "", program)
    return re.sub(r"@[\w.]+", lambda match: numbers.setdefault(match[0], f"@{len(numbers)}"), program)
