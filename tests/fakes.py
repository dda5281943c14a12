"""Test helpers: tiny models with random weights, requests, runs on disk, and a counter of compilations."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

from hipgpt_jax import config, training_config
from hipgpt_jax.generation import requests, scheduler
from hipgpt_jax.model import cache
from hipgpt_jax.runs import directory, states, weights
from hipgpt_jax.text import dataset, preparation, tokenizer
from hipgpt_jax.training import checkpoint

# The vocabulary exceeds the largest of ``topk._CPU_BUCKETS``, so every sampling branch is compiled.
MODEL = config.ModelConfig(vocab_size=150, max_seq_len=16, embed_dim=16, num_heads=2, ff_hidden_dim=32, num_layers=2)


def random_params(model: config.ModelConfig, seed: int = 4, stddev: float = 0.5) -> dict[str, Any]:
    """Returns random parameters, including biases and scales, large enough for varied, non-uniform text.

    The stream of NumPy's ``RandomState`` is frozen, so tokens sampled with these parameters can be
    pinned across JAX versions.
    """
    rng = np.random.RandomState(seed)
    params: dict[str, Any] = {}
    for path, shape in sorted(weights.layout(model).items()):
        value = rng.normal(0, stddev, shape).astype(np.float32)
        if path[-1] == "bias":
            value *= 0.25
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = 1 + value / 2 if path[-1] == "scale" else value
    return params


def examples(number: int) -> hypothesis.settings:
    """Returns Hypothesis settings of ``number`` examples, four times as many with the profile ``thorough``."""
    return hypothesis.settings(max_examples=number * hypothesis.settings().max_examples // 100)


class _Shifted(tokenizer.Tokenizer):
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(85 + token_id for token_id in ids)


# Decodes the ids of MODEL to the bytes from "U" on: letters and, from 128 - 85 on, every continuation byte.
SHIFTED = _Shifted(tokenizer.Tokenizer.train([], 256)._backend)


@functools.cache
def make_scheduler(platform: str | None = None, **settings: Any) -> scheduler.Scheduler:
    """Returns a scheduler of ``MODEL`` with a window of 11, cached per setting because compiling is slow.

    As for a larger model, its KV cache has several blocks: 4, 4 and 3 positions on a CPU, 4 and 7 on a GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SMALLEST_BLOCK", 4)
        patch.setattr(cache, "SMALLEST_BLOCK_ON_GPU", 4)
        decode = config.DecodingConfig(**{"window": 11, **settings})
        return scheduler.Scheduler(MODEL, random_params(MODEL), decode, platform=platform)


def request(
    prompt_ids: tuple[int, ...] = (1, 2, 3),
    *,
    sample: int = 0,
    num_tokens: int = 8,
    seed: int = 0,
    eos_id: int = -1,
    stop: tuple[str, ...] = (),
    min_tokens: int = 0,
    top_logprobs: int = 0,
    **settings: Any,
) -> requests.Request:
    """Returns a request for one sample; ``settings`` are those of ``config.SamplingConfig``."""
    return requests.Request(
        prompt_ids=prompt_ids,
        sample=sample,
        generation=config.GenerationConfig(
            num_tokens=num_tokens,
            seed=seed,
            eos_id=eos_id,
            stop=stop,
            min_tokens=min_tokens,
            top_logprobs=top_logprobs,
        ),
        sampling=config.SamplingConfig(**settings),
    )


def prompt(length: int) -> tuple[int, ...]:
    """Returns a fixed random prompt of ``length`` ids of ``MODEL``."""
    return tuple(np.random.RandomState(length).randint(0, MODEL.vocab_size, length).tolist())


def tokens_of(source: scheduler.Scheduler, requests: list[requests.Request]) -> list[list[int]]:
    """Returns the sampled tokens of each request."""
    tokens: list[list[int]] = [[] for _ in requests]
    for event in source.run(requests):
        if event.token is not None:
            tokens[event.index].append(event.token)
    return tokens


def stats_bytes(stats: requests.Stats) -> bytes:
    """Returns the bits of a token's statistics."""
    return np.array([column_B[stats.row] for column_B in stats.step], np.float32).tobytes()


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields every equation of a program, including those of nested programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(inner if hasattr(inner, "eqns") else inner.jaxpr)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list to which the name of each program compiled within the block is appended."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


RUN_MODEL = config.ModelConfig(vocab_size=256, max_seq_len=8, embed_dim=8, num_heads=2, ff_hidden_dim=12, num_layers=1)
RUN_TEXT = "".join(f"Speaker {i % 7}:\nTo be, or not to be, line {i}.\n\n" for i in range(40))


def make_run(root: Path, name: str, steps: tuple[int, ...] = (2, 10), seed: int = 0) -> Path:
    """Writes a run of random weights with the package's writers, and returns its directory."""
    path = root / name
    path.mkdir(parents=True)
    source = root.parent / "text.txt"
    source.write_text(RUN_TEXT)
    preparation.prepare(path, source, RUN_MODEL.vocab_size)
    for at in steps:
        write_step(path, at, seed=seed)
    return path


def writer(path: Path, keep_last: int = 5) -> checkpoint.CheckpointWriter:
    """Returns the checkpoint writer of a run from ``make_run``."""
    return checkpoint.CheckpointWriter(
        directory=path,
        model=RUN_MODEL,
        train=training_config.TrainConfig(keep_last=keep_last),
        manifest=dataset.Dataset(path).manifest,
        init_from=None,
        weights_dtype="float32",
        attention="xla",
    )


def write_step(path: Path, at: int, *, keep_last: int = 5, seed: int = 0) -> None:
    """Writes random weights as the latest step of a run from ``make_run``."""
    found = writer(path, keep_last)
    found.write(at, random_params(RUN_MODEL, seed=seed + at), best=False)
    found.link_latest(at)


def make_state(run: Path, at: int, *, sealed: bool = True) -> Path:
    """Writes random bytes in the layout of an Orbax training state, and returns the directory of the state."""
    state = run / directory.TRAIN_STATE_NAME / str(at)
    rng = np.random.RandomState(at)
    for name, size in (("_CHECKPOINT_METADATA", 300), ("default/manifest.ocdbt", 120), ("default/d/5c1e", 9000)):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(rng.bytes(size))
    if sealed:
        states.write_digests(state)
    return state
