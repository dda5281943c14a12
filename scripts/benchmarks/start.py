"""Duration of a whole process that generates 50 tokens from the shipped run."""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plain, table
from hipgpt_jax import compilation, config

OURS, BARE, PEER = "hipgpt-generate", "imports and device", "PyTorch as nanoGPT's sample.py"
RATIOS_TO = (BARE, PEER)
HELD = ((OURS, BARE), (OURS, PEER))

IMPORTS = "import jax, flax.linen, tokenizers; from absl import flags; jax.devices()"
_TOKENS = 50


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows, in tokens/s of whole processes that generate 50 tokens; the bare imports count as 50, too.

    The compilation cache starts empty and is filled in the uncounted round.
    """
    del model, options
    ours = [sys.executable, "-m", "hipgpt_jax.cli.generate", "--run-name", "shakespeare"]
    ours += ["--prompt", "To be, or not to be:", "--num_tokens", str(_TOKENS)]
    return {
        OURS: [_process(ours, directory)],
        BARE: [_process([sys.executable, "-c", IMPORTS], directory)],
        PEER: [_process([sys.executable, plain.__file__], directory)] if importlib.util.find_spec("torch") else [],
    }


def _process(command: Sequence[str], cache: Path) -> table.Request:
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    environ.pop(compilation.CACHE_VARIABLE, None)
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(config.__file__).parents[1]), environ.get("PYTHONPATH", "")])

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        subprocess.run(command, env=environ, capture_output=True, check=True)
        return _TOKENS, time.perf_counter() - began

    return request
