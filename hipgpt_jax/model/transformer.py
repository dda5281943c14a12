"""GPT-2 as pure functions of its parameters.

Axes: ``B`` batch, ``T`` new token, ``S`` cache slot, ``N`` head, ``H`` head width, ``D`` model,
``F`` feed-forward, ``V`` vocabulary, ``L`` layer, ``M`` the ``B * T`` tokens in one row each.

Parameters carry the names of Hugging Face's GPT-2: ``wte``, ``wpe``, ``h_0.attn.c_attn``, …, ``ln_f``.

References:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.model import attention
from hipgpt_jax.model import cache as kv

_INIT_STDDEV = 0.02
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32)


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    config: config.ModelConfig
    dtype: str
    attention: str

    def setup(self) -> None:
        model = self.config
        self.c_attn = _dense(3 * model.embed_dim, self.dtype)
        self.c_proj = _dense(model.embed_dim, self.dtype, residual_of=model)

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

    def setup(self) -> None:
        self.c_fc = _dense(self.config.ff_hidden_dim, self.dtype)
        self.c_proj = _dense(self.config.embed_dim, self.dtype, residual_of=self.config)

    def __call__(self, x_MD: jax.Array) -> jax.Array:
        return self.c_proj(nn.gelu(self.c_fc(x_MD), approximate=True))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    config: config.ModelConfig
    dtype: str
    attention: str

    def setup(self) -> None:
        self.ln_1 = _LayerNorm()
        self.attn = Attention(self.config, self.dtype, self.attention)
        self.ln_2 = _LayerNorm()
        self.mlp = Mlp(self.config, self.dtype)

    def _drop(self, x_MD: jax.Array, dropout: float) -> jax.Array:
        return attention.drop(x_MD, dropout, self.make_rng("dropout")) if dropout else x_MD

    def __call__(self, x_MD: jax.Array, batch: int, dropout: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed_MD, k_BNTH, v_BNTH = self.attn(_normalize(self.ln_1, x_MD), batch, dropout)
        x_MD = x_MD + self._drop(mixed_MD, dropout)
        x_MD = x_MD + self._drop(self.mlp(_normalize(self.ln_2, x_MD)), dropout)
        return x_MD, k_BNTH, v_BNTH

    def last(self, x_MD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed_BD, k_BNTH, v_BNTH = self.attn.last(_normalize(self.ln_1, x_MD), length_B)
        x_BD = _at_last(x_MD.reshape(len(length_B), -1, x_MD.shape[1]), length_B) + mixed_BD
        return x_BD + self.mlp(_normalize(self.ln_2, x_BD)), k_BNTH, v_BNTH

    def decode(
        self, x_BD: jax.Array, past: Sequence[tuple[jax.Array, jax.Array]], length_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed_BD, k_BN1H, v_BN1H = self.attn.decode(_normalize(self.ln_1, x_BD), past, length_B)
        x_BD = x_BD + mixed_BD
        return x_BD + self.mlp(_normalize(self.ln_2, x_BD)), k_BN1H, v_BN1H


class Transformer(nn.Module):
    """GPT-2 with a head tied to the token embedding.

    Example::

        model = Transformer(model_config)
        params = model.init(key, tokens_BT, dropout=0.0)["params"]
        logits_BTV = model.bind({"params": params})(tokens_BT, dropout=0.0)

    Attributes:
        config: Its shape.
        dtype: Type of the arithmetic. Softmax, LayerNorm's statistics and the logits are float32
            whatever it is, and parameters are as ``init`` makes them; ``cast`` narrows them.
        remat: Whether a backward pass computes the activations of a block again instead of keeping them.
        attention: One of ``attention.IMPLEMENTATIONS``; ``devices.Device.attention`` chooses it.
        exact: Whether products are made in ``dtype`` whatever JAX is set to. Else float32 is rounded to
            TF32 on NVIDIA's GPUs, unless ``JAX_DEFAULT_MATMUL_PRECISION`` says otherwise. On a CPU it
            changes no bit.
    """

    config: config.ModelConfig
    dtype: str = "float32"
    remat: bool = False
    attention: str = "xla"
    exact: bool = False

    def setup(self) -> None:
        model = self.config
        init = _normal(_INIT_STDDEV)
        embed = functools.partial(nn.Embed, features=model.embed_dim, embedding_init=init, dtype=self.dtype)
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        self.wte = embed(model.vocab_size)
        self.wpe = embed(model.max_seq_len)
        self.h = [block(model, self.dtype, self.attention) for _ in range(model.num_layers)]
        self.ln_f = _LayerNorm()

    def __call__(self, tokens_BT: jax.Array, *, dropout: float) -> jax.Array:
        """Logits of every next token.

        Args:
            tokens_BT: Ids ``[B, T]``, ``T`` at most ``max_seq_len``.
            dropout: Probability of dropping an activation, on when training; 0 elsewhere. Above 0,
                ``bind`` needs ``rngs={"dropout": key}``. Changing it compiles again.

        Returns:
            Logits ``[B, T, V]`` in float32; ``[:, t]`` depends on tokens up to ``t`` alone.
        """
        with self._precision():
            x_MD, _ = self._hidden(tokens_BT, dropout, self.h)
            return self._logits(x_MD).reshape(*tokens_BT.shape, -1)

    def prefill(self, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Logits of the token after each row's first ``length`` ones, and the cache they leave.

        The last block computes its output for the last of those alone: a context of 256 tokens of D256 L8
        takes 19 ms instead of 22 on 2 cores.

        Args:
            tokens_BT: Ids ``[B, T]`` from position 0; what stands at ``length`` and after is padding,
                which no real token sees.
            length_B: Real tokens of each row, at least 1.

        Returns:
            Logits ``[B, V]``, and keys and values ``[B, N, T, H]`` of each layer.
        """
        with self._precision():
            x_MD, new = self._hidden(tokens_BT, 0.0, self.h[:-1])
            x_BD, k_BNTH, v_BNTH = self.h[-1].last(x_MD, length_B)
            return self._logits(x_BD), kv.Cache((*new.keys, k_BNTH), (*new.values, v_BNTH))

    def decode(self, token_B: jax.Array, past: tuple[kv.Cache, ...], length_B: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Logits of the token after ``token``, which stands at position ``length`` behind the cache.

        Args:
            token_B: The newest id of each row.
            past: Parts of the cache of the tokens before it, from the first slot on; as many as hold one.
            length_B: Number of those, below the model's positions.

        Returns:
            Logits ``[B, V]``, and the token's own keys and values ``[B, N, 1, H]`` of each layer.
        """
        x_BD = self.wte(token_B) + self.wpe(length_B)
        new = []
        with self._precision():
            for layer, block in enumerate(self.h):
                own = [(part.keys[layer], part.values[layer]) for part in past]
                x_BD, k_BN1H, v_BN1H = block.decode(x_BD, own, length_B)
                new.append((k_BN1H, v_BN1H))
            return self._logits(x_BD), kv.Cache(*map(tuple, zip(*new, strict=True)))

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return jax.default_matmul_precision(self.dtype) if self.exact else contextlib.nullcontext()

    def _hidden(self, tokens_BT: jax.Array, dropout: float, blocks: Sequence[Block]) -> tuple[jax.Array, kv.Cache]:
        """Runs blocks on rows of tokens; the dense layers see ``[B * T, D]``.

        On a CPU the training step on ``[B * T, D]`` is 1.5 (D128 L4) to 3.6 times (D256 L8) faster
        than on ``[B, T, D]``, whose backward products XLA does not hand to its matrix library.
        """
        B, T = tokens_BT.shape
        x_BTD = self.wte(tokens_BT) + self.wpe(jnp.arange(T))[None]
        x_MD = x_BTD.reshape(B * T, -1)
        if dropout:
            x_MD = attention.drop(x_MD, dropout, self.make_rng("dropout"))
        keys, values = [], []
        for block in blocks:
            x_MD, k_BNTH, v_BNTH = block(x_MD, B, dropout)
            keys.append(k_BNTH)
            values.append(v_BNTH)
        return x_MD, kv.Cache(tuple(keys), tuple(values))

    def _logits(self, x_MD: jax.Array) -> jax.Array:
        """Head tied to the embedding, contracted as it is stored: ``x @ wte.T`` copied it every token."""
        head_VD = self.wte.embedding.astype(self.dtype)
        return jnp.einsum("MD,VD->MV", _normalize(self.ln_f, x_MD), head_VD, preferred_element_type=jnp.float32)


def cast(params: Any, dtype: str) -> Any:
    """Returns parameters as a ``Transformer`` of ``dtype`` multiplies them; LayerNorm's stay as they are.

    No bit of its results changes, and the memory they are read from is that of ``dtype``.

    Args:
        params: Parameters, arrays of NumPy's or JAX's.
        dtype: As of ``Transformer``.
    """

    def narrow(path: tuple[Any, ...], x: Any) -> Any:
        return x if path[-2].key.startswith("ln_") else x.astype(dtype, copy=False)

    return jax.tree_util.tree_map_with_path(narrow, params)


def _normalize(norm: nn.LayerNorm, x_MD: jax.Array) -> jax.Array:
    """LayerNorm in float32, back in the type of its argument."""
    return norm(x_MD.astype(jnp.float32)).astype(x_MD.dtype)


def _at_last(x_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """Returns what stands at each row's last token, ``[B, ...]`` of ``[B, T, ...]``."""
    return jnp.take_along_axis(x_BT, jnp.expand_dims(length_B - 1, tuple(range(1, x_BT.ndim))), axis=1)[:, 0]


def _normal(stddev: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev)


def _dense(features: int, dtype: str, residual_of: config.ModelConfig | None = None) -> nn.Dense:
    """A biased linear layer; one that writes to the residual stream starts smaller, by its depth."""
    depth = 2 * residual_of.num_layers if residual_of else 1
    return nn.Dense(features, dtype=dtype, kernel_init=_normal(_INIT_STDDEV / math.sqrt(depth)))
