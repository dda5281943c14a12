"""Measures this package beside a peer and the hardware: all figures of a table are from one run.

``python scripts/benchmark.py generate`` decodes at batch 1, beside Hugging Face, CTranslate2 and the bandwidth of the
memory; ``widths`` in batches of 16 and 64; ``long`` beyond the window, beside nanoGPT's way; ``prefill`` reads prompts;
``start`` runs whole processes; ``memory`` prints their peak.
``python scripts/benchmark.py samples`` makes 64 samples, at a decode width of 1 and of 16, and their records.
``python scripts/benchmark.py train`` trains, beside plain PyTorch.
``python scripts/benchmark.py --check`` runs all of them and fails where a ratio has fallen, by more than a fifth,
below the lowest of those that ``--save`` wrote to ``benchmarks/ratios.json``.

All is on the CPU, in float32, from random weights and with the documented sampling settings. Rounds are
interleaved, so that a noisy machine hits all rows alike, and ratios are taken within a round. Compiling is not
counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from benchmarks import generate, long, memory, prefill, samples, start, table, train, widths

COMMANDS = {
    "generate": (generate, "default,d256,d384,gpt2", 128, "tokens/s at batch 1"),
    "train": (train, "default,nanogpt,d256", 0, "tokens/s of training steps"),
    "samples": (samples, "d256", 64, "tokens/s of many samples, by decode width and with records"),
    "widths": (widths, "d256,gpt2", 64, "tokens/s at decode widths of 16 and 64"),
    "long": (long, "d256", 0, "tokens/s beyond the window"),
    "prefill": (prefill, "d256,gpt2", 0, "tokens/s of reading a prompt"),
    "start": (start, "shipped", 0, "tokens/s of a whole process that makes 50"),
    "memory": (memory, "gpt2", 8, "peak resident memory, beside the weights"),
}
CHECKED = {
    "generate": "default,d256",
    "train": "default,nanogpt,d256",
    "samples": "d256",
    "widths": "d256",
    "long": "d256",
    "prefill": "d256",
    "start": "shipped",
}
RATIOS = Path(__file__).parent / "benchmarks" / "ratios.json"

_FALL = 0.2


def main(arguments: Sequence[str]) -> None:
    """Runs the measurement that the command line names, or all of them."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check or options.save:
        if "module" in options:
            parser.error("--check and --save measure all commands: give them alone")
        hold({name: _ratios(name) for name in CHECKED}, save=options.save)
        return
    if "module" not in options:
        parser.error(f"what is to be measured? One of {', '.join(COMMANDS)}, or --check")
    if unknown := [name for name in options.shapes.split(",") if name not in table.SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}: choose from {', '.join(table.SHAPES)}")
    if options.rounds < 1 or getattr(options, "num_tokens", 3) < 3:
        parser.error("--rounds must be at least 1 and --num_tokens at least 3")
    if options.module is memory:
        memory.report(options)
    else:
        table.run(options, options.module.rows_of, options.module.RATIOS_TO)


def hold(ratios: dict[str, Any], *, save: bool) -> None:
    """Saves measured ratios, or holds them against the saved ones; raises SystemExit where that fails."""
    absent = [
        f"{command} {shape}: {name}"
        for command, shapes in ratios.items()
        for shape, found in shapes.items()
        for name, values in found.items()
        if not values
    ]
    if save and absent:
        raise SystemExit(f"not saved, a peer is {table.ABSENT}: {'; '.join(absent)}")
    if save:
        RATIOS.write_text(json.dumps(ratios, indent=1) + "\n")
        return
    for name in absent:
        print(f"not compared: {name}, the peer is {table.ABSENT}")
    if fallen := falls(json.loads(RATIOS.read_text()), ratios):
        raise SystemExit("\n".join(fallen))


def falls(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each median ratio that lies more than a fifth below the lowest one before."""
    lines = []
    for command, shapes in before.items():
        for shape, ratios in shapes.items():
            for name, (lowest, median, _) in ratios.items():
                found = now.get(command, {}).get(shape, {}).get(name)
                if found and found[1] < (1 - _FALL) * lowest:
                    lines.append(
                        f"{command} {shape}: {name} is {found[1]:.2f}; it was {median:.2f}, {lowest:.2f} at least"
                    )
    return lines


def _ratios(name: str) -> dict[str, dict[str, list[float]]]:
    """Measures in a process of its own, and returns the ratios that are held; an empty one to a peer that is absent."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rates.json"
        subprocess.run([sys.executable, __file__, name, "--shapes", CHECKED[name], "--json", path], check=True)
        shapes = json.loads(path.read_text())["shapes"]
    return {
        shape: {
            f"{row} to {other}": [round(ratio, 3) for ratio in found["ratios"][row][other]]
            for row, other in COMMANDS[name][0].HELD
        }
        for shape, found in shapes.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_of_them = parser.add_mutually_exclusive_group()
    all_of_them.add_argument("--check", action="store_true", help="run all, and fail where a ratio has fallen")
    all_of_them.add_argument("--save", action="store_true", help=f"run all, and write the ratios to {RATIOS.name}")
    commands = parser.add_subparsers()
    for name, (module, shapes, num_tokens, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--shapes", default=shapes, help=f"among {','.join(table.SHAPES)} (%(default)s)")
        command.add_argument("--rounds", type=int, default=5, help="measurements of each row (%(default)s)")
        if num_tokens:
            command.add_argument(
                "--num_tokens", type=int, default=num_tokens, help="fewer where the window ends (%(default)s)"
            )
        command.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement (%(default)s)")
        command.add_argument("--json", type=Path, help="file for all rounds and ratios")
        command.set_defaults(module=module)
    return parser


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # where the peer runs too
    main(sys.argv[1:])
