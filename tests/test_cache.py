"""Tests of the key/value cache: append, split and layout, and decoding against the full forward pass."""

import functools
import math
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import transformer

MODEL = fakes.MODEL
B, S = 3, MODEL.max_seq_len
BLOCK_SIZES = (6, 6, 4)
TOKENS_BS = np.random.RandomState(0).randint(0, MODEL.vocab_size, (B, S))
LENGTHS = (1, 4, 9)


def bound(params: dict[str, Any]) -> transformer.Transformer:
    return transformer.Transformer(MODEL).bind({"params": params})


@jax.jit
def forward(params: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
    return bound(params)(tokens_BT, dropout=0.0)


@jax.jit
def prefill(params: dict[str, Any], tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, kv.Block]:
    return bound(params).prefill(tokens_BT, length_B)


@jax.jit
def decode(params: dict[str, Any], token_B: jax.Array, blocks: tuple[kv.Block, ...], length_B: jax.Array) -> Any:
    return bound(params).decode(token_B, blocks, length_B)


@jax.jit
def append(block: kv.Block, token: kv.Block, slot_B: jax.Array) -> kv.Block:
    return kv.append(kv.Cache((), (block,)), token, slot_B).writable[0]


append_all = jax.jit(kv.append)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return fakes.random_params(MODEL)


def random_cache(slots: int, seed: int) -> kv.Block:
    rng = np.random.RandomState(seed)

    def layers() -> tuple[jax.Array, ...]:
        shape = (B, MODEL.num_heads, slots, MODEL.head_dim)
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(MODEL.num_layers))

    return kv.Block(layers(), layers())


def assert_same(left: kv.Block, right: kv.Block) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_append_writes_only_one_position_per_slot() -> None:
    old, new, lengths = random_cache(S, 0), random_cache(1, 1), [0, 5, S - 1]
    got = append(old, new, jnp.asarray(lengths))
    for was_BNSH, new_BN1H, now_BNSH in zip(*map(jax.tree.leaves, (old, new, got)), strict=True):
        expected_BNSH = np.array(was_BNSH)
        for row, slot in enumerate(lengths):
            expected_BNSH[row, :, slot] = new_BN1H[row, :, 0]
        np.testing.assert_array_equal(now_BNSH, expected_BNSH)


def test_append_ignores_positions_in_another_block() -> None:
    old, new = random_cache(S, 0), random_cache(1, 1)
    for beyond in (-1, -S, S, S + 5):
        assert_same(append(old, new, jnp.asarray([beyond] * B)), old)


@pytest.mark.parametrize("sizes", [(S,), (4, 4, 4, 4), (6, 6, 4)])
def test_split_pads_the_last_block_with_zeros(sizes: tuple[int, ...]) -> None:
    for slots in (1, 5, S):
        new = random_cache(slots, 0)
        blocks = kv.Layout(sizes).split(new)
        assert tuple(part.keys[0].shape[2] for part in blocks) == sizes[: len(blocks)]
        assert sum(sizes[: len(blocks) - 1]) < slots <= sum(sizes[: len(blocks)])
        joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), *blocks)
        for now_BNSH, new_BNTH in zip(*map(jax.tree.leaves, (joined, new)), strict=True):
            np.testing.assert_array_equal(now_BNSH[:, :, :slots], new_BNTH)
            np.testing.assert_array_equal(now_BNSH[:, :, slots:], 0)


@pytest.mark.parametrize("window", [1, 11, 32, 63, 64, 65, 100, 128, 257, 1000, 1024])
def test_a_step_reads_a_bounded_number_of_unused_positions(window: int) -> None:
    layout = kv.cpu_layout(window)
    sizes = layout.block_sizes
    assert sum(sizes) == window
    for length in range(1, window + 1):
        read = sum(sizes[: layout.num_blocks(length)])
        assert length <= read <= min(max(64, 2 * length), length + max(64, -(-window // 4)))
    assert len(sizes) <= 4 + max(0, math.ceil(math.log2(window / 256)))


def test_unused_blocks_do_not_change_a_slot(params: dict[str, Any]) -> None:
    """A step may read further blocks for a longer slot; the result of a shorter one stays bit-identical."""
    blocks = kv.Layout((4, 4, 4, 4)).split(random_cache(S, 0))
    token_B, length_B = np.array([1, 2, 3]), np.array([1, 3, 4])
    short = decode(params, token_B, blocks[:1], length_B)
    for live in (2, 3, 4):
        for got, expected in zip(
            *map(jax.tree.leaves, (decode(params, token_B, blocks[:live], length_B), short)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("start", ["prefill", "empty"])
def test_decoding_from_the_cache_matches_the_full_forward_pass_at_every_position(
    start: str, params: dict[str, Any]
) -> None:
    """Slots have different lengths throughout, and each decodes to the last position.

    A full slot keeps appending, as a finished slot does while the others continue.
    """
    full_BSV = np.asarray(forward(params, TOKENS_BS))
    if start == "prefill":
        length_B = np.array(LENGTHS)
        logits_BV, new = prefill(params, TOKENS_BS[:, : max(LENGTHS)], length_B)
        np.testing.assert_allclose(logits_BV, full_BSV[np.arange(B), length_B - 1], rtol=1e-5, atol=1e-5)
        cache = kv.Layout(BLOCK_SIZES).split(new)
        cache = (*cache, *kv.empty(kv.Layout(BLOCK_SIZES).shapes(MODEL, B, "float32", first=len(cache))))
    else:
        length_B = np.zeros(B, int)
        cache = kv.empty(kv.Layout(BLOCK_SIZES).shapes(MODEL, B, "float32"))
    while length_B.min() < S:
        slot_B = np.minimum(length_B, S - 1)
        logits_BV, new = decode(params, TOKENS_BS[np.arange(B), slot_B], cache, length_B)
        frozen, writable = (cache[:1], cache[1:]) if length_B.min() >= 6 else ((), cache)
        cache = append_all(kv.Cache(frozen, writable), new, length_B).blocks
        live_B = length_B < S
        expected_BV = full_BSV[np.arange(B), slot_B]
        np.testing.assert_allclose(np.asarray(logits_BV)[live_B], expected_BV[live_B], rtol=1e-5, atol=1e-5)
        length_B = length_B + 1


def test_positions_from_the_length_on_are_never_attended_to(params: dict[str, Any]) -> None:
    """Logits are bit-identical whatever the unused positions hold."""
    length_B, token_B = np.array([0, 5, S - 1]), np.array([1, 2, 3])
    past = random_cache(S, 0)
    unused_BS = np.arange(S)[None] >= length_B[:, None]

    def fill(value: float) -> kv.Block:
        return jax.tree.map(lambda x: jnp.where(unused_BS[:, None, :, None], value, x), past)

    results = [decode(params, token_B, (fill(value),), length_B) for value in (0.0, 1e4, -1e30)]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


def test_slots_do_not_affect_each_other(params: dict[str, Any]) -> None:
    """Replacing the contents of all other slots changes no bit of a slot."""
    length_B, token_B = np.array([3, 7, 12]), np.array([1, 2, 3])
    past, others = random_cache(S, 0), random_cache(S, 1)
    together = decode(params, token_B, (past,), length_B)
    for row in range(B):
        own_B = np.arange(B) == row
        mixed = jax.tree.map(functools.partial(np.where, own_B[:, None, None, None]), past, others)
        alone = decode(params, np.where(own_B, token_B, 30), (mixed,), np.where(own_B, length_B, 5))
        for got, expected in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(got[row], expected[row])
            assert np.any(np.asarray(got[row - 1]) != np.asarray(expected[row - 1]))
