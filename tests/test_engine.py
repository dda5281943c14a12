"""Tests of the engine: the GPU backend, run on a CPU, samples the same tokens, several per program."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import fakes
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hipgpt_jax import config
from hipgpt_jax.generation import backends, engine, requests, scheduler, topk

# Settings for which 64 candidates suffice, and settings that need more of the 150.
NARROW: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 40, "repetition_penalty": 1.3},
    {"eos_id": 7, "penalty_scope": "output", "frequency_penalty": 0.5},
)
WIDE: tuple[dict[str, Any], ...] = (
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 100, "min_p": 0.01},
    {"top_k": 0, "top_p": 0.7, "eos_id": 7},
    {"no_repeat_ngram": 2, "ban": (3, 4)},
)


def make_requests(*settings: dict[str, Any], count: int = 8) -> list[requests.Request]:
    """Returns requests of 1 to 23 tokens, so that some outgrow the window of 11, cycling through the settings."""
    cycle = itertools.cycle(settings)
    return [
        fakes.request(fakes.prompt(n % 7 + 1), num_tokens=n * 5 % 23 + 1, sample=n, **next(cycle)) for n in range(count)
    ]


def described(
    source: scheduler.Scheduler, requested: list[requests.Request]
) -> tuple[list[tuple[Any, ...]], list[tuple[float, ...]]]:
    """Returns the tokens of each request in order, and the statistics of each token."""
    described, statistics = [], []
    for output in sorted(source.run(requested, measure=True), key=lambda output: output.index):
        stats = output.stats
        assert stats is not None
        statistics.append(tuple(float(column_B[stats.row]) for column_B in stats.step))
        count = requested[output.index].generation.top_logprobs
        top = stats.top_logprobs(count)[0].tolist()
        described.append((output.index, output.token, output.finish_reason, top))
    return described, statistics


@pytest.mark.slow
@pytest.mark.parametrize(("width", "stride"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_the_gpu_backend_samples_the_tokens_of_the_cpu_backend(width: int, stride: int) -> None:
    """Tokens, finish reasons and statistics, within the window and past it, with mixed settings in a batch."""
    on_gpu, on_cpu = (
        fakes.make_scheduler(platform, batch_size=width, window_stride=stride) for platform in ("gpu", "cpu")
    )
    requested = make_requests(*NARROW, *WIDE, count=14)
    requested[1] = dataclasses.replace(
        requested[1], generation=dataclasses.replace(requested[1].generation, top_logprobs=3)
    )
    tokens, statistics = described(on_gpu, requested)
    expected, numbers = described(on_cpu, requested)
    assert tokens == expected
    np.testing.assert_allclose(statistics, numbers, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
def test_slots_do_not_affect_each_other_and_settings_do_not_recompile() -> None:
    """Slots whose settings need more than 64 candidates use a separate program."""
    source = fakes.make_scheduler("gpu", batch_size=3, window_stride=3)
    fakes.tokens_of(source, [fakes.request(num_tokens=30)])
    requested = make_requests(*NARROW, *WIDE)
    with fakes.compilations() as compiled:
        together = fakes.tokens_of(source, requested)
        alone = [fakes.tokens_of(source, [one])[0] for one in requested]
    assert together == alone
    assert set(compiled) <= {"jit(prefill)", "jit(insert)"}, "only for another prefill bucket"


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens that each later program samples in the first slot."""
    sampled: list[int] = []
    decode = engine.Engine.decode

    def spy(self: engine.Engine, limits: Mapping[int, int]) -> list[engine.Decoded]:
        decoded = decode(self, limits)
        sampled.extend(each.counts[0] for each in decoded)
        return decoded

    monkeypatch.setattr(engine.Engine, "decode", spy)
    return sampled


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("platform", "expected"),
    [pytest.param("gpu", [8, 3, 1, 1], marks=pytest.mark.slow), ("cpu", [1, 3, 4, 3, 1, 1])],
)
def test_a_program_samples_several_tokens_up_to_the_limit_of_a_slot(
    platform: str, expected: list[int], counts: list[int]
) -> None:
    """After a one-token prompt, 11 tokens fill the window of blocks 4, 4 and 3; then each program samples one."""
    fakes.tokens_of(fakes.make_scheduler(platform), [fakes.request((5,), num_tokens=13)])
    assert counts == expected


def test_a_large_model_on_a_cpu_samples_one_token_per_program(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = [fakes.request((5,), num_tokens=13)]
    tokens = fakes.tokens_of(fakes.make_scheduler("cpu"), requested)
    counts.clear()
    monkeypatch.setattr(backends, "_MOST_WEIGHTS_FOR_SEVERAL_STEPS", 1)
    decode = config.DecodingConfig(window=11)
    large = scheduler.Scheduler(fakes.MODEL, fakes.random_params(fakes.MODEL), decode, platform="cpu")
    assert fakes.tokens_of(large, requested) == tokens
    assert counts == [1] * 13


def test_decoding_does_not_run_ahead_of_a_possible_stop_string(counts: list[int]) -> None:
    """After four tokens, the next program is already dispatched unless a stop string may end the sequence."""
    source, vocabulary = fakes.make_scheduler("cpu"), fakes.SHIFTED
    text = [output.text for output in source.run([fakes.request((5,), num_tokens=4, seed=6)], vocabulary)]
    assert text[3] != ""
    assert text[3] not in "".join(text[:3])
    for stop, dispatched in ((), [1, 3, 4]), ((text[3],), [1, 3]):
        counts.clear()
        outputs = source.run([fakes.request((5,), num_tokens=13, seed=6, stop=stop)], vocabulary)
        assert [output.finish_reason for output in itertools.islice(outputs, 4)][:3] == [None, None, None]
        assert counts == dispatched


@pytest.mark.gpu
@pytest.mark.slow
def test_nan_ends_a_sequence_within_a_program_and_does_not_leak() -> None:
    """The next request of the slot has the tokens that it has with intact weights."""
    params = fakes.random_params(fakes.MODEL)
    broken = jax.tree.map(np.array, params)
    broken["wpe"]["embedding"][8] = np.nan  # beyond the prefilled positions, padding included
    source = scheduler.Scheduler(fakes.MODEL, broken, config.DecodingConfig(), platform="gpu")
    outputs = list(source.run([fakes.request((1, 2, 3, 4), num_tokens=12), fakes.request((1,), num_tokens=3)]))
    assert [event.finish_reason for event in outputs] == [*[None] * 5, "error", None, None, "length"]
    whole = scheduler.Scheduler(fakes.MODEL, params, config.DecodingConfig(), platform="gpu")
    assert [event.token for event in outputs[-3:]] == fakes.tokens_of(whole, [fakes.request((1,), num_tokens=3)])[0]


def test_transposed_parameters_give_the_same_logits() -> None:
    """Scoring uses the parameters of the scheduler, which the GPU backend stores transposed."""
    tokens_BT = jnp.asarray([fakes.prompt(9)])
    logits = [
        source.module.bind({"params": source.params})(tokens_BT, dropout=0.0)
        for source in (fakes.make_scheduler("gpu"), fakes.make_scheduler("cpu"))
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


LOGITS = arrays.arrays(
    np.float32,
    st.sampled_from([(1, 1), (2, 31), (1, 64), (3, 100), (2, 200)]),  # few, because each is compiled
    elements=st.sampled_from([-np.inf, -1.5, 0.0, 1.0, 1.5, 2.0, 3.0])
    | st.floats(-10, 10, width=32, allow_subnormal=False),
)


@hypothesis.given(LOGITS, st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_top_in_chunks_equals_top_k(x_BV: np.ndarray, data: st.DataObject) -> None:
    """Values and indices, including the order of ties, which are frequent in ``LOGITS``."""
    k = min(data.draw(st.sampled_from([1, 2, 3, 17, 65, 200])), x_BV.shape[1])
    x_BV = x_BV + np.float32(0)  # -0.0 is less than 0.0 to top_k
    values, indices = topk.top_in_chunks(jnp.asarray(x_BV), k)
    expected, places = jax.lax.top_k(jnp.asarray(x_BV), k)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(indices, places)


@pytest.mark.parametrize(
    ("row", "wide"),
    [
        (config.SamplingConfig(), False),
        (config.SamplingConfig(top_k=64), False),
        (config.SamplingConfig(top_k=65), True),
        (config.SamplingConfig(top_k=0), True),
        (config.SamplingConfig(top_k=2**40), True),
        (config.SamplingConfig(top_k=0, temperature=0.0), False),
        (config.SamplingConfig(top_k=0, temperature=1e-45), False),
        (config.SamplingConfig(min_p=0.1), False),
        (config.SamplingConfig(top_k=0, min_p=0.1), True),
        (config.SamplingConfig(no_repeat_ngram=2), True),
    ],
)
def test_settings_determine_whether_the_full_vocabulary_is_needed(row: config.SamplingConfig, wide: bool) -> None:
    assert topk.plan_for(5000, "gpu").needs_full_vocab(row) is wide
    repeats = row.no_repeat_ngram > 0
    assert topk.plan_for(60, "gpu").needs_full_vocab(row) is repeats, "64 candidates cover the whole vocabulary"
