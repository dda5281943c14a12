"""docs/promise.md is complete: its draw, implemented from it in ``reference``, gives the package's tokens."""

import functools
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from safetensors import numpy as safetensors_numpy

import hipgpt_jax
from hipgpt_jax import config
from hipgpt_jax.runs import directory

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/promise.md").read_text(encoding="utf-8")
TINY = ROOT / "tests/data/tiny"
SHIPPED = directory.SHIPPED / "shakespeare"

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1},
    "plain": NEUTRAL,
    "greedy": {**NEUTRAL, "temperature": 0.0, "repetition_penalty": 1.3},
    "top_k": {**NEUTRAL, "temperature": 0.7, "top_k": 40},
    "top_p": {**NEUTRAL, "temperature": 1.4, "top_p": 0.6},
    "penalty": {**NEUTRAL, "top_k": 200, "top_p": 0.97, "repetition_penalty": 1.8},
    "reward": {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "repetition_penalty": 0.9},
}

# Two computations of one logit differ by 2e-5 at most (docs/promise.md). A token that a smaller change than this one
# would have altered decides nothing. Fewer than one in 100 tokens are so near to another.
_NEAR = 1e-4


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the tests with random weights, large enough that its text is varied."""
    run = tmp_path_factory.mktemp("random") / "tiny"
    shutil.copytree(TINY, run)
    values = json.loads((run / "latest_config.json").read_text())
    path = run / values["checkpoint"]["latest"]
    rng = np.random.RandomState(3)
    weights = safetensors_numpy.load_file(path)
    for name in sorted(weights):
        spread = 0.3 if weights[name].ndim == 2 else 0.1
        weights[name] = rng.normal(float(".ln_" in f".{name}" and name.endswith("weight")), spread, weights[name].shape)
        weights[name] = weights[name].astype(np.float32)
    safetensors_numpy.save_file(weights, path)
    values["checkpoint"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "latest_config.json").write_text(json.dumps(values))
    return run


@pytest.mark.parametrize(
    ("run_name", "stride"),
    [
        ("random", 5),
        pytest.param("random", 1, marks=pytest.mark.slow),
        pytest.param("shakespeare", 5, marks=pytest.mark.slow),
    ],
)
def test_a_reimplementation_of_the_page_gives_the_packages_tokens(run_name: str, stride: int, random_run: Path) -> None:
    where = SHIPPED if run_name == "shakespeare" else random_run
    window = 24  # of both, so that the text below outgrows it
    decoding = config.DecodingConfig(window=window, window_stride=stride)
    run = hipgpt_jax.load_run(where.name, where=where, decoding=decoding)
    model = reference.Model.load(where)
    prompts = ("the king", "ROMEO:\nWhat, what says my lord of all that we have lost, and of the queen who is gone?")
    tokens = near = 0
    for seed, (own, prompt) in enumerate(zip(SETTINGS.values(), itertools.cycle(prompts), strict=False)):
        for record in run.generate(prompt, seed=seed * 1_000_003, num_samples=2, num_tokens=30, **own):
            assert len(record.ids) == 30
            ids = (*record.prompt_ids, *record.ids)
            prompt_tokens = len(record.prompt_ids)
            logits = functools.cache(lambda start, ids=ids: model.logits(ids[start : start + window]))
            for index, token in enumerate(record.ids):
                length = prompt_tokens + index
                start = reference.window_start(prompt_tokens, length, window, stride)
                assert length - start <= window
                u = reference.uniform(record.seed, record.prompt_ids, record.sample, index)
                drawn = reference.choose(logits(start)[length - start - 1], ids[:length], u, **own)
                is_near = min(record.margins[index], record.gaps[index]) < _NEAR
                assert drawn == token or is_near, (run_name, own, record.sample, index)
                tokens, near = tokens + 1, near + (drawn != token)
    assert tokens == 30 * 2 * len(SETTINGS)
    assert near <= 2


def test_the_worked_example_on_the_page_is_true() -> None:
    example = PAGE.partition("### A worked example")[2].partition("\n#")[0]
    seed, sample, prompt_ids = 7, 2, (1, 2, 3)
    word = reference.prompt_word(prompt_ids)
    key = reference.fold_in(reference.fold_in((0, seed), word), sample)
    rows = [
        (f"0x{reference.fold_in(key, index)[0]:08x}", f"{reference.uniform(seed, prompt_ids, sample, index):.10f}")
        for index in range(3)
    ]
    shown = [*(f"0x{value:08x}" for value in (word, *key)), *itertools.chain.from_iterable(rows)]
    assert re.findall(r"0x[0-9a-f]{8}|0\.\d{10}", example) == shown
    assert all(part in example for part in (f"seed {seed}", f"sample {sample}", f"{list(prompt_ids)}"))


def test_the_reference_is_the_published_threefry() -> None:
    """The known answers of Random123 1.14, ``threefry 2x32 20``, which the page quotes."""
    answers = [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, block, wanted in answers:
        assert reference.threefry2x32(key, block) == wanted
        assert all(f"{value:08x}" in PAGE for value in (*key, *block, *wanted))
