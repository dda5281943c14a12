"""Peak resident memory of ``hipgpt-generate``, relative to its weights and above a bare process."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import samples, start, table
from hipgpt_jax import config

_COUNT = """
import os, runpy, sys
code = 0
try:
    {run}
except SystemExit as end:
    code = end.code or 0
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
sys.stderr.write("\\n" + peak)
os._exit(code)
"""
_MB = 1024


def report(options: argparse.Namespace) -> None:
    """Prints, per shape, the memory above that of the bare process as a multiple of the weights."""
    bare = _peak(["-c", _COUNT.format(run=start.IMPORTS.replace("; ", "\n    "))])
    print(f"bare process (imports and device): {bare / _MB:.0f} MB")
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            samples.write_run(table.SHAPES[name], Path(directory) / "checkpoints/run")
            size = (Path(directory) / "checkpoints/run/model.safetensors").stat().st_size / 1024
            run = "sys.argv[0] = 'hipgpt-generate'; runpy.run_module('hipgpt_jax.cli.generate', run_name='__main__')"
            flags = ["--run-name", "run", "--prompt", "mana tovi", "--num_tokens", str(options.num_tokens)]
            peaks = [_peak(["-c", _COUNT.format(run=run), *flags], directory) for _ in range(options.rounds + 1)][1:]
        excess = sorted((peak - bare) / size for peak in peaks)
        print(
            f"{name}: weights {size / _MB:.0f} MB, peak {max(peaks) / _MB:.0f} MB: above the bare process "
            f"{excess[len(excess) // 2]:.2f} times the weights ({excess[0]:.2f}–{excess[-1]:.2f})"
        )


def _peak(arguments: Sequence[str], directory: str = ".") -> int:
    """Returns the peak resident memory of a Python process, in KiB."""
    root = str(Path(config.__file__).parents[1])
    environ = {**os.environ, "XDG_CACHE_HOME": directory, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, *arguments], cwd=directory, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stderr.splitlines()[-1].split()[1])
