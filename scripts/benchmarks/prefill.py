"""Prefill: time to the first token, compared with a bare forward pass and with the matrix products alone."""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generate, table
from hipgpt_jax import config
from hipgpt_jax.generation import requests, scheduler
from hipgpt_jax.model import transformer

OURS, FORWARD, PRODUCTS = "to the first token", "bare forward pass", "products alone"
RATIOS_TO = (FORWARD, PRODUCTS)
HELD = ((OURS, FORWARD), (OURS, PRODUCTS))

_LONGEST = 1000


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape, in prompt tokens/s; the prompt has 1,000 tokens, or as many as the window holds.

    The bare forward pass is a program of exactly the prompt's length without a KV cache that returns the logits of the
    last position. The matrix products are those of its dense layers, in a chain.
    """
    del options
    params = generate.random_params(model, directory)
    T = min(_LONGEST, model.max_seq_len)
    prompts = np.random.RandomState(0).randint(0, model.vocab_size, (64, T)).astype(np.int32)
    module = transformer.Transformer(model)

    @jax.jit
    def forward(params: Any, tokens_1T: jax.Array) -> jax.Array:
        return module.bind({"params": params}).prefill(tokens_1T, jnp.asarray([T]))[0]

    @jax.jit
    def products(params: Any, x_TD: jax.Array) -> jax.Array:
        for number in range(model.num_layers):
            block = params[f"h_{number}"]
            q_TD, k_TD, v_TD = jnp.split(x_TD @ block["attn"]["c_attn"]["kernel"], 3, axis=-1)
            x_TD = (q_TD + k_TD + v_TD) @ block["attn"]["c_proj"]["kernel"]
            x_TD = x_TD @ block["mlp"]["c_fc"]["kernel"] @ block["mlp"]["c_proj"]["kernel"]
        return jnp.einsum("D,VD->V", x_TD[-1], params["wte"]["embedding"])

    x_TD = jax.random.normal(jax.random.key(0), (T, model.embed_dim)) / 1e3
    return {
        OURS: [_first_token(model, params, prompts)],
        FORWARD: [_timed(T, lambda: forward(params, prompts[:1]))],
        PRODUCTS: [_timed(T, lambda: products(params, x_TD))],
    }


def _first_token(model: config.ModelConfig, params: Any, prompts: np.ndarray) -> table.Request:
    generator = scheduler.Scheduler(model, params, config.DecodingConfig())
    number = 0

    def request() -> tuple[float, float]:
        nonlocal number
        number += 1  # a repeated prompt would skip prefill
        prompt_request = requests.Request(
            prompt_ids=tuple(prompts[number % len(prompts)].tolist()),
            sample=0,
            generation=config.GenerationConfig(num_tokens=2),
            sampling=config.SamplingConfig(),
        )
        began = time.perf_counter()
        next(generator.run([prompt_request]))
        return prompts.shape[1], time.perf_counter() - began

    return request


def _timed(tokens: int, program: Any) -> table.Request:
    def request() -> tuple[float, float]:
        began = time.perf_counter()
        jax.block_until_ready(program())
        return tokens, time.perf_counter() - began

    return request
