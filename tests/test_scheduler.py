"""Tests of the scheduler against a naive loop of full forward passes, and of finish reasons and slot reuse."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import fakes
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.generation import backends, engine, executables, requests, sampling, scheduler
from hipgpt_jax.model import cache, transformer

MODEL = fakes.MODEL
WINDOW = 11
PARAMS = fakes.random_params(MODEL)
SEQUENCE = requests.Sequence(fakes.request(), 8)
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}

forward = jax.jit(transformer.Transformer(MODEL).apply, static_argnames="dropout")
choose = jax.jit(lambda *args: sampling.sample(*args).token_B)


def naive(request: requests.Request, window: int, stride: int) -> list[int]:
    """Generates by a full forward pass over the window for every token, without a cache.

    With ``m`` tokens from the first one read, the window starts at the first multiple of the stride
    that leaves at most ``W`` tokens. Zero padding to one length lets one program serve all contexts;
    no real token attends to it (``test_transformer.py``).
    """
    ids = list(request.prompt_ids)
    first = max(0, len(ids) - window)
    key_12 = sampling.sample_key(request.generation.seed, request.prompt_ids, request.sample)[None]
    settings = sampling.sampling_params([request.sampling], MODEL.vocab_size)
    for t in range(request.generation.num_tokens):
        dropped = max(0, math.ceil((len(ids) - first - window) / stride) * stride)
        context = ids[first + dropped :]
        assert window - stride < len(context) <= window or not dropped
        padded_BT = np.asarray([context + [0] * (MODEL.max_seq_len - len(context))])
        logits_BTV = forward({"params": PARAMS}, padded_BT, dropout=0.0)
        counts_BV = np.bincount(ids, minlength=MODEL.vocab_size)[None].astype(np.int32)
        logits_BV = np.asarray(logits_BTV)[:, len(context) - 1]
        ids.append(int(choose(logits_BV, counts_BV, settings, key_12, np.array([t], np.int32))[0]))
    return ids[len(request.prompt_ids) :]


@pytest.fixture
def narrow() -> scheduler.Scheduler:
    return fakes.make_scheduler()


@pytest.fixture
def wide() -> scheduler.Scheduler:
    return fakes.make_scheduler(batch_size=3)


@pytest.mark.parametrize(
    ("window", "stride", "width"),
    [
        pytest.param(WINDOW, 1, 1, marks=pytest.mark.slow),
        (WINDOW, 1, 3),
        pytest.param(WINDOW, 4, 3, marks=pytest.mark.slow),
        pytest.param(MODEL.max_seq_len, MODEL.max_seq_len, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_generation_matches_a_naive_loop_far_past_the_window(window: int, stride: int, width: int) -> None:
    """Prompts shorter than, equal to and longer than the window; slots of a batch slide at different steps."""
    others = {"batch_size": width} if width > 1 else {}
    if (window, stride) != (WINDOW, 1):
        others |= {"window": window, "window_stride": stride}
    source = fakes.make_scheduler(**others)
    requested = [
        fakes.request(fakes.prompt(length), num_tokens=window + 10 + length % 4, sample=place, **settings)
        for place, length in enumerate((1, window, window - 1 or 2, window + 1, 2 * window + 3, 6))
        for settings in (GREEDY, {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3})
    ]
    sampled = fakes.tokens_of(source, requested)
    assert sampled == [naive(one, window, stride) for one in requested]
    assert len({token for tokens in sampled for token in tokens}) > 30


def test_overflow_stop_ends_a_sequence_when_the_window_is_full(
    narrow: scheduler.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler applies the overflow rule, so programs compiled for another rule can be reused."""
    monkeypatch.setattr(narrow, "_decoding", fakes.make_scheduler(overflow="stop")._decoding)
    requested = [fakes.request(fakes.prompt(n), num_tokens=30) for n in (1, 4, WINDOW - 1, WINDOW, WINDOW + 1)]
    requested.append(fakes.request(fakes.prompt(4), num_tokens=3))
    sampled = fakes.tokens_of(narrow, requested)
    assert [len(tokens) for tokens in sampled] == [WINDOW, WINDOW - 3, 2, 1, 1, 3]
    for one, tokens in zip(requested, sampled, strict=True):
        assert tokens == naive(one, WINDOW, 1)[: len(tokens)]
    reasons = [event.finish_reason for event in narrow.run(requested) if event.finish_reason is not None]
    assert reasons == ["length"] * len(requested)


def test_overflow_error_refuses_requests_that_exceed_the_window() -> None:
    source = fakes.make_scheduler(overflow="error")
    source.check(fakes.request(fakes.prompt(4), num_tokens=WINDOW - 3))
    with pytest.raises(ValueError, match=r"prompt of 4 tokens and 9 new ones need a window of 12: it holds 11"):
        list(source.run([fakes.request(fakes.prompt(4), num_tokens=WINDOW - 2)]))
    with pytest.raises(ValueError, match=r"prompt of 12 tokens and 1 new ones need a window of 12: it holds 11"):
        list(source.run([fakes.request(fakes.prompt(WINDOW + 1), num_tokens=1)]))


def test_invalid_requests_and_windows_are_refused(narrow: scheduler.Scheduler) -> None:
    with pytest.raises(ValueError, match="prompt is empty: it must hold at least one token"):
        list(narrow.run([fakes.request(())]))
    with pytest.raises(ValueError, match="eos_id must be -1 or below the vocabulary's size 150: got 150"):
        list(narrow.run([fakes.request(eos_id=MODEL.vocab_size)]))
    with pytest.raises(ValueError, match="window must be at most the run's own 16"):
        fakes.make_scheduler(window=MODEL.max_seq_len + 1)
    with pytest.raises(ValueError, match="window_stride must be at most the window of 11 tokens: got 12"):
        fakes.make_scheduler(window_stride=WINDOW + 1)


def test_eos_ends_only_its_own_sequence_and_is_its_last_token(wide: scheduler.Scheduler) -> None:
    """Tries every token of a sequence as its end token, an id that never occurs, and no end token."""
    plain = [fakes.request(fakes.prompt(n), num_tokens=n + 12) for n in (2, 9, 4)]
    expected = fakes.tokens_of(wide, plain)
    for row in range(3):
        for eos_id in {*expected[row], -1, 149}:
            ending = list(plain)
            ending[row] = fakes.request(plain[row].prompt_ids, num_tokens=len(expected[row]), eos_id=eos_id)
            outputs = list(wide.run(ending))
            for index, tokens in enumerate(expected):
                own = [event for event in outputs if event.index == index]
                ended = index == row and eos_id in tokens
                kept = tokens[: tokens.index(eos_id) + 1] if ended else tokens
                reasons = [*[None] * (len(kept) - 1), "eos" if ended else "length"]
                assert [event.token for event in own] == kept
                assert [event.finish_reason for event in own] == reasons


@pytest.mark.parametrize("length", [2, WINDOW + 2])
def test_decoding_stops_after_eos(length: int, narrow: scheduler.Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the window the device stops at EOS too; past it, at most one further token has been dispatched."""
    (tokens,) = fakes.tokens_of(narrow, [fakes.request(fakes.prompt(length), num_tokens=30)])
    eos_at = next(t for t in range(4, 30) if tokens[t] not in tokens[:t])
    counts, sampled = [], []
    decode = engine.Engine.decode

    def spy(self: engine.Engine, limits: Mapping[int, int]) -> list[engine.Decoded]:
        decoded = decode(self, limits)
        counts.extend(each.counts[0] for each in decoded)
        sampled.append(int(self._state.num_sampled_B[0]))
        return decoded

    monkeypatch.setattr(engine.Engine, "decode", spy)
    outputs = list(narrow.run([fakes.request(fakes.prompt(length), num_tokens=30, eos_id=tokens[eos_at])]))
    assert len(outputs) == eos_at + 1
    assert eos_at + 1 <= sampled[-1] <= eos_at + 1 + (length + eos_at >= WINDOW)
    counts.clear()
    list(narrow.run([fakes.request(fakes.prompt(length), num_tokens=30)]))
    assert sum(counts) == 30, "no token is sampled after the last"


def test_a_request_for_no_tokens_finishes_without_compiling(wide: scheduler.Scheduler) -> None:
    nothing = fakes.request(num_tokens=0)
    with fakes.compilations() as compiled:
        outputs = list(fakes.make_scheduler(batch_size=3).run([nothing] * 4))
    assert [(one.index, one.token, one.finish_reason) for one in outputs] == [(i, None, "length") for i in range(4)]
    assert not compiled
    some = fakes.request(fakes.prompt(7), num_tokens=5)
    assert fakes.tokens_of(wide, [nothing, some, nothing, nothing]) == [[], naive(some, WINDOW, 1), [], []]
    assert list(wide.run([])) == []


@pytest.mark.parametrize(("width", "ahead"), [(1, 0), (3, 63)])
def test_requests_are_consumed_lazily(width: int, ahead: int) -> None:
    """Memory is constant in the number of requests; wide batches read ahead to prefill prompts together."""
    taken = []

    def endless() -> Iterator[requests.Request]:
        for sample in range(10**9):
            taken.append(sample)
            yield fakes.request(num_tokens=2, sample=sample)

    outputs = fakes.make_scheduler(batch_size=width).run(endless())
    for _ in range(2 * width):
        next(outputs)
    assert len(taken) == width + ahead
    next(outputs)
    assert len(taken) == 2 * width + ahead


def test_prefill_buckets_are_tight_monotone_and_within_the_window() -> None:
    for window in (1, 5, 8, 11, 32, 100, 1024):
        sizes = [backends.prefill_bucket(length, window) for length in range(1, window + 1)]
        assert sizes == sorted(sizes)
        assert all(length <= size <= window for length, size in enumerate(sizes, 1))
        assert all(3 * (size - length) <= size for length, size in enumerate(sizes, 1) if size > 8)
        assert len(set(sizes)) <= 2 * math.log2(max(8, window)) - 3
    assert backends.prefill_bucket(1, 1024) == 8


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 5), st.randoms())
def test_in_order_sorts_by_sample_and_delays_only_later_samples(lengths: list[int], width: int, random: Any) -> None:
    samples = [
        [requests.Output(index=i, token=t, sequence=SEQUENCE) for t in range(length)]
        + [requests.Output(index=i, finish_reason="length", sequence=SEQUENCE)]
        for i, length in enumerate(lengths)
    ]
    given: list[requests.Output] = []
    for first in range(0, len(samples), width):
        group = [list(sample) for sample in samples[first : first + width]]
        while any(group):
            given.append(random.choice([sample for sample in group if sample]).pop(0))
    taken = []
    ordered = requests.in_order(event for event in given if taken.append(event) or True)
    for place, event in enumerate(expected := [event for sample in samples for event in sample]):
        assert next(ordered) == event
        assert set(expected[: place + 1]) <= set(taken)
        needed = max(given.index(one) for one in expected[: place + 1])
        assert len(taken) == needed + 1, "an output waits only for those before it"
    assert list(ordered) == []


def test_a_freed_slot_is_reused_by_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long and short requests in three slots: exact tokens, none sampled in excess, and few steps."""
    source = fakes.make_scheduler(batch_size=3)
    steps: list[int] = []
    tokens: list[int] = []
    decode = engine.Engine.decode

    def spy(self: engine.Engine, limits: Mapping[int, int]) -> list[engine.Decoded]:
        decoded = decode(self, limits)
        steps.extend(max(each.counts.values()) for each in decoded)
        tokens.extend(sum(each.counts.values()) for each in decoded)
        return decoded

    monkeypatch.setattr(engine.Engine, "decode", spy)
    lengths = [11, 4, 4, 4, 4, 2, 6, 10, 4]
    requested = [fakes.request(fakes.prompt(1), num_tokens=n, sample=place) for place, n in enumerate(lengths)]
    assert fakes.tokens_of(source, requested) == [naive(one, WINDOW, 1) for one in requested]
    assert sum(tokens) == sum(lengths)
    assert sum(steps) <= 21, "fixed batches of three, each waiting for its longest request, take 25"


@pytest.mark.parametrize("measure", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nans_do_not_leak_into_the_next_request_of_a_slot(measure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The position embedding at 10 is NaN. The next request of the slot must not attend to the NaNs in the cache."""
    monkeypatch.setattr(cache, "SMALLEST_BLOCK", 4)
    params = fakes.random_params(MODEL)
    params["wpe"]["embedding"][10] = np.nan
    source = scheduler.Scheduler(MODEL, params, config.DecodingConfig(window=WINDOW))
    broken = fakes.request(fakes.prompt(8), num_tokens=5)
    well = fakes.request(fakes.prompt(3), num_tokens=8, top_k=3)
    apart = [event.token for event in source.run([well], measure=measure)]
    assert len(apart) == 8
    assert None not in apart
    together = list(source.run([broken, well], measure=measure))
    of_broken = [event for event in together if event.index == 0]
    assert [event.finish_reason for event in of_broken] == [None, None, None, "error"]
    assert [event.token for event in together if event.index == 1] == apart


def test_a_prompt_is_prefilled_once_for_its_samples_until_the_weights_change(narrow: scheduler.Scheduler) -> None:
    prefilled: list[int] = []
    prefill = executables.Executables.prefill
    requested = [fakes.request(fakes.prompt(6), num_tokens=3, sample=k) for k in range(4)]
    expected = fakes.tokens_of(narrow, requested)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executables.Executables, "prefill", lambda *args: prefilled.append(1) or prefill(*args))
        narrow.load(PARAMS)
        assert fakes.tokens_of(narrow, requested) == expected
        assert len(prefilled) == 1
        fakes.tokens_of(narrow, [fakes.request(fakes.prompt(5), num_tokens=2), requested[0]])
        assert len(prefilled) == 3, "only the latest prompt is cached"
        narrow.load(fakes.random_params(MODEL, seed=5))
        assert fakes.tokens_of(narrow, requested) != expected
        narrow.load(PARAMS)
        assert fakes.tokens_of(narrow, requested) == expected


@pytest.mark.slow
def test_replicas_generate_the_tokens_of_a_single_replica() -> None:
    """On a CPU a width of 16 is two replicas of 8 slots; the order of outputs does not depend on thread timing."""
    assert [backends.backend_for("cpu", MODEL, 11, width).num_replicas for width in (1, 8, 15, 16, 17, 64)] == [
        1,
        1,
        1,
        2,
        1,
        2,
    ]
    assert backends.backend_for("gpu", MODEL, 11, 64).num_replicas == 1
    assert (
        backends.backend_for("cpu", dataclasses.replace(MODEL, embed_dim=512, ff_hidden_dim=2048), 11, 64).num_replicas
        == 1
    )
    wide = fakes.make_scheduler(batch_size=16)
    requested = [fakes.request(fakes.prompt(n % 7 + 1), num_tokens=n % 5 + 6, sample=n) for n in range(40)]
    sampled = fakes.tokens_of(wide, requested)
    assert sampled == fakes.tokens_of(fakes.make_scheduler(batch_size=8), requested)
    assert sampled == [naive(one, WINDOW, 1) for one in requested]
    events_of = [[(event.index, event.token) for event in wide.run(requested)] for _ in range(2)]
    assert events_of[0] == events_of[1]


@pytest.mark.parametrize(
    ("width", "length", "stride", "measure"),
    [
        (1, 2, 1, True),
        pytest.param(2, 2, 4, True, marks=pytest.mark.slow),
        pytest.param(1, WINDOW - 1, 9, False, marks=pytest.mark.slow),
        pytest.param(2, WINDOW, 9, False, marks=pytest.mark.slow),
        pytest.param(2, WINDOW, 1, True, marks=pytest.mark.slow),
    ],
)
def test_nothing_compiles_after_the_first_token(width: int, length: int, stride: int, measure: bool) -> None:
    """Neither at the next cache block, nor when the window slides, nor at the length it slides back to."""
    source = fakes.make_scheduler.__wrapped__(batch_size=width, window_stride=stride)
    request = fakes.request(fakes.prompt(length), num_tokens=WINDOW + 9, top_logprobs=3)
    stream = source.run([request], measure=measure)
    next(stream)
    with fakes.compilations() as compiled:
        assert len(list(stream)) == WINDOW + 8
    assert compiled == []


@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_alternatives_compile_once_within_the_window_and_once_past_it(width: int) -> None:
    """A program returns several tokens within the window and one past it, so the shapes differ."""
    source = fakes.make_scheduler.__wrapped__(batch_size=width)
    for num_tokens, expected in ((4, 1), (WINDOW, 1), (WINDOW, 0)):
        with fakes.compilations() as compiled:
            sampled = source.run([fakes.request((5,), num_tokens=num_tokens + 1, top_logprobs=3)], measure=True)
            assert all(event.stats is not None and len(event.stats.top_logprobs(3)[0]) == 3 for event in sampled)
        assert compiled.count("jit(top_logprobs)") == expected


@pytest.mark.slow
def test_two_replicas_compile_each_program_once() -> None:
    """In a new scheduler, both replicas prefill prompts of one bucket at the same time."""
    fresh = scheduler.Scheduler(MODEL, fakes.random_params(MODEL), config.DecodingConfig(batch_size=16))
    requested = [fakes.request(fakes.prompt(3), sample=n, num_tokens=4) for n in range(16)]
    with fakes.compilations() as names:
        fakes.tokens_of(fresh, requested)
    assert {"jit(prefill)", "jit(decode)"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_cache_blocks_are_allocated_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(MODEL, max_seq_len=256, num_layers=1)
    source = scheduler.Scheduler(model, fakes.random_params(model), config.DecodingConfig())
    allocated: list[int] = []
    empty = cache.empty
    monkeypatch.setattr(
        cache, "empty", lambda *args: allocated.extend(block.keys[0].shape[2] for block in args[0]) or empty(*args)
    )
    for num_tokens, parts in ((60, 1), (61, 2), (300, 4)):
        allocated.clear()
        assert len(fakes.tokens_of(source, [fakes.request(fakes.prompt(5), num_tokens=num_tokens)])[0]) == num_tokens
        assert allocated == [64] * (parts - 1), "the first block comes from prefill"
