"""``hipgpt-import`` and ``hipgpt-export``: round trip, variants of folders, refusals, and damaged files."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import safetensors.numpy

from hipgpt_jax import doctor
from hipgpt_jax.runs import directory, weights

Program = Callable[..., programs.Result]


@pytest.fixture
def program(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs programs in a directory with the run ``tiny`` and its export ``folder``."""
    shutil.copytree(tiny / "checkpoints/tiny", tmp_path / "checkpoints/tiny", symlinks=True)
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> programs.Result:
        return programs.call(name, *arguments, monkeypatch=monkeypatch, capsys=capsys)

    assert call("export", "--run-name", "tiny", "--output", "folder").code == 0
    return call


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _tensors() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file("folder/model.safetensors")


def _save(tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, "folder/model.safetensors")


def _refused(result: programs.Result, *texts: str) -> None:
    assert result.code == 1, result
    assert re.fullmatch(r"\w+: error: [^\n]+\n", result.err), result.err
    assert result.out == ""
    assert [text for text in texts if text not in result.err] == [], result.err
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["tiny"]


def _same_weights(run: str) -> None:
    old, new = (directory.read_checkpoint(name) for name in ("tiny", run))
    assert old.model == new.model
    old_bytes, new_bytes = (safetensors.numpy.save(_flat(found)) for found in (old, new))
    assert old_bytes == new_bytes


def _flat(found: directory.Checkpoint) -> dict[str, np.ndarray]:
    params = weights.read(found.weights, found.model)
    flat = {}
    for key in weights.layout(found.model):
        node: Any = params
        for part in key:
            node = node[part]
        flat[weights.tensor_name(key)] = np.ascontiguousarray(node)
    return flat


def test_an_import_of_an_export_is_the_same_model(program: Program) -> None:
    assert program("import", "folder", "--run-name", "again").code == 0
    _same_weights("again")
    generate = ("generate", "--prompt", "my lord", "--num_tokens", "8", "--run-name")
    assert program(*generate, "tiny").out == program(*generate, "again", "--output", "a.jsonl", "--stream").out
    assert program("replay", "a.jsonl").code == 0
    assert [check.advice for check in doctor.check_runs("again")] == [None]
    (Path("text.txt")).write_text(programs.TEXT[:2000])
    assert program("evaluate", "--run-name", "again", "--data-path", "text.txt").code == 0


def test_an_imported_run_cannot_be_resumed(program: Program) -> None:
    program("import", "folder", "--run-name", "again")
    result = program("train", "--run-name", "again", "--resume")
    assert result.code == 1
    assert "run 'again' has weights, but neither training data nor a training state" in result.err


def test_the_source_is_in_the_config(program: Program) -> None:
    program("import", "folder", "--run-name", "again")
    value = json.loads(Path("checkpoints/again/latest_config.json").read_text())
    names = {one["name"] for one in value["source"]["files"]}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    weights_digest = next(one["sha256"] for one in value["source"]["files"] if one["name"] == "model.safetensors")
    assert weights_digest == value["checkpoint"]["sha256"]
    program("export", "--run-name", "again", "--output", "next")
    assert weights_digest in Path("next/README.md").read_text()


def _prefixed() -> None:
    tensors = {f"transformer.{name}": value for name, value in _tensors().items()}
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.bool_)
    tensors["transformer.h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)
    _save({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].copy()})


def _sharded() -> None:
    tensors = _tensors()
    Path("folder/model.safetensors").unlink()
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for shard, names in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in names}, f"folder/{shard}")
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    Path("folder/model.safetensors.index.json").write_text(json.dumps(index))


def _older_tokenizer() -> None:
    model = json.loads(Path("folder/tokenizer.json").read_text())["model"]
    Path("folder/vocab.json").write_text(json.dumps(model["vocab"]))
    Path("folder/merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))
    Path("folder/tokenizer.json").unlink()
    Path("folder/tokenizer_config.json").unlink()


def _defaults() -> None:
    config = json.loads(Path("folder/config.json").read_text())
    kept = ("model_type", "vocab_size", "n_positions", "n_embd", "n_head", "n_inner", "n_layer")
    Path("folder/config.json").write_text(json.dumps({name: config[name] for name in kept}))


@pytest.mark.parametrize("change", [_prefixed, _sharded, _older_tokenizer, _defaults])
def test_variants_of_a_folder_give_the_same_run(change: Callable[[], None], program: Program) -> None:
    change()
    result = program("import", "folder", "--run-name", "again")
    assert result.code == 0, result.err
    _same_weights("again")
    old, new = (Path(f"checkpoints/{name}/tokenizer.json").read_text() for name in ("tiny", "again"))
    assert json.loads(old)["model"]["vocab"] == json.loads(new)["model"]["vocab"]


@pytest.mark.parametrize("given", [5, [5, 7]])
def test_the_end_token_comes_along(given: Any, program: Program) -> None:
    _edit(Path("folder/config.json"), eos_token_id=6)
    _edit(Path("folder/generation_config.json"), eos_token_id=given)
    result = program("import", "folder", "--run-name", "again")
    assert directory.read_checkpoint("again").eos_id == 5
    assert ("several end tokens" in result.err) == isinstance(given, list)
    program("export", "--run-name", "again", "--output", "next")
    assert json.loads(Path("next/config.json").read_text())["eos_token_id"] == 5


def test_an_end_token_beyond_the_vocabulary_is_noted(program: Program) -> None:
    for name in ("config.json", "generation_config.json"):
        _edit(Path("folder", name), eos_token_id=50256)
    result = program("import", "folder", "--run-name", "again")
    assert result.code == 0
    assert "the end token 50256 is not in the vocabulary of 300" in result.err
    assert directory.read_checkpoint("again").eos_id == -1


def test_half_precision_is_converted_with_a_note(program: Program) -> None:
    _save({name: value.astype(np.float16) for name, value in _tensors().items()})
    result = program("import", "folder", "--run-name", "again")
    assert "weights of type F16 are converted to float32" in result.err
    found = directory.read_checkpoint("again")
    assert {value.dtype for value in _flat(found).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_embd", 10**9),
        ("n_head", 7),
        ("n_layer", "two"),
        ("vocab_size", 299),
        ("eos_token_id", "</s>"),
        ("eos_token_id", []),
    ],
)
def test_other_models_are_refused_by_name(name: str, value: Any, program: Program) -> None:
    _edit(Path("folder/config.json"), **{name: value})
    shown = {"n_embd": "embed_dim", "n_head": "num_heads", "vocab_size": "wte.weight"}.get(name, name)
    _refused(program("import", "folder", "--run-name", "again"), "folder", shown)


def test_a_folder_without_a_config_is_refused(program: Program) -> None:
    Path("folder/config.json").unlink()
    result = program("import", "folder", "--run-name", "again")
    assert (result.code, result.out) == (1, "")
    assert "folder has no config.json: give a folder that transformers saved a GPT-2 in" in result.err


def test_other_weights_are_refused(program: Program) -> None:
    tensors = _tensors()
    untied = tensors["wte.weight"] + 1
    for changed, text in (
        ({**tensors, "lm_head.weight": untied}, "lm_head.weight must equal wte.weight"),
        ({**tensors, "lm_head.weight": untied[:0]}, "lm_head.weight must equal wte.weight"),
        ({**tensors, "score.weight": untied}, "score.weight"),
        ({**tensors, "transformer.wpe.weight": untied}, "a second tensor"),
        ({**tensors, "ln_f.bias": np.zeros(24, np.int64)}, "ln_f.bias must be one of F32"),
        ({name: tensors[name] for name in tensors if name != "ln_f.bias"}, "the first is ln_f.bias"),
    ):
        _save(changed)
        _refused(program("import", "folder", "--run-name", "again"), text)
    Path("folder/model.safetensors").unlink()
    _refused(program("import", "folder", "--run-name", "again"), "has no model.safetensors")
    Path("folder/pytorch_model.bin").write_bytes(b"")
    _refused(program("import", "folder", "--run-name", "again"), "a pickle", "save_pretrained(f)")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "missing.safetensors", "\0", ""])
def test_an_index_leads_nowhere_else(name: str, program: Program) -> None:
    Path("folder/model.safetensors").unlink()
    Path("folder/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    _refused(program("import", "folder", "--run-name", "again"))


@pytest.mark.parametrize(
    "settings",
    [
        {"add_prefix_space": True},
        {"eos_token": "<new>"},
        {"eos_token": "Ġ"},
        {"eos_token": 5},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"299": {"content": "<pad>", "special": True}}},
        {"added_tokens_decoder": {"99999": {"content": "a"}}},
        {"added_tokens_decoder": {"300": {"special": True}}},
    ],
    ids=str,
)
def test_other_tokenizers_are_refused(settings: dict[str, Any], program: Program) -> None:
    _edit(Path("folder/tokenizer_config.json"), **settings)
    _refused(program("import", "folder", "--run-name", "again"), "folder")


@pytest.mark.parametrize("change", [None, _sharded, _older_tokenizer])
def test_damaged_files_are_one_line(change: Callable[[], None] | None, program: Program) -> None:
    if change is not None:
        change()
    rng = random.Random(0)
    for path in sorted(Path("folder").iterdir()):
        if path.name == "README.md":
            continue
        whole = path.read_bytes()
        hostile = [b"", b"\0" * 64, b"null", b"[]", b"\xff\xfe", b'{"a":' * 5000, whole + b"\xff", rng.randbytes(512)]
        for content in [*hostile, *(whole[: rng.randrange(len(whole) - 2)] for _ in range(4))]:
            path.write_bytes(content)
            result = program("import", "folder", "--run-name", "again")
            if result.code == 0 and path.name == "merges.txt":  # fewer merges are valid
                shutil.rmtree("checkpoints/again")
            else:
                _refused(result, path.name)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_values_of_other_kinds_are_one_line(name: str, program: Program) -> None:
    path = Path("folder", name)
    value = json.loads(path.read_text())
    for key in value:
        for other in (None, True, -1, 1.5, 10**25, "x", [], {}, [[]], {"a": {}}):
            path.write_text(json.dumps({**value, key: other}))
            result = program("import", "folder", "--run-name", "again")
            if result.code:
                _refused(result)
            else:
                shutil.rmtree("checkpoints/again")


def test_runs_and_folders_of_others_stay(program: Program) -> None:
    assert program("import", "folder", "--run-name", "again").code == 0
    before = Path("checkpoints/again/latest_config.json").read_bytes()
    result = program("import", "folder", "--run-name", "again")
    assert result.code == 1
    assert "exists already" in result.err
    assert Path("checkpoints/again/latest_config.json").read_bytes() == before
    assert program("import", "nothing", "--run-name", "b").code == 1
    assert program("import", "folder", "--run-name", "a/..").code == 1


def test_only_an_export_is_replaced(program: Program) -> None:
    export = ("export", "--run-name", "tiny", "--step", "20", "--output")
    before = Path("folder/model.safetensors").read_bytes()
    assert program(*export, "folder").code == 0
    assert Path("folder/model.safetensors").read_bytes() != before
    Path("empty").mkdir()
    assert program(*export, "empty").code == 0
    Path("other").mkdir()
    Path("other/README.md").write_text("mine")
    Path("folder/notes.txt").write_text("mine")
    for target in ("other", "folder", "missing/folder", "checkpoints", "folder/notes.txt"):
        _refused(program(*export, target), target)
    assert Path("other/README.md").read_text() == "mine"
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]


def test_a_failure_leaves_nothing(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write", fail)
    before = sorted(Path("folder").iterdir())
    _refused(program("import", "folder", "--run-name", "again"))
    _refused(program("export", "--run-name", "tiny", "--output", "folder"))
    assert sorted(Path("folder").iterdir()) == before
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["checkpoints", "folder"]
