"""CPU benchmarks of this package, compared with other libraries and with the hardware's limits.

Commands of ``python scripts/benchmark.py``:

- ``generate``: decoding at batch size 1, compared with Hugging Face, CTranslate2 and the memory bandwidth
- ``widths``: decoding at batch sizes 16 and 64
- ``long``: generation beyond the context window, compared with nanoGPT's cropping
- ``prefill``: time to the first token of a long prompt
- ``samples``: 64 samples at decode widths 1 and 16, with and without records
- ``train``: training steps, compared with plain PyTorch
- ``start``: whole processes, startup included
- ``memory``: peak resident memory of a process

``--check`` runs every command except ``memory`` and fails if a ratio is more than a fifth below the lowest ratio that
``--save`` wrote to ``benchmarks/ratios.json``.

Everything runs in float32 with random weights and the default sampling settings, except ``start``, which uses the
shipped run. Rounds are interleaved so that noise affects all rows alike. Ratios are computed within a round. Compile
time is excluded.
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
    "generate": (generate, "default,d256,d384,gpt2", 128, "tokens/s at batch size 1"),
    "train": (train, "default,nanogpt,d256", 0, "tokens/s of training steps"),
    "samples": (samples, "d256", 64, "tokens/s of 64 samples, by decode width, with and without records"),
    "widths": (widths, "d256,gpt2", 64, "tokens/s at decode widths of 16 and 64"),
    "long": (long, "d256", 0, "tokens/s beyond the context window"),
    "prefill": (prefill, "d256,gpt2", 0, "prompt tokens/s of prefill"),
    "start": (start, "shipped", 0, "tokens/s of a whole process that generates 50 tokens"),
    "memory": (memory, "gpt2", 8, "peak resident memory, relative to the weights"),
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

_TOLERANCE = 0.2


def main(arguments: Sequence[str]) -> None:
    """Runs one benchmark, or all of them with ``--check`` or ``--save``."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check or options.save:
        if "module" in options:
            parser.error("--check and --save run all commands: give no command with them")
        hold({name: _ratios(name) for name in CHECKED}, save=options.save)
        return
    if "module" not in options:
        parser.error(f"no command given: choose from {', '.join(COMMANDS)}, or --check")
    if unknown := [name for name in options.shapes.split(",") if name not in table.SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}: choose from {', '.join(table.SHAPES)}")
    if options.rounds < 1 or getattr(options, "num_tokens", 3) < 3:
        parser.error("--rounds must be at least 1 and --num_tokens at least 3")
    if options.module is memory:
        memory.report(options)
    else:
        table.run(options, options.module.rows_of, options.module.RATIOS_TO)


def hold(ratios: dict[str, Any], *, save: bool) -> None:
    """Saves the measured ratios, or compares them with the saved ones.

    Raises:
        SystemExit: If a ratio has fallen, or if a peer needed for saving is not installed.
    """
    absent = [
        f"{command} {shape}: {name}"
        for command, shapes in ratios.items()
        for shape, measured in shapes.items()
        for name, values in measured.items()
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
    """Returns one line per median ratio that is more than a fifth below the lowest saved one."""
    lines = []
    for command, shapes in before.items():
        for shape, ratios in shapes.items():
            for name, (lowest, median, _) in ratios.items():
                measured = now.get(command, {}).get(shape, {}).get(name)
                if measured and measured[1] < (1 - _TOLERANCE) * lowest:
                    lines.append(
                        f"{command} {shape}: {name} is {measured[1]:.2f}; it was {median:.2f}, {lowest:.2f} at least"
                    )
    return lines


def _ratios(name: str) -> dict[str, dict[str, list[float]]]:
    """Returns the checked ratios, measured in a separate process; the list is empty if the peer is not installed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rates.json"
        subprocess.run([sys.executable, __file__, name, "--shapes", CHECKED[name], "--json", path], check=True)
        shapes = json.loads(path.read_text())["shapes"]
    return {
        shape: {
            f"{row} to {other}": [round(ratio, 3) for ratio in measured["ratios"][row][other]]
            for row, other in COMMANDS[name][0].HELD
        }
        for shape, measured in shapes.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole_suite = parser.add_mutually_exclusive_group()
    whole_suite.add_argument("--check", action="store_true", help="run all commands and fail if a ratio has fallen")
    whole_suite.add_argument(
        "--save", action="store_true", help=f"run all commands and write the ratios to {RATIOS.name}"
    )
    commands = parser.add_subparsers()
    for name, (module, shapes, num_tokens, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--shapes", default=shapes, help=f"comma-separated, from {','.join(table.SHAPES)} (%(default)s)"
        )
        command.add_argument("--rounds", type=int, default=5, help="measurements per row (%(default)s)")
        if num_tokens:
            command.add_argument(
                "--num_tokens",
                type=int,
                default=num_tokens,
                help="tokens per sample, limited by the window (%(default)s)",
            )
        command.add_argument(
            "--seconds", type=float, default=2.0, help="minimum duration of a measurement (%(default)s)"
        )
        command.add_argument("--json", type=Path, help="write all rounds and ratios to this JSON file")
        command.set_defaults(module=module)
    return parser


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the peers run on the CPU as well
    main(sys.argv[1:])
