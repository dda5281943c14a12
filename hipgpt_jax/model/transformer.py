"""GPT-2 as pure functions of its parameters.

Axes: ``B`` batch, ``T`` new token, ``S`` cache position, ``N`` head, ``H`` head width, ``D`` model,
``F`` feed-forward, ``V`` vocabulary, ``L`` layer, ``M`` the ``B * T`` tokens in one row each.

Parameters carry the names of Hugging Face's GPT-2: ``wte``, ``wpe``, ``h_0.attn.c_attn``, …, ``ln_f``.

References:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import contextlib
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from hipgpt_jax import config
from hipgpt_jax.model import attention, block
from hipgpt_jax.model import cache as kv


class Transformer(nn.Module):
    """GPT-2 with a head tied to the token embedding.

    Example::

        model = Transformer(model_config)
        params = model.init(key, tokens_BT, dropout=0.0)["params"]
        logits_BTV = model.bind({"params": params})(tokens_BT, dropout=0.0)

    Attributes:
        config: Shape of the model.
        dtype: Type of the arithmetic. Softmax, LayerNorm's statistics and the logits are always float32, and ``init``
            makes float32 parameters; ``parameters.cast`` casts them.
        remat: Whether a backward pass recomputes the activations of a block instead of storing them.
        attention_impl: One of ``attention.IMPLEMENTATIONS``; ``devices.Device.attention`` chooses it.
        full_precision: Whether products are computed in ``dtype`` whatever JAX's setting is. Otherwise an NVIDIA GPU
            rounds float32 to TF32, unless ``JAX_DEFAULT_MATMUL_PRECISION`` is set. It changes no bit on a CPU.
        transposed_kernels: Whether kernels are ``[out, in]``, as ``parameters.transpose_kernels`` makes them, and the
            logits of a single row are computed as an elementwise product and a sum.
    """

    config: config.ModelConfig
    dtype: str = "float32"
    remat: bool = False
    attention_impl: str = "xla"
    full_precision: bool = False
    transposed_kernels: bool = False

    def setup(self) -> None:
        model = self.config
        embed = functools.partial(
            nn.Embed, features=model.embed_dim, embedding_init=nn.initializers.normal(block.INIT_STDDEV)
        )
        make_block = nn.remat(block.Block, static_argnums=(2, 3)) if self.remat else block.Block
        self.wte = embed(model.vocab_size)
        self.wpe = embed(model.max_seq_len)
        self.h = [make_block(model, self.dtype, self.transposed_kernels) for _ in range(model.num_layers)]
        self.ln_f = block.LayerNorm()

    def __call__(self, tokens_BT: jax.Array, *, dropout: float) -> jax.Array:
        """Logits of every next token.

        Args:
            tokens_BT: Ids ``[B, T]``, ``T`` at most ``max_seq_len``.
            dropout: Probability of dropping an activation, above 0 in training alone, where ``bind`` needs
                ``rngs={"dropout": key}``. Changing it recompiles.

        Returns:
            Logits ``[B, T, V]`` in float32; ``[:, t]`` depends on the tokens up to ``t`` alone.
        """
        with self._precision():
            x_MD = self._embed(tokens_BT)
            if dropout:
                x_MD = attention.drop(x_MD, dropout, self.make_rng("dropout"))
            attend = attention.Full(len(tokens_BT), self.attention_impl, dropout)
            for layer in self.h:
                x_MD, _, _ = layer(x_MD, attend, dropout)
            return self._logits(x_MD).reshape(*tokens_BT.shape, -1)

    def prefill(self, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, kv.Block]:
        """Logits of the token after each row's first ``length`` ones, and their keys and values.

        Args:
            tokens_BT: Ids ``[B, T]`` from position 0. Those at and beyond ``length`` are padding, which no real token
                attends to.
            length_B: Real tokens of each row, at least 1.

        Returns:
            Logits ``[B, V]``, and keys and values ``[B, N, T, H]`` of each layer.
        """
        with self._precision():
            x_MD = self._embed(tokens_BT)
            full = self._apply(attention.Full(len(tokens_BT), self.attention_impl))
            last = self._apply(attention.LastToken())
            keys, values = [], []
            for layer in self.h[:-1]:
                x_MD, k_BNTH, v_BNTH = full(layer.variables, x_MD)
                keys.append(k_BNTH)
                values.append(v_BNTH)
            # The last block computes outputs for the last token alone: 256 tokens of D256 L8 take 19 ms instead of 22.
            x_BD, k_BNTH, v_BNTH = last(self.h[-1].variables, x_MD, length_B)
            return self._logits(x_BD), kv.Block((*keys, k_BNTH), (*values, v_BNTH))

    def decode(
        self, token_B: jax.Array, blocks: tuple[kv.Block, ...], length_B: jax.Array
    ) -> tuple[jax.Array, kv.Block]:
        """Logits of the token after ``token``, whose position is ``length``.

        Args:
            token_B: The newest id of each row.
            blocks: Cache blocks of the tokens before it, from position 0 on; all that hold one.
            length_B: Number of those tokens. For a row of as many tokens as the model has positions, the result is
                undefined but finite.

        Returns:
            Logits ``[B, V]``, and the token's own keys and values ``[B, N, 1, H]`` of each layer.
        """
        x_BD = self._look_up(self.wte, token_B)
        x_BD += self._look_up(self.wpe, jnp.minimum(length_B, self.config.max_seq_len - 1))
        apply, keys, values = self._apply(attention.Cached()), [], []
        with self._precision():
            for index, layer in enumerate(self.h):
                of_layer = [one.layer(index) for one in blocks]
                x_BD, k_BN1H, v_BN1H = apply(layer.variables, x_BD, of_layer, length_B)
                keys.append(k_BN1H)
                values.append(v_BN1H)
            return self._logits(x_BD), kv.Block(tuple(keys), tuple(values))

    def _apply(self, attend: attention.Attend) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
        return block.apply_fn(self.config, self.dtype, self.transposed_kernels, attend)

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return jax.default_matmul_precision(self.dtype) if self.full_precision else contextlib.nullcontext()

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns embedded tokens, one per row: the dense layers see ``[B * T, D]``."""
        # XLA hands the backward products of [B, T, D] on a CPU to no matrix library: the training step on [B * T, D] is
        # 1.5 (D128 L4) to 3.6 times (D256 L8) as fast.
        B, T = tokens_BT.shape
        x_BTD = self._look_up(self.wte, tokens_BT) + self._look_up(self.wpe, jnp.arange(T))[None]
        return x_BTD.reshape(B * T, -1)

    def _look_up(self, embed: nn.Embed, ids: jax.Array) -> jax.Array:
        """Rows of an embedding, cast after the lookup, so that their gradients are summed in the embedding's type."""
        return jnp.take(embed.embedding, ids, axis=0).astype(self.dtype)

    def _logits(self, x_MD: jax.Array) -> jax.Array:
        x_MD, head_VD = block.normalize(self.ln_f, x_MD), self.wte.embedding.astype(self.dtype)
        if self.transposed_kernels and len(x_MD) == 1:
            # For a product of one row, XLA widens the whole head to float32 on a GPU: 0.10 ms per token of GPT-2 on an
            # H200.
            return jnp.sum(x_MD.astype(jnp.float32) * head_VD.astype(jnp.float32), axis=-1)[None]
        return block.head(x_MD, head_VD)
