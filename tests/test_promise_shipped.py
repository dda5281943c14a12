"""Tests of the reproducibility promise on the run shipped in the package: records equal to the last digit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import hipgpt_jax
from hipgpt_jax import config
from hipgpt_jax.generation import engine
from hipgpt_jax.records import record

pytestmark = pytest.mark.gpu

PROMPTS = ["To be, or not to be:", "ROMEO:", "First Citizen:\nBefore we proceed any further, hear me speak." * 4, "O"]


def load(width: int) -> hipgpt_jax.Run:
    return hipgpt_jax.load_run("shakespeare", decoding=config.DecodingConfig(batch_size=width))


@pytest.fixture(scope="module")
def narrow() -> hipgpt_jax.Run:
    return load(1)


@pytest.fixture(scope="module")
def wide() -> hipgpt_jax.Run:
    return load(4)


def outputs_of(generated: record.Record) -> tuple[Any, ...]:
    """Returns ids and statistics. A record's decimal digits round-trip float32, so equality is bitwise."""
    return generated.ids, *(getattr(generated, name) for name in record.STATISTICS)


def first(generated: record.Record, number: int) -> tuple[Any, ...]:
    return tuple(part and part[:number] for part in outputs_of(generated))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
def test_first_50_of_100_tokens_equal_a_run_of_50(width: int, narrow: hipgpt_jax.Run, wide: hipgpt_jax.Run) -> None:
    run = {1: narrow, 4: wide}[width]
    long = run.generate(PROMPTS, num_tokens=100, top_logprobs=3)
    short = run.generate(PROMPTS, num_tokens=50, top_logprobs=3)
    assert [first(one, 50) for one in long] == [outputs_of(one) for one in short]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
def test_a_sample_is_independent_of_the_batch(width: int, narrow: hipgpt_jax.Run, wide: hipgpt_jax.Run) -> None:
    """Streams sample 7 of 10 alone, and runs each prompt in reversed, extended and repeated lists."""
    run = {1: narrow, 4: wide}[width]
    ten = run.generate(PROMPTS[1], num_samples=10, num_tokens=30)
    stream = run.stream(PROMPTS[1], sample=7, num_tokens=30)
    assert "".join(stream) == ten[7].text
    assert stream.record is not None
    assert outputs_of(stream.record) == outputs_of(ten[7])
    alone = {prompt: outputs_of(run.generate(prompt, num_tokens=30)[0]) for prompt in PROMPTS}
    for prompts in (PROMPTS[::-1], PROMPTS[2:] + PROMPTS, PROMPTS[1:2] * 5):
        assert [outputs_of(one) for one in run.generate(prompts, num_tokens=30)] == [
            alone[prompt] for prompt in prompts
        ]


def test_logits_are_independent_of_the_other_slots(wide: hipgpt_jax.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, at every step and in each slot, beside other prompts and settings and beside copies of itself."""
    decoded: list[engine.Decoded] = []
    decode = engine.Engine.decode

    def listen(self: engine.Engine, limits: Mapping[int, int]) -> list[engine.Decoded]:
        decoded.extend(found := decode(self, limits))
        return found

    def logits_of(slot: int) -> np.ndarray:
        """Returns the 25 steps of a slot, which is not reused while the other requests, of 60 tokens, run."""
        rows = [np.asarray(each.output.logits_BV)[: each.counts[slot], slot] for each in decoded if slot in each.counts]
        return np.concatenate(rows)

    monkeypatch.setattr(engine.Engine, "decode", listen)
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
    (own,), rest = list(wide.requests_of([ask])), list(wide.requests_of(others))
    logits = []
    for slot, samples in enumerate(([own], [rest[2], own], [rest[2], rest[0], own, rest[3]], [rest[1], own, own, own])):
        decoded.clear()
        list(wide.outputs(samples))
        logits.append(logits_of(samples.index(own)))
        assert len(logits[slot]) == 25
    for other in logits[1:]:
        np.testing.assert_array_equal(logits[0], other)


@pytest.mark.slow
def test_a_reloaded_run_gives_the_same_records(wide: hipgpt_jax.Run) -> None:
    again = load(4)
    for one, other in zip(wide.generate(PROMPTS), again.generate(PROMPTS), strict=True):
        plain = {"timings": one.timings, "started": one.started}
        assert dataclasses.replace(other, **plain) == one
