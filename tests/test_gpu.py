"""Agreement of a GPU with the CPU up to rounding, and of two starts on a GPU to the bit."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import programs
import pytest

from hipgpt_jax import devices

pytestmark = pytest.mark.gpu

# Prompts of several buckets and one beyond the window of 128; texts that go beyond it.
PROMPTS = ["O", "ROMEO:", "To be, or not to be:", "First Citizen: Before we proceed any further, hear me speak. " * 6]
HEAD_DIM = 32


@pytest.fixture(scope="module")
def gpu() -> devices.Device:
    """The GPU; without one, nothing here can be tried."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        pytest.skip("no GPU")
    return devices.Device(first.platform, first.device_kind)


def generate(*flags: str, cwd: Path, cache: Path | None = None) -> list[dict[str, Any]]:
    """Makes five samples of each prompt, where JAX would, and returns the records in ``made.jsonl``."""
    (cwd / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    asked = ["--prompts_file", "prompts.txt", "--num_samples", "5", "--num_tokens", "150", "--output", "made.jsonl"]
    done = programs.spawn("generate", "--run-name", "shakespeare", *asked, *flags, cwd=cwd, cache=cache, platforms="")
    assert done.code == 0, done.err
    return [json.loads(line) for line in (cwd / "made.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("width", ["1", "16"])
def test_records_of_the_cpu_are_replayed_but_for_rounding(gpu: devices.Device, width: str, tmp_path: Path) -> None:
    """Wherever a token differs, rounding suffices to change it."""
    generate("--device", "cpu", "--batch_size", width, cwd=tmp_path)
    done = programs.spawn("replay", "made.jsonl", cwd=tmp_path, platforms="")
    assert f"platform: cpu in the record, {gpu.platform} now" in done.out, done.err
    *_, summary = done.out.splitlines()
    told = re.fullmatch(
        r"(\d+) of 20 identical(?:, (\d+) differ \((\d+) within floating-point error\))?, log-.* within (\S+)", summary
    )
    assert told, done.out
    identical, differ, rounding = (int(number or 0) for number in told.groups()[:3])
    assert identical + differ == 20
    assert rounding == differ, done.out
    assert identical > 10, done.out
    assert float(told[4]) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_start_with_a_cold_cache_gives_the_same_bits(gpu: devices.Device, dtype: str, tmp_path: Path) -> None:
    """Whatever is compiled and tuned anew, and was left in memory, is no part of a record."""
    flags = ["--dtype", dtype, "--top_logprobs", "2", "--batch_size", "4"]
    starts = [tmp_path / name for name in ("one", "other")]
    for start in starts:
        start.mkdir()
    one, other = (generate(*flags, cwd=start, cache=start) for start in starts)
    for made in (*one, *other):
        del made["timings"], made["started"]
    assert one == other
    assert one[0]["numerics"]["attention"] == gpu.attention(dtype, HEAD_DIM)
    done = programs.spawn("replay", "made.jsonl", cwd=starts[0], cache=starts[1], platforms="")
    assert done.out.splitlines()[-1] == "20 of 20 identical, log-probabilities equal to the bit", done.out + done.err


@pytest.mark.parametrize(
    ("dtype", "flags"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "--xla_gpu_deterministic_ops=true")]
)
def test_training_learns_what_it_learns_on_the_cpu(
    gpu: devices.Device,
    dtype: str,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After 20 steps the loss is that of the CPU, within what half precision costs.

    After 40, at this learning rate, two CPUs are 0.5 % apart, and TF32 or bfloat16 2 % from either. Without the
    flags that generation needs, unless they are asked for; products of float32 are made in float32.
    """
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", dtype)
    asked = "--data-path ../text.txt --run-name tiny --vocab-size 300 --steps 40 --ckpt-every 20 --lr 1e-2"
    (tmp_path / "text.txt").write_text(programs.TEXT)
    losses = []
    for name, platforms in (("cpu", "cpu"), ("gpu", "")):
        (tmp_path / name).mkdir()
        words = (*asked.split(), "--warmup-steps", "5", "--dtype", dtype if name == "gpu" else "float32")
        done = programs.spawn("train", *words, cwd=tmp_path / name, platforms=platforms)
        assert done.code == 0, done.err
        losses.append(first_loss(tmp_path / name / "checkpoints" / "tiny"))
    on_cpu, on_gpu = losses
    assert on_gpu == pytest.approx(on_cpu, rel=0.02)
    config = json.loads((tmp_path / "gpu" / "checkpoints" / "tiny" / "latest_config.json").read_text())
    head_dim = config["model"]["embed_dim"] // config["model"]["num_heads"]
    attention = gpu.attention(dtype, head_dim, trains=True, environ={"XLA_FLAGS": flags})
    assert config["training"]["attention"] == attention


def first_loss(run: Path) -> float:
    """Returns the first validation loss of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["validation_loss"] for line in lines if "validation_loss" in line)
