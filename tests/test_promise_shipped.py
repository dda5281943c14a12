"""The clauses of the promise for a run of real size, the one in the package: records equal to the last digit."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import hipgpt_jax
from hipgpt_jax import config
from hipgpt_jax.generation import carry, lane, waiting
from hipgpt_jax.records import record

pytestmark = pytest.mark.gpu

PROMPTS = ["To be, or not to be:", "ROMEO:", "First Citizen:\nBefore we proceed any further, hear me speak." * 4, "O"]


def load(width: int) -> hipgpt_jax.Run:
    return hipgpt_jax.load_run("shakespeare", decoding=config.DecodingConfig(width=width))


@pytest.fixture(scope="module")
def narrow() -> hipgpt_jax.Run:
    return load(1)


@pytest.fixture(scope="module")
def wide() -> hipgpt_jax.Run:
    return load(4)


def drawn(made: record.Record) -> tuple[Any, ...]:
    """All that was drawn and measured, bit for bit: a record has the shortest digits that are a float32's own."""
    return made.ids, made.logprobs, made.ranks, made.margins, made.gaps, made.top_logprobs


def first(made: record.Record, number: int) -> tuple[Any, ...]:
    return tuple(part and part[:number] for part in drawn(made))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
def test_first_50_of_100_tokens_are_the_run_of_50(width: int, narrow: hipgpt_jax.Run, wide: hipgpt_jax.Run) -> None:
    run = {1: narrow, 4: wide}[width]
    long = run.generate(PROMPTS, num_tokens=100, top_logprobs=3)
    short = run.generate(PROMPTS, num_tokens=50, top_logprobs=3)
    assert [first(one, 50) for one in long] == [drawn(one) for one in short]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
def test_a_sample_is_the_same_alone_and_in_any_company(
    width: int, narrow: hipgpt_jax.Run, wide: hipgpt_jax.Run
) -> None:
    """Sample 7 of 10, streamed; and each prompt in a list that is shuffled, split and doubled."""
    run = {1: narrow, 4: wide}[width]
    ten = run.generate(PROMPTS[1], num_samples=10, num_tokens=30)
    stream = run.stream(PROMPTS[1], sample=7, num_tokens=30)
    assert "".join(stream) == ten[7].text
    assert stream.record is not None
    assert drawn(stream.record) == drawn(ten[7])
    alone = {prompt: drawn(run.generate(prompt, num_tokens=30)[0]) for prompt in PROMPTS}
    for prompts in (PROMPTS[::-1], PROMPTS[2:] + PROMPTS, PROMPTS[1:2] * 5):
        assert [drawn(one) for one in run.generate(prompts, num_tokens=30)] == [alone[prompt] for prompt in prompts]


def test_logits_are_bit_identical_at_one_width_whatever_the_companions(
    wide: hipgpt_jax.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits themselves, at every step, in each row: beside prompts of other lengths, other settings, itself."""
    seen: dict[int, list[np.ndarray]] = {}
    facts_of = lane.Lane._facts

    def listen(self: lane.Lane, told: carry.Told, rows: dict[int, tuple[waiting.Sample, int, bool]]) -> Any:
        logits_TBV = np.asarray(told.logits_BV)
        logits_TBV = logits_TBV.reshape(-1, *logits_TBV.shape[-2:])
        for place, (sample, count, _) in rows.items():
            seen.setdefault(sample.index, []).extend(logits_TBV[:count, place])
        return facts_of(self, told, rows)

    monkeypatch.setattr(lane.Lane, "_facts", listen)
    (ask,) = wide.files.resolve_all(
        [hipgpt_jax.Prompt(text=PROMPTS[0])],
        config.SamplingConfig(),
        config.GenerationConfig(num_tokens=25),
    )
    others = wide.files.resolve_all(
        [hipgpt_jax.Prompt(text=text) for text in PROMPTS],
        config.SamplingConfig(temperature=0.4, top_k=0),
        config.GenerationConfig(num_tokens=60, seed=9),
    )
    (job,), rest = list(wide.jobs([ask])), list(wide.jobs(others))
    told = {}
    for row, jobs in enumerate(([job], [rest[2], job], [rest[2], rest[0], job, rest[3]], [rest[1], job, job, job])):
        seen.clear()
        list(wide.make(jobs, measure=True))
        told[row] = np.stack(seen[jobs.index(job)])
        assert len(told[row]) == 25
    for other in told.values():
        np.testing.assert_array_equal(told[0], other)


@pytest.mark.slow
def test_a_run_loaded_again_gives_the_same_records(wide: hipgpt_jax.Run) -> None:
    again = load(4)
    for one, other in zip(wide.generate(PROMPTS), again.generate(PROMPTS), strict=True):
        plain = {"timings": one.timings, "started": one.started}
        assert dataclasses.replace(other, **plain) == one
