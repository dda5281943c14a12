"""A training step, beside the same step in plain PyTorch."""

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import table
from hipgpt_jax import config, devices, training_config
from hipgpt_jax.model import transformer
from hipgpt_jax.training import mesh, optimizer, step

OURS, PEER = "hipgpt_jax", "PyTorch"
RATIOS_TO = (PEER,)
HELD = ((OURS, PEER),)

_BATCHES = {"default": 4, "nanogpt": 12, "d256": 8}
_STEPS = 10


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape: steps of AdamW behind a clip, in float32, without dropout, on random tokens.

    Both sides begin with the same weights and get the same batches, and their losses must agree.
    """
    del options, directory
    devices.step_on_main_thread()  # both as hipgpt-train does; the second serves both sides
    devices.keep_freed_memory()
    batch_size = next((size for name, size in _BATCHES.items() if table.SHAPES[name] == model), 2)
    train = training_config.TrainConfig(batch_size=batch_size, warmup_steps=0, min_lr=1e-3)
    shape = (_STEPS, train.batch_size, model.max_seq_len + 1)
    tokens = np.random.RandomState(0).randint(0, model.vocab_size, shape).astype(np.int32)
    ours, first_loss = _ours(model, train, tokens)
    return {OURS: [ours], PEER: _peer(model, train, tokens, first_loss)}


def _ours(model: config.ModelConfig, train: training_config.TrainConfig, tokens: np.ndarray) -> tuple[Any, list[float]]:
    module, key = transformer.Transformer(model), jax.random.key(0)
    layout, adam = mesh.Layout.over({"data": 1, "fsdp": 1, "model": 1}), optimizer.make(train)
    take = step.make(module, adam, train, key, layout)
    state = step.init_on(layout, module, adam, key)

    def request() -> tuple[float, float]:
        nonlocal state
        began = time.perf_counter()
        for tokens_BT in tokens:
            state, _ = take(state, tokens_BT)
        jax.block_until_ready(state)
        return tokens[:, :, 1:].size, time.perf_counter() - began

    losses, probe = [], step.init_on(layout, module, adam, key)
    for tokens_BT in tokens:
        probe, metrics = take(probe, tokens_BT)
        losses.append(float(metrics.loss))
    return request, losses


def _peer(
    model: config.ModelConfig, train: training_config.TrainConfig, tokens: np.ndarray, expected: list[float]
) -> list[table.Request]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return []
    torch.set_num_threads(table.CORES)
    batches = torch.from_numpy(tokens).long()
    take = _torch_step(torch, model, train)
    losses = [take(batch) for batch in batches]
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-3)

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        for batch in batches:
            take(batch)
        return tokens[:, :, 1:].size, time.perf_counter() - began

    return [request]


def _torch_step(torch: Any, model: config.ModelConfig, train: training_config.TrainConfig) -> Any:
    """Returns a step as nanoGPT takes it: one function of a batch ``[B, T + 1]`` that gives the loss."""
    functional, N = torch.nn.functional, model.num_heads
    module = transformer.Transformer(model)
    adam = optimizer.make(train)
    layout = mesh.Layout.over({"data": 1, "fsdp": 1, "model": 1})
    start = step.init_on(layout, module, adam, jax.random.key(0)).params

    def parameter(array: Any, *, turned: bool) -> Any:
        value = np.array(array)
        return torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(value.T) if turned else value))

    params = jax.tree_util.tree_map_with_path(
        lambda path, array: parameter(array, turned=path[-1].key == "kernel"), start
    )
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, torch.nn.Parameter))
    groups = [
        {"params": [leaf for leaf in leaves if leaf.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [leaf for leaf in leaves if leaf.ndim < 2], "weight_decay": 0.0},
    ]
    optimize = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, train.beta2), fused=True)

    def norm(x: Any, p: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps=1e-5)

    def linear(x: Any, p: Any) -> Any:
        return functional.linear(x, p["kernel"], p["bias"])

    def take(batch: Any) -> Any:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        B, T = inputs.shape
        x = params["wte"]["embedding"][inputs] + params["wpe"]["embedding"][:T]
        for layer in range(model.num_layers):
            p = params[f"h_{layer}"]
            q, k, v = linear(norm(x, p["ln_1"]), p["attn"]["c_attn"]).split(model.embed_dim, dim=2)
            q, k, v = (part.view(B, T, N, -1).transpose(1, 2) for part in (q, k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(B, T, -1), p["attn"]["c_proj"])
            hidden = functional.gelu(linear(norm(x, p["ln_2"]), p["mlp"]["c_fc"]), approximate="tanh")
            x = x + linear(hidden, p["mlp"]["c_proj"])
        logits = functional.linear(norm(x, params["ln_f"]), params["wte"]["embedding"])
        loss = functional.cross_entropy(logits.view(B * T, -1), targets.reshape(-1))
        optimize.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, train.clip)
        optimize.step()
        return loss.detach()

    return take
