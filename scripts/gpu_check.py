"""GPU check: decoding and training compared with the GPU's limits, then the tests marked ``gpu``.

``scripts/gpu_check.sh`` installs the dependencies and runs this script. Stdout is one JSON object. The exit code is 1
if a test failed or a part could not run. Each part runs in its own process because XLA's settings are per process:
decoding and the tests use those of ``hipgpt-generate``, training uses those of ``hipgpt-train``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import table

from hipgpt_jax import devices

ROOT = Path(__file__).parents[1]
PARTS = ("decode", "training", "tests")

_SETTINGS = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")
_NO_GPU = 3


def main(arguments: Sequence[str]) -> int:
    """Runs the parts, prints their results and returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.result:
        result = _tests(options) if options.parts == ["tests"] else _measure(options.parts[0], options)
        settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
        options.result.write_text(json.dumps({"settings": settings, **result}))
        return 0
    results = {part: _run(part, arguments) for part in options.parts}
    print(json.dumps(results, indent=1))
    return int(any("error" in result or result.get("failed", 0) for result in results.values()))


def log(line: str) -> None:
    """Prints a line on stderr."""
    print(f"gpu_check: {line}", file=sys.stderr, flush=True)


def _run(part: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the result of a part, run in a separate process with its output on stderr."""
    log(f"{part} …")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        command = [sys.executable, __file__, *arguments, "--parts", part, "--result", path]
        code = subprocess.run(command, stdout=sys.stderr).returncode
        if code == _NO_GPU:
            raise SystemExit(1)
        return json.loads(path.read_text()) if code == 0 else {"error": f"exit code {code}; see stderr"}


def _measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    try:
        device = devices.start(options.device, log, deterministic=part == "decode")
    except ValueError as error:
        log(f"error: {error}")
        sys.exit(_NO_GPU)
    if device.platform == "cpu" and options.device != "cpu":
        log("error: JAX computes on the CPU here: install its plugin for the GPU, or try this with --device cpu")
        sys.exit(_NO_GPU)

    from benchmarks import gpu  # imports JAX, which reads the environment variables set above

    model = table.SHAPES[options.shape]
    measurements = (
        gpu.decode(model, device, rounds=options.rounds)
        if part == "decode"
        else gpu.training(model, device, batch_size=options.batch_size, rounds=options.rounds)
    )
    return {"device": str(device), "facts": table.facts(), "plugins": devices.plugins(), **measurements}


def _tests(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the GPU tests in this process and returns the counts of their outcomes."""
    if options.device != "auto":
        os.environ["JAX_PLATFORMS"] = options.device
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the tests' subprocesses share the GPU
    devices.set_defaults(options.device, log, deterministic=True)

    import pytest

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tests.xml"
        selection = ["-m", "gpu", "--rootdir", str(ROOT), str(ROOT / "tests")]
        code = pytest.main([*selection, f"--junitxml={path}", "-n", str(options.workers)])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(int(code))
        (suite,) = ElementTree.parse(path).getroot()
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run (%(default)s)")
    parser.add_argument("--device", choices=devices.DEVICES, default="auto", help="auto requires a GPU (%(default)s)")
    parser.add_argument("--shape", choices=table.SHAPES, default="gpt2", help="model shape (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per training step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per figure (%(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="test processes that share the GPU (%(default)s)")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # internal: result file of a part's process
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
