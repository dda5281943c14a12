"""Training steps, compared with the same steps in plain PyTorch."""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import peers, plain, table
from hipgpt_jax import config, devices, training_config
from hipgpt_jax.model import mesh, transformer
from hipgpt_jax.training import optimizer, train_step

OURS, PEER = "hipgpt_jax", "PyTorch"
RATIOS_TO = (PEER,)
HELD = ((OURS, PEER),)

_BATCHES = {"default": 4, "nanogpt": 12, "d256": 8}
_STEPS = 10


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape: AdamW steps with gradient clipping, in float32, without dropout, on random tokens.

    Both libraries start from the same weights and use the same batches, and their losses must agree.
    """
    del options, directory
    devices.step_on_main_thread()  # both calls as in hipgpt-train; the second benefits PyTorch, too
    devices.keep_freed_memory()
    batch_size = next((size for name, size in _BATCHES.items() if table.SHAPES[name] == model), 2)
    train = training_config.TrainConfig(batch_size=batch_size, warmup_steps=0, min_lr=1e-3)
    shape = (_STEPS, train.batch_size, model.max_seq_len + 1)
    tokens = np.random.RandomState(0).randint(0, model.vocab_size, shape).astype(np.int32)
    ours, losses = steps(transformer.Transformer(model), train, tokens)
    return {OURS: [ours], PEER: _peer(model, train, tokens, losses)}


def steps(
    module: transformer.Transformer, train: training_config.TrainConfig, tokens: np.ndarray
) -> tuple[table.Request, list[float]]:
    """Returns a request that trains one step per batch of ``[steps, B, T + 1]``, and the losses of a first pass."""
    key = jax.random.key(0)
    layout, adam = mesh.Layout.create({"data": 1, "fsdp": 1, "model": 1}), optimizer.make(train)
    step = train_step.make_train_step(module, adam, train, key, layout)
    state = train_step.init_sharded(layout, module, adam, key)

    def request() -> tuple[float, float]:
        nonlocal state
        began = time.perf_counter()
        for tokens_BT in tokens:
            state, _ = step(state, tokens_BT)
        jax.block_until_ready(state)
        return tokens[:, :, 1:].size, time.perf_counter() - began

    losses, probe = [], train_step.init_sharded(layout, module, adam, key)
    for tokens_BT in tokens:
        probe, metrics = step(probe, tokens_BT)
        losses.append(float(metrics.loss))
    return request, losses


def _peer(
    model: config.ModelConfig, train: training_config.TrainConfig, tokens: np.ndarray, expected: list[float]
) -> list[table.Request]:
    torch = peers.torch()
    if torch is None:
        return []
    batches = torch.from_numpy(tokens).long()
    step = _torch_step(torch, model, train)
    losses = [step(batch) for batch in batches]
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-3)

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        for batch in batches:
            step(batch)
        return tokens[:, :, 1:].size, time.perf_counter() - began

    return [request]


def _torch_step(torch: Any, model: config.ModelConfig, train: training_config.TrainConfig) -> Any:
    """Returns nanoGPT's training step: a function from a batch ``[B, T + 1]`` to its loss."""
    functional, adam = torch.nn.functional, optimizer.make(train)
    layout = mesh.Layout.create({"data": 1, "fsdp": 1, "model": 1})
    start = train_step.init_sharded(layout, transformer.Transformer(model), adam, jax.random.key(0)).params
    params = peers.plain_params(start, torch)
    forward = plain.forward_of(model, params, torch)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, torch.nn.Parameter))
    groups = [
        {"params": [leaf for leaf in leaves if leaf.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [leaf for leaf in leaves if leaf.ndim < 2], "weight_decay": 0.0},
    ]
    optimize = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, train.beta2), fused=True)

    def step(batch: Any) -> Any:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = functional.linear(forward(inputs), params["wte"]["embedding"])
        loss = functional.cross_entropy(logits.view(targets.numel(), -1), targets.reshape(-1))
        optimize.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, train.clip)
        optimize.step()
        return loss.detach()

    return step
