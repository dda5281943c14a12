"""GPU benchmarks, compared with the memory bandwidth and the matrix product rate measured in the same run."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generate, table, train
from hipgpt_jax import config, devices, training_config
from hipgpt_jax.generation import requests, scheduler
from hipgpt_jax.model import transformer
from hipgpt_jax.training import flops

DTYPE = "bfloat16"

_PROMPT_TOKENS = 8
_READ_BYTES = 2**31
_PRODUCT_SIZE = 8192
_STEPS = 5


def decode(
    model: config.ModelConfig,
    device: devices.Device,
    *,
    widths: Sequence[int] = (1, 64),
    num_tokens: int = 512,
    rounds: int = 5,
    read_bytes: int = _READ_BYTES,
) -> dict[str, Any]:
    """Measures decoded tokens/s per decode width, and their share of what the memory bandwidth allows.

    The time runs from the first token of the last slot to the last token of all. A step must read the weights once for
    all slots, and the cached keys and values of each slot.

    Args:
        model: Model shape; the weights are random.
        device: Device that JAX uses.
        widths: Numbers of slots decoded together.
        num_tokens: Tokens per slot, limited by the window.
        rounds: Interleaved rounds, after an uncounted one that compiles.
        read_bytes: Bytes per read to measure the bandwidth; must far exceed the device's caches.
    """
    num_tokens = min(num_tokens, model.max_seq_len - _PROMPT_TOKENS)
    with tempfile.TemporaryDirectory() as directory:
        params = generate.random_params(model, Path(directory))
    attention = device.attention(DTYPE, model.head_dim)
    decoders = {width: _sampled(model, params, attention, width, num_tokens) for width in widths}
    read = _read(read_bytes)
    measured: dict[str, list[float]] = {"bandwidth": [], **{f"width {width}": [] for width in widths}}
    for _ in range(rounds + 1):
        measured["bandwidth"].append(_rate(read))
        for width, request in decoders.items():
            measured[f"width {width}"].append(_rate(request))
    bandwidth = measured.pop("bandwidth")[1:]
    weights = sum(leaf.size for leaf in jax.tree.leaves(params)) - params["wpe"]["embedding"].size
    live = 2 * model.num_layers * model.embed_dim * (_PROMPT_TOKENS + num_tokens / 2)
    result: dict[str, Any] = {"dtype": DTYPE, "attention": attention, "bandwidth_GB_per_s": _spread(bandwidth, 1e9)}
    for width in widths:
        rates = measured[f"width {width}"][1:]
        needed = (weights / width + live) * jnp.dtype(DTYPE).itemsize  # bytes per token
        shares = [rate * needed / ceiling for rate, ceiling in zip(rates, bandwidth, strict=True)]
        result[f"width {width}"] = {"tokens_per_s": _spread(rates), "share_of_bandwidth": _spread(shares)}
    return result


def training(
    model: config.ModelConfig,
    device: devices.Device,
    *,
    batch_size: int = 32,
    rounds: int = 5,
    product_size: int = _PRODUCT_SIZE,
) -> dict[str, Any]:
    """Measures training: tokens/s, the share of the measured matrix product rate, and the MFU.

    Args:
        model: Model shape; tokens are random, without dropout.
        device: Device that JAX uses.
        batch_size: Sequences per step, each as long as the context window.
        rounds: Interleaved rounds, after an uncounted one that compiles.
        product_size: Side of the square matrices multiplied to measure the product rate.
    """
    settings = training_config.TrainConfig(batch_size=batch_size, warmup_steps=0, min_lr=1e-3, dtype=DTYPE)
    attention = device.attention(DTYPE, model.head_dim, trains=True)
    module = transformer.Transformer(model, DTYPE, attention_impl=attention)
    shape = (_STEPS, batch_size, model.max_seq_len + 1)
    tokens = np.random.RandomState(0).randint(0, model.vocab_size, shape).astype(np.int32)
    request, losses = train.steps(module, settings, tokens)
    product = _product(product_size)
    products, rates = [], []
    for _ in range(rounds + 1):
        products.append(_rate(product))
        rates.append(_rate(request))
    init = functools.partial(transformer.Transformer(model).init, dropout=0.0)
    sizes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    per_token = flops.per_token(model, flops.size(sizes["params"]))
    shares = [rate * per_token / ceiling for rate, ceiling in zip(rates[1:], products[1:], strict=True)]
    mfu = flops.mfu(per_token, statistics.median(rates[1:]), device.kind, 1, DTYPE)
    return {
        "dtype": DTYPE,
        "attention": attention,
        "batch": [batch_size, model.max_seq_len],
        "losses": [round(loss, 4) for loss in losses],
        "products_TFLOP_per_s": _spread(products[1:], 1e12),
        "tokens_per_s": _spread(rates[1:]),
        "share_of_products": _spread(shares),
        "mfu": mfu and round(mfu, 4),  # null if the device's peak is unknown
    }


def _sampled(model: config.ModelConfig, params: Any, attention: str, width: int, num_tokens: int) -> table.Request:
    generator = scheduler.Scheduler(model, params, config.DecodingConfig(batch_size=width, dtype=DTYPE), attention)
    generation = config.GenerationConfig(num_tokens=num_tokens)
    prompts = np.random.RandomState(width).randint(0, model.vocab_size, (width, _PROMPT_TOKENS)).tolist()
    batch = [
        requests.Request(prompt_ids=tuple(ids), sample=0, generation=generation, sampling=config.SamplingConfig())
        for ids in prompts
    ]

    def request() -> tuple[float, float]:
        times = [time.perf_counter() for event in generator.run(batch) if event.token is not None]
        return len(times) - width, times[-1] - times[width - 1]  # all first tokens come from prefill, before any step

    return request


def _read(size: int) -> table.Request:
    """Returns a request that reads ``size`` bytes."""
    x = jnp.ones(size // 2, DTYPE)
    return _timed(jax.jit(functools.partial(jnp.sum, dtype=jnp.float32)), x, amount=x.nbytes)


def _product(size: int) -> table.Request:
    """Returns a request that multiplies two square matrices and counts its FLOPs."""
    # Random, because products of zeros are faster.
    x, y = jax.random.normal(jax.random.key(0), (2, size, size), DTYPE)
    return _timed(jax.jit(jnp.matmul), x, y, amount=2 * size**3)


def _timed(run: Callable[..., jax.Array], *arrays: jax.Array, amount: float, times: int = 10) -> table.Request:
    def request() -> tuple[float, float]:
        began = time.perf_counter()
        jax.block_until_ready([run(*arrays) for _ in range(times)])
        return times * amount, time.perf_counter() - began

    return request


def _rate(request: table.Request) -> float:
    amount, seconds = request()
    return amount / seconds


def _spread(values: Sequence[float], unit: float = 1.0) -> dict[str, float]:
    """Returns the minimum, median and maximum, to four digits."""
    parts = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value / unit:.4g}") for name, value in parts.items()}
