"""The benchmark runs, and its table and its file say the same."""

import argparse
import dataclasses
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

from hipgpt_jax import config, devices

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = config.ModelConfig(embed_dim=16, num_layers=2, num_heads=2, ff_hidden_dim=32, vocab_size=300, max_seq_len=16)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with one more shape, as it finds itself when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark")
    monkeypatch.setitem(module.table.SHAPES, "tiny", TINY)
    return module


@pytest.mark.slow
def test_generate_prints_the_figures_it_writes(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.generate, "_hugging_face", lambda *_: [])
    monkeypatch.setattr(benchmark.generate.peers, "ctranslate2", lambda *_: [])
    path = tmp_path / "rates.json"
    benchmark.main(["generate", "--shapes", "tiny", "--rounds", "3", "--seconds", "0.01", "--json", str(path)])

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ")[2:] for line in lines}
    tiny = json.loads(path.read_text())["shapes"]["tiny"]
    assert list(cells) == list(tiny["rates"]) == ["streaming", "scan", "Hugging Face", "CTranslate2", "bound"]
    assert cells["Hugging Face"] == [benchmark.table.ABSENT, "–", "–", "–", "–"]
    for row in ("streaming", "scan", "bound"):
        rates = tiny["rates"][row]
        assert len(rates) == 3
        assert cells[row][0] == f"{statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})"
        shares = sorted(rate / bound for rate, bound in zip(rates, tiny["rates"]["bound"], strict=True))
        assert cells[row][3] == "/".join(f"{share:.2f}" for share in shares)


@pytest.mark.peers
def test_hugging_face_is_measured_with_our_weights(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("ctranslate2")
    rows = benchmark.generate.rows_of(TINY, argparse.Namespace(num_tokens=8), tmp_path)
    rates = benchmark.table.measure(rows, rounds=1, seconds=0.0)
    assert [len(values) for values in rates.values()] == [1, 1, 1, 1, 1]


@pytest.mark.slow
def test_samples_are_made_at_both_widths_and_recorded(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.table.SHAPES, "tiny", dataclasses.replace(TINY, max_seq_len=40))
    path = tmp_path / "rates.json"
    benchmark.main(["samples", "--shapes", "tiny", "--rounds", "1", "--seconds", "0", "--json", str(path)])
    tiny = json.loads(path.read_text())["shapes"]["tiny"]
    assert list(tiny["rates"]) == ["width 1", "width 16", "width 16, recorded"]
    assert all(rate > 0 for rates in tiny["rates"].values() for rate in rates)


@pytest.mark.slow
def test_prompts_and_long_texts_are_measured(benchmark: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(num_tokens=4)
    for module, rows in (
        (benchmark.prefill, ["to the first token", "bare forward pass", "products alone"]),
        (benchmark.long, ["stride 1", "stride 64"]),
        (benchmark.widths, ["hipgpt_jax, 16", "hipgpt_jax, 64"]),
    ):
        rates = benchmark.table.measure(module.rows_of(TINY, options, tmp_path), rounds=1, seconds=0.0)
        assert set(rows) <= set(rates)
        assert all(rates[row][0] > 0 for row in rows)


@pytest.mark.slow
def test_what_a_gpu_is_measured_for_runs_here_too(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once truly; and once with known speeds, of which the shares follow."""
    gpu, device = importlib.import_module("benchmarks.gpu"), devices.Device("cpu", "cpu")
    found = gpu.decode(TINY, device, widths=(2, 8), rounds=2, read_bytes=2**20)
    assert found["width 8"]["tokens_per_s"]["median"] > found["width 2"]["tokens_per_s"]["max"]
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction
        found = gpu.training(TINY, device, batch_size=4, rounds=2, product_size=64)
    assert found["losses"][0] == pytest.approx(math.log(300), abs=0.1)
    assert found["mfu"] is None

    monkeypatch.setattr(gpu, "_read", lambda *_: lambda: (1e9, 1.0))
    monkeypatch.setattr(gpu, "_product", lambda *_: lambda: (1e12, 1.0))
    monkeypatch.setattr(gpu, "_sampled", lambda *_: lambda: (1000, 1.0))
    monkeypatch.setattr(gpu.train, "steps", lambda *_: (lambda: (1000, 1.0), [5.7]))
    layer = 4 * 16 * 16 + 2 * 16 * 32 + (3 + 1 + 1 + 4) * 16 + 32
    weights, live = 2 * layer + 300 * 16 + 2 * 16, 2 * 2 * 16 * (8 + 8 / 2)
    found = gpu.decode(TINY, device, widths=(1, 4))
    for width in (1, 4):
        share = found[f"width {width}"]["share_of_bandwidth"]["median"]
        assert share == pytest.approx(2 * (weights / width + live) * 1000 / 1e9, rel=1e-3)
    found = gpu.training(TINY, devices.Device("gpu", "NVIDIA H200"))
    assert found["share_of_products"]["median"] == pytest.approx(
        (6 * weights + 12 * 2 * 16 * 16) * 1000 / 1e12, rel=1e-3
    )
    assert found["mfu"] == 0.0
    assert found["attention"] == "cudnn"


@pytest.mark.slow
def test_gpu_check_says_in_a_line_that_jax_finds_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "gpu_check.py"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[1:] == [
        "gpu_check: error: JAX computes on the CPU here: install its plugin for the GPU, or try this with --device cpu"
    ]


def test_an_unknown_shape_names_those_there_are(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["generate", "--shapes", "huge"])
    assert (
        "unknown shape 'huge': choose from default, nanogpt, shipped, d256, d384, gpt2, tiny" in capsys.readouterr().err
    )


def test_a_ratio_that_has_fallen_by_more_than_a_fifth_of_its_lowest_is_named(benchmark: ModuleType) -> None:
    before = {"generate": {"default": {"streaming to bound": [0.5, 0.6, 0.7], "streaming to Hugging Face": [2, 3, 4]}}}
    for median, fallen in ((0.41, False), (0.39, True)):
        now = {"generate": {"default": {"streaming to bound": [0.1, median, 0.9]}}}
        told = benchmark.falls(before, now)
        assert bool(told) == fallen
    assert told == ["generate default: streaming to bound is 0.39; it was 0.60, 0.50 at least"]


def test_a_peer_that_is_absent_is_said_and_nothing_is_saved(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = json.loads(benchmark.RATIOS.read_text())
    monkeypatch.setattr(benchmark, "RATIOS", tmp_path / "ratios.json")
    benchmark.hold(ratios, save=True)
    ratios["train"]["d256"]["hipgpt_jax to PyTorch"] = []
    with pytest.raises(
        SystemExit, match=r"^not saved, a peer is not installed: .*: train d256: hipgpt_jax to PyTorch$"
    ):
        benchmark.hold(ratios, save=True)
    assert json.loads(benchmark.RATIOS.read_text()) != ratios
    benchmark.hold(ratios, save=False)
    assert "not compared: train d256: hipgpt_jax to PyTorch, the peer is not installed" in capsys.readouterr().out


def test_the_saved_ratios_are_of_what_is_checked(benchmark: ModuleType) -> None:
    saved = json.loads(benchmark.RATIOS.read_text())
    assert {name: ",".join(shapes) for name, shapes in saved.items()} == benchmark.CHECKED
    for name, shapes in saved.items():
        held = [f"{row} to {other}" for row, other in benchmark.COMMANDS[name][0].HELD]
        assert all(list(ratios) == held for ratios in shapes.values())
        assert all(low <= median <= high for ratios in shapes.values() for low, median, high in ratios.values())
    assert benchmark.falls(saved, saved) == []


def test_a_missing_command_is_an_error(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert (
        "no command given: choose from generate, train, samples, widths, long, prefill, start, memory, or --check"
        in capsys.readouterr().err
    )
