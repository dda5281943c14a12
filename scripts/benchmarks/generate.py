"""Decoding at batch size 1, compared with Hugging Face, CTranslate2 and the bandwidth of plain matrix products."""

import argparse
import functools
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, table
from hipgpt_jax import config
from hipgpt_jax.generation import decoding, requests, scheduler
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import weights

STREAM, SCAN, PEER, OTHER, BOUND = "streaming", "scan", "Hugging Face", "CTranslate2", "bound"
RATIOS_TO = (PEER, OTHER, BOUND, SCAN)
HELD = ((STREAM, PEER), (STREAM, BOUND))

_PROMPT_IDS = tuple(range(8))
_SAMPLING = config.SamplingConfig()


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape. Compilation, request setup and prefill are not timed.

    All libraries load the weights from the same file in ``directory``.
    """
    num_tokens = min(options.num_tokens, model.max_seq_len - len(_PROMPT_IDS))
    params = random_params(model, directory)
    return {
        STREAM: [_stream(model, params, num_tokens)],
        SCAN: [_scan(model, params, num_tokens)],
        PEER: _hugging_face(model, params, num_tokens, directory),
        OTHER: peers.ctranslate2(model, directory, [_PROMPT_IDS], num_tokens),
        BOUND: [_products(model, params, num_tokens, transposed) for transposed in (False, True)],
    }


def random_params(model: config.ModelConfig, directory: Path) -> Any:
    """Writes random weights to ``model.safetensors`` in ``directory`` and returns them as loaded from there."""
    module = transformer.Transformer(model)
    init = jax.jit(lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32), dropout=0.0)["params"])
    file = directory / "model.safetensors"
    weights.write(file, init(jax.random.key(0)), model)
    return jax.device_put(weights.read(file, model))


def _count_and_time(times: Sequence[float]) -> tuple[float, float]:
    """Returns the tokens after the first and their duration, without the last: one step may emit the last two."""
    return len(times) - 2, times[-2] - times[0]


def _stream(model: config.ModelConfig, params: Any, num_tokens: int) -> table.Request:
    generator = scheduler.Scheduler(model, params, config.DecodingConfig())
    generation = config.GenerationConfig(num_tokens=num_tokens)
    prompt_request = requests.Request(prompt_ids=_PROMPT_IDS, sample=0, generation=generation, sampling=_SAMPLING)

    def request() -> tuple[float, float]:
        return _count_and_time(
            [time.perf_counter() for event in generator.run([prompt_request]) if event.token is not None]
        )

    return request


def _scan(model: config.ModelConfig, params: Any, num_tokens: int) -> table.Request:
    module, W, V = transformer.Transformer(model), model.max_seq_len, model.vocab_size
    generation = config.GenerationConfig(num_tokens=num_tokens)
    prompt_request = requests.Request(prompt_ids=_PROMPT_IDS, sample=0, generation=generation, sampling=_SAMPLING)
    start = decoding.initial_state(prompt_request, W, V)
    layout = kv.cpu_layout(W)

    @jax.jit
    def prefill(params: Any) -> decoding.DecodeState:
        blocks = decoding.prefill_cache(module, params, start.context_BS[:, : len(_PROMPT_IDS)], layout)
        blocks = (*blocks, *kv.empty(layout.shapes(model, 1, "float32", first=len(blocks))))
        state = start._replace(cache=kv.Cache((), blocks), limit_B=jnp.array([num_tokens]))
        return decoding.decode_step(module, params, state)[0]

    @jax.jit
    def decode(params: Any, state: decoding.DecodeState) -> jax.Array:
        def step(state: decoding.DecodeState, _: None) -> tuple[decoding.DecodeState, jax.Array]:
            state, output = decoding.decode_step(module, params, state)
            return state, output.token_B

        return jax.lax.scan(step, state, None, length=num_tokens - 1)[1]

    def request() -> tuple[float, float]:
        ready = jax.block_until_ready(prefill(params))
        began = time.perf_counter()
        np.asarray(decode(params, ready))
        return num_tokens - 1, time.perf_counter() - began

    return request


def _hugging_face(model: config.ModelConfig, params: Any, num_tokens: int, directory: Path) -> list[table.Request]:
    torch, peer = peers.torch(), peers.hugging_face(model, params, directory)
    if peer is None:
        return []
    prompt_1T = torch.tensor([_PROMPT_IDS])
    arguments = {"inputs": prompt_1T, "attention_mask": torch.ones_like(prompt_1T), "max_new_tokens": num_tokens}
    arguments |= {"use_cache": True, "pad_token_id": 0, **peers.sampling_arguments()}

    def request() -> tuple[float, float]:
        times: list[float] = []
        clock = types.SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        with torch.inference_mode():
            peer.generate(**arguments, streamer=clock)
        return _count_and_time(times[1:])  # the streamer gets the prompt first

    return [request]


def _products(model: config.ModelConfig, params: Any, num_tokens: int, transposed: bool) -> table.Request:
    """Returns the upper bound: tokens for which the memory bandwidth can read the weights and the live KV cache.

    The bandwidth is measured with matrix-vector products of all the model's matrices, in a program that does nothing
    else. Either layout, the model's or the transposed one, can be faster, depending on the shape.
    """
    # The two layouts differ by up to 15 % in either direction.
    dot = functools.partial(jnp.einsum, "MK,NK->MN" if transposed else "MK,KN->MN")
    head = params["wte"]["embedding"]
    to_layout = jax.jit(jnp.transpose) if transposed else lambda matrix: matrix
    blocks = [jax.tree.leaves(params[f"h_{i}"]) for i in range(model.num_layers)]
    layers = [[to_layout(leaf) for leaf in block if leaf.ndim == 2] for block in blocks]

    @jax.jit
    def read(layers: list[list[jax.Array]], head: jax.Array, x_1D: jax.Array) -> jax.Array:
        def token(_: int, x_1D: jax.Array) -> jax.Array:
            for c_attn, attn_proj, c_fc, mlp_proj in layers:
                x_1D = x_1D + dot(sum(jnp.split(dot(x_1D, c_attn), 3, axis=-1)), attn_proj)
                x_1D = x_1D + dot(dot(x_1D, c_fc), mlp_proj)
            return jnp.tanh(x_1D + jnp.einsum("MD,VD->MV", x_1D, head).max())

        return jax.lax.fori_loop(0, num_tokens, token, x_1D)

    matrices = sum(matrix.nbytes for matrix in jax.tree.leaves((layers, head)))
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["wpe"]["embedding"].nbytes
    live = 2 * 4 * model.num_layers * model.embed_dim * (len(_PROMPT_IDS) + num_tokens / 2)

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        read(layers, head, jnp.ones((1, model.embed_dim))).block_until_ready()
        return num_tokens * matrices / (parameters + live), time.perf_counter() - began

    return request
