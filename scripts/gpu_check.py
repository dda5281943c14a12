"""Checks the package on a GPU: decoding and training beside the GPU's own ceilings, then the tests marked ``gpu``.

``scripts/gpu_check.sh`` installs what that needs and runs this. Stdout has one JSON object; the exit code is 1
where a test failed or a part could not run. Each part is a process of its own, because XLA's settings hold for
a whole one: decoding and tests run as ``hipgpt-generate`` does, training as ``hipgpt-train`` does.
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
    """Runs the parts and prints what they found; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.result:
        found = _tests(options) if options.parts == ["tests"] else _measure(options.parts[0], options)
        settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
        options.result.write_text(json.dumps({"settings": settings, **found}))
        return 0
    results = {part: _run(part, arguments) for part in options.parts}
    print(json.dumps(results, indent=1))
    return int(any("error" in found or found.get("failed", 0) for found in results.values()))


def tell(line: str) -> None:
    """Prints a line on stderr."""
    print(f"gpu_check: {line}", file=sys.stderr, flush=True)


def _run(part: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a part in a process of its own, its output on stderr, and returns what it found."""
    tell(f"{part} …")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        command = [sys.executable, __file__, *arguments, "--parts", part, "--result", path]
        code = subprocess.run(command, stdout=sys.stderr).returncode
        if code == _NO_GPU:
            raise SystemExit(1)
        return json.loads(path.read_text()) if code == 0 else {"error": f"exit code {code}; stderr says why"}


def _measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    try:
        device = devices.start(options.device, tell, deterministic=part == "decode")
    except ValueError as error:
        tell(f"error: {error}")
        sys.exit(_NO_GPU)
    if device.platform == "cpu" and options.device != "cpu":
        tell("error: JAX computes on the CPU here: install its plugin for the GPU, or try this with --device cpu")
        sys.exit(_NO_GPU)

    from benchmarks import gpu  # it imports JAX, which starts with the settings made above

    model = table.SHAPES[options.shape]
    measured = (
        gpu.decode(model, device, rounds=options.rounds)
        if part == "decode"
        else gpu.training(model, device, batch_size=options.batch_size, rounds=options.rounds)
    )
    return {"device": str(device), "facts": table.facts(), "plugins": devices.plugins(), **measured}


def _tests(options: argparse.Namespace) -> dict[str, Any]:
    """Runs pytest here; what it prints goes where stdout does."""
    if options.device != "auto":
        os.environ["JAX_PLATFORMS"] = options.device
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # tests start processes that share the GPU
    devices.set_defaults(options.device, tell, deterministic=True)

    import pytest

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tests.xml"
        which = ["-m", "gpu", "--rootdir", str(ROOT), str(ROOT / "tests")]
        code = pytest.main([*which, f"--junitxml={path}", "-n", str(options.workers)])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(int(code))
        (suite,) = ElementTree.parse(path).getroot()
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="%(default)s")
    parser.add_argument("--device", choices=devices.DEVICES, default="auto", help="auto must find a GPU (%(default)s)")
    parser.add_argument("--shape", choices=table.SHAPES, default="gpt2", help="%(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences in a training step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (%(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that test at once, sharing it (%(default)s)")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of the one part that this process runs
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
