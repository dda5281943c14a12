"""Prompts that are prefilled together: how many programs run, and that other prompts change no bit."""

import functools
from collections.abc import Sequence

import fakes
import hypothesis
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import executables, requests, scheduler

WIDTH = 6  # rows of a bucket of 8; one of 11 has 5


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Contexts and rows of each call of ``Executables.prefill``."""
    found: list[tuple[int, int]] = []
    prefill = executables.Executables.prefill

    def spy(self: executables.Executables, contexts: Sequence[tuple[int, ...]], rows: int) -> object:
        found.append((len(contexts), rows))
        return prefill(self, contexts, rows)

    monkeypatch.setattr(executables.Executables, "prefill", spy)
    return found


def run(width: int, asked: list[requests.Request]) -> None:
    for _ in fakes.make_scheduler(width=width).run(asked):
        pass


def asked_for(lengths: Sequence[int], samples: int = 1) -> list[requests.Request]:
    """Requests for the samples of one prompt after another, each prompt other than the ones before."""
    return [
        fakes.request(tuple((7 * n + k) % 150 for k in range(length)), num_tokens=2, sample=sample)
        for n, length in enumerate(lengths)
        for sample in range(samples)
    ]


@pytest.mark.parametrize(
    ("width", "asked", "expected"),
    [
        (1, asked_for([3, 4, 9]), [(1, 1)] * 3),
        (1, asked_for([3, 4], samples=3), [(1, 1)] * 2),
        pytest.param(WIDTH, asked_for([3, 4, 5]), [(3, 6)], marks=pytest.mark.slow),
        (WIDTH, asked_for([2 + n % 7 for n in range(14)]), [(6, 6), (6, 6), (2, 6)]),
        (WIDTH, asked_for([3, 10] * 6), [(6, 6), (5, 5), (1, 5)]),
        pytest.param(WIDTH, asked_for([4, 20, 11, 30, 10, 2]), [(2, 6), (4, 5)], marks=pytest.mark.slow),
        (WIDTH, asked_for([3, 4, 5], samples=4), [(3, 6)]),
        (WIDTH, asked_for([3], samples=100), [(1, 6)]),
        (WIDTH, [fakes.request((5,), num_tokens=0), *asked_for([3, 4])], [(2, 6)]),
        (1, [fakes.request((5, 6, last), num_tokens=2) for last in (7, 8)], [(1, 1)]),
        (WIDTH, [fakes.request((5,), num_tokens=2), *asked_for([3, 4])], [(3, 6)]),
        pytest.param(16, asked_for([3] * 16), [(8, 8)] * 2, marks=pytest.mark.slow),
    ],
)
def test_prompts_of_one_bucket_are_read_together_and_once(
    width: int, asked: list[requests.Request], expected: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    """The rows of a program follow from the width and the bucket, however many prompts are at hand."""
    run(width, asked)
    assert sorted(reads) == sorted(expected)


@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_prompt_of_one_token_is_not_read(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step takes it in; of what an earlier sample left in the row nothing is seen."""
    source, one = fakes.make_scheduler(width=width), fakes.request((5,), num_tokens=9)
    after_others = fakes.tokens_of(source, [*asked_for([9] * width), one])[-1]
    run, names = executables.Executables.run, []
    monkeypatch.setattr(
        executables.Executables, "run", lambda self, *args: names.append(args[0].name) or run(self, *args)
    )
    assert fakes.tokens_of(source, [one]) == [after_others]
    assert "decode" in names
    assert "prefill" not in names


@functools.cache
def alone(ids: tuple[int, ...]) -> list[bytes]:
    """The numbers of each token drawn after a prompt that is the only one of its run."""
    return numbers(fakes.make_scheduler(width=WIDTH), [fakes.request(ids, num_tokens=3)])[0]


def numbers(source: scheduler.Scheduler, asked: list[requests.Request]) -> list[list[bytes]]:
    found: list[list[bytes]] = [[] for _ in asked]
    for event in source.run(asked, measure=True):
        if event.stats is not None:
            found[event.index].append(fakes.stats_bytes(event.stats))
    return found


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=40)
@hypothesis.given(st.lists(st.lists(st.integers(0, 149), min_size=1, max_size=13).map(tuple), min_size=1, max_size=14))
def test_no_company_changes_a_bit_of_what_follows_a_prompt(prompts: list[tuple[int, ...]]) -> None:
    asked = [fakes.request(ids, num_tokens=3) for ids in prompts]
    assert numbers(fakes.make_scheduler(width=WIDTH), asked) == [alone(ids) for ids in prompts]


def test_a_sequence_starts_its_clock_when_its_turn_comes_and_not_when_it_is_read_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    decode = config.DecodingConfig(window=11, width=2)
    source = scheduler.Scheduler(fakes.MODEL, fakes.random_params(fakes.MODEL), decode)
    outputs = source.run(asked_for([3] * 5))
    take = requests.Sequence.start
    monkeypatch.setattr(requests.Sequence, "start", lambda self: started.append(self.index) or take(self))
    next(outputs)
    assert sorted(started) == [0, 0, 1, 1, 2, 3, 4], "read ahead, and two of them scheduled"
    list(outputs)
    assert sorted(started) == sorted([*range(5)] * 2)
