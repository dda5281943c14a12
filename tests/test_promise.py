"""Tests of the reproducibility promise, clause by clause: a token depends on its documented inputs only."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import engine, requests, scheduler

pytestmark = pytest.mark.gpu

# Width, window stride and dtype. Prompts of up to 14 tokens cover both buckets and exceed the window of 11.
SHAPES: list[Any] = [
    (1, 1, "float32"),
    pytest.param(3, 1, "float32", marks=pytest.mark.slow),
    (3, 4, "float32"),
    pytest.param(3, 4, "bfloat16", marks=pytest.mark.slow),
]
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SETTINGS = fakes.examples(25)


def scheduler_of(width: int, stride: int, dtype: str = "float32") -> scheduler.Scheduler:
    others: dict[str, Any] = {"batch_size": width} if width > 1 else {}
    if stride > 1:
        others |= {"window": 11, "window_stride": stride}
    return fakes.make_scheduler(**others, **({"dtype": dtype} if dtype != "float32" else {}))


@functools.cache
def alone(width: int, stride: int, request: requests.Request, dtype: str = "float32") -> list[int]:
    """Returns the tokens of a request that is run alone."""
    return fakes.tokens_of(scheduler_of(width, stride, dtype), [request])[0]


def any_request() -> st.SearchStrategy[requests.Request]:
    return st.builds(
        fakes.request,
        st.integers(1, 14).map(fakes.prompt),
        sample=st.integers(0, 3),
        num_tokens=st.integers(0, 25),
        seed=st.sampled_from([0, 1, 2**32 - 1]),
        eos_id=st.sampled_from([-1, *range(0, 150, 10)]),
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_k=st.sampled_from([0, 5, 140]),
        top_p=st.sampled_from([0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.1]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        penalty_scope=st.sampled_from(["all", "output"]),
        no_repeat_ngram=st.sampled_from([0, 2]),
        ban=st.sampled_from([(), (126,)]),
    )


def longer(request: requests.Request, more: int) -> requests.Request:
    generation = dataclasses.replace(request.generation, num_tokens=request.generation.num_tokens + more)
    return dataclasses.replace(request, generation=generation)


@pytest.mark.parametrize(("width", "stride", "dtype"), SHAPES)
@SETTINGS
@hypothesis.given(st.lists(any_request(), min_size=1, max_size=7), st.randoms())
def test_a_sample_is_independent_of_the_batch_and_its_order(
    width: int, stride: int, dtype: str, requested: list[requests.Request], random: Any
) -> None:
    requested = [*requested, random.choice(requested)]
    random.shuffle(requested)
    sampled = fakes.tokens_of(scheduler_of(width, stride, dtype), requested)
    assert sampled == [alone(width, stride, one, dtype) for one in requested]


@pytest.mark.parametrize(("width", "stride", "dtype"), SHAPES)
@SETTINGS
@hypothesis.given(any_request(), st.integers(0, 40))
def test_a_longer_run_starts_with_the_tokens_of_a_shorter_run(
    width: int, stride: int, dtype: str, request_: requests.Request, more: int
) -> None:
    short = alone(width, stride, request_, dtype)
    longest = alone(width, stride, longer(request_, more), dtype)
    assert longest[: len(short)] == short
    assert len(longest) == len(short) or len(short) == request_.generation.num_tokens


def test_samples_differ_by_prompt_seed_and_index() -> None:
    """A token depends on prompt, seed and index; 12 tokens agree by chance less than once in a million."""
    free: dict[str, Any] = {"num_tokens": 12, **NEUTRAL}
    prompts = [fakes.prompt(20), (0, *fakes.prompt(20)[1:])]
    assert prompts[0][-11:] == prompts[1][-11:], "the prompts differ only before the window"
    sampled = [
        tuple(alone(1, 1, fakes.request(prompt, seed=seed, sample=sample, **free)))
        for prompt in prompts
        for seed in (0, 1)
        for sample in (0, 1)
    ]
    assert len(set(sampled)) == 8


@pytest.mark.parametrize(("width", "stride", "dtype"), SHAPES)
def test_streams_may_be_interleaved_and_abandoned(width: int, stride: int, dtype: str) -> None:
    """Interleaves two streams of one scheduler, while a third is left unfinished."""
    source = scheduler_of(width, stride, dtype)
    groups = [[fakes.request(fakes.prompt(n + k), num_tokens=20, sample=n) for k in range(width)] for n in (2, 8)]
    left = source.run(groups[0])
    next(left)
    streams = [source.run(group) for group in groups]
    sampled: list[list[list[int]]] = [[[] for _ in group] for group in groups]
    for turn in zip(*streams, strict=True):
        for group, event in zip(sampled, turn, strict=True):
            if event.token is not None:
                group[event.index].append(event.token)
    assert sampled == [[alone(width, stride, one, dtype) for one in group] for group in groups]


def test_tokens_are_yielded_as_they_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a token is yielded, at most the next one has been dispatched."""
    source, steps = scheduler_of(1, 1), []
    step = engine.Engine.decode
    monkeypatch.setattr(engine.Engine, "decode", lambda *args: steps.append(1) or step(*args))
    for sampled, event in enumerate(source.run([fakes.request(num_tokens=30)])):
        assert len(steps) <= (sampled + 2 if sampled else 1)
        assert event.token is not None or sampled == 30


@pytest.mark.slow
def test_a_new_scheduler_gives_the_same_tokens_and_compiles_only_once() -> None:
    """A first batch from copied parameters covers both buckets and the sliding window.

    Later tokens, slides, prompts, seeds, samples, settings and partial batches compile nothing.
    """
    params = jax.tree.map(np.copy, fakes.random_params(fakes.MODEL))
    fresh = scheduler.Scheduler(fakes.MODEL, params, config.DecodingConfig(window=11, batch_size=3))
    first = [fakes.request(fakes.prompt(n), num_tokens=10) for n in (3, 10, 4)]
    sampled = fakes.tokens_of(fresh, first)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0, "seed": 5},
        {"top_k": 0, "sample": 2},
        {"top_p": 0.5, "eos_id": 3},
        {"repetition_penalty": 2.0, "num_tokens": 30},
        {"top_k": 2**31},
        {"min_p": 0.1, "presence_penalty": 0.5, "no_repeat_ngram": 2, "logit_bias": {3: 1.5}, "ban": (126,)},
    ]
    others = [
        fakes.request(fakes.prompt(length + k), **settings[length % len(settings)])
        for length in (1, 2, 5, 8, 9, 10, 11, 14, 40)
        for k in range(4)
    ]
    with fakes.compilations() as compiled:
        sampled += fakes.tokens_of(fresh, others)
    assert compiled == []
    assert sampled == [alone(3, 1, one) for one in [*first, *others]]


# Literal ids, obtained with JAX 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.13) on CPU. They must never change.
# The weights come from NumPy. Every lead and every cut is above 1.7e-4, so rounding cannot change a token.
GOLDEN: list[tuple[dict[str, Any], list[int]]] = [
    (
        {"prompt_ids": (1, 2, 3)},
        [66, 132, 75, 46, 68, 93, 130, 130, 87, 46, 124, 56, 144, 127, 30, 126, 75, 126, 132, 126, 126, 122, 45, 90],
    ),
    (
        {"prompt_ids": (1, 2, 3), "sample": 1},
        [11, 122, 49, 127, 127, 79, 130, 126, 79, 126, 21, 75, 80, 80, 45, 25, 132, 75, 46, 108, 62, 130, 43, 11],
    ),
    (
        {"prompt_ids": (0, 149), "seed": 2**32 - 1, "sample": 22, **NEUTRAL},
        [65, 75, 136, 132, 75, 75, 75, 114, 43, 127, 126, 75, 45, 17, 130, 79, 47, 49, 54, 136, 132, 68, 46, 126],
    ),
    (
        {"prompt_ids": (126, 92, 126, 56, 125, 65, 22, 59, 40), **NEUTRAL, "temperature": 0.0},
        [42, 46, 46, 126, 101, 126, 75, 130, 107, 126, 75, 46, 126, 136, 107, 31, 28, 62, 107, 79, 132, 122, 127, 75],
    ),
    (
        {
            "prompt_ids": (107, 88, 12, 71, 102, 138, 61, 109, 25, 32, 4, 138, 138, 0),
            **{"seed": 1, "temperature": 0.7, "top_k": 140, "top_p": 0.95, "repetition_penalty": 1.3},
        },
        [114, 126, 75, 99, 126, 73, 1, 46, 18, 130, 107, 83, 73, 127, 132, 126, 73, 110, 126, 94, 149, 1, 1, 20],
    ),
    (
        {
            "prompt_ids": (5, 6, 7, 8),
            **{"seed": 3, "eos_id": 21, "min_tokens": 20, **NEUTRAL, "temperature": 1.5, "min_p": 0.05},
            **{"penalty_scope": "output", "frequency_penalty": 0.5, "presence_penalty": 0.25, "no_repeat_ngram": 2},
            **{"logit_bias": {7: 2.0, 126: -1.0}, "ban": (79,)},
        },
        [145, 124, 124, 5, 32, 78, 116, 1, 11, 47, 66, 75, 37, 105, 98, 83, 1, 52, 132, 74, 93, 10, 112, 7],
    ),
]


@pytest.mark.parametrize("width", [1, 3])
def test_golden_tokens(width: int) -> None:
    requested = [fakes.request(**{"num_tokens": 24, **arguments}) for arguments, _ in GOLDEN]
    assert fakes.tokens_of(scheduler_of(width, 1), requested) == [tokens for _, tokens in GOLDEN]


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [
        {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_NUM_CPU_DEVICES": "1"},
        {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
    ],
)
@pytest.mark.parametrize("platform", [None, "gpu"])
def test_another_process_gives_the_same_tokens_whatever_jax_settings_its_environment_has(
    platform: str | None, own: dict[str, str]
) -> None:
    lengths = (6, 2, 9)
    program = (
        f"import fakes, json; requested = [fakes.request(fakes.prompt(n), num_tokens=20, seed=n) for n in {lengths}];"
        "print(json.dumps(fakes.tokens_of(fakes.make_scheduler(" + repr(platform) + "), requested)))"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **own, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    requested = [fakes.request(fakes.prompt(n), num_tokens=20, seed=n) for n in lengths]
    assert json.loads(done.stdout) == [alone(1, 1, one) for one in requested]
