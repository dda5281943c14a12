"""The benchmark runs, and its table and its file say the same."""

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from hipgpt_jax import config

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
TINY = config.ModelConfig(embed_dim=16, num_layers=2, num_heads=2, ff_hidden_dim=32, vocab_size=300, max_seq_len=16)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.SHAPES, "tiny", TINY)
    return module


def test_generate_prints_the_figures_it_writes(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_peer", lambda *_: [])
    path = tmp_path / "rates.json"
    benchmark.main(["generate", "--shapes", "tiny", "--rounds", "3", "--seconds", "0.01", "--json", str(path)])

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ")[2:] for line in lines}
    tiny = json.loads(path.read_text())["shapes"]["tiny"]
    assert list(cells) == list(tiny["rates"]) == ["streaming", "scan", "Hugging Face", "bound"]
    assert tiny["num_tokens"] == TINY.max_seq_len - 8
    assert cells["Hugging Face"] == [benchmark.ABSENT, "–", "–", "–"]
    for row in ("streaming", "scan", "bound"):
        rates = tiny["rates"][row]
        assert len(rates) == 3
        assert cells[row][0] == f"{statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})"
        shares = sorted(rate / bound for rate, bound in zip(rates, tiny["rates"]["bound"], strict=True))
        assert cells[row][2] == "/".join(f"{share:.2f}" for share in shares)


@pytest.mark.peers
def test_hugging_face_is_measured_with_our_weights(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    rates = benchmark._measure(benchmark._rows(TINY, 8, tmp_path), rounds=1, seconds=0.0)
    assert [len(values) for values in rates.values()] == [1, 1, 1, 1]


def test_an_unknown_shape_names_those_there_are(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["generate", "--shapes", "huge"])
    assert "unknown shape 'huge': choose from default, d256, d384, gpt2, tiny" in capsys.readouterr().err
