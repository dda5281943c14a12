"""Tests of the draw: random bits, and the chosen tokens against the float64 definition."""

import functools
import hashlib
import math
from typing import Any

import definition
import fakes
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import neutral
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import sampling, topk

# Fewer candidates than the first of `topk._CPU_BUCKETS`, and more than the last: every branch of `sample` runs.
SIZES = (7, 300)


@functools.partial(jax.jit, static_argnames="plan")
def sample(*arguments: Any, plan: topk.Plan | None = None) -> sampling.Choice:
    logits_BV, counts_BV, params, key_B2, index_B = arguments
    return sampling.sample(logits_BV + params.bias_BV, counts_BV, params, key_B2, index_B, plan)


noise = jax.jit(sampling.noise)


def key_of(seed: int) -> np.ndarray:
    return sampling.sample_key(seed, (1,), 0)


def choose(
    logits_V: np.ndarray, settings: config.SamplingConfig, seed: int = 0, counts_V: np.ndarray | None = None
) -> sampling.Choice:
    """Chooses the first token of a sample; the fields are arrays of one element."""
    logits_BV = logits_V.astype(np.float32)[None]
    counts_BV = np.zeros(logits_BV.shape, np.int32) if counts_V is None else counts_V.astype(np.int32)[None]
    params = sampling.sampling_params([settings], logits_BV.shape[1])
    choice = sample(logits_BV, counts_BV, params, key_of(seed)[None], np.zeros(1, np.int32))
    return jax.tree.map(np.asarray, choice)


def choose_tokens(logits_V: np.ndarray, settings: config.SamplingConfig, keys_B2: np.ndarray, **other: Any) -> Any:
    """Chooses one token per key."""
    B, V = len(keys_B2), len(logits_V)
    logits_BV = np.broadcast_to(logits_V.astype(np.float32), (B, V))
    params = jax.tree.map(
        lambda x_1: np.broadcast_to(x_1[0], (B, *x_1.shape[1:])), sampling.sampling_params([settings], V)
    )
    index_B = np.broadcast_to(np.int32(other.pop("index", 0)), B)
    choice = sample(logits_BV, np.zeros((B, V), np.int32), params, keys_B2, index_B, **other)
    return jax.tree.map(np.asarray, choice)


def keys_of(number: int, first: int = 0) -> np.ndarray:
    """Returns the keys of consecutive seeds."""
    seeds = np.arange(first, first + number, dtype=np.uint32)
    key = np.zeros(number, np.uint32), seeds
    digest = hashlib.sha256(np.asarray([1], "<u4").tobytes()).digest()
    for word in (*np.frombuffer(digest[:8], "<u4").astype(np.uint32), np.uint32(0)):
        key = sampling.fold_in(key, np.full(number, word, np.uint32))
    return np.stack(key, axis=1)


# --- random bits


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("key", "block", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_has_the_known_answers_of_random123(as_array: Any, key: Any, block: Any, expected: Any) -> None:
    words = sampling.threefry2x32(*(tuple(as_array([x], np.uint32) for x in pair) for pair in (key, block)))
    assert (int(words[0][0]), int(words[1][0])) == expected


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=20)
def test_keys_are_those_of_jax_under_any_setting(
    impl: str, partitionable: bool, seed: int, token: int, index: int
) -> None:
    with jax.threefry_partitionable(partitionable), jax.default_prng_impl(impl):
        own = sampling.sample_key(seed, (token % 2**24, 5), index)
        digest = hashlib.sha256(np.asarray([token % 2**24, 5], "<u4").tobytes()).digest()
        key = jax.random.key(seed, impl="threefry2x32")
        for word in (*np.frombuffer(digest[:8], "<u4"), index):
            key = jax.random.fold_in(key, np.uint32(word))
        assert own.tolist() == jax.random.key_data(key).tolist()
        of_id = jax.random.fold_in(jax.random.fold_in(key, index), np.uint32(token))
        assert definition.words(own, index, np.array([token]))[0] == jax.random.key_data(of_id)[0]


# Literal values, the same with JAX 0.10.2 and 0.12.0 on CPUs: the key of (seed, prompt, sample), the words of the ids
# 0, 1 and 50256 at the token index 2, their noise, and the tokens at the indices 0, 1, 2 and 1000 of plain sampling
# among 1,024 equally likely ones, and of the default settings. They must never change.
GOLDEN: list[tuple[tuple[int, tuple[int, ...], int], list[int], list[int], list[str], list[int], list[int]]] = [
    (
        (0, (1,), 0),
        [3039318718, 363837825],
        [656845619, 4103433207, 1784946090],
        ["0x1.53eb720000000p-3", "0x1.8e18da0000000p+1", "0x1.1305b00000000p-1"],
        [869, 970, 568, 839],
        [2, 1, 2, 1],
    ),
    (
        (0, (1, 2, 3), 0),
        [208604554, 2618967842],
        [507834772, 266295511, 2249725627],
        ["0x1.01b5ae0000000p-3", "0x1.062c6a0000000p-4", "0x1.7bddfe0000000p-1"],
        [511, 239, 393, 16],
        [2, 1, 1, 3],
    ),
    (
        (0, (1, 2, 3), 1),
        [1907192583, 4145684147],
        [535105247, 4083464854, 2484413438],
        ["0x1.1082a40000000p-3", "0x1.81673e0000000p+1", "0x1.ba45740000000p-1"],
        [1007, 737, 659, 680],
        [2, 1, 0, 2],
    ),
    (
        (1, (1, 2, 3), 0),
        [1260527955, 2339518622],
        [4193739651, 2759308136, 3071785050],
        ["0x1.dfb8d80000000p+1", "0x1.074abc0000000p+0", "0x1.41886e0000000p+0"],
        [279, 979, 830, 747],
        [1, 3, 3, 0],
    ),
    (
        (4294967295, (50256, 50256, 50256), 7),
        [1287892439, 2313803027],
        [3036983046, 2390437542, 327381636],
        ["0x1.3a59d60000000p+0", "0x1.a05cea0000000p-1", "0x1.44c1940000000p-4"],
        [354, 147, 971, 258],
        [0, 1, 2, 4],
    ),
    (
        (12345, tuple(range(100)), 2**32 - 1),
        [4087565964, 1380718067],
        [1762707298, 3637191656, 1776663896],
        ["0x1.0e81800000000p-1", "0x1.e057840000000p+0", "0x1.1155e80000000p-1"],
        [103, 973, 499, 113],
        [1, 4, 2, 4],
    ),
]


@pytest.mark.parametrize(("of", "key", "words", "numbers", "plain", "default"), GOLDEN)
def test_golden_values(
    of: tuple[int, tuple[int, ...], int],
    key: list[int],
    words: list[int],
    numbers: list[str],
    plain: list[int],
    default: list[int],
) -> None:
    found = sampling.sample_key(*of)
    assert found.tolist() == key
    ids, index_B = np.array([0, 1, 50256]), np.array([0, 1, 2, 1000], np.int32)
    assert definition.words(found, 2, ids).tolist() == words
    noise_1K = noise(found[None], np.array([2], np.int32), ids.astype(np.int32)[None])
    assert [float(x).hex() for x in np.asarray(noise_1K)[0]] == numbers
    keys_B2, even_BV = np.stack([found] * 4), np.zeros((4, 1024), np.float32)
    falling_BV = even_BV - np.arange(1024, dtype=np.float32) / 4
    for logits_BV, settings, tokens in ((even_BV, neutral(), plain), (falling_BV, config.SamplingConfig(), default)):
        params = sampling.sampling_params([settings] * 4, 1024)
        choice = sample(logits_BV, np.zeros((4, 1024), np.int32), params, keys_B2, index_B)
        assert choice.token_B.tolist() == tokens


# --- noise


def test_noise_is_exponential_and_fine_grained_near_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, for extreme words and 100,000 random ones."""
    edges = [0, 1, 2, 3, 1000, 2**24, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 129, 2**32 - 2, 2**32 - 1]
    words_1K = np.array([*edges, *np.random.RandomState(0).randint(0, 2**32, 100_000)], np.uint32)[None]
    monkeypatch.setattr(sampling, "fold_in", lambda key, word: (words_1K, words_1K))
    found_K = np.asarray(jax.jit(sampling.noise)(np.zeros((1, 2), np.uint32), np.zeros(1, np.int32), words_1K))[0]
    expected_K = definition.noise(words_1K[0])
    np.testing.assert_allclose(found_K, expected_K, rtol=3e-7)
    assert found_K[0] == np.float32(2.0**-33)
    assert found_K[1] == np.float32(1.5 * 2.0**-32), "steps of 2.3e-10"
    assert found_K.max() == found_K[len(edges) - 1] == pytest.approx(24 * math.log(2), rel=1e-6)


def test_noise_depends_on_the_key_the_index_and_the_id_alone() -> None:
    keys_B2, index_B = np.stack([key_of(1), key_of(2), key_of(1)]), np.array([5, 5, 6], np.int32)
    id_K = np.random.RandomState(0).permutation(1024).astype(np.int32)
    found_BK = np.asarray(noise(keys_B2, index_B, np.stack([id_K] * 3)))
    for row in range(3):
        expected_K = definition.noise(definition.words(keys_B2[row], int(index_B[row]), id_K))
        np.testing.assert_allclose(found_BK[row], expected_K, rtol=3e-7)
    in_order_BK = np.asarray(noise(keys_B2, index_B, np.stack([np.arange(1024, dtype=np.int32)] * 3)))
    np.testing.assert_array_equal(in_order_BK[:, id_K], found_BK)


@pytest.mark.parametrize("chunks", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_the_smallest_noise_occurs_at_the_rate_of_an_exponential(chunks: int) -> None:
    """The small end decides which rare tokens win: 2**24 words, and 2**30 in the slow test.

    ``P(e < x) = 1 - exp(-x)``. A token of probability 1e-7 beats one other if its noise is below 1e-7 of the other's.
    """
    size, key_12, bounds = 2**24, jnp.asarray(key_of(5)[None]), (1e-3, 1e-5, 1e-6, 1e-7, 1e-8)
    id_1K = jnp.arange(size, dtype=jnp.int32)[None]

    @jax.jit
    def statistics(index_1: jax.Array) -> tuple[jax.Array, ...]:
        noise_K = sampling.noise(key_12, index_1, id_1K)[0]
        numbers = jnp.stack([(noise_K < bound).sum() for bound in bounds])
        wins = (noise_K[: size // 2] / 1e-5 < noise_K[size // 2 :] / (1 - 1e-5)).sum()
        return numbers, wins, noise_K.min(), noise_K.max()

    found = [statistics(jnp.array([chunk], jnp.int32)) for chunk in range(chunks)]
    numbers, wins_of, smallest_of, largest_of = (np.array(values) for values in zip(*found, strict=True))
    below = dict(zip(bounds, numbers.sum(axis=0).tolist(), strict=True))
    wins, smallest, largest = int(wins_of.sum()), float(smallest_of.min()), float(largest_of.max())
    n = chunks * size
    for bound, count in below.items():
        expected = n * -math.expm1(-bound)
        assert abs(count - expected) < 5 * math.sqrt(expected) + 3, bound
    assert abs(wins - n / 2 * 1e-5) < 5 * math.sqrt(n / 2 * 1e-5)
    assert 2.0**-33 <= smallest < 20 / n
    assert min(math.log(n) - 4, 16.6) < largest < 16.64, "24 bits: at most 24 * log 2"


def test_noise_is_independent_across_samples_tokens_seeds_and_ids() -> None:
    """Correlations and a chi-square of pairs, between the noise of two keys that differ in one part."""
    n, id_K, base_key = 2**17, np.arange(2**17), sampling.sample_key(7, (1, 2), 3)
    base = definition.words(base_key, 4, id_K)
    others = {
        "seed": definition.words(sampling.sample_key(8, (1, 2), 3), 4, id_K),
        "prompt": definition.words(sampling.sample_key(7, (1, 3), 3), 4, id_K),
        "sample": definition.words(sampling.sample_key(7, (1, 2), 4), 4, id_K),
        "index": definition.words(sampling.sample_key(7, (1, 2), 3), 5, id_K),
        "id": np.roll(base, 1),
        "sample and index": definition.words(sampling.sample_key(7, (1, 2), 4), 3, id_K),
    }
    for name, other in others.items():
        one, two = (definition.noise(x) for x in (base, other))
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(n), name
        counts = np.bincount((base >> 28) * 16 + (other >> 28), minlength=256)
        assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 380, name  # 255 degrees of freedom: chance 5e-7
    # Along consecutive seeds, samples and indices, for one id.
    along = {
        "seeds": keys_of(n),
        "samples": np.stack([sampling.sample_key(7, (1, 2), sample) for sample in range(4096)]),
    }
    for name, keys_B2 in along.items():
        word_B, _ = sampling.fold_in(
            sampling.fold_in((keys_B2[:, 0], keys_B2[:, 1]), np.zeros(len(keys_B2), np.uint32)),
            np.full(len(keys_B2), 11, np.uint32),
        )
        assert_uncorrelated(word_B, name)
    key = np.full(n, base_key[0]), np.full(n, base_key[1])
    assert_uncorrelated(
        sampling.fold_in(sampling.fold_in(key, id_K.astype(np.uint32)), np.full(n, 11, np.uint32))[0], ""
    )


def assert_uncorrelated(word_B: np.ndarray, name: str) -> None:
    n = len(word_B)
    e = definition.noise(word_B)
    for lag in (1, 2):
        assert abs(np.corrcoef(e[lag:], e[:-lag])[0, 1]) < 5 / math.sqrt(n), name
    counts = np.bincount((word_B[1:] >> 28) * 16 + (word_B[:-1] >> 28), minlength=256)
    assert ((counts - (n - 1) / 256) ** 2 / ((n - 1) / 256)).sum() < 380, name
    assert np.unique(word_B).size > 0.999 * n


# --- choice


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, config.SamplingConfig, int]:
    """Draws logits with ties, gaps and tails, counts, settings and a seed."""
    V = draw(st.sampled_from(SIZES))
    rng = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    logits_V = rng.normal(0, draw(st.sampled_from([0.01, 1.0, 5.0])), V)
    logits_V = np.round(logits_V, draw(st.sampled_from([0, 1, 6]))).astype(np.float32)  # some are -0.0
    if draw(st.booleans()):
        logits_V[rng.randint(0, V, 3)] = draw(st.sampled_from([-1e30, 1e30, 0.0, -0.0, 60.0]))
    counts_V = rng.poisson(draw(st.sampled_from([0.0, 0.5])), V)
    tokens = st.lists(st.integers(0, V - 1), max_size=V - 1, unique=True).map(tuple)
    bias = st.lists(st.tuples(st.integers(0, V - 1), st.floats(-20, 20)), unique_by=lambda pair: pair[0], max_size=3)
    allow, ban = draw(st.just(()) | tokens), draw(st.just(()) | tokens)
    if set(allow) <= set(ban):
        allow = ()
    settings = config.SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 1e-40, 1e-30, 0.5, 1.0, 100.0, 3e38, 1e300]) | st.floats(0.05, 5)),
        top_k=draw(st.sampled_from([0, 1, 2, 5, 15, 16, 17, 127, 128, 129, 299, 300, 2**31]) | st.integers(1, 300)),
        top_p=draw(st.just(1.0) | st.floats(0.001, 1)),
        min_p=draw(st.just(0.0) | st.floats(0, 0.999)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.5, 2)),
        frequency_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        presence_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        logit_bias=tuple(draw(st.just([]) | bias)),
        ban=ban,
        allow=allow,
    )
    return logits_V, counts_V, settings, draw(st.integers(0, 2**32 - 1))


def expected_of(
    logits_V: np.ndarray, counts_V: np.ndarray, settings: config.SamplingConfig, seed: int
) -> tuple[np.ndarray, definition.Draw]:
    adjusted_V = definition.adjusted(logits_V, counts_V, settings)
    noise_V = definition.noise(definition.words(key_of(seed), 0, np.arange(len(logits_V))))
    return adjusted_V, definition.draw(adjusted_V, noise_V, settings)


@hypothesis.given(cases())
@fakes.examples(100)
def test_choice_matches_the_definition(case: tuple[np.ndarray, np.ndarray, config.SamplingConfig, int]) -> None:
    """A token may differ only if the lead or the cut is below the rounding of float32."""
    logits_V, counts_V, settings, seed = case
    choice = choose(logits_V, settings, seed, counts_V)
    adjusted_V, expected = expected_of(logits_V, counts_V, settings, seed)
    assert choice.token_B.dtype == jnp.int32
    token, divisor = int(choice.token_B[0]), definition.temperature(settings) or 1.0
    assert adjusted_V[token] > -np.inf, "a banned token is never chosen"
    if token != expected.token:
        # Scores are float32 numbers, and shares of the probability sums of them.
        rounding = 4e-7 * np.abs(adjusted_V[[token, expected.token]]).max() + 4e-6 * divisor
        may_drop = definition.leaves(adjusted_V, settings, expected.token, rounding)
        assert expected.lead <= rounding or may_drop or definition.enters(adjusted_V, settings, rounding)


def test_a_vocabulary_of_one_token() -> None:
    for settings in (neutral(), config.SamplingConfig(), config.SamplingConfig(temperature=0.0, min_p=0.5)):
        choice = choose(np.array([3.0]), settings)
        assert [float(x[0]) for x in choice] == [0, 0, 1, 1, pytest.approx(3.4028235e38), pytest.approx(3.4028235e38)]


@pytest.mark.parametrize("V", SIZES)
def test_ties_go_to_the_lower_id(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits, zeros of both signs among them, and equal noise."""
    monkeypatch.setattr(sampling, "noise", lambda key_B2, index_B, id_BK: jnp.ones(id_BK.shape, jnp.float32))
    logits_BV = np.full((4, V), -1, np.float32)
    logits_BV[:, 3:] = 0.0
    logits_BV[:, 2] = -0.0
    settings = [neutral(**one) for one in ({}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0})]
    params, zero_B = sampling.sampling_params(settings, V), np.zeros(4, np.int32)
    choice = jax.jit(sampling.sample)(logits_BV, np.zeros((4, V), np.int32), params, keys_of(4), zero_B)
    assert choice.token_B.tolist() == [2] * 4
    assert choice.lead_B.tolist() == [0] * 4


@pytest.mark.parametrize("V", SIZES)
def test_temperature_0_takes_the_most_likely_token_whatever_the_other_settings(V: int) -> None:
    keys_B2 = keys_of(64)
    for decimals in (0, 6):
        logits_V = np.round(np.random.RandomState(V).normal(0, 2, V), decimals).astype(np.float32) + np.float32(0)
        for settings in ({}, {"top_k": 5, "top_p": 0.5}, {"top_k": 200, "min_p": 0.1}):
            chosen = choose_tokens(logits_V, neutral(temperature=0.0, **settings), keys_B2)
            np.testing.assert_array_equal(chosen.token_B, np.argmax(logits_V))
            np.testing.assert_array_equal(chosen.kept_B, 1)
        np.testing.assert_array_equal(choose_tokens(logits_V, neutral(top_k=1), keys_B2).token_B, np.argmax(logits_V))


@pytest.mark.parametrize("V", SIZES)
def test_extreme_temperatures_behave_as_their_limits(V: int) -> None:
    rng, keys_B2 = np.random.RandomState(V), keys_of(64)
    logits_V = rng.permutation(V) - V / 2
    for tiny in (1e-300, 1e-40, 1e-37, 1e-30, 1e-6):
        assert set(choose_tokens(logits_V, neutral(temperature=tiny), keys_B2).token_B) == {np.argmax(logits_V)}
    even = choose_tokens(np.zeros(V), neutral(), keys_B2).token_B
    for huge in (1e12, 3e38, 3.5e38, 1e308):
        np.testing.assert_array_equal(choose_tokens(logits_V, neutral(temperature=huge), keys_B2).token_B, even)
    overflowing_V = np.append(logits_V[1:] * 1e36, 3e38)
    assert set(choose_tokens(overflowing_V, neutral(temperature=1e-3), keys_B2).token_B) == {V - 1}


@pytest.mark.parametrize("V", SIZES)
def test_top_k_of_0_and_above_the_vocabulary_keep_all_tokens(V: int) -> None:
    logits_V = np.random.RandomState(V).normal(size=V)
    expected = choose_tokens(logits_V, neutral(), keys_of(64))
    for top_k in (V, V + 1, 2**31 - 1, 2**31, 2**40):
        found = choose_tokens(logits_V, neutral(top_k=top_k), keys_of(64))
        np.testing.assert_array_equal(found.token_B, expected.token_B)
        np.testing.assert_array_equal(found.kept_B, V)


# --- penalties and neutral values


def bits(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.int32)


def test_penalties_change_only_the_logits_of_counted_tokens() -> None:
    rng = np.random.RandomState(0)
    logits_BV, counts_BV = rng.normal(0, 5, (2, 300)).astype(np.float32), rng.poisson(0.7, (2, 300)).astype(np.int32)
    settings = [
        neutral(repetition_penalty=1.3, frequency_penalty=0.25),
        neutral(repetition_penalty=0.7, presence_penalty=-1.5),
    ]
    found_BV = np.asarray(jax.jit(sampling.penalize)(logits_BV, counts_BV, sampling.sampling_params(settings, 300)))
    for row, one in enumerate(settings):
        expected_V = definition.adjusted(logits_BV[row], counts_BV[row], one)
        np.testing.assert_allclose(found_BV[row], expected_V, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(bits(found_BV)[counts_BV == 0], bits(logits_BV)[counts_BV == 0])
    assert np.all(found_BV[counts_BV > 0] != logits_BV[counts_BV > 0])


def test_neutral_values_change_no_bit() -> None:
    """Of penalties, bias, temperature and n-grams; a cut that is neutral keeps every token."""
    logits_1V = np.random.RandomState(0).normal(0, 5, (1, 300)).astype(np.float32)
    logits_1V[0, :6] = 0.0, -0.0, 3e38, -3e38, 1.2e-38, -np.inf
    params = sampling.sampling_params([neutral()], 300)
    for count in (0, 3):
        same_1V = jax.jit(sampling.penalize)(logits_1V, np.full((1, 300), count, np.int32), params)
        np.testing.assert_array_equal(bits(same_1V), bits(logits_1V))
    same_1V = jax.jit(sampling.ban_repeats)(logits_1V, np.ones((1, 9), np.int32), np.array([9], np.int32), params)
    np.testing.assert_array_equal(bits(same_1V), bits(logits_1V))
    np.testing.assert_array_equal(params.bias_BV, 0)
    small_1V = np.where(np.abs(logits_1V) < 1e30, logits_1V, np.float32(0))
    scaled_1V = jax.jit(sampling.scale)(small_1V, small_1V.max(axis=1), np.ones(1, np.float32))
    np.testing.assert_array_equal(bits(scaled_1V), bits(small_1V - small_1V.max()))
    assert int(choose(small_1V[0], neutral()).kept_B[0]) == 300


def test_a_tail_below_float32_resolution_is_kept_unless_it_is_cut() -> None:
    """299 tokens of probability 1e-9: the sum of the weights does not see them, the draw does."""
    tail_V = np.full(300, -20.7)
    tail_V[7] = 0
    for settings, number in (({}, 300), ({"top_k": 290}, 290), ({"top_p": 0.9999}, 1), ({"min_p": 1e-8}, 1)):
        assert int(choose(tail_V, neutral(**settings)).kept_B[0]) == number
    assert int(choose(tail_V, neutral(min_p=5e-10)).kept_B[0]) == 300


def test_bias_and_bans() -> None:
    params = sampling.sampling_params(
        [neutral(logit_bias={1: 2.5, 3: -1}, ban=(2,)), neutral(allow=(1, 4), ban=(4, 5), logit_bias={1: 7})], 6
    )
    np.testing.assert_array_equal(
        params.bias_BV, [[0, 2.5, -np.inf, -1, 0, 0], [-np.inf, 7, -np.inf, -np.inf, -np.inf, -np.inf]]
    )
    for settings in (neutral(allow=(2, 5)), config.SamplingConfig(ban=(0, 1, 3, 4, 6))):
        chosen = choose_tokens(np.arange(7) / 5, settings, keys_of(64))
        assert set(chosen.token_B) == {2, 5}
        np.testing.assert_array_equal(chosen.kept_B, 2)


# --- repeated n-grams


def banned(context: list[int], length: int, ngram: int) -> set[int]:
    """Returns the tokens that would repeat an n-gram of the context, by definition."""
    context = context[:length]
    if ngram == 0 or length < ngram:
        return set()
    last = context[length - ngram + 1 :]
    return {context[i + ngram - 1] for i in range(length - ngram + 1) if context[i : i + ngram - 1] == last}


ban_repeats = jax.jit(sampling.ban_repeats, static_argnames="plan")


@hypothesis.given(
    st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=3, max_size=3),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.lists(st.integers(0, 6) | st.sampled_from([12, 13, 2**24]), min_size=3, max_size=3),
)
def test_tokens_that_repeat_an_n_gram_are_banned(contexts: list[list[int]], lengths: list[int], ngrams: Any) -> None:
    logits_BV = np.random.RandomState(0).normal(size=(3, 7)).astype(np.float32)
    params = sampling.sampling_params([neutral(no_repeat_ngram=ngram) for ngram in ngrams], 7)
    context_BS, length_B = np.array(contexts, np.int32), np.array(lengths, np.int32)
    found_BV = np.asarray(ban_repeats(logits_BV, context_BS, length_B, params))
    for row in range(3):
        expected_V = logits_BV[row].copy()
        expected_V[list(banned(contexts[row], lengths[row], ngrams[row]))] = -np.inf
        np.testing.assert_array_equal(found_BV[row], expected_V)


def test_repeats_are_allowed_if_every_token_left_would_be_one() -> None:
    """``1`` and ``3`` are left by the bias; both followed a ``2``."""
    context_BS, length_B = np.array([[1, 2, 3, 2, 1, 2, 0]] * 2, np.int32), np.array([6, 4], np.int32)
    logits_BV = np.full((2, 7), -np.inf, np.float32)
    logits_BV[:, [1, 3]] = 0.5, 1.5
    params = sampling.sampling_params([neutral(no_repeat_ngram=2)] * 2, 7)
    found_BV = np.asarray(ban_repeats(logits_BV, context_BS, length_B, params))
    np.testing.assert_array_equal(found_BV[0], logits_BV[0])
    np.testing.assert_array_equal(np.flatnonzero(found_BV[1] > -np.inf), [1])


# --- frequencies


def test_frequencies_match_the_distribution() -> None:
    """Pearson's statistic of 20,000 seeds stays below a bound that chance exceeds once in a million."""
    n, V = 20_000, 12
    logits_V = np.linspace(1.5, -1.5, V)[np.random.RandomState(0).permutation(V)]
    keys_B2 = keys_of(n)
    cases: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5, "top_k": 8},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.3, "ban": (3, 5), "logit_bias": {1: 1.0}},
    ]
    for settings in cases:
        one = neutral(**settings)
        counts_V = np.bincount(choose_tokens(logits_V, one, keys_B2).token_B, minlength=V)
        adjusted_V = definition.adjusted(logits_V.astype(np.float32), np.zeros(V, int), one)
        ids = definition.kept(adjusted_V, one)
        weights = np.exp((adjusted_V[ids] - adjusted_V[ids[0]]) / one.temperature)
        expected = n * weights / weights.sum()
        assert 1 < len(ids) <= V
        assert counts_V[ids].sum() == n
        bound = {12: 50, 8: 43, 7: 40, 6: 38, 5: 35, 4: 32, 3: 28, 2: 24}[len(ids)]
        assert ((counts_V[ids] - expected) ** 2 / expected).sum() < bound


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 40, "top_p": 0.95}, {"min_p": 0.05}])
def test_frequency_of_a_token_is_its_sampled_log_probability(settings: dict[str, Any]) -> None:
    """Over 100,000 seeds, for every token that is expected at least 20 times, within 5 standard deviations."""
    n, V = 100_000, 64
    logits_V = np.random.RandomState(3).normal(0, 2, V)
    chosen = choose_tokens(logits_V, neutral(**settings), keys_of(n))
    counts_V = np.bincount(chosen.token_B, minlength=V)
    probability_V = np.zeros(V)
    probability_V[chosen.token_B] = np.exp(chosen.sampled_logprob_B.astype(np.float64))
    assert 0.99 < probability_V.sum() < 1 + 1e-4, "nearly every token that can be sampled was"
    common = probability_V * n >= 20
    deviation_V = np.sqrt(n * probability_V * (1 - probability_V))
    assert common.sum() > 10
    assert np.all(np.abs(counts_V - n * probability_V)[common] < 5 * deviation_V[common])


# --- independence of slots, plans and compilations

ROWS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"temperature": 0.0},
    {"top_k": 128, "top_p": 0.9},
    {"top_k": 40, "temperature": 0.7, "min_p": 0.1},
    {"top_k": 0},
    {"top_k": 129, "top_p": 0.95},
    {"top_k": 0, "top_p": 0.5},
    {"top_k": 0, "min_p": 0.001, "temperature": 3.0},
    {"top_k": 0, "top_p": 0.99, "temperature": 5.0, "ban": (0, 1)},
]


def test_choice_is_independent_of_other_slots_and_of_the_plan() -> None:
    """Every field, to the bit; rows for which a plan is too small are left out."""
    rng, V, B = np.random.RandomState(0), 300, 3
    on_cpu, on_gpu = topk.plan_for(V, "cpu"), topk.plan_for(V, "cuda")
    for turn in range(12):
        rows = [ROWS[(turn + 4 * row) % len(ROWS)] for row in range(B)]
        logits_BV = np.round(rng.normal(0, 2, (B, V)), 2).astype(np.float32)  # with ties
        counts_BV, keys_B2 = rng.poisson(0.3, (B, V)).astype(np.int32), keys_of(B, first=turn)
        settings = [config.SamplingConfig(**{**definition.NEUTRAL, "repetition_penalty": 1.2, **one}) for one in rows]
        arguments = logits_BV, counts_BV, sampling.sampling_params(settings, V), keys_B2, np.arange(B, dtype=np.int32)
        together = jax.tree.map(np.asarray, sample(*arguments, plan=on_cpu))
        for row in range(B):
            alone = sample(*jax.tree.map(lambda x, row=row: x[[row] * B], arguments), plan=on_cpu)
            assert [x[row].tobytes() for x in together] == [np.asarray(x)[row].tobytes() for x in alone]
        for plan in (on_gpu, on_gpu.smallest, on_gpu.full_vocab):
            other = jax.tree.map(np.asarray, sample(*arguments, plan=plan))
            for row in range(B):
                if plan == on_gpu.smallest and on_gpu.needs_full_vocab(settings[row]):
                    continue
                assert other.token_B[row] == together.token_B[row]
                assert other.kept_B[row] == together.kept_B[row]
                for name in ("sampled_logprob_B", "kept_mass_B", "lead_B", "cut_B"):
                    one, two = getattr(other, name)[row], getattr(together, name)[row]
                    assert one == pytest.approx(two, rel=2e-5, abs=2e-6), name


def test_settings_do_not_recompile() -> None:
    fresh, rng = jax.jit(lambda *arguments: sampling.sample(*arguments).token_B), np.random.RandomState(0)
    counts = []
    for settings in (*ROWS, {"repetition_penalty": 2.0, "frequency_penalty": 1.0}, {"allow": (3,)}, {"top_k": 2**31}):
        params = sampling.sampling_params([neutral(**settings)], 300)
        logits_1V = rng.normal(size=(1, 300)).astype(np.float32)
        with fakes.compilations() as compiled:
            fresh(logits_1V, (logits_1V > 1).astype(np.int32), params, key_of(1)[None], np.zeros(1, np.int32))
        counts.append(len(compiled))
    assert counts == [1] + [0] * (len(counts) - 1)
