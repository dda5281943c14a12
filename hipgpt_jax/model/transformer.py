"""GPT-2 as pure functions of its parameters.

Axes: ``B`` batch, ``T`` new token, ``S`` cache slot, ``N`` head, ``H`` head width, ``D`` model,
``F`` feed-forward, ``V`` vocabulary, ``L`` layer, ``M`` the ``B * T`` tokens in one row each.

Parameters carry the names of Hugging Face's GPT-2: ``wte``, ``wpe``, ``h_0.attn.c_attn``, …, ``ln_f``.

References:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

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
        config: Its shape.
        dtype: Type of the arithmetic. Softmax, LayerNorm's statistics and the logits are float32
            whatever it is, and parameters are as ``init`` makes them; ``cast`` narrows them.
        remat: Whether a backward pass computes the activations of a block again instead of keeping them.
        attention: One of ``attention.IMPLEMENTATIONS``; ``devices.Device.attention`` chooses it.
        full_precision: Whether products are made in ``dtype`` whatever JAX is set to. Else float32 is rounded to
            TF32 on NVIDIA's GPUs, unless ``JAX_DEFAULT_MATMUL_PRECISION`` says otherwise. On a CPU it
            changes no bit.
        transposed_kernels: Whether kernels are ``[out, in]``, as ``parameters.transpose_kernels`` makes them, and the
            head multiplies a single row as products that are summed.
    """

    config: config.ModelConfig
    dtype: str = "float32"
    remat: bool = False
    attention: str = "xla"
    full_precision: bool = False
    transposed_kernels: bool = False

    def setup(self) -> None:
        model = self.config
        init = nn.initializers.normal(block.INIT_STDDEV)
        embed = functools.partial(nn.Embed, features=model.embed_dim, embedding_init=init)
        make = nn.remat(block.Block, static_argnums=(2, 3)) if self.remat else block.Block
        self.wte = embed(model.vocab_size)
        self.wpe = embed(model.max_seq_len)
        self.h = [make(model, self.dtype, self.attention, self.transposed_kernels) for _ in range(model.num_layers)]
        self.ln_f = block.LayerNorm()

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
            layers = [lambda x_MD, layer=layer: layer(x_MD, len(tokens_BT), dropout) for layer in self.h]
            x_MD, _ = self._hidden(tokens_BT, dropout, layers)
            return self._logits(x_MD).reshape(*tokens_BT.shape, -1)

    def prefill(self, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, kv.Block]:
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
            read = self._block("__call__", batch=len(tokens_BT), dropout=0.0)
            layers = [functools.partial(read, layer.variables) for layer in self.h[:-1]]
            x_MD, new = self._hidden(tokens_BT, 0.0, layers)
            x_BD, k_BNTH, v_BNTH = self._block("last")(self.h[-1].variables, x_MD, length_B)
            return self._logits(x_BD), kv.Block((*new.keys, k_BNTH), (*new.values, v_BNTH))

    def decode(
        self, token_B: jax.Array, blocks: tuple[kv.Block, ...], length_B: jax.Array
    ) -> tuple[jax.Array, kv.Block]:
        """Logits of the token after ``token``, which stands at position ``length`` behind the cache.

        Args:
            token_B: The newest id of each row.
            past: Parts of the cache of the tokens before it, from the first slot on; as many as hold one.
            length_B: Number of those. A row of as many as the model has positions takes the last one anew: what
                comes of it means nothing, but is finite.

        Returns:
            Logits ``[B, V]``, and the token's own keys and values ``[B, N, 1, H]`` of each layer.
        """
        x_BD = self._look_up(self.wte, token_B)
        x_BD += self._look_up(self.wpe, jnp.minimum(length_B, self.config.max_seq_len - 1))
        decode, new = self._block("decode"), []
        with self._precision():
            for index, layer in enumerate(self.h):
                own = [each.layer(index) for each in blocks]
                x_BD, k_BN1H, v_BN1H = decode(layer.variables, x_BD, own, length_B)
                new.append((k_BN1H, v_BN1H))
            return self._logits(x_BD), kv.Block(*map(tuple, zip(*new, strict=True)))

    def _block(self, method: str, **fixed: Any) -> Callable[..., Any]:
        return block.function(self.config, self.dtype, self.attention, self.transposed_kernels, method, **fixed)

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return jax.default_matmul_precision(self.dtype) if self.full_precision else contextlib.nullcontext()

    def _hidden(
        self,
        tokens_BT: jax.Array,
        dropout: float,
        layers: Sequence[Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]],
    ) -> tuple[jax.Array, kv.Block]:
        """Runs blocks on rows of tokens; the dense layers see ``[B * T, D]``.

        On a CPU the training step on ``[B * T, D]`` is 1.5 (D128 L4) to 3.6 times (D256 L8) faster
        than on ``[B, T, D]``, whose backward products XLA does not hand to its matrix library.
        """
        B, T = tokens_BT.shape
        x_BTD = self._look_up(self.wte, tokens_BT) + self._look_up(self.wpe, jnp.arange(T))[None]
        x_MD = x_BTD.reshape(B * T, -1)
        if dropout:
            x_MD = attention.drop(x_MD, dropout, self.make_rng("dropout"))
        keys, values = [], []
        for layer in layers:
            x_MD, k_BNTH, v_BNTH = layer(x_MD)
            keys.append(k_BNTH)
            values.append(v_BNTH)
        return x_MD, kv.Block(tuple(keys), tuple(values))

    def _look_up(self, embed: nn.Embed, ids: jax.Array) -> jax.Array:
        """Rows of an embedding; their gradients are added up in its type, and not in that of the arithmetic."""
        return jnp.take(embed.embedding, ids, axis=0).astype(self.dtype)

    def _logits(self, x_MD: jax.Array) -> jax.Array:
        x_MD, head_VD = block.normalize(self.ln_f, x_MD), self.wte.embedding.astype(self.dtype)
        if self.transposed_kernels and len(x_MD) == 1:
            # For a product of one row, XLA widens the whole head to float32 on a GPU: 0.10 ms per token of GPT-2 on an
            # H200.
            return jnp.sum(x_MD.astype(jnp.float32) * head_VD.astype(jnp.float32), axis=-1)[None]
        return block.head(x_MD, head_VD)
