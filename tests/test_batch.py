"""The programs that suit a GPU, run on a CPU: they draw what those for a CPU draw, several tokens at a time."""

import dataclasses
import itertools
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
from hipgpt_jax.generation import batch, candidates, events, programs, sampler

# Settings that 64 candidates suffice for, and that need more of the 150.
NARROW: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.0}, {"top_k": 40, "repetition_penalty": 1.3}, {"eos_id": 7})
WIDE: tuple[dict[str, Any], ...] = ({"top_k": 0, "top_p": 1.0}, {"top_k": 100}, {"top_k": 0, "top_p": 0.7, "eos_id": 7})


def requests(*settings: dict[str, Any], count: int = 8) -> list[events.Request]:
    """Returns requests of one token up to more than the window and several programs hold, their settings by turns."""
    cycle = itertools.cycle(settings)
    return [
        fakes.request(fakes.prompt(n % 7 + 1), num_tokens=n * 5 % 23 + 1, sample=n, **next(cycle)) for n in range(count)
    ]


def described(engine: sampler.Sampler, asked: list[events.Request]) -> list[tuple[Any, ...]]:
    """Returns what is told of each sample's tokens, in order; numbers to what rounding allows."""
    told = []
    for event in sorted(engine.run(asked, measure=True), key=lambda event: event.index):
        assert event.facts is not None
        numbers = tuple(np.round(event.facts.numbers_4, 3).tolist())
        top = event.facts.top[0].tolist() if asked[event.index].generation.top_logprobs else []
        told.append((event.index, event.token, event.finish_reason, numbers, top))
    return told


@pytest.mark.slow
@pytest.mark.parametrize(("width", "stride"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_programs_for_a_gpu_draw_what_those_for_a_cpu_draw(width: int, stride: int) -> None:
    """Tokens, ends and facts; within the window and beyond it, whatever the settings, and in mixed company."""
    on_gpu, on_cpu = (fakes.make_sampler(platform, width=width, window_stride=stride) for platform in ("gpu", "cpu"))
    asked = requests(*NARROW, *WIDE, count=14)
    asked[1] = dataclasses.replace(asked[1], generation=dataclasses.replace(asked[1].generation, top_logprobs=3))
    assert described(on_gpu, asked) == described(on_cpu, asked)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_row_is_the_same_in_any_company_and_settings_compile_nothing() -> None:
    """Rows whose settings need more candidates than others' are taken on by a program of their own."""
    engine = fakes.make_sampler("gpu", width=3, window_stride=3)
    fakes.tokens_of(engine, [fakes.request(num_tokens=30)])
    asked = requests(*NARROW, *WIDE)
    with fakes.compilations() as compiled:
        together = fakes.tokens_of(engine, asked)
        alone = [fakes.tokens_of(engine, [one])[0] for one in asked]
    assert together == alone
    assert set(compiled) <= {"jit(fill)", "jit(_enter)"}, "of another bucket of prompts"


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each program draws of the first row from now on."""
    drawn: list[int] = []
    step = batch.Batch.step

    def spy(self: batch.Batch, *args: Any) -> list[batch.Drawn]:
        found = step(self, *args)
        drawn.extend(each.counts[0] for each in found)
        return found

    monkeypatch.setattr(batch.Batch, "step", spy)
    return drawn


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("platform", "expected"),
    [pytest.param("gpu", [8, 3, 1, 1], marks=pytest.mark.slow), ("cpu", [1, 3, 4, 3, 1, 1])],
)
def test_a_program_draws_several_tokens_and_stops_a_row_at_its_last(
    platform: str, expected: list[int], counts: list[int]
) -> None:
    """11 tokens of a prompt of one fill the window, or parts of 4, 4 and 3; then one is drawn at a time."""
    fakes.tokens_of(fakes.make_sampler(platform), [fakes.request((5,), num_tokens=13)])
    assert counts == expected


def test_a_large_model_on_a_cpu_draws_one_token_by_a_program(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [fakes.request((5,), num_tokens=13)]
    tokens = fakes.tokens_of(fakes.make_sampler("cpu"), asked)
    counts.clear()
    monkeypatch.setattr(programs, "_MOST_WEIGHTS", 1)
    decode = config.DecodingConfig(window=11)
    large = sampler.Sampler(fakes.MODEL, fakes.random_params(fakes.MODEL), decode, platform="cpu")
    assert fakes.tokens_of(large, asked) == tokens
    assert counts == [1] * 13


def test_no_tokens_are_started_ahead_of_those_that_a_stop_string_may_end(counts: list[int]) -> None:
    engine = fakes.make_sampler("cpu")
    for stop, started in ((), [1, 3, 4]), (("x",), [1, 3]):
        counts.clear()
        asked, heard = fakes.request((5,), num_tokens=13, stop=stop), []
        ends = lambda token, heard=heard: heard.append(token) or len(heard) == 4  # noqa: E731
        happened = engine.run([dataclasses.replace(asked, ends=ends)])
        assert [event.finish_reason for event in happened] == [None, None, None, "stop"]
        assert counts == started


@pytest.mark.gpu
@pytest.mark.slow
def test_nan_ends_a_sample_amid_a_programs_tokens_and_leaves_none_behind() -> None:
    """The row's next sample is what it is elsewhere."""
    params = fakes.random_params(fakes.MODEL)
    broken = jax.tree.map(np.array, params)
    broken["wpe"]["embedding"][8] = np.nan  # beyond what is read of a prompt, padding included
    engine = sampler.Sampler(fakes.MODEL, broken, config.DecodingConfig(), platform="gpu")
    happened = list(engine.run([fakes.request((1, 2, 3, 4), num_tokens=12), fakes.request((1,), num_tokens=3)]))
    assert [event.finish_reason for event in happened] == [*[None] * 5, "error", None, None, "length"]
    whole = sampler.Sampler(fakes.MODEL, params, config.DecodingConfig(), platform="gpu")
    assert [event.token for event in happened[-3:]] == fakes.tokens_of(whole, [fakes.request((1,), num_tokens=3)])[0]


def test_turned_parameters_predict_what_plain_ones_do() -> None:
    """What scores a text takes them from the sampler as they are."""
    tokens_BT = jnp.asarray([fakes.prompt(9)])
    logits = [
        engine.module.bind({"params": engine.params})(tokens_BT, dropout=0.0)
        for engine in (fakes.make_sampler("gpu"), fakes.make_sampler("cpu"))
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
def test_top_in_chunks_is_top_k(x_BV: np.ndarray, data: st.DataObject) -> None:
    """Ties too, which are many among these."""
    k = min(data.draw(st.sampled_from([1, 2, 3, 17, 65, 200])), x_BV.shape[1])
    x_BV = x_BV + np.float32(0)  # -0.0 is less than 0.0 to top_k
    values, indices = candidates.top_in_chunks(jnp.asarray(x_BV), k)
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
    ],
)
def test_settings_say_whether_a_step_on_a_gpu_has_enough_candidates(row: config.SamplingConfig, wide: bool) -> None:
    assert candidates.search_on(5000, "gpu").is_wide(row) is wide
    assert not candidates.search_on(60, "gpu").is_wide(row), "all of them fit"
