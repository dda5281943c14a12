"""Invariant numerics: the bits of a sample do not depend on the batch size.

Prompts of mixed lengths, prefilled in batches of several rows, with windows that slide, should get the same tokens and
statistics from every batch size, on one core and on two. Fast numerics do not give them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import compiled
import fakes
import jax
import numpy as np
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import backends, requests, scheduler

SMALL = config.ModelConfig(vocab_size=300, max_seq_len=80, embed_dim=48, num_heads=3, ff_hidden_dim=96, num_layers=2)
SHIPPED = config.ModelConfig(
    vocab_size=1024, max_seq_len=128, embed_dim=192, num_heads=6, ff_hidden_dim=768, num_layers=5
)
WIDE = config.ModelConfig(vocab_size=2000, max_seq_len=96, embed_dim=384, num_heads=6, ff_hidden_dim=1536, num_layers=2)
SIZES = {"SHIPPED": (1, 2, 17), "WIDE": (1, 16)}
TOKENS = 3


def _requests(model: config.ModelConfig, number: int) -> list[requests.Request]:
    """Returns requests whose prompts need one cache block, two, or fill the window."""
    rng, W = np.random.RandomState(7), model.max_seq_len
    lengths = (5, W, 20, 60, 70, W - 3, 1, W - 1, 21)
    return [
        requests.Request(
            prompt_ids=tuple(rng.randint(0, model.vocab_size, lengths[index % len(lengths)]).tolist()),
            sample=index,
            generation=config.GenerationConfig(num_tokens=TOKENS, seed=index),
            sampling=config.SamplingConfig(top_k=(0, 5, 100)[index % 3], top_p=(0.95, 1.0)[index % 2]),
        )
        for index in range(number)
    ]


def bits(model: config.ModelConfig, width: int, number: int, numerics: str = "invariant", stride: int = 1) -> list[str]:
    """Returns the bits of each sample's tokens and statistics, in hexadecimal."""
    decoding = config.DecodingConfig(batch_size=width, window_stride=stride, numerics=numerics)
    generator = scheduler.Scheduler(model, fakes.random_params(model, stddev=0.05), decoding)
    found = [b""] * number
    for output in generator.run(_requests(model, number), measure=True):
        assert output.token is not None
        assert output.stats is not None
        row = output.stats.row
        found[output.index] += output.token.to_bytes(4) + b"".join(x_B[row].tobytes() for x_B in output.stats.step)
    return [one.hex() for one in found]


def test_every_batch_size_gives_the_same_bits() -> None:
    alone = bits(SMALL, 1, 5)
    assert len(set(alone)) == 5
    assert alone == bits(SMALL, 3, 5)


@pytest.mark.slow
def test_two_replicas_and_longer_strides_give_the_same_bits() -> None:
    alone = bits(SMALL, 1, 18)
    assert alone == bits(SMALL, 16, 18)
    assert alone != bits(SMALL, 16, 18, "fast")
    assert bits(SMALL, 1, 8, stride=16) == bits(SMALL, 3, 8, stride=16)


def test_what_has_no_invariant_numerics_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="numerics invariant is available on a CPU only: got the platform 'gpu'"):
        backends.backend_for("gpu", SMALL, 16, 4, invariant=True)
    with pytest.raises(ValueError, match="numerics invariant needs dtype float32: got bfloat16"):
        config.DecodingConfig(numerics="invariant", dtype="bfloat16")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    with pytest.raises(ValueError, match="which is in XLA_FLAGS too: remove it there"):
        backends.backend_for("cpu", SMALL, 16, 4, invariant=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_cores_do_not_change_the_bits_either(name: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    expected, *by_size = _in_process(name, SIZES[name], cores[:2])
    assert len(set(expected)) == len(expected)
    for size, found in zip(SIZES[name][1:], by_size, strict=True):
        assert found == expected, f"batch size {size}"
    assert _in_process(name, SIZES[name][:1], cores[:1]) == [expected], "on one core"


def _in_process(name: str, sizes: Sequence[int], cores: Sequence[int]) -> list[list[str]]:
    """Returns the bits at each batch size, computed on some cores."""
    script = f"import test_batch_invariance as test; test.print_bits({name!r}, {list(sizes)}, {list(cores)})"
    environ = {**os.environ, **compiled.PROCESS, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def print_bits(name: str, sizes: Sequence[int], cores: Sequence[int]) -> None:
    """Prints the bits at each batch size as JSON. XLA's threads are as many as the cores at its start."""
    os.sched_setaffinity(0, cores)
    assert jax.default_backend() == "cpu"
    print(json.dumps([bits(globals()[name], size, max(SIZES[name]) + 2) for size in sizes]))
