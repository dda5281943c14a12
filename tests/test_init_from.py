"""``hipgpt-train --init-from``: a run that starts from the weights of another."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import programs
import pytest

from hipgpt_jax import config
from hipgpt_jax.cli import arguments, train_flags, train_init
from hipgpt_jax.runs import directory, initial, loading, weights
from hipgpt_jax.text import tokenizer
from hipgpt_jax.training import train_step

Run = Callable[..., programs.Result]


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Optax 0.2.8 itself promotes a Python float with an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``hipgpt-train`` for one step that changes no weight, beside the run ``tiny`` and a text of other words."""
    programs.copy_tiny(tmp_path / "checkpoints/tiny")
    (tmp_path / "text.txt").write_text(programs.TEXT[::-1])
    monkeypatch.chdir(tmp_path)
    flags = "--data-path text.txt --steps 1 --warmup-steps 0 --lr 1e-30 --mesh data=1 --eval-batches 1"
    return lambda *more: programs.call("train", *flags.split(), *more, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, path = directory.read_checkpoint("tiny"), Path("checkpoints/new")
    digest = tiny.weights_sha256
    result = run("--run-name", "new", "--init-from", "tiny")
    assert result.code == 0, result.err
    assert f"starting from the weights of tiny:600 (sha256 {digest[:12]}…)" in result.err
    new, init_from = directory.read_checkpoint("new"), initial.Initial(run="tiny", step=600, sha256=digest)
    assert (new.step, new.model, new.init_from) == (1, tiny.model, init_from)
    expected = weights.read(tiny.weights, tiny.model)
    jax.tree.map(np.testing.assert_array_equal, weights.read(new.weights, new.model), expected)
    assert json.loads((path / "settings.json").read_text())["init_from"] == {
        "run": "tiny",
        "step": 600,
        "sha256": digest,
    }
    programs.call("export", "--run-name", "new", "--output", "folder", monkeypatch=monkeypatch, capsys=capsys)
    assert f"| started from | `tiny`, step 600, weights sha256 {digest} |" in Path("folder/README.md").read_text()
    doctor = programs.call("doctor", "--run-name", "new", monkeypatch=monkeypatch, capsys=capsys)
    assert "new: 1 step, latest 1, started from tiny:600" in doctor.out

    for given, message in (("new", "starts from tiny:600"), ("tiny:5", "starts from tiny:600")):
        assert (
            f"--init-from {given} contradicts --resume: the run {message}"
            in run(*("--run-name", "new", "--resume", "--init-from", given)).err
        )
    base = _base(
        "--run-name", "new", "--resume", "--init-from", "tiny", "--tokenizer-path", "checkpoints/tiny/tokenizer.json"
    )
    assert base == _base("--run-name", "new", "--resume")
    # Killed before its first checkpoint, it starts again from the same weights, and from no others.
    shutil.rmtree(path / "train_state")
    for file in [*path.glob("*_step*"), *path.glob("latest*"), *path.glob("best*"), path / "metrics.jsonl"]:
        file.unlink()
    assert run("--run-name", "new", "--resume").code == 0
    jax.tree.map(np.testing.assert_array_equal, weights.read(new.weights, new.model), expected)
    programs.copy_tiny(Path("checkpoints/tiny"), scale=2.0)
    with pytest.raises(ValueError, match="has other weights than the run starts from"):
        loading.read_initial(init_from, new.model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init-from none", "run 'none' not found"),
        ("--init-from tiny:7", "run 'tiny' has no step 7. Steps: 600"),
        ("--init-from tiny:x", "--init-from tiny:x must be RUN or RUN:STEP: step must be a number, best or latest"),
        ("--init-from tiny --dim 48", "--dim 48 contradicts --init-from tiny, which has 24: leave it out"),
        ("--init-from tiny --vocab-size 301", "--vocab-size 301 contradicts --init-from tiny, which has 300"),
        ("--init-from tiny --seq 33", "--seq must be at most 32, the context of --init-from tiny: got 33"),
        ("--init-from tiny --tokenizer-path other.json", r"\(sha256 [0-9a-f]{12}…\) is not .* tiny \(sha256 509aeb33"),
        ("--init-from tiny --run-name tiny --reset", "lies in the directory of the run"),
        ("--init-from tiny --run-name tiny", "run 'tiny' exists already"),
    ],
)
def test_what_contradicts_the_other_run_is_refused(run: Run, flags: str, message: str) -> None:
    vocabulary = json.loads((programs.TINY / "tokenizer.json").read_text())
    vocabulary["model"]["merges"].pop()
    vocabulary["model"]["vocab"].popitem()
    Path("other.json").write_text(json.dumps(vocabulary))
    before = sorted(Path().rglob("*"))
    result = run("--run-name", "new", *flags.split())
    assert (result.code, result.out) == (1, "")
    assert re.search(f"^train: error: .*{message}", result.err.splitlines()[-1]), result.err
    assert sorted(Path().rglob("*")) == before


def _base(*given: str) -> train_init.Base:
    arguments.parse(train_flags.FLAGS, given)
    base = train_init.find_base()
    assert base is not None
    return base


@pytest.mark.usefixtures("run")
def test_the_same_tokenizer_may_be_given_and_the_context_be_shorter() -> None:
    vocabulary = json.loads((programs.TINY / "tokenizer.json").read_text())
    Path("same.json").write_text(json.dumps(vocabulary))
    base = _base("--init-from", "tiny:600", "--tokenizer-path", "same.json", "--seq", "8", "--dim", "24")
    model = train_flags.model_config(base.model)
    assert model == dataclasses.replace(directory.read_checkpoint("tiny").model, max_seq_len=8)
    whole, short = (loading.read_initial(base.init_from, one) for one in (base.model, model))
    whole["wpe"]["embedding"] = whole["wpe"]["embedding"][:8]
    jax.tree.map(np.testing.assert_array_equal, whole, short)
    assert jax.tree.map(np.shape, short) == jax.tree.map(np.shape, train_step.param_shapes(model))


@pytest.mark.usefixtures("run")
def test_documents_end_with_the_other_runs_end_token_if_that_is_special() -> None:
    value = json.loads(Path("checkpoints/tiny/tiny_step600_config.json").read_text())
    vocabulary = tokenizer.Tokenizer.load(Path("checkpoints/tiny/tokenizer.json"))
    special = list(vocabulary.special_tokens.values())
    for eos_id, expected in [(None, None), (5, None), *((one, one) for one in special)]:
        value["data"]["eos_id"] = eos_id
        Path("checkpoints/tiny/tiny_step600_config.json").write_text(json.dumps(value))
        assert _base("--init-from", "tiny").end_id == expected


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.flags")), ids=lambda p: p.stem)
def test_flag_files_are_valid(path: Path) -> None:
    arguments.parse(train_flags.FLAGS, [f"--flagfile={path}"])
    assert train_flags.train_config().steps >= 100
    assert isinstance(train_flags.model_config(), config.ModelConfig)
    assert path.stem == train_flags.RUN_NAME.value
