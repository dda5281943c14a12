"""Batched decoding at batch sizes 16 and 64, compared with Hugging Face and CTranslate2."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import generate, peers, table
from hipgpt_jax import config, devices
from hipgpt_jax.generation import requests, scheduler

_WIDTHS = (16, 64)
_PROMPT_TOKENS = 8
OURS, PEER, OTHER = ("hipgpt_jax", "Hugging Face", "CTranslate2")
RATIOS_TO = tuple(f"{peer}, {width}" for width in _WIDTHS for peer in (PEER, OTHER))
HELD = tuple((f"{OURS}, {width}", f"{peer}, {width}") for width in _WIDTHS for peer in (PEER, OTHER))


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape: one prompt of 8 ids per slot, with prefill included in the time."""
    devices.keep_freed_memory()  # as hipgpt-generate does
    num_tokens = min(options.num_tokens, model.max_seq_len - _PROMPT_TOKENS)
    params = generate.random_params(model, directory)
    torch, hugging_face = peers.torch(), peers.hugging_face(model, params, directory)

    def ours(prompts: np.ndarray) -> table.Request:
        generator = scheduler.Scheduler(model, params, config.DecodingConfig(batch_size=len(prompts)))
        generation = config.GenerationConfig(num_tokens=num_tokens)
        batch = [
            requests.Request(
                prompt_ids=tuple(ids.tolist()), sample=0, generation=generation, sampling=config.SamplingConfig()
            )
            for ids in prompts
        ]
        return _timed(prompts.shape[0] * num_tokens, lambda: sum(1 for _ in generator.run(batch)))

    def theirs(prompts: np.ndarray) -> table.Request:
        ids = torch.from_numpy(prompts)
        arguments = {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": num_tokens}
        arguments |= {"pad_token_id": 0, **peers.sampling_arguments()}
        return _timed(prompts.shape[0] * num_tokens, lambda: torch.inference_mode()(hugging_face.generate)(**arguments))

    rows: table.Rows = {}
    for width in _WIDTHS:
        prompts = np.random.RandomState(width).randint(0, model.vocab_size, (width, _PROMPT_TOKENS))
        rows[f"{OURS}, {width}"] = [ours(prompts)]
        rows[f"{PEER}, {width}"] = [theirs(prompts)] if hugging_face is not None else []
        rows[f"{OTHER}, {width}"] = peers.ctranslate2(model, directory, prompts.tolist(), num_tokens)
    return rows


def _timed(tokens: int, run: Callable[[], object]) -> table.Request:
    def request() -> tuple[float, float]:
        began = time.perf_counter()
        run()
        return tokens, time.perf_counter() - began

    return request
