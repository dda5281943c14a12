"""One block of GPT-2: attention and feed-forward, each added to the residual stream. Axes as in ``transformer``."""

import functools
import math
from collections.abc import Callable
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
    transposed_kernels: bool

    def setup(self) -> None:
        model = self.config
        self.c_attn = Linear(3 * model.embed_dim, self.dtype, self.transposed_kernels)
        self.c_proj = Linear(model.embed_dim, self.dtype, self.transposed_kernels, _residual(model))

    def __call__(
        self, x_MD: jax.Array, attend: attention.Attend, dropout: float, *cached: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv_MD = jnp.split(self.c_attn(x_MD), 3, axis=-1)
        qkv_MNH = [part_MD.reshape(-1, self.config.num_heads, self.config.head_dim) for part_MD in qkv_MD]
        key = self.make_rng("dropout") if dropout else None
        out_MNH, keys, values = attend(*qkv_MNH, key, *cached)
        return self.c_proj(out_MNH.reshape(-1, x_MD.shape[1])), keys, values


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
    transposed_kernels: bool = False

    def setup(self) -> None:
        self.ln_1 = LayerNorm()
        self.attn = Attention(self.config, self.dtype, self.transposed_kernels)
        self.ln_2 = LayerNorm()
        self.mlp = Mlp(self.config, self.dtype, self.transposed_kernels)

    def __call__(
        self, x_MD: jax.Array, attend: attention.Attend, dropout: float, *cached: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Applies the block.

        Args:
            x_MD: Tokens, one per row.
            attend: Attention of the phase: training, prefill or decoding. Static.
            dropout: Probability of dropping an activation. Static.
            *cached: Further arguments of ``attend``.

        Returns:
            The rows that ``attend`` computes outputs for, and keys and values of all rows.
        """
        out_MD, keys, values = self.attn(normalize(self.ln_1, x_MD), attend, dropout, *cached)
        x_MD = attend.rows(x_MD, *cached) + self._drop(out_MD, dropout)
        return x_MD + self._drop(self.mlp(normalize(self.ln_2, x_MD)), dropout), keys, values

    def _drop(self, x_MD: jax.Array, dropout: float) -> jax.Array:
        return attention.drop(x_MD, dropout, self.make_rng("dropout")) if dropout else x_MD


@functools.cache
def apply_fn(
    model: config.ModelConfig, dtype: str, transposed_kernels: bool, attend: attention.Attend
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns a block as a function of its variables, ``x_MD`` and the further arguments of ``attend``.

    Layers differ in their variables alone, so the function is traced once for all of them. XLA gets the same program.
    """
    # If every layer is traced, the first token of the run in the package, of 5 layers, takes 0.75 s instead of 0.61 s.
    block = Block(model, dtype, transposed_kernels, parent=None)

    def apply(variables: Any, x_MD: jax.Array, *cached: Any) -> Any:
        return block.apply(variables, x_MD, attend, 0.0, *cached)

    return jax.jit(apply)


def normalize(norm: nn.LayerNorm, x_MD: jax.Array) -> jax.Array:
    """LayerNorm in float32, cast back to the type of its argument."""
    return norm(x_MD.astype(jnp.float32)).astype(x_MD.dtype)


@jax.custom_vjp
def head(x_MD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Logits ``[M, V]`` in float32, of a head tied to the embedding.

    Its gradients are products in the type of ``x``, like those of all other layers. JAX's own derivative would multiply
    in float32, the type of the logits' gradient.
    """
    # Contracted as the embedding is stored: x @ wte.T copied the whole table for every token, 154 MB for GPT-2.
    return jnp.einsum("MD,VD->MV", x_MD, head_VD, preferred_element_type=jnp.float32)


def _head_gradients(saved: tuple[jax.Array, jax.Array], of_logits_MV: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, head_VD = saved
    of_logits_MV = of_logits_MV.astype(x_MD.dtype)
    return jnp.einsum("MV,VD->MD", of_logits_MV, head_VD), jnp.einsum("MV,MD->VD", of_logits_MV, x_MD)


head.defvjp(lambda x_MD, head_VD: (head(x_MD, head_VD), (x_MD, head_VD)), _head_gradients)


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
    """Standard deviation of a kernel that writes to the residual stream; it shrinks with the model's depth."""
    return INIT_STDDEV / math.sqrt(2 * model.num_layers)
