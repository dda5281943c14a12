"""Kills a training run at random moments, resumes it each time, and holds it against an uninterrupted one.

``python scripts/soak.py --kills 50`` ends with exit code 0 where, after every kill, ``latest`` names whole files,
and the run that was killed ends with the weights and the metrics of the one that was not.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hipgpt_jax.runs import directory

_FLAGS = shlex.split(
    "--data-path text.txt --vocab-size 300 --dim 32 --heads 2 --ff 64 --layers 2 --seq 32 --steps 4000 --ckpt-every 7 "
    "--eval-every 50 --log-every 5 --dropout 0.1 --eval-batches 2 --keep-last 3 --device cpu"
)
_TEXT = "the king and his fool went up to see what a queen would say of all that they had lost"
_CLOCK = ("milliseconds", "tokens_per_second")


def main(kills: int, seed: int) -> None:
    """Runs the soak in a temporary directory."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        words = _TEXT.split()
        Path("text.txt").write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(900)))
        subprocess.run(_command("whole"), check=True, stdout=subprocess.DEVNULL)
        opened = 0
        for kill in range(kills):
            process = subprocess.Popen(_command("killed", begun=_is_begun()), stdout=subprocess.DEVNULL)
            time.sleep(draw.uniform(0.5, 6))
            ended = process.poll()
            process.kill()
            process.wait()
            if ended is not None and ended != 0:
                sys.exit(f"soak: error: the run did not go on after kill {kill}: exit code {ended}")
            if (directory.CHECKPOINTS / "killed" / directory.LATEST_CONFIG).exists():
                directory.read_checkpoint("killed").verify()
                opened += 1
        subprocess.run(_command("killed", begun=_is_begun()), check=True, stdout=subprocess.DEVNULL)
        same = _result("killed") == _result("whole")
        print(f"{kills} kills, {opened} left a checkpoint that opens; the end is {'the same' if same else 'ANOTHER'}")
        sys.exit(not same)


def _is_begun() -> bool:
    return (directory.CHECKPOINTS / "killed" / directory.SETTINGS_NAME).is_file()


def _command(run: str, *, begun: bool = False) -> list[str]:
    more = ["--resume"] if begun else []
    return [sys.executable, "-m", "hipgpt_jax.cli.train", *_FLAGS, "--run-name", run, *more]


def _result(run: str) -> tuple[bytes, list[dict[str, float]]]:
    """The weights of the last step, and the metrics without what only the clock decides."""
    where = directory.CHECKPOINTS / run
    lines = map(json.loads, (where / directory.METRICS_NAME).read_text().splitlines())
    told = [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines]
    return (where / directory.LATEST_CHECKPOINT).read_bytes(), told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    options = parser.parse_args()
    main(options.kills, options.seed)
