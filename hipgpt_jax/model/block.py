"""One block of GPT-2: attention and feed-forward, each added to the residual stream. Axes as in ``transformer``."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.model import attention

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32)
INIT_STDDEV = 0.02


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    config: config.ModelConfig
    dtype: str
    attention: str
    transposed_kernels: bool

    def setup(self) -> None:
        model = self.config
        self.c_attn = Linear(3 * model.embed_dim, self.dtype, self.transposed_kernels)
        self.c_proj = Linear(model.embed_dim, self.dtype, self.transposed_kernels, _residual(model))

    def _heads(self, x_MD: jax.Array) -> list[jax.Array]:
        """Returns queries, keys and values, each ``[M, N, H]``."""
        qkv_MD = jnp.split(self.c_attn(x_MD), 3, axis=-1)
        return [part_MD.reshape(-1, self.config.num_heads, self.config.head_dim) for part_MD in qkv_MD]

    def __call__(self, x_MD: jax.Array, batch: int, dropout: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BTNH, k_BTNH, v_BTNH = (part.reshape(batch, -1, *part.shape[1:]) for part in self._heads(x_MD))
        key = self.make_rng("dropout") if dropout else None
        mixed_BTNH = attention.attend(
            q_BTNH, k_BTNH, v_BTNH, dropout=dropout, dropout_key=key, implementation=self.attention
        )
        return self.c_proj(mixed_BTNH.reshape(x_MD.shape)), k_BTNH.swapaxes(1, 2), v_BTNH.swapaxes(1, 2)

    def last(self, x_MD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        parts = [part.reshape(len(length_B), -1, *part.shape[1:]) for part in self._heads(x_MD)]
        q_BNH, k_BNH, v_BNH = (_at_last(part_BTNH, length_B) for part_BTNH in parts)
        k_BNTH, v_BNTH = (part_BTNH.swapaxes(1, 2) for part_BTNH in parts[1:])
        mixed_BNH = attention.attend_cached(q_BNH, k_BNH, v_BNH, [(k_BNTH, v_BNTH)], length_B - 1)
        return self.c_proj(mixed_BNH.reshape(len(length_B), -1)), k_BNTH, v_BNTH

    def decode(
        self, x_BD: jax.Array, past: Sequence[tuple[jax.Array, jax.Array]], length_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BNH, k_BNH, v_BNH = self._heads(x_BD)
        mixed_BNH = attention.attend_cached(q_BNH, k_BNH, v_BNH, past, length_B)
        return self.c_proj(mixed_BNH.reshape(x_BD.shape)), k_BNH[:, :, None], v_BNH[:, :, None]


class Mlp(nn.Module):
    """Feed-forward layer with GELU in its tanh form.

    References:
        Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """

    config: config.ModelConfig
    dtype: str
    transposed_kernels: bool

    def setup(self) -> None:
        self.c_fc = Linear(self.config.ff_hidden_dim, self.dtype, self.transposed_kernels)
        self.c_proj = Linear(self.config.embed_dim, self.dtype, self.transposed_kernels, _residual(self.config))

    def __call__(self, x_MD: jax.Array) -> jax.Array:
        return self.c_proj(nn.gelu(self.c_fc(x_MD), approximate=True))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    config: config.ModelConfig
    dtype: str
    attention: str
    transposed_kernels: bool = False

    def setup(self) -> None:
        self.ln_1 = LayerNorm()
        self.attn = Attention(self.config, self.dtype, self.attention, self.transposed_kernels)
        self.ln_2 = LayerNorm()
        self.mlp = Mlp(self.config, self.dtype, self.transposed_kernels)

    def _drop(self, x_MD: jax.Array, dropout: float) -> jax.Array:
        return attention.drop(x_MD, dropout, self.make_rng("dropout")) if dropout else x_MD

    def __call__(self, x_MD: jax.Array, batch: int, dropout: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed_MD, k_BNTH, v_BNTH = self.attn(normalize(self.ln_1, x_MD), batch, dropout)
        x_MD = x_MD + self._drop(mixed_MD, dropout)
        x_MD = x_MD + self._drop(self.mlp(normalize(self.ln_2, x_MD)), dropout)
        return x_MD, k_BNTH, v_BNTH

    def last(self, x_MD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed_BD, k_BNTH, v_BNTH = self.attn.last(normalize(self.ln_1, x_MD), length_B)
        x_BD = _at_last(x_MD.reshape(len(length_B), -1, x_MD.shape[1]), length_B) + mixed_BD
        return x_BD + self.mlp(normalize(self.ln_2, x_BD)), k_BNTH, v_BNTH

    def decode(
        self, x_BD: jax.Array, past: Sequence[tuple[jax.Array, jax.Array]], length_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed_BD, k_BN1H, v_BN1H = self.attn.decode(normalize(self.ln_1, x_BD), past, length_B)
        x_BD = x_BD + mixed_BD
        return x_BD + self.mlp(normalize(self.ln_2, x_BD)), k_BN1H, v_BN1H


@functools.cache
def function(
    model: config.ModelConfig, dtype: str, attention: str, transposed_kernels: bool, method: str, **fixed: Any
) -> Callable[..., Any]:
    """Returns a method of a block as a function of its variables and the arguments that are not ``fixed``.

    Layers differ in their variables alone, so it is traced once for all of them: where all is traced, the first
    token of the run in the package, of 5 layers, comes after 0.61 s instead of 0.75. XLA gets the same program.
    """
    block = Block(model, dtype, attention, transposed_kernels, parent=None)
    return jax.jit(functools.partial(block.apply, method=method, **fixed))


def normalize(norm: nn.LayerNorm, x_MD: jax.Array) -> jax.Array:
    """LayerNorm in float32, back in the type of its argument."""
    return norm(x_MD.astype(jnp.float32)).astype(x_MD.dtype)


@jax.custom_vjp
def head(x_MD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Logits ``[M, V]`` in float32, of a head tied to the embedding, contracted as that is stored.

    ``x @ wte.T`` copied it every token. Its gradients are products in the type of ``x``, like those of all other
    layers: as JAX derives them, the logits' gradient, float32 as they are, would be multiplied in float32.
    """
    return jnp.einsum("MD,VD->MV", x_MD, head_VD, preferred_element_type=jnp.float32)


def _head_gradients(saved: tuple[jax.Array, jax.Array], of_logits_MV: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, head_VD = saved
    of_logits_MV = of_logits_MV.astype(x_MD.dtype)
    return jnp.einsum("MV,VD->MD", of_logits_MV, head_VD), jnp.einsum("MV,MD->VD", of_logits_MV, x_MD)


head.defvjp(lambda x_MD, head_VD: (head(x_MD, head_VD), (x_MD, head_VD)), _head_gradients)


def _at_last(x_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """Returns what stands at each row's last token, ``[B, ...]`` of ``[B, T, ...]``."""
    return jnp.take_along_axis(x_BT, jnp.expand_dims(length_B - 1, tuple(range(1, x_BT.ndim))), axis=1)[:, 0]


class Linear(nn.Module):
    """A biased linear layer on rows ``[M, K]``.

    Attributes:
        features: Width of its output, ``F``.
        dtype: Type of its arithmetic.
        transposed_kernels: Whether the kernel is ``[F, K]`` and not ``[K, F]``; see
            ``parameters.transpose_kernels``.
        stddev: Standard deviation of the kernel that ``init`` makes.
    """

    features: int
    dtype: str
    transposed_kernels: bool
    stddev: float = INIT_STDDEV

    @nn.compact
    def __call__(self, x_MK: jax.Array) -> jax.Array:
        shape = (x_MK.shape[1], self.features)
        init = nn.initializers.normal(self.stddev)
        kernel = self.param("kernel", init, shape[::-1] if self.transposed_kernels else shape).astype(self.dtype)
        bias_F = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return jnp.einsum("MK,FK->MF" if self.transposed_kernels else "MK,KF->MF", x_MK, kernel) + bias_F[None]


def _residual(model: config.ModelConfig) -> float:
    """Standard deviation of a kernel that writes to the residual stream: it starts smaller, by the model's depth."""
    return INIT_STDDEV / math.sqrt(2 * model.num_layers)
