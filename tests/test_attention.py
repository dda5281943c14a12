"""Tests of attention in blocks of queries against full attention in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax.model import attention

B, N, H = 2, 3, 8
attend = jax.jit(attention.causal_attention, static_argnames="dropout")


def heads(T: int, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys and values ``[B, T, N, H]``."""
    return [np.random.RandomState(seed + part).normal(0, 1, (B, T, N, H)).astype(np.float32) for part in range(3)]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130, 256, 300])
def test_attention_in_blocks_matches_float64(T: int) -> None:
    """One block, blocks of 64 with a short last one, four of them, and four larger ones."""
    q_BTNH, k_BTNH, v_BTNH = heads(T)
    scores_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH.astype(np.float64), k_BTNH) / np.sqrt(H)
    scores_BNTS[:, :, np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] = -np.inf
    probs_BNTS = np.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
    probs_BNTS /= probs_BNTS.sum(-1, keepdims=True)
    got_BTNH = attend(q_BTNH, k_BTNH, v_BTNH, dropout=0.0, dropout_key=None)
    np.testing.assert_allclose(got_BTNH, np.einsum("BNTS,BSNH->BTNH", probs_BNTS, v_BTNH), atol=1e-5)


@pytest.mark.parametrize("at", [0, 63, 64, 129])
def test_no_block_attends_to_later_positions(at: int) -> None:
    def output(k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
        return attend(q_BTNH, k_BTNH, v_BTNH, dropout=0.0, dropout_key=None)[:, at].sum()

    q_BTNH, k_BTNH, v_BTNH = heads(130)
    for gradient_BTNH in jax.grad(output, argnums=(0, 1))(k_BTNH, v_BTNH):
        np.testing.assert_array_equal(gradient_BTNH[:, at + 1 :], 0)
        assert np.all(np.any(gradient_BTNH[:, : at + 1] != 0, axis=(2, 3))) or at == 0


def test_blocks_have_independent_dropout_masks_that_preserve_the_mean() -> None:
    """Equal queries and keys have equal probabilities, so the output shows the dropout mask of each block."""
    T = 128
    ones_BTNH, v_BTNH = (
        np.ones((B, T, N, H), np.float32),
        np.tile(np.eye(T, H, dtype=np.float32)[None, :, None], (B, 1, N, 1)),
    )
    dropped_BTNH = attend(ones_BTNH, ones_BTNH, v_BTNH, dropout=0.5, dropout_key=jax.random.key(3))
    kept_BTNH = np.asarray(dropped_BTNH) > 0
    assert np.any(kept_BTNH[:, 32:64] != kept_BTNH[:, 96:128])
    assert kept_BTNH[:, H:].mean() == pytest.approx(0.5, abs=0.05)
    mean = np.mean([attend(*heads(70), dropout=0.3, dropout_key=jax.random.key(k)) for k in range(200)], axis=0)
    whole = attend(*heads(70), dropout=0.0, dropout_key=None)
    np.testing.assert_allclose(mean, whole, atol=0.35)
    assert np.abs(mean - whole).mean() < 0.04
    assert jnp.isfinite(mean).all()


def test_cudnn_is_used_when_selected_and_without_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JAX's XLA implementation stands in for cuDNN, with the same axes and mask."""
    implementations: list[str] = []
    reference = jax.nn.dot_product_attention

    def stand_in(*arrays: jax.Array, implementation: str, **settings: Any) -> jax.Array:
        implementations.append(implementation)
        return reference(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    own = attention.causal_attention(*map(jnp.asarray, heads(70)), dropout=0.0, dropout_key=None)
    found = attention.causal_attention(
        *map(jnp.asarray, heads(70)), dropout=0.0, dropout_key=None, implementation="cudnn"
    )
    np.testing.assert_allclose(found, own, atol=1e-5)
    attention.causal_attention(
        *map(jnp.asarray, heads(70)), dropout=0.1, dropout_key=jax.random.key(0), implementation="cudnn"
    )
    assert implementations == ["cudnn"]
