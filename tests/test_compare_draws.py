"""The comparison of the rules of drawing: the logits, both rules, the table and saved logits."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import hipgpt_jax

SCRIPTS = Path(__file__).parents[1] / "scripts"
FLAGS = ["--run_name", "tiny", "--batch_sizes", "2", "--positions", "1", "--draws", "4", "--device", "cpu"]


@pytest.fixture
def script(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in the working directory of the run ``tiny``."""
    monkeypatch.chdir(tiny)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compare_draws")


def rows(out: str) -> dict[tuple[str, str], list[int]]:
    """Returns the counts of both rules by numerics and settings."""
    cells = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    return {(row[0], row[2]): [int(cell.split(", ")[-1]) for cell in row[3:5]] for row in cells}


def test_logits_are_those_of_generation(script: ModuleType) -> None:
    """Their log-probabilities of the sampled tokens are the recorded ones."""
    run = hipgpt_jax.load_run("tiny", device="cpu")
    (record,) = run.generate("\n", num_tokens=run.files.window - 1)
    logits_TV = script.Decoder(run).logits(np.array([(*record.prompt_ids, *record.ids)], np.int32))[0]
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV.astype(np.float64)).sum(axis=-1, keepdims=True))
    first = len(record.prompt_ids) - 1
    found = [logprobs_TV[first + t, token] for t, token in enumerate(record.ids)]
    np.testing.assert_allclose(found, record.logprobs, atol=1e-5)


def _contract_1(logits_V: np.ndarray, uniform: np.float32, top_k: int, top_p: float) -> int:
    """Returns the first candidate, by logit and then by id, whose cumulative probability exceeds the number."""
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    sums = np.cumsum(np.exp(logits_V[order] - logits_V[order[0]]), dtype=np.float32)
    kept = 1 + int(np.argmax(sums >= np.float32(top_p) * sums[-1])) if top_p < 1 else len(sums)
    return int(order[np.argmax(sums > uniform * sums[kept - 1])])


def test_draws_by_both_rules(script: ModuleType) -> None:
    """Contract 1 draws what its definition does. Contract 2 draws the same distribution."""
    logits_TV = np.random.default_rng(0).normal(scale=2, size=(3, 12)).astype(np.float32)
    uniform_DT, gumbel_DTV = script.noise((0,), 4000, *logits_TV.shape)
    drawn = script.draw(logits_TV, uniform_DT, gumbel_DTV)
    for (top_k, top_p), tokens, probability_TV in zip(script.SETTINGS.values(), *drawn, strict=True):
        for t, logits in enumerate(logits_TV):
            expected = [_contract_1(logits, u, top_k, top_p) for u in uniform_DT[:50, t]]
            assert tokens[0, :50, t].tolist() == expected
        for rule in (0, 1):
            share_TV = (tokens[rule][:, :, None] == np.arange(12)).mean(axis=0)
            deviation_TV = np.sqrt(probability_TV * (1 - probability_TV) / len(uniform_DT))
            assert np.all(np.abs(share_TV - probability_TV) <= 5 * deviation_TV)


@pytest.mark.slow
def test_table(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights change tokens, and every pair has a row per setting."""
    assert script.main([*FLAGS, "--other_step", "20"]) == 0
    counts = rows(capsys.readouterr().out)
    pairs = ("batch size 1 → 2", "float32 → bfloat16, batch size 2", "step 600 → 20, batch size 2")
    assert list(counts) == [(pair, settings) for pair in pairs for settings in script.SETTINGS]
    assert counts["step 600 → 20, batch size 2", "plain"][0] > counts["step 600 → 20, batch size 2", "plain"][1] > 0


@pytest.mark.slow
def test_saved_logits(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numerics change no token, another dtype does, and other weights are refused."""
    path = str(tmp_path / "logits.npz")
    assert script.main([*FLAGS, "--save", path]) == 0
    assert script.main([*FLAGS, "--against", path]) == 0
    counts = rows(capsys.readouterr().out)
    assert list(counts.values()) == [[0, 0]] * 3
    assert script.main([*FLAGS, "--against", path, "--dtype", "bfloat16", "--draws", "40"]) == 0
    assert sum(map(sum, rows(capsys.readouterr().out).values())) > 0
    assert script.main([*FLAGS, "--against", path, "--step", "20"]) == 1
    assert capsys.readouterr().err.endswith("logits.npz is of other weights\n")


def test_interval(script: ModuleType) -> None:
    """Wilson's interval, and a wider one if the texts differ by more than chance."""
    low, high = script.interval(np.array([10, 10]), 100)
    assert (round(low, 4), round(high, 4)) == (0.0657, 0.1494)
    assert script.interval(np.array([0, 20]), 100)[1] > 0.2
    assert script.interval(np.array([0, 0]), 100)[0] == 0
