"""Prompts read together: how many programs run, and that no company changes a bit of what is read."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import fakes
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import events, programs, sampler, waiting

WIDTH = 6  # rows of a bucket of 8; one of 11 has 5


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Contexts and rows of each program that read some."""
    found: list[tuple[int, int]] = []
    read = programs.Programs.read_contexts

    def spy(self: programs.Programs, contexts: Sequence[tuple[int, ...]], rows: int) -> object:
        found.append((len(contexts), rows))
        return read(self, contexts, rows)

    monkeypatch.setattr(programs.Programs, "read_contexts", spy)
    return found


def run(width: int, asked: list[events.Request]) -> None:
    for _ in fakes.make_sampler(width=width).run(asked):
        pass


def asked_for(lengths: Sequence[int], samples: int = 1) -> list[events.Request]:
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
    width: int, asked: list[events.Request], expected: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    """The rows of a program follow from the width and the bucket, however many prompts are at hand."""
    run(width, asked)
    assert sorted(reads) == sorted(expected)


@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_prompt_of_one_token_is_not_read(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step takes it in; of what an earlier sample left in the row nothing is seen."""
    engine, one = fakes.make_sampler(width=width), fakes.request((5,), num_tokens=9)
    after_others = fakes.tokens_of(engine, [*asked_for([9] * width), one])[-1]
    monkeypatch.setattr(engine._programs, "fill", None)
    assert fakes.tokens_of(engine, [one]) == [after_others]


@functools.cache
def alone(ids: tuple[int, ...]) -> list[bytes]:
    """The numbers of each token drawn after a prompt that is the only one of its run."""
    return numbers(fakes.make_sampler(width=WIDTH), [fakes.request(ids, num_tokens=3)])[0]


def numbers(engine: sampler.Sampler, asked: list[events.Request]) -> list[list[bytes]]:
    found: list[list[bytes]] = [[] for _ in asked]
    for event in engine.run(asked, measure=True):
        if event.facts is not None:
            found[event.index].append(np.asarray(event.facts.numbers_4).tobytes())
    return found


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=40)
@hypothesis.given(st.lists(st.lists(st.integers(0, 149), min_size=1, max_size=13).map(tuple), min_size=1, max_size=14))
def test_no_company_changes_a_bit_of_what_follows_a_prompt(prompts: list[tuple[int, ...]]) -> None:
    asked = [fakes.request(ids, num_tokens=3) for ids in prompts]
    assert numbers(fakes.make_sampler(width=WIDTH), asked) == [alone(ids) for ids in prompts]


def test_samples_keep_their_order_and_their_groups() -> None:
    """Prompts of two buckets in turn: each sample keeps its group until it has its row."""
    engine = fakes.make_sampler(width=WIDTH)
    samples = (
        waiting.Sample(n, one, 2, one.prompt_ids) for n, one in enumerate(asked_for([3, 10, 4, 11, 5, 11, 6, 7, 8, 2]))
    )
    queue = waiting.Queue(engine._programs, samples)
    taken = list(itertools.takewhile(bool, iter(queue.take, None)))
    assert [sample.index for sample, _ in taken] == list(range(10))
    groups = [group for _, group in taken]
    assert groups[0] is groups[2] is groups[4] is groups[6] is groups[7] is groups[8] is not groups[9]
    assert groups[1] is groups[3] is groups[5]
    assert queue.take() is None
    assert all(group is not None and sample.context in group.row_of for sample, group in taken)


def test_a_sample_begins_when_its_turn_comes_and_not_when_it_is_taken_ahead() -> None:
    begun: list[int] = []
    asked = [
        dataclasses.replace(one, begins=functools.partial(begun.append, n)) for n, one in enumerate(asked_for([3] * 5))
    ]
    happened = sampler.Sampler(
        fakes.MODEL, fakes.random_params(fakes.MODEL), config.DecodingConfig(window=11, width=2)
    ).run(asked)
    next(happened)
    assert begun == [0, 1]
    list(happened)
    assert begun == [0, 1, 2, 3, 4]
