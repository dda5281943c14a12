"""The draws of given texts: equal to the generated ones, and their log-probabilities to a definition in NumPy."""

from typing import Any

import fakes
import jax
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import requests
from hipgpt_jax.records import forced, replay

PLAIN = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": PLAIN,
    "greedy": {"temperature": 0.0},
    "min_p": {"top_k": 0, "top_p": 0.95, "min_p": 0.05, "temperature": 0.7},
    "penalties of the output": {
        "top_k": 40,
        "penalty_scope": "output",
        "frequency_penalty": 0.4,
        "presence_penalty": -0.3,
    },
    "n-grams": {"no_repeat_ngram": 2, "temperature": 0.3},
    "tokens": {**PLAIN, "ban": (7, 8), "logit_bias": ((9, 3.5), (10, -2.0))},
    "few tokens": {**PLAIN, "allow": (1, 2, 3, 4, 5), "logit_bias": ((9, 3.5),)},
}


def generated(request: requests.Request, stride: int) -> requests.Sequence:
    (*_, last) = fakes.make_scheduler(window_stride=stride).run([request], measure=True)
    return last.sequence


def drawer(stride: int) -> forced.Drawer:
    return forced.Drawer(fakes.make_scheduler(window_stride=stride), stride)


def check(request: requests.Request, stride: int) -> requests.Sequence:
    """Compares the draws of a generated text with it, and returns it."""
    made = generated(request, stride)
    draws = drawer(stride).draw(request, made.ids)
    assert draws.token_T.tolist() == made.ids
    np.testing.assert_allclose(draws.logprob_T, [one.logprob for one in made.stats], atol=1e-4)
    np.testing.assert_allclose(draws.stats.logprob_B, draws.logprob_T, atol=1e-5)
    for name in ("sampled_logprob", "kept_mass", "lead", "cut"):
        found, own = getattr(draws.stats, f"{name}_B"), [getattr(one, name) for one in made.stats]
        np.testing.assert_allclose(found, own, atol=2e-4, rtol=1e-6, err_msg=name)
    for name in ("rank", "kept"):
        assert getattr(draws.stats, f"{name}_B").tolist() == [getattr(one, name) for one in made.stats], name
    return made


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("length", [3, 25])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_are_the_generated_tokens(name: str, length: int, stride: int) -> None:
    """With a window of 11 that rolls, and a prompt that is longer than it."""
    check(fakes.request(fakes.prompt(length), num_tokens=40, seed=3, sample=2, **SETTINGS[name]), stride)


@pytest.mark.parametrize("min_tokens", [0, 9])
def test_draws_end_with_the_end_token(min_tokens: int) -> None:
    settings = {**PLAIN, "logit_bias": ((5, 6.0),)}
    made = check(fakes.request(num_tokens=40, eos_id=5, min_tokens=min_tokens, **settings), 1)
    assert made.finish_reason == "eos"
    assert made.ids.index(5) == len(made.ids) - 1 >= min_tokens


def test_more_tokens_than_a_program_draws() -> None:
    check(fakes.request(num_tokens=2 * forced._ROWS + 3), 4)


def test_other_tokens_are_drawn_after_another_text() -> None:
    """Each token is drawn after the given ones, not after those that were drawn."""
    request = fakes.request(num_tokens=20, **PLAIN)
    made = generated(request, 1)
    other = [*made.ids[:10], (made.ids[10] + 1) % 150, *made.ids[11:]]
    draws = drawer(1).draw(request, other)
    assert draws.token_T[:11].tolist() == made.ids[:11]
    assert draws.token_T[11:].tolist() != made.ids[11:]
    assert draws.stats.logprob_B[10] == pytest.approx(made.stats[10].logprob, abs=1e-4)
    assert draws.logprob_T[10] != pytest.approx(made.stats[10].logprob, abs=1e-2)


def test_no_tokens() -> None:
    draws = drawer(1).draw(fakes.request(), [])
    assert {x.shape for x in jax.tree.leaves(draws)} == {(0,)}


def test_nothing_is_compiled_for_other_texts_and_settings() -> None:
    drawer(1).draw(fakes.request(), list(range(20)))
    with fakes.compilations() as seen:
        drawer(1).draw(fakes.request((4, 5), seed=9, **SETTINGS["min_p"]), list(range(30)))
        drawer(1).draw(fakes.request((4, 5), no_repeat_ngram=3), list(range(22)))
    assert seen == []


def logprob_by_definition(
    logits_V: np.ndarray, counted: list[int], context: list[int], token: int, settings: Any
) -> float:
    """Returns the log-probability of a token under sampling settings, by sets and sums in float64."""
    ids = range(len(logits_V))
    bias = dict(settings.logit_bias)
    allowed = set(settings.allow or ids) - set(settings.ban)
    n = settings.no_repeat_ngram
    last = context[len(context) - n + 1 :]
    repeats = {context[p] for p in range(n - 1, len(context)) if n and context[p - n + 1 : p] == last}
    allowed = allowed - repeats or allowed
    logits = {v: float(logits_V[v]) + bias.get(v, 0.0) for v in allowed}
    for v in set(counted) & allowed:
        r = settings.repetition_penalty
        logits[v] = logits[v] / r if logits[v] > 0 else logits[v] * r
        logits[v] -= settings.frequency_penalty * counted.count(v) + settings.presence_penalty
    order = sorted(allowed, key=lambda v: (-logits[v], v))
    if settings.temperature == 0:
        return 0.0 if token == order[0] else -np.inf
    order = order[: settings.top_k or None]
    weight = {v: np.exp((logits[v] - logits[order[0]]) / settings.temperature) for v in order}
    total, sums = sum(weight.values()), np.cumsum([weight[v] for v in order])
    number = len(order) if settings.top_p == 1 else 1 + int(np.argmax(sums >= settings.top_p * total))
    kept = [v for v in order[:number] if weight[v] >= settings.min_p]
    return float(np.log(weight[token] / sum(weight[v] for v in kept))) if token in kept else -np.inf


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("prompt_length", [1, 5, 25])
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_log_probabilities_of_a_text(name: str, prompt_length: int, stride: int) -> None:
    """The text begins with the tokens of the prompt in the window, whose tokens are scored one after another."""
    settings, W = config.SamplingConfig(**SETTINGS[name]), 11
    source = fakes.make_scheduler(window_stride=stride)
    prompt = fakes.prompt(prompt_length)
    rest = generated(fakes.request(prompt, num_tokens=12, **SETTINGS[name]), stride).ids
    text = [*prompt[-W:], *rest, *fakes.prompt(13), 7]
    found = drawer(stride).sampled_logprobs(settings, prompt, text)
    split, dropped = min(prompt_length, W), max(0, prompt_length - W)
    for index in range(1, len(text)):
        if index < split:
            start, counted, scored = 0, text[:index], text[:1]
        else:
            start = replay.window_start(prompt_length, dropped + index, W, stride) - dropped
            counted, scored = [*prompt[:dropped], *text[:index]], text[:split]
        if settings.penalty_scope == "output":
            counted = text[len(scored) : index]
        context = text[start:index]
        padded_1T = np.array([[*context, *[0] * (W - len(context))]], np.int32)
        logits_V = np.asarray(forced.all_logits(source.module, source.params, padded_1T))[0, len(context) - 1]
        expected = logprob_by_definition(logits_V, counted, context, text[index], settings)
        assert found[index - 1] == pytest.approx(expected, abs=2e-4), (index, text[index])
    is_cut = np.isneginf(found)
    assert not is_cut[split - 1 : split - 1 + len(rest)].any()
    assert is_cut.any() != (name == "plain")
    assert found.dtype == np.float32
