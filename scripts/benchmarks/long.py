"""Generation beyond the context window, compared with nanoGPT's PyTorch code, which recomputes it for every token."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import generate, peers, plain, table
from hipgpt_jax import config
from hipgpt_jax.generation import requests, scheduler

_STRIDES = (1, 64)
_SHARE = 4  # a request generates at least 1/4 of the window's length
OURS, PEER = "stride", "nanoGPT's crop"
RATIOS_TO = (PEER,)
HELD = tuple((f"{OURS} {stride}", PEER) for stride in _STRIDES)


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape: tokens generated after a prompt that fills the window."""
    del options
    params = generate.random_params(model, directory)
    prompt = np.random.RandomState(0).randint(0, model.vocab_size, model.max_seq_len)
    rows = {
        f"{OURS} {stride}": [_rolling(model, params, prompt, min(stride, model.max_seq_len))] for stride in _STRIDES
    }
    return {**rows, PEER: _cropping(model, params, prompt)}


def _rolling(model: config.ModelConfig, params: Any, prompt: np.ndarray, stride: int) -> table.Request:
    generator = scheduler.Scheduler(model, params, config.DecodingConfig(window_stride=stride))
    prompt_request = requests.Request(
        prompt_ids=tuple(prompt.tolist()),
        sample=0,
        generation=config.GenerationConfig(num_tokens=2**31),
        sampling=config.SamplingConfig(),
    )
    num_tokens = max(model.max_seq_len // _SHARE, 2 * stride)

    def request() -> tuple[float, float]:
        tokens: Iterator[requests.Output] = generator.run([prompt_request])
        next(tokens)
        began = time.perf_counter()
        for _ in range(num_tokens):
            next(tokens)
        return num_tokens, time.perf_counter() - began

    return request


def _cropping(model: config.ModelConfig, params: Any, prompt: np.ndarray) -> list[table.Request]:
    torch = peers.torch()
    if torch is None:
        return []
    torch_params, num_tokens = peers.plain_params(params, torch), model.max_seq_len // _SHARE

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        ids = torch.from_numpy(prompt)[None]
        plain.crop_and_recompute(model, torch_params, ids, num_tokens, torch, config.SamplingConfig())
        return num_tokens, time.perf_counter() - began

    return [request]
