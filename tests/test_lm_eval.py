"""Scores and texts of lm-evaluation-harness are those of its own model for Hugging Face, on an exported folder."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import programs
import pytest

from hipgpt_jax import config
from hipgpt_jax.runs import export, huggingface, loading
from hipgpt_jax.text import tokenizer

pytestmark = pytest.mark.peers

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[peers]")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[peers]")
lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -e .[peers]")

DOCUMENTS: list[dict[str, Any]] = [
    {"text": "the king and the queen", "context": "the king", "choices": [" and", " queen", " qq"], "answer": 0},
    {"text": "no", "context": "here the king and the", "choices": [" the queen is not", " a", "n end"], "answer": 2},
    {"text": "a queen is here. " * 6, "context": "", "choices": ["is", "the", "of"], "answer": 1},
]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "until": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{context}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
SAMPLED = {**TASKS["until"], "repeats": 2, "generation_kwargs": {"until": [], "max_gen_toks": 8, "temperature": 1.0}}


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Evaluates on local tasks, in a directory with the run ``own`` and its export ``folder``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    vocabulary = tokenizer.Tokenizer.train([programs.TEXT], 300, has_end=True)
    end = vocabulary.vocab_size - 1
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 24, "n_embd": 48, "n_head": 6, "n_layer": 2}
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=end, eos_token_id=end))
    for parameter in peer.parameters():
        parameter.data.normal_(0, 0.3)
    peer.save_pretrained("source")
    (tmp_path / "source/tokenizer.json").write_text(vocabulary.to_json())
    huggingface.write_run("own", huggingface.read(tmp_path / "source"))
    export.write(loading.open_run("own", None, config.DecodingConfig()), tmp_path / "folder", lambda digest: digest)
    Path("data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    Path("tasks").mkdir()
    for name, task in {**TASKS, "sampled": SAMPLED}.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data.jsonl"}}}
        Path(f"tasks/{name}.yaml").write_text(json.dumps({"task": name, **source, "test_split": "test", **task}))

    importlib.import_module("hipgpt_jax.cli.lm_eval")  # registers the model
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path="tasks")

    def run(model: str, names: Sequence[str] = tuple(TASKS), **arguments: Any) -> dict[str, Any]:
        return lm_eval.simple_evaluate(model, tasks=list(names), task_manager=manager, **arguments)

    return run


def test_scores_and_texts_are_those_of_the_exported_folder(evaluate: Callable[..., dict[str, Any]]) -> None:
    ours = evaluate("hipgpt", model_args={"run": "own"}, batch_size=2)
    theirs = evaluate("hf", model_args={"pretrained": "folder", "dtype": "float32"}, device="cpu", batch_size=1)
    for name in TASKS:
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for own, peer in zip(one["resps"], other["resps"], strict=True):
                flat = [[answer] if isinstance(answer, float | str) else [*answer] for answer in (own[0], peer[0])]
                assert flat[0] == (flat[1] if isinstance(flat[1][0], str) else pytest.approx(flat[1], abs=1e-3))
    for name, results in theirs["results"].items():
        for metric, value in results.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5)


def test_samples_follow_the_seed_and_repeats_differ(evaluate: Callable[..., dict[str, Any]]) -> None:
    def texts(seed: int) -> list[list[str]]:
        found = evaluate("hipgpt", ["sampled"], model_args={"run": "own"}, batch_size=3, numpy_random_seed=seed)
        return [one["resps"][0] for one in found["samples"]["sampled"]]

    first = texts(1)
    assert texts(1) == first != texts(2)
    assert all(one != other for one, other in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("run=none", "run 'none' not found"), ("run=own,dtype=float16", "dtype must be one of float32, bfloat16")],
)
def test_a_mistake_is_one_line(evaluate: Callable[..., dict[str, Any]], arguments: str, message: str) -> None:
    del evaluate
    command = [sys.executable, "-m", "hipgpt_jax.cli.lm_eval", "run", "--model", "hipgpt", "--model_args", arguments]
    command += ["--tasks", "rolling", "--include_path", "tasks"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"lm_eval: error: {message}")
    assert "Traceback" not in done.stderr
