"""Attention of each phase, and dropout, as pure functions. Axes as in ``transformer``."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla", "cudnn")

_Attended = tuple[jax.Array, jax.Array, jax.Array]  # outputs, one per row; keys and values [B, N, T, H]
_Blocks = Sequence[tuple[jax.Array, jax.Array]]  # keys and values

# Queries are processed in blocks of at least 64 tokens, at most four of them, each against the keys up to its last
# query.
_SMALLEST_BLOCK = 64
_BLOCKS = 4


class Attend(Protocol):
    """Attention of a phase. Hashable, because a block is traced once for each.

    It is called with queries, keys and values, one token per row, with a dropout key, and with what else it needs.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> _Attended: ...

    def rows(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns the rows of its first argument that have an output; the others are what else it needs."""
        ...


@dataclasses.dataclass(frozen=True)
class Full:
    """Attention of all tokens of ``batch`` contexts among themselves, for training and prefill.

    Attributes:
        batch: Number of contexts.
        implementation: See ``causal_attention``.
        dropout: See ``causal_attention``.
    """

    batch: int
    implementation: str = "xla"
    dropout: float = 0.0

    def __call__(self, q_MNH: jax.Array, k_MNH: jax.Array, v_MNH: jax.Array, key: jax.Array | None) -> _Attended:
        q_BTNH, k_BTNH, v_BTNH = (x.reshape(self.batch, -1, *x.shape[1:]) for x in (q_MNH, k_MNH, v_MNH))
        options = {"dropout": self.dropout, "dropout_key": key, "implementation": self.implementation}
        out_BTNH = causal_attention(q_BTNH, k_BTNH, v_BTNH, **options)
        return out_BTNH.reshape(q_MNH.shape), k_BTNH.swapaxes(1, 2), v_BTNH.swapaxes(1, 2)

    def rows(self, x_MD: jax.Array) -> jax.Array:
        """Returns the rows that have an output."""
        return x_MD


@dataclasses.dataclass(frozen=True)
class LastToken:
    """Attention of the last token of each context, of ``length`` tokens, for the last block of a prefill."""

    def __call__(
        self, q_MNH: jax.Array, k_MNH: jax.Array, v_MNH: jax.Array, key: None, length_B: jax.Array
    ) -> _Attended:
        q_BNH, k_BNH, v_BNH = (self.rows(x, length_B) for x in (q_MNH, k_MNH, v_MNH))
        k_BNTH, v_BNTH = (x.reshape(len(length_B), -1, *x.shape[1:]).swapaxes(1, 2) for x in (k_MNH, v_MNH))
        return cached_attention(q_BNH, k_BNH, v_BNH, [(k_BNTH, v_BNTH)], length_B - 1), k_BNTH, v_BNTH

    def rows(self, x_MD: jax.Array, length_B: jax.Array) -> jax.Array:
        """Returns the rows that have an output."""
        x_BT = x_MD.reshape(len(length_B), -1, *x_MD.shape[1:])
        last = jnp.expand_dims(length_B - 1, tuple(range(1, x_BT.ndim)))
        return jnp.take_along_axis(x_BT, last, axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Cached:
    """Attention of one new token per row to itself and the cached ones; see ``cached_attention``."""

    def __call__(
        self, q_BNH: jax.Array, k_BNH: jax.Array, v_BNH: jax.Array, key: None, blocks: _Blocks, length_B: jax.Array
    ) -> _Attended:
        return cached_attention(q_BNH, k_BNH, v_BNH, blocks, length_B), k_BNH[:, :, None], v_BNH[:, :, None]

    def rows(self, x_BD: jax.Array, *_: object) -> jax.Array:
        """Returns the rows that have an output."""
        return x_BD


def causal_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    dropout: float,
    dropout_key: jax.Array | None,
    implementation: str = "xla",
) -> jax.Array:
    """Causal attention of new tokens among themselves; softmax in float32.

    Args:
        q_BTNH: Queries.
        k_BTNH: Keys.
        v_BTNH: Values.
        dropout: Probability of dropping a weight of attention.
        dropout_key: Its key; None drops nothing.
        implementation: ``xla``, or ``cudnn`` on an NVIDIA GPU; with a dropout key it is always ``xla``.

    Returns:
        ``[B, T, N, H]``, of the arguments' type.
    """
    # In four blocks, three eighths of the square of scores are never computed. D256, 8 rows of 256 tokens, 2 cores: a
    # layer with its gradient takes 22 ms, and 36 ms in one block. With heads before tokens the forward pass takes 11
    # ms, with tokens before heads 34 ms.
    if implementation == "cudnn" and dropout_key is None:
        return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn")
    q_BNTH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    T = q_BNTH.shape[2]
    size = max(_SMALLEST_BLOCK, -(-T // _BLOCKS))
    outputs = []
    for first in range(0, T, size):
        last = min(first + size, T)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, first)
        block = q_BNTH[:, :, first:last], k_BNSH[:, :, :last], v_BNSH[:, :, :last]
        outputs.append(_attend_block(*block, dropout=dropout, dropout_key=key))
    return jnp.concatenate(outputs, axis=2).swapaxes(1, 2)


def _attend_block(
    q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, *, dropout: float, dropout_key: jax.Array | None
) -> jax.Array:
    """Attention of the last ``T`` of ``S`` tokens."""
    T, S = q_BNTH.shape[2], k_BNSH.shape[2]
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BNTS / math.sqrt(q_BNTH.shape[-1])
    mask_TS = jnp.tril(jnp.ones((T, S), bool), S - T)
    scores_BNTS = jnp.where(mask_TS, scores_BNTS, jnp.finfo(scores_BNTS.dtype).min)
    weights_BNTS = jnp.exp(scores_BNTS - jax.lax.stop_gradient(scores_BNTS.max(axis=-1, keepdims=True)))
    denominator_BNT1 = weights_BNTS.sum(axis=-1, keepdims=True)
    if dropout_key is not None:
        weights_BNTS = drop(weights_BNTS, dropout, dropout_key)
    out_BNTH = jnp.einsum(
        "BNTS,BNSH->BNTH", weights_BNTS.astype(v_BNSH.dtype), v_BNSH, preferred_element_type=jnp.float32
    )
    # Dividing the output rather than the weights, which are more, takes 0.73 ms instead of 0.94 (D256, 256 tokens).
    return (out_BNTH / denominator_BNT1).astype(v_BNSH.dtype)


def cached_attention(
    q_BNH: jax.Array,
    k_BNH: jax.Array,
    v_BNH: jax.Array,
    blocks: _Blocks,
    length_B: jax.Array,
) -> jax.Array:
    """Attention of one new token to the ``length`` cached ones and itself; softmax in float32.

    Args:
        q_BNH: Query of the new token.
        k_BNH: Its key.
        v_BNH: Its value.
        blocks: Keys and values ``[B, N, S, H]`` of the cache blocks that hold a token of any row, from position 0
            on. A block that holds no token of a row changes no bit of that row.
        length_B: Cached tokens of each row.

    Returns:
        ``[B, N, H]``, of the query's type.
    """
    # The cache is read as it was before the token, whose own key and value are handled beside it: XLA copies a cache
    # that is written before all of it is read, 144 MB per token for GPT-2.
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = 1 / math.sqrt(q_BNH.shape[-1])
    self_score_BN1 = jnp.sum(q_BNH.astype(jnp.float32) * k_BNH.astype(jnp.float32), axis=-1, keepdims=True) * scale
    top_BN1, first, read = self_score_BN1, 0, []
    for k_BNSH, v_BNSH in blocks:
        scores_BNS = einsum("BNH,BNSH->BNS", q_BNH, k_BNSH) * scale
        mask_B1S = (first + jnp.arange(k_BNSH.shape[2])[None] < length_B[:, None])[:, None]
        scores_BNS = jnp.where(mask_B1S, scores_BNS, jnp.finfo(scores_BNS.dtype).min)
        top_BN1 = jnp.maximum(top_BN1, scores_BNS.max(axis=-1, keepdims=True))
        read.append((scores_BNS, mask_B1S, v_BNSH))
        first += k_BNSH.shape[2]
    self_score_BN1 = jnp.exp(self_score_BN1 - top_BN1)
    denominator_BN1, out_BNH = self_score_BN1, self_score_BN1 * v_BNH.astype(jnp.float32)
    for scores_BNS, mask_B1S, v_BNSH in read:
        weights_BNS = jnp.where(mask_B1S, jnp.exp(scores_BNS - top_BN1), 0)
        denominator_BN1 = denominator_BN1 + weights_BNS.sum(axis=-1, keepdims=True)
        out_BNH = out_BNH + einsum("BNS,BNSH->BNH", weights_BNS.astype(v_BNSH.dtype), v_BNSH)
    return (out_BNH / denominator_BN1).astype(q_BNH.dtype)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes each element with probability ``rate``, to 16 bits, and scales up the rest.

    References:
        Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014.
    """
    threshold = min(round(rate * 2**16), 2**16 - 1)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= threshold
    return jnp.where(keep, x / (1 - threshold / 2**16), 0)
