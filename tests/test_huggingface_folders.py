"""Imported and exported folders against transformers and CTranslate2: logits, ids of random texts, greedy text."""

import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import jax
import numpy as np
import programs
import pytest

from hipgpt_jax import config
from hipgpt_jax.model import transformer
from hipgpt_jax.report import card
from hipgpt_jax.runs import export, huggingface, loading, weights
from hipgpt_jax.text import tokenizer

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[peers]")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[peers]")

pytestmark = pytest.mark.peers

TEXTS = 10_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ``save_pretrained`` with random weights and a tokenizer with an end token."""
    monkeypatch.chdir(tmp_path)
    vocabulary = tokenizer.Tokenizer.train([programs.TEXT], 300, has_end=True)
    (tmp_path / "tokenizer.json").write_text(vocabulary.to_json())
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **end)
    peer.save_pretrained(tmp_path / "gpt2")
    _peer(end=vocabulary.vocab_size - 1).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def _peer(end: int = 299) -> Any:
    torch.manual_seed(0)
    shape = transformers.GPT2Config(
        vocab_size=300, n_positions=24, n_embd=48, n_head=6, n_layer=3, bos_token_id=end, eos_token_id=end
    )
    model = transformers.GPT2LMHeadModel(shape).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def _run(folder: Path, name: str = "again") -> loading.RunFiles:
    huggingface.write_run(name, huggingface.read(folder))
    return loading.open_run(name, None, config.DecodingConfig())


def _assert_same_logits(run: loading.RunFiles, peer: Any) -> None:
    model = run.checkpoint.model
    tokens_BT = np.random.RandomState(1).randint(0, model.vocab_size, (3, model.max_seq_len))
    params = weights.read(run.checkpoint.weights, model)
    apply = jax.jit(transformer.Transformer(model).apply, static_argnames="dropout")
    logits_BTV = np.asarray(apply({"params": params}, tokens_BT, dropout=0.0))
    with torch.no_grad():
        peer_BTV = peer(torch.tensor(tokens_BT)).logits.float().numpy()
    assert peer_BTV.std() > 0.3
    np.testing.assert_allclose(logits_BTV, peer_BTV, atol=1e-4)


def _texts() -> list[str]:
    rng = random.Random(0)
    alphabets = [
        "abc ETAOIN",
        " \n\t'.,",
        "0123456789",
        "éßñ漢字אב",
        "".join(map(chr, range(1, 0x300))),
        "🙂🇩🇪\u200d\u0301",
    ]
    return [
        "".join(rng.choice(rng.choice([*alphabets, programs.TEXT])) for _ in range(rng.randrange(1, 40)))
        for _ in range(TEXTS)
    ]


def _assert_same_ids(run: loading.RunFiles, folder: Path) -> None:
    peer, texts = transformers.AutoTokenizer.from_pretrained(folder), _texts()
    ids = list(run.vocabulary.encode_batch(texts))
    assert peer(texts).input_ids == ids
    assert peer.batch_decode(ids) == texts
    assert peer.eos_token_id == run.checkpoint.eos_id == run.vocabulary.end_id
    assert len(peer) == run.vocabulary.vocab_size


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("part", ["whole", "body"])
def test_a_saved_model_imports_with_equal_logits_and_ids(folder: Path, shard: str, part: str) -> None:
    (folder / "model.safetensors").unlink()
    peer = _peer()
    (peer if part == "whole" else peer.transformer).save_pretrained(folder, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "50KB")
    run = _run(folder)
    _assert_same_logits(run, peer)
    _assert_same_ids(run, folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_imports_with_equal_logits(folder: Path, dtype: str) -> None:
    _peer().to(getattr(torch, dtype)).save_pretrained(folder)
    source = huggingface.read(folder)
    assert len(source.notes) == 1
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype="float32").eval()
    _assert_same_logits(_run(folder), peer)


def test_an_export_opens_with_equal_logits_and_ids(folder: Path, tmp_path: Path) -> None:
    run = _run(folder)
    export.write(run, tmp_path / "out", lambda digest: card.write(run, digest))
    _assert_same_logits(run, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    _assert_same_ids(run, tmp_path / "out")
    again = _run(tmp_path / "out", "twice")
    assert again.checkpoint.weights_sha256 == run.checkpoint.weights_sha256
    assert again.checkpoint.tokenizer_sha256 == run.checkpoint.tokenizer_sha256


def test_the_command_in_the_refusal_converts_a_pickle(folder: Path) -> None:
    peer = _peer()
    (folder / "model.safetensors").unlink()
    state = {name: value for name, value in peer.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle") as error:
        huggingface.read(folder)
    found = re.search(r"python (-c .*)$", str(error.value))
    assert found is not None
    subprocess.run([sys.executable, *shlex.split(found[1])], check=True, capture_output=True)
    _assert_same_logits(_run(folder), peer)


def test_ctranslate2_converts_an_export(folder: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2: pip install -e .[peers]")
    run = _run(folder)
    export.write(run, tmp_path / "out", lambda digest: card.write(run, digest))
    ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), compute_type="float32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompt = fakes.prompt(5)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens(prompt)
    (result,) = generator.generate_batch([tokens], max_length=12, sampling_topk=1, include_prompt_in_result=False)
    expected = peer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    assert result.sequences_ids[0] == [token for token in expected if token != run.checkpoint.eos_id]
