"""Shared parts of the benchmarks: model shapes, rounds, ratios and the printed table."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hipgpt_jax import config

# Runs one request; returns the number of timed tokens and their duration in seconds.
Request = Callable[[], tuple[float, float]]
# Variants of the request per table row of a shape; empty if a peer is not installed.
Rows = dict[str, list[Request]]

CORES = os.cpu_count() or 1
# In seconds: CTranslate2's threads spin for 0.2 s after a request.
_PAUSE = 0.3
ABSENT = "not installed: pip install -e '.[peers]'"


def shape_of(D: int, L: int, N: int, F: int, V: int, W: int) -> config.ModelConfig:
    """Returns a model config from its sizes, named as tensor axes."""
    return config.ModelConfig(embed_dim=D, num_layers=L, num_heads=N, ff_hidden_dim=F, vocab_size=V, max_seq_len=W)


SHAPES = {
    "default": config.ModelConfig(),
    "nanogpt": shape_of(D=128, L=4, N=4, F=512, V=256, W=64),
    "shipped": shape_of(D=192, L=5, N=6, F=768, V=1024, W=128),
    "d256": shape_of(D=256, L=8, N=8, F=1024, V=5000, W=256),
    "d384": shape_of(D=384, L=6, N=6, F=1536, V=65, W=256),
    "gpt2": shape_of(D=768, L=12, N=12, F=3072, V=50257, W=1024),
}


def run(
    options: argparse.Namespace,
    rows_of: Callable[[config.ModelConfig, argparse.Namespace, Path], Rows],
    ratios_to: Sequence[str],
) -> None:
    """Measures the rows of each shape in interleaved rounds, prints the table and writes the JSON file."""
    environment, shapes = facts(), {}
    print("; ".join(f"{name} {value}" for name, value in environment.items()))
    print("tokens/s: median (min–max) of the rounds; ratios: min/median/max of the per-round ratios\n")
    print(f"| shape | row | tokens/s | {' | '.join(f'to {other}' for other in ratios_to)} |")
    print(f"|{'---|' * (3 + len(ratios_to))}", flush=True)
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            rates = measure(rows_of(SHAPES[name], options, Path(directory)), options.rounds, options.seconds)
        ratios = {row: {other: ratios_of(rates[row], rates[other]) for other in ratios_to} for row in rates}
        shapes[name] = {"rates": rates, "ratios": ratios}
        for row, values in rates.items():
            speed = f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})" if values else ABSENT
            cells = ["/".join(f"{ratio:.2f}" for ratio in ratios[row][other]) or "–" for other in ratios_to]
            print(f"| {' | '.join([name, row, speed, *cells])} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"facts": environment, "shapes": shapes}, indent=1) + "\n")


def measure(rows: Rows, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Returns the tokens/s per row and round, of the fastest variant of each row."""
    rates: dict[str, list[float]] = {row: [] for row in rows}
    for minimum in (0.0, *[seconds] * rounds):  # the first round compiles
        for row, variants in rows.items():
            if variants:
                rates[row].append(max(rate_of(request, minimum) for request in variants))
    return {row: values[1:] for row, values in rates.items()}


def rate_of(request: Request, seconds: float) -> float:
    """Returns the tokens/s of repeated requests over at least ``seconds``, then pauses until all threads are idle."""
    timed = [request()]
    while sum(elapsed for _, elapsed in timed) < seconds:
        timed.append(request())
    time.sleep(_PAUSE)
    return sum(tokens for tokens, _ in timed) / sum(elapsed for _, elapsed in timed)


def facts() -> dict[str, str]:
    """Returns the hardware, load and library versions of the measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.machine()]
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    machine = {"cores": str(CORES), "cpu": names[0], "load": f"{os.getloadavg()[0]:.1f}"}
    return machine | {
        name: installed.get(name, "absent")
        for name in ("jax", "jaxlib", "flax", "torch", "transformers", "ctranslate2")
    }


def ratios_of(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Returns the minimum, median and maximum per-round ratio; empty if a row has no rates."""
    ratios = sorted(value / other for value, other in zip(values, others, strict=False))
    return [ratios[0], statistics.median(ratios), ratios[-1]] if ratios else []
