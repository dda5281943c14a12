"""Tests of sampling against a slow float64 reference, and golden values of the random bits."""

import math
from typing import Any

import fakes
import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import sampling

# One candidate, fewer than `topk._CPU_BUCKETS`, exactly as many, and more: every branch of `choose` runs.
SIZES = (1, 2, 7, 16, 17, 128, 129, 300)
LAST = 1 - 2**-24
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}

choose = jax.jit(lambda *args: sampling.sample(*args).token_B)


def choices(logits_V: np.ndarray, uniforms: Any, **settings: Any) -> np.ndarray:
    """Chooses from one row of logits for each of some uniform numbers."""
    uniform_B = np.asarray(uniforms, np.float32)
    rows = [config.SamplingConfig(**{**NEUTRAL, **settings})] * len(uniform_B)
    logits_BV = np.tile(logits_V.astype(np.float32), (len(uniform_B), 1))
    return np.asarray(choose(logits_BV, np.zeros_like(logits_BV, bool), sampling.sampling_params(rows), uniform_B))


def acceptable(logits_V: np.ndarray, seen_V: np.ndarray, row: config.SamplingConfig, uniform: float) -> set[int]:
    """Returns the token by the float64 definition, and those that float32 rounding may give instead.

    These are the neighbours within 1e-5 of a boundary. XLA divides by a penalty by multiplying with its
    reciprocal. The last bits of the largest logits then shift the boundaries further, and tokens whose
    penalized logits agree up to those bits may swap ranks.
    """
    logits_V = logits_V.astype(np.float64)
    temperature, top_p, penalty = (float(np.float32(x)) for x in (row.temperature, row.top_p, row.repetition_penalty))
    penalized_V = np.where(seen_V, np.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)
    ids = sorted(range(len(logits_V)), key=lambda i: (-penalized_V[i], i))
    scaled = penalized_V[ids] / (temperature or 1)
    slack = 1e-5 if penalty == 1 else min(1e-2, 1e-5 + 5e-7 * (20 + abs(scaled[0])))
    probs = np.exp(scaled - scaled[0])[: 1 if temperature == 0 else row.top_k or None]
    probs /= probs.sum()
    kept_range = [len(probs)] * 2
    if top_p < 1:
        kept_range = [int(np.searchsorted(probs.cumsum(), top_p + e)) + 1 for e in (-slack, slack)]
    accepted: set[int] = set()
    for kept in range(kept_range[0], min(kept_range[1], len(probs)) + 1):
        shares = probs[:kept].cumsum() / probs[:kept].sum()
        low, high = (int(np.searchsorted(shares, uniform + e, side="right")) for e in (-slack, slack))
        accepted.update(ids[low : min(high, kept - 1) + 1])
    for token in list(accepted):
        near_V = np.abs(penalized_V - penalized_V[token]) <= 1e-6 * np.abs(penalized_V[token])
        if len({(logits_V[i], seen_V[i]) for i in np.flatnonzero(near_V)}) > 1:
            accepted.update(np.flatnonzero(near_V).tolist())
    return accepted


@st.composite
def logits_and_seen(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draws logits with ties, gaps and tails, and a mask of seen tokens."""
    size = draw(st.sampled_from(SIZES))
    if draw(st.booleans()):
        elements = st.floats(-30, 30, width=16, allow_subnormal=False) | st.sampled_from([-1e30, 1e30])
        logits_V = draw(hypothesis.extra.numpy.arrays(np.float32, size, elements=elements, fill=elements))
    else:
        rng = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
        logits_V = rng.normal(0, draw(st.sampled_from([0.01, 1.0, 5.0])), size)
        logits_V = np.round(logits_V, draw(st.sampled_from([0, 1, 6])))
    seen_V = draw(hypothesis.extra.numpy.arrays(bool, size, fill=st.booleans()))
    return logits_V.astype(np.float32) + np.float32(0), seen_V  # + 0 makes -0 a 0, which sorts the same


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    logits_and_seen(),
    st.builds(
        config.SamplingConfig,
        temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 100.0]) | st.floats(0.05, 5),
        top_k=st.sampled_from([0, 1, 2, 5, 127, 128, 129, 10**6, 2**31]) | st.integers(1, 300),
        top_p=st.just(1.0) | st.floats(0.001, 1),
        repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    ),
    st.sampled_from([0.0, LAST]) | st.integers(0, 2**24 - 1).map(lambda word: word * 2**-24),
)
def test_choice_matches_the_definition(
    case: tuple[np.ndarray, np.ndarray], row: config.SamplingConfig, uniform: float
) -> None:
    logits_V, seen_V = case
    chosen = choose(logits_V[None], seen_V[None], sampling.sampling_params([row]), np.asarray([uniform], np.float32))
    assert chosen.dtype == jnp.int32
    assert int(chosen[0]) in acceptable(logits_V, seen_V, row, uniform)


@pytest.mark.parametrize("size", SIZES)
def test_ties_are_broken_by_the_lower_id(size: int) -> None:
    logits_V = np.zeros(size, np.float32)
    logits_V[size // 2 :] = 1
    uniforms = (np.arange(64) / 64).astype(np.float32)
    for top_k in (1, 4):
        kept = np.arange(size // 2, size)[:top_k]
        expected = kept[np.minimum((uniforms * len(kept)).astype(int), len(kept) - 1)]
        if len(kept) == top_k:
            np.testing.assert_array_equal(choices(logits_V, uniforms, top_k=top_k), expected)


def test_zeros_of_both_signs_are_tied() -> None:
    for size in SIZES[1:]:
        logits_V = np.full(size, -1, np.float32)
        logits_V[:2] = -0.0, 0.0
        assert choices(logits_V, [0.0], temperature=0.0) == [0]


@pytest.mark.parametrize("size", SIZES)
def test_temperature_0_is_greedy_whatever_the_other_settings(size: int) -> None:
    rng = np.random.RandomState(size)
    for decimals in (0, 6):
        logits_V = np.round(rng.normal(0, 2, size), decimals)
        for settings in ({}, {"top_k": 5, "top_p": 0.5}, {"top_k": 200}):
            chosen = choices(logits_V, np.arange(64) / 64, temperature=0.0, **settings)
            np.testing.assert_array_equal(chosen, np.argmax(logits_V.astype(np.float32)))
        np.testing.assert_array_equal(choices(logits_V, np.arange(64) / 64, top_k=1), np.argmax(logits_V))


@pytest.mark.parametrize("size", SIZES)
def test_extreme_temperatures_behave_as_their_limits(size: int) -> None:
    rng = np.random.RandomState(size)
    logits_V, uniforms = rng.permutation(size) - size / 2, np.append(rng.randint(0, 2**24, 63) * 2**-24, LAST)
    for tiny in (1e-40, 1e-37, 1e-30, 1e-6):
        assert set(choices(logits_V, uniforms, temperature=tiny)) == {np.argmax(logits_V)}
    by_rank = np.argsort(-logits_V)
    for huge in (1e12, 3e38):
        np.testing.assert_array_equal(
            choices(logits_V, uniforms, temperature=huge), by_rank[(uniforms * size).astype(int)]
        )
    overflowing_V = np.append(logits_V[1:] * 1e36, 3e38)
    assert set(choices(overflowing_V, uniforms, temperature=1e-3)) == {size - 1}


@pytest.mark.parametrize("temperature", [3.5e38, 1e39, 1e308])
def test_a_temperature_beyond_float32_samples_uniformly(temperature: float) -> None:
    """The conversion to float32 must not emit NumPy's overflow warning, which pytest turns into an error."""
    row = sampling.sampling_params(
        [config.SamplingConfig(temperature=temperature, top_k=4, top_p=1, repetition_penalty=1)]
    )
    logits = jnp.array([[0.0, 30.0, 10.0, 20.0, -5.0]])
    seen = jnp.zeros(logits.shape, bool)
    sampled = [
        int(sampling.sample(logits, seen, row, jnp.array([u], jnp.float32)).token_B[0]) for u in (0.1, 0.3, 0.6, 0.9)
    ]
    assert sampled == [1, 3, 2, 0]


def test_penalty_changes_only_the_logits_of_seen_tokens() -> None:
    logits_BV = np.random.RandomState(0).normal(0, 5, (2, 300)).astype(np.float32)
    seen_BV = np.random.RandomState(1).randint(0, 2, (2, 300)).astype(bool)
    penalty_B = np.asarray([1.3, 0.7], np.float32)
    expected_BV = np.where(logits_BV > 0, logits_BV / penalty_B[:, None], logits_BV * penalty_B[:, None])
    got_BV = np.asarray(jax.jit(sampling.penalize)(logits_BV, seen_BV, penalty_B))
    np.testing.assert_array_max_ulp(got_BV[seen_BV], expected_BV[seen_BV], maxulp=1)
    np.testing.assert_array_equal(got_BV[~seen_BV], logits_BV[~seen_BV])


def test_neutral_penalty_and_temperature_change_no_bit() -> None:
    logits_BV = np.random.RandomState(0).normal(0, 5, (1, 300)).astype(np.float32)
    logits_BV[0, :6] = 0.0, -0.0, 3e38, -3e38, 1.2e-38, -np.inf
    for seen in (False, True):
        same_BV = jax.jit(sampling.penalize)(logits_BV, np.full((1, 300), seen), np.ones(1, np.float32))
        np.testing.assert_array_equal(np.asarray(same_BV).view(np.int32), logits_BV.view(np.int32))
    small_BV = np.where(np.abs(logits_BV) < 1e30, logits_BV, 0)
    scaled_BV = np.asarray(jax.jit(sampling.scale)(small_BV, np.ones(1, np.float32)))
    np.testing.assert_array_equal(scaled_BV, small_BV - small_BV.max())


@pytest.mark.parametrize("size", SIZES)
def test_top_k_of_0_and_above_the_vocabulary_keep_all_tokens(size: int) -> None:
    logits_V, uniforms = np.random.RandomState(size).normal(size=size), np.append(np.arange(63) / 63, LAST)
    expected = choices(logits_V, uniforms, top_k=0)
    for top_k in (size, size + 1, 2**31 - 1, 2**31, 2**40):
        np.testing.assert_array_equal(choices(logits_V, uniforms, top_k=top_k), expected)


def test_top_p_1_keeps_a_tail_below_float32_resolution() -> None:
    cumulative_BK = np.asarray([[1, 1, 1, 1], [1, 1 + 2**-20, 1 + 2**-19, 1 + 2**-19]], np.float32)
    count = jax.jit(sampling.num_top_p)
    np.testing.assert_array_equal(count(cumulative_BK, np.asarray([4, 3]), np.ones(2, np.float32)), [4, 3])
    almost_B = np.full(2, 1 - 2**-24, np.float32)
    np.testing.assert_array_equal(count(cumulative_BK, np.asarray([4, 3]), almost_B), [1, 3])
    tail_V = np.full(300, -16.0)
    tail_V[0] = 0
    assert choices(tail_V, [LAST]) == [299]
    assert choices(tail_V, [LAST], top_p=0.9999) == [0]


def test_sampled_frequencies_match_the_softmax() -> None:
    """Pearson's statistic of 20,000 draws stays below a bound that chance exceeds once in a million."""
    n, logits_V = 20_000, np.linspace(1.5, -1.5, 12)[np.random.RandomState(0).permutation(12)]
    key = sampling.sample_key(sampling.seed_words(3, (1, 2), 0))
    uniform_B = np.asarray(jax.jit(jax.vmap(sampling.uniform, (None, 0)))(key, jnp.arange(n)))
    assert np.all((uniform_B >= 0) & (uniform_B < 1))
    np.testing.assert_array_equal(uniform_B * 2.0**24 % 1, 0)
    assert np.all(np.bincount((uniform_B * 16).astype(int)) > n / 16 - 5 * math.sqrt(n / 16))
    for settings, bound in (({}, 50), ({"temperature": 0.5, "top_k": 8}, 43), ({"top_p": 0.5}, 40)):
        counts_V = np.bincount(choices(logits_V, uniform_B, **settings), minlength=12)
        weights_V = np.exp((logits_V - logits_V.max()) / settings.get("temperature", 1.0))
        order = np.argsort(-weights_V)[: settings.get("top_k", 12)]
        if top_p := settings.get("top_p"):
            order = order[: 1 + np.searchsorted(np.cumsum(weights_V[order]) / weights_V.sum(), top_p)]
        expected = n * weights_V[order] / weights_V[order].sum()
        assert counts_V[order].sum() == n
        assert ((counts_V[order] - expected) ** 2 / expected).sum() < bound


FAST = ({"top_k": 5}, {"temperature": 0.0}, {"top_k": 128, "top_p": 0.9}, {"top_k": 40, "temperature": 0.7})
SLOW = ({"top_k": 0}, {"top_k": 129, "top_p": 0.95}, {"top_k": 0, "top_p": 0.5}, {"temperature": 2.0})


@pytest.mark.parametrize("own", [*FAST, *SLOW])
def test_choice_is_independent_of_other_slots(own: dict[str, Any]) -> None:
    """Includes uniform numbers on the boundaries, where a difference of one bit changes the token."""
    rng, width, V = np.random.RandomState(0), 4, 300
    logits_V = rng.normal(0, 3, V).astype(np.float32)
    seen_BV = rng.randint(0, 2, (width, V)).astype(bool)
    probs = np.exp(np.sort(logits_V)[::-1].astype(np.float64))[: own.get("top_k") or V]
    boundaries = np.round((probs.cumsum() / probs.sum())[:12] * 2**24)
    uniforms = [*((boundaries[:, None] + [-1, 0, 1]).ravel().clip(0, 2**24 - 1) * 2**-24), *rng.rand(20)]
    for number, uniform in enumerate(np.asarray(uniforms, np.float32)):
        chosen = set()
        for neighbours in ((own,) * width, FAST, SLOW, (*SLOW[:1], *FAST[1:]), (*FAST[:3], *SLOW[:1])):
            row = number % width
            configs = [config.SamplingConfig(**{**NEUTRAL, **settings}) for settings in neighbours]
            configs[row] = config.SamplingConfig(**{**NEUTRAL, **own})
            logits_BV, uniform_B = rng.normal(0, 3, (width, V)).astype(np.float32), rng.rand(width).astype(np.float32)
            logits_BV[row], uniform_B[row] = logits_V, uniform
            chosen.add(int(choose(logits_BV, seen_BV, sampling.sampling_params(configs), uniform_B)[row]))
        assert len(chosen) == 1


def test_settings_do_not_recompile() -> None:
    fresh, rng = jax.jit(lambda *args: sampling.sample(*args).token_B), np.random.RandomState(0)
    counts = []
    for row in ({}, {"temperature": 0.0}, {"top_k": 7}, {"top_k": 2**31}, {"top_p": 0.3}, {"repetition_penalty": 2.0}):
        settings = sampling.sampling_params([config.SamplingConfig(**{**NEUTRAL, **row})])
        logits_BV, uniform_B = rng.normal(size=(1, 300)).astype(np.float32), rng.rand(1).astype(np.float32)
        with fakes.compilations() as compiled:
            fresh(logits_BV, logits_BV > 1, settings, uniform_B)
        counts.append(len(compiled))
    assert counts == [1, 0, 0, 0, 0, 0]


# Literal numbers, obtained with JAX 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12): the key's two words,
# and the uniform numbers of tokens 0, 1, 2 and 1000 in units of 2**-24. They must never change.
GOLDEN: list[tuple[tuple[int, tuple[int, ...], int], list[int], list[int]]] = [
    ((0, (1,), 0), [0xD61A42FF, 0xDF79AB30], [14399590, 6809447, 14813428, 674346]),
    ((0, (1, 2, 3), 0), [0x471897EF, 0x70935D5C], [10825184, 6132892, 3465015, 10483139]),
    ((0, (1, 2, 3), 1), [0xC449685E, 0x0241B60A], [2201857, 11294502, 12184743, 4670209]),
    ((1, (1, 2, 3), 0), [0xD8EE94EB, 0x20A9AC73], [11180284, 9455691, 4978488, 440748]),
    ((2**32 - 1, (50256,) * 3, 7), [0xCF5A4FBE, 0x71B9FD8E], [1543199, 13522961, 9842260, 12266874]),
    ((12345, tuple(range(100)), 2**32 - 1), [0xE0083242, 0xAD8FE13D], [12757122, 4839718, 11514175, 4163750]),
]


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize(("of", "words", "numbers"), GOLDEN)
def test_golden_keys_and_uniform_numbers_under_any_jax_setting(
    of: tuple[int, tuple[int, ...], int], words: list[int], numbers: list[int], impl: str, partitionable: bool
) -> None:
    with jax.threefry_partitionable(partitionable), jax.default_prng_impl(impl):
        key = sampling.sample_key(sampling.seed_words(*of))
        assert jax.random.key_data(key).tolist() == words
        assert [float(sampling.uniform(key, jnp.asarray(t))) * 2**24 for t in (0, 1, 2, 1000)] == numbers
