"""Measures this package beside a peer and the hardware: all figures of a table are from one run.

``python scripts/benchmark.py generate`` decodes at batch 1, beside Hugging Face and the bandwidth of the memory.
``python scripts/benchmark.py samples`` makes 64 samples, at a decode width of 1 and of 16, and their records.
``python scripts/benchmark.py train`` trains, beside plain PyTorch.

All is on the CPU, in float32, from random weights and with the documented sampling settings. Rounds are
interleaved, so that a noisy machine hits all rows alike, and ratios are taken within a round. Compiling is not
counted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from benchmarks import generate, samples, table, train

COMMANDS = {
    "generate": (generate, "default,d256,d384,gpt2", 128, "tokens/s at batch 1"),
    "train": (train, "default,nanogpt,d256", 0, "tokens/s of training steps"),
    "samples": (samples, "d256", 64, "tokens/s of many samples, by decode width and with records"),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
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
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.shapes.split(",") if name not in table.SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}: choose from {', '.join(table.SHAPES)}")
    if options.rounds < 1 or getattr(options, "num_tokens", 3) < 3:
        parser.error("--rounds must be at least 1 and --num_tokens at least 3")
    table.run(options, options.module.rows_of, options.module.RATIOS_TO)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # where the peer runs too
    main(sys.argv[1:])
