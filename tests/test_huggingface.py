"""Tests of logits, sampling distribution and greedy text against Hugging Face transformers."""

import itertools
from pathlib import Path
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import sampling, scheduler, topk
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import weights

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[peers]")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[peers]")

pytestmark = pytest.mark.peers

MODELS = [
    config.ModelConfig(vocab_size=150, max_seq_len=16, embed_dim=16, num_heads=2, ff_hidden_dim=32, num_layers=2),
    config.ModelConfig(vocab_size=65, max_seq_len=33, embed_dim=48, num_heads=6, ff_hidden_dim=100, num_layers=3),
    config.ModelConfig(vocab_size=7, max_seq_len=5, embed_dim=8, num_heads=1, ff_hidden_dim=4, num_layers=1),
    config.ModelConfig(vocab_size=500, max_seq_len=64, embed_dim=64, num_heads=64, ff_hidden_dim=256, num_layers=4),
]


def load(directory: Path, model: config.ModelConfig, params: dict[str, Any]) -> Any:
    """Writes weights with this package and loads them with transformers."""
    shape = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_seq_len,
        n_embd=model.embed_dim,
        n_head=model.num_heads,
        n_inner=model.ff_hidden_dim,
        n_layer=model.num_layers,
        activation_function="gelu_new",
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    shape.save_pretrained(directory)
    weights.write(directory / "model.safetensors", params, model)
    return transformers.GPT2LMHeadModel.from_pretrained(directory).eval()


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_logits_match_gpt2(model: config.ModelConfig, tmp_path: Path) -> None:
    params = fakes.random_params(model, stddev=0.3)
    tokens_BT = np.random.RandomState(1).randint(0, model.vocab_size, (3, model.max_seq_len))
    apply = jax.jit(transformer.Transformer(model).apply, static_argnames="dropout")
    logits_BTV = np.asarray(apply({"params": params}, tokens_BT, dropout=0.0))
    with torch.no_grad():
        peer_BTV = load(tmp_path, model, params)(torch.tensor(tokens_BT)).logits.numpy()
    assert peer_BTV.std() > 0.3
    np.testing.assert_allclose(logits_BTV, peer_BTV, atol=1e-4)


def test_greedy_text_matches_generate(tmp_path: Path) -> None:
    """With the cache, up to the last position, from prompts in both buckets."""
    model = MODELS[1]
    params = fakes.random_params(model, stddev=0.3)
    peer = load(tmp_path, model, params)
    ours = scheduler.Scheduler(model, params, config.DecodingConfig())
    for length, penalty in itertools.product((1, 6, 13), (1.0, 1.2)):
        num_tokens = model.max_seq_len - length
        prompt = tuple(np.random.RandomState(length).randint(0, model.vocab_size, length).tolist())
        expected = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            do_sample=False,
            max_new_tokens=num_tokens,
            repetition_penalty=penalty,
            pad_token_id=0,
        )[0, length:].tolist()
        request = fakes.request(prompt, num_tokens=num_tokens, temperature=0.0, repetition_penalty=penalty)
        assert fakes.tokens_of(ours, [request]) == [expected]
        assert len(set(expected)) > 4


@pytest.mark.parametrize("size", [30, 400])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 200},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"ban": (1, 5, 9), "top_k": 20},
        {"logit_bias": {3: 2.5, 8: -4.0}, "top_p": 0.8},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.1},
        {"temperature": 1.5, "top_k": 150, "top_p": 0.9, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_distribution_matches_the_logits_processors(settings: dict[str, Any], size: int) -> None:
    """Every token has the probability that transformers gives it, and those that it cuts have none."""
    rng = np.random.RandomState(size)
    logits_V = rng.normal(0, 0.8, size).astype(np.float32)
    seen = rng.choice(size, size // 3, replace=False)
    row = config.SamplingConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **settings})
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(row.repetition_penalty),
        transformers.TemperatureLogitsWarper(row.temperature),
        transformers.TopKLogitsWarper(row.top_k or size),
        transformers.TopPLogitsWarper(row.top_p),
    ]
    if row.min_p:
        processors.append(transformers.MinPLogitsWarper(row.min_p))
    if row.ban:
        processors.insert(0, transformers.SuppressTokensLogitsProcessor(list(row.ban), device="cpu"))
    if row.logit_bias:
        bias = {(token,): value for token, value in row.logit_bias}
        processors.insert(0, transformers.SequenceBiasLogitsProcessor(bias))
    scores, twice = torch.tensor(logits_V)[None], torch.tensor([[*seen, *seen]])
    for processor in processors:
        scores = processor(twice, scores)
    probs_V = torch.softmax(scores[0].double(), dim=-1).numpy()
    counts_BV = np.tile(np.isin(np.arange(size), seen).astype(np.int32), (size, 1))
    found_V = np.asarray(
        sampled_logprobs(np.tile(logits_V, (size, 1)), counts_BV, sampling.sampling_params([row] * size, size))
    )
    np.testing.assert_array_equal(np.isfinite(found_V), probs_V > 0)
    np.testing.assert_allclose(np.exp(found_V), probs_V, atol=2e-6)


@jax.jit
def sampled_logprobs(logits_BV: Any, counts_BV: Any, params: sampling.SamplingParams) -> jax.Array:
    """Returns the log-probability of token ``b`` in row ``b``."""
    B = len(logits_BV)
    logits_BV = logits_BV + params.bias_BV
    choice = sampling.sample(logits_BV, counts_BV, params, jnp.zeros((B, 2), jnp.uint32), jnp.zeros(B, jnp.int32))
    adjusted_BV = sampling.adjust(logits_BV, counts_BV, params)
    return topk.at_rank(sampling.sampled_logprobs(adjusted_BV, params, choice.kept_B), jnp.arange(B))


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_banned_repeats_match_the_logits_processor(length: int) -> None:
    rng = np.random.RandomState(length)
    context_BS = rng.randint(0, 3, (20, 16)).astype(np.int32)
    params = sampling.sampling_params([config.SamplingConfig(no_repeat_ngram=length)] * 20, 5)
    logits_BV, length_B = np.zeros((20, 5), np.float32), np.full(20, 16, np.int32)
    found_BV = np.asarray(jax.jit(sampling.ban_repeats)(logits_BV, context_BS, length_B, params))
    processor = transformers.NoRepeatNGramLogitsProcessor(length)
    expected_BV = processor(torch.tensor(context_BS), torch.tensor(logits_BV)).numpy()
    np.testing.assert_array_equal(found_BV, expected_BV)
    assert np.isinf(found_BV).any()
