"""Tests of batched prefill: the number of programs, and independence of the other prompts."""

import functools
from collections.abc import Sequence

import fakes
import hypothesis
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import executables, requests, scheduler

WIDTH = 6  # prompts per batch in the bucket of length 8; the bucket of length 11 has 5


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Number of contexts and of rows of each call of ``Executables.prefill``."""
    found: list[tuple[int, int]] = []
    prefill = executables.Executables.prefill

    def spy(self: executables.Executables, contexts: Sequence[tuple[int, ...]], rows: int) -> object:
        found.append((len(contexts), rows))
        return prefill(self, contexts, rows)

    monkeypatch.setattr(executables.Executables, "prefill", spy)
    return found


def run(width: int, requested: list[requests.Request]) -> None:
    for _ in fakes.make_scheduler(batch_size=width).run(requested):
        pass


def make_requests(lengths: Sequence[int], samples: int = 1) -> list[requests.Request]:
    """Returns requests for the samples of each of several distinct prompts, prompt by prompt."""
    return [
        fakes.request(tuple((7 * n + k) % 150 for k in range(length)), num_tokens=2, sample=sample)
        for n, length in enumerate(lengths)
        for sample in range(samples)
    ]


@pytest.mark.parametrize(
    ("width", "requested", "expected"),
    [
        (1, make_requests([3, 4, 9]), [(1, 1)] * 3),
        (1, make_requests([3, 4], samples=3), [(1, 1)] * 2),
        pytest.param(WIDTH, make_requests([3, 4, 5]), [(3, 6)], marks=pytest.mark.slow),
        (WIDTH, make_requests([2 + n % 7 for n in range(14)]), [(6, 6), (6, 6), (2, 6)]),
        (WIDTH, make_requests([3, 10] * 6), [(6, 6), (5, 5), (1, 5)]),
        pytest.param(WIDTH, make_requests([4, 20, 11, 30, 10, 2]), [(2, 6), (4, 5)], marks=pytest.mark.slow),
        (WIDTH, make_requests([3, 4, 5], samples=4), [(3, 6)]),
        (WIDTH, make_requests([3], samples=100), [(1, 6)]),
        (WIDTH, [fakes.request((5,), num_tokens=0), *make_requests([3, 4])], [(2, 6)]),
        (1, [fakes.request((5, 6, last), num_tokens=2) for last in (7, 8)], [(1, 1)]),
        (WIDTH, [fakes.request((5,), num_tokens=2), *make_requests([3, 4])], [(3, 6)]),
        pytest.param(16, make_requests([3] * 16), [(8, 8)] * 2, marks=pytest.mark.slow),
    ],
)
def test_prompts_of_one_bucket_are_prefilled_once_in_one_batch(
    width: int, requested: list[requests.Request], expected: list[tuple[int, int]], prefills: list[tuple[int, int]]
) -> None:
    """The batch size depends on the width and the bucket, not on the number of waiting prompts."""
    run(width, requested)
    assert sorted(prefills) == sorted(expected)


@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_prompt_of_one_token_is_not_prefilled(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first decode step processes it, and does not attend to the cache of the slot's previous request."""
    source, one = fakes.make_scheduler(batch_size=width), fakes.request((5,), num_tokens=9)
    after_others = fakes.tokens_of(source, [*make_requests([9] * width), one])[-1]
    run, names = executables.Executables.run, []
    monkeypatch.setattr(
        executables.Executables, "run", lambda self, *args: names.append(args[0].name) or run(self, *args)
    )
    assert fakes.tokens_of(source, [one]) == [after_others]
    assert "decode" in names
    assert "prefill" not in names


@functools.cache
def alone(ids: tuple[int, ...]) -> list[bytes]:
    """Returns the statistics of each token sampled after a prompt that is run alone."""
    return numbers(fakes.make_scheduler(batch_size=WIDTH), [fakes.request(ids, num_tokens=3)])[0]


def numbers(source: scheduler.Scheduler, requested: list[requests.Request]) -> list[list[bytes]]:
    found: list[list[bytes]] = [[] for _ in requested]
    for event in source.run(requested, measure=True):
        if event.stats is not None:
            found[event.index].append(fakes.stats_bytes(event.stats))
    return found


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=40)
@hypothesis.given(st.lists(st.lists(st.integers(0, 149), min_size=1, max_size=13).map(tuple), min_size=1, max_size=14))
def test_other_prompts_do_not_change_a_bit_of_the_output(prompts: list[tuple[int, ...]]) -> None:
    requested = [fakes.request(ids, num_tokens=3) for ids in prompts]
    assert numbers(fakes.make_scheduler(batch_size=WIDTH), requested) == [alone(ids) for ids in prompts]


def test_the_clock_of_a_sequence_starts_when_it_is_scheduled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    decode = config.DecodingConfig(window=11, batch_size=2)
    source = scheduler.Scheduler(fakes.MODEL, fakes.random_params(fakes.MODEL), decode)
    outputs = source.run(make_requests([3] * 5))
    take = requests.Sequence.start
    monkeypatch.setattr(requests.Sequence, "start", lambda self: started.append(self.index) or take(self))
    next(outputs)
    assert sorted(started) == [0, 0, 1, 1, 2, 3, 4], "started when read ahead, and again when scheduled"
    list(outputs)
    assert sorted(started) == sorted([*range(5)] * 2)
