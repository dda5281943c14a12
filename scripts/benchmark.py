"""Measures this package beside a peer and the hardware: all figures of a table are from one run.

``python scripts/benchmark.py generate`` decodes at batch 1, on the CPU, in float32, from random
weights and with the documented sampling settings. Rounds are interleaved, so that a noisy machine
hits all rows alike, and ratios are taken within a round. Compiling, setting up a request and reading
its prompt are not counted.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, events, sampler, sampling
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import weights


def _shape(D: int, L: int, N: int, F: int, V: int, W: int) -> config.ModelConfig:
    return config.ModelConfig(embed_dim=D, num_layers=L, num_heads=N, ff_hidden_dim=F, vocab_size=V, max_seq_len=W)


SHAPES = {
    "default": config.ModelConfig(),
    "d256": _shape(D=256, L=8, N=8, F=1024, V=5000, W=256),
    "d384": _shape(D=384, L=6, N=6, F=1536, V=65, W=256),
    "gpt2": _shape(D=768, L=12, N=12, F=3072, V=50257, W=1024),
}

STREAM, SCAN, PEER, BOUND = "streaming", "scan", "Hugging Face", "bound"
RATIOS_TO = (PEER, BOUND, SCAN)
ABSENT = "not installed: pip install 'hipgpt-jax[peers]'"

_PROMPT_IDS = tuple(range(8))
_SAMPLING = config.SamplingConfig()
_CORES = os.cpu_count() or 1

# Makes one request; returns the tokens that were timed and their seconds.
Request = Callable[[], tuple[float, float]]


def main(arguments: Sequence[str]) -> None:
    """Runs the measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("generate", help="tokens/s at batch 1")
    command.add_argument("--shapes", default=",".join(SHAPES), help="among %(default)s")
    command.add_argument("--rounds", type=int, default=5, help="measurements of each row (%(default)s)")
    command.add_argument("--num_tokens", type=int, default=128, help="fewer where the window ends (%(default)s)")
    command.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement (%(default)s)")
    command.add_argument("--json", type=Path, help="file for all rounds and ratios")
    command.set_defaults(run=_generate)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.shapes.split(",") if name not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}: choose from {', '.join(SHAPES)}")
    if options.rounds < 1 or options.num_tokens < 3:
        parser.error("--rounds must be at least 1 and --num_tokens at least 3")
    options.run(options)


def _generate(options: argparse.Namespace) -> None:
    facts, shapes = _facts(), {}
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print("tokens/s: median (min–max) of the rounds; ratios: min/median/max of the ratios within a round\n")
    print(f"| shape | row | tokens/s | {' | '.join(f'to {other}' for other in RATIOS_TO)} |\n|{'---|' * 6}", flush=True)
    for name in options.shapes.split(","):
        model = SHAPES[name]
        num_tokens = min(options.num_tokens, model.max_seq_len - len(_PROMPT_IDS))
        with tempfile.TemporaryDirectory() as directory:
            rates = _measure(_rows(model, num_tokens, Path(directory)), options.rounds, options.seconds)
        ratios = {row: {other: _ratios(rates[row], rates[other]) for other in RATIOS_TO} for row in rates}
        shapes[name] = {"num_tokens": num_tokens, "rates": rates, "ratios": ratios}
        for row, values in rates.items():
            speed = f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})" if values else ABSENT
            cells = ["/".join(f"{ratio:.2f}" for ratio in ratios[row][other]) or "–" for other in RATIOS_TO]
            print(f"| {' | '.join([name, row, speed, *cells])} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "shapes": shapes}, indent=1) + "\n")


def _measure(rows: dict[str, list[Request]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Returns the tokens/s of each row in each round; of several ways to make a row, the fastest counts."""
    rates: dict[str, list[float]] = {row: [] for row in rows}
    for least in (0.0, *[seconds] * rounds):  # the first round compiles
        for row, ways in rows.items():
            if ways:
                rates[row].append(max(_rate(request, least) for request in ways))
    return {row: values[1:] for row, values in rates.items()}


def _rate(request: Request, seconds: float) -> float:
    """Tokens/s of as many requests as fill ``seconds``, at least one."""
    timed = [request()]
    while sum(elapsed for _, elapsed in timed) < seconds:
        timed.append(request())
    return sum(tokens for tokens, _ in timed) / sum(elapsed for _, elapsed in timed)


def _rows(model: config.ModelConfig, num_tokens: int, directory: Path) -> dict[str, list[Request]]:
    """Every row of the table with the ways to make it; none where a peer is absent.

    Both sides load the weights from one file in ``directory``, as they would load a run's.
    """
    module = transformer.Transformer(model)
    init = jax.jit(lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32), dropout=0.0)["params"])
    file = directory / "model.safetensors"
    weights.write(file, init(jax.random.key(0)), model)
    params = jax.device_put(weights.read(file, model))
    return {
        STREAM: [_stream(model, params, num_tokens)],
        SCAN: [_scan(model, params, num_tokens)],
        PEER: _peer(model, params, num_tokens, directory),
        BOUND: [_products(model, params, num_tokens, turned) for turned in (False, True)],
    }


def _between(times: Sequence[float]) -> tuple[float, float]:
    """Tokens after the first and their time, the last left out: it may have been made with the one before."""
    return len(times) - 2, times[-2] - times[0]


def _stream(model: config.ModelConfig, params: Any, num_tokens: int) -> Request:
    engine = sampler.Sampler(model, params, config.DecodingConfig())
    generation = config.GenerationConfig(num_tokens=num_tokens)
    asked = events.Request(prompt_ids=_PROMPT_IDS, sample=0, generation=generation, sampling=_SAMPLING)

    def request() -> tuple[float, float]:
        return _between([time.perf_counter() for event in engine.run([asked]) if event.token is not None])

    return request


def _scan(model: config.ModelConfig, params: Any, num_tokens: int) -> Request:
    module, W = transformer.Transformer(model), model.max_seq_len
    key = jax.random.key_data(sampling.sample_key(0, _PROMPT_IDS, 0))
    rows = decoding.Rows(key[None], sampling.settings([_SAMPLING]))
    zero_B, prompt_1T = jnp.zeros(1, jnp.int32), jnp.asarray([_PROMPT_IDS], jnp.int32)
    context_BS = jnp.pad(prompt_1T, ((0, 0), (0, W - prompt_1T.size)))
    seen_BV = jnp.zeros((1, model.vocab_size), bool).at[0, prompt_1T[0]].set(True)
    logits_BV = jnp.zeros((1, model.vocab_size))
    start = decoding.State(zero_B, zero_B, zero_B + prompt_1T.size, context_BS, seen_BV, logits_BV)
    read = jax.jit(functools.partial(decoding.read_window, module, length=len(_PROMPT_IDS)))

    @jax.jit
    def decode(params: Any, state: decoding.State, cache: Any) -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            carry = decoding.decode_step(module, params, rows, *carry)
            return carry, carry[0].token_B

        return jax.lax.scan(step, (state, cache), None, length=num_tokens - 1)[1]

    def request() -> tuple[float, float]:
        ready = jax.block_until_ready(read(params, rows, start))
        began = time.perf_counter()
        np.asarray(decode(params, *ready))
        return num_tokens - 1, time.perf_counter() - began

    return request


def _peer(model: config.ModelConfig, params: Any, num_tokens: int, directory: Path) -> list[Request]:
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return []
    torch.set_num_threads(_CORES)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = {"n_embd": model.embed_dim, "n_layer": model.num_layers, "n_head": model.num_heads}
    sizes |= {"n_inner": model.ff_hidden_dim, "vocab_size": model.vocab_size, "n_positions": model.max_seq_len}
    transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None).save_pretrained(directory)
    peer = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype="float32")
    prompt_1T = torch.tensor([_PROMPT_IDS])
    asked = {"inputs": prompt_1T, "attention_mask": torch.ones_like(prompt_1T), "max_new_tokens": num_tokens}
    asked |= {"do_sample": True, "use_cache": True, "pad_token_id": 0, **dataclasses.asdict(_SAMPLING)}
    expected = transformer.Transformer(model).bind({"params": params})(jnp.asarray([_PROMPT_IDS]), dropout=0.0)
    with torch.inference_mode():
        np.testing.assert_allclose(peer(prompt_1T).logits.numpy(), np.asarray(expected), atol=1e-3)

    def request() -> tuple[float, float]:
        times: list[float] = []
        clock = types.SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        with torch.inference_mode():
            peer.generate(**asked, streamer=clock)
        return _between(times[1:])  # the prompt comes first

    return [request]


def _products(model: config.ModelConfig, params: Any, num_tokens: int, turned: bool) -> Request:
    """The bound: as many tokens as the weights and the live cache could be read for.

    The bandwidth is that of plain batch-1 products with every matrix of the model in turn, in one
    program that does nothing else. Which layout reads faster, the model's or ``turned``, differs by up
    to 15 % either way with the shape.
    """
    dot = functools.partial(jnp.einsum, "MK,NK->MN" if turned else "MK,KN->MN")
    head = params["wte"]["embedding"]
    turn = jax.jit(jnp.transpose) if turned else lambda matrix: matrix
    blocks = [jax.tree.leaves(params[f"h_{i}"]) for i in range(model.num_layers)]
    layers = [[turn(leaf) for leaf in block if leaf.ndim == 2] for block in blocks]

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


def _facts() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.machine()]
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    facts = {"cores": str(_CORES), "cpu": names[0], "load": f"{os.getloadavg()[0]:.1f}"}
    return facts | {name: installed.get(name, "absent") for name in ("jax", "jaxlib", "flax", "torch", "transformers")}


def _ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Least, median and greatest ratio of a round; nothing where a row is absent."""
    ratios = sorted(value / other for value, other in zip(values, others, strict=False))
    return [ratios[0], statistics.median(ratios), ratios[-1]] if ratios else []


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # where the peer runs too
    main(sys.argv[1:])
