"""What every measurement shares: shapes, rounds, ratios, and the table."""

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

# Makes one request; returns the tokens that were timed and their seconds.
Request = Callable[[], tuple[float, float]]
# Every row of a shape with the ways to make it; none where a peer is absent.
Rows = dict[str, list[Request]]

CORES = os.cpu_count() or 1
# CTranslate2's threads wait actively for 0.2 s after a request.
_PAUSE = 0.3
ABSENT = "not installed: pip install 'hipgpt-jax[peers]'"


def shape_of(D: int, L: int, N: int, F: int, V: int, W: int) -> config.ModelConfig:
    """Returns a model by the letters of its sizes."""
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
    """Measures the rows of each shape in interleaved rounds, and prints their speeds and ratios."""
    found, shapes = facts(), {}
    print("; ".join(f"{name} {value}" for name, value in found.items()))
    print("tokens/s: median (min–max) of the rounds; ratios: min/median/max of the ratios within a round\n")
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
        options.json.write_text(json.dumps({"facts": found, "shapes": shapes}, indent=1) + "\n")


def measure(rows: Rows, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Returns the tokens/s of each row in each round; of several ways to make a row, the fastest counts."""
    rates: dict[str, list[float]] = {row: [] for row in rows}
    for least in (0.0, *[seconds] * rounds):  # the first round compiles
        for row, ways in rows.items():
            if ways:
                rates[row].append(max(rate_of(request, least) for request in ways))
    return {row: values[1:] for row, values in rates.items()}


def rate_of(request: Request, seconds: float) -> float:
    """Tokens/s of as many requests as fill ``seconds``, at least one; then a pause, in which the machine falls idle."""
    timed = [request()]
    while sum(elapsed for _, elapsed in timed) < seconds:
        timed.append(request())
    time.sleep(_PAUSE)
    return sum(tokens for tokens, _ in timed) / sum(elapsed for _, elapsed in timed)


def facts() -> dict[str, str]:
    """Returns what the figures were measured on and with."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.machine()]
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    found = {"cores": str(CORES), "cpu": names[0], "load": f"{os.getloadavg()[0]:.1f}"}
    return found | {
        name: installed.get(name, "absent")
        for name in ("jax", "jaxlib", "flax", "torch", "transformers", "ctranslate2")
    }


def ratios_of(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Least, median and greatest ratio of a round; nothing where a row is absent."""
    ratios = sorted(value / other for value, other in zip(values, others, strict=False))
    return [ratios[0], statistics.median(ratios), ratios[-1]] if ratios else []
