"""Settings outside the contract do not change random numbers, or are recorded."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import compiled
import jax
import numpy as np
import pytest

import hipgpt_jax
from hipgpt_jax import numerics

PACKAGE = Path(hipgpt_jax.__file__).parent
SEEDS = (0, 1, 7, 2**31, 2**32 - 1)

# Prints a sample's key, initial weights and a dropout mask under whatever settings the environment holds.
_RANDOM = """
import jax, jax.numpy as jnp
from hipgpt_jax import config, numerics, training_config
from hipgpt_jax.generation import sampling
from hipgpt_jax.model import attention, transformer
from hipgpt_jax.training import optimizer, train_step
model = config.ModelConfig(vocab_size=16, max_seq_len=8, embed_dim=8, num_heads=2, ff_hidden_dim=16, num_layers=1)
with train_step.fixed_random_bits():
    key = numerics.key_of(3)
    adam = optimizer.make(training_config.TrainConfig())
    state = jax.jit(lambda key: train_step.init_state(transformer.Transformer(model), adam, key))(key)
    mask = attention.drop(jnp.ones((5, 7)), 0.5, key)
key_2 = sampling.sample_key(5, (1, 2), 3)
print(key_2.tolist(), sampling.noise(key_2[None], jnp.array([4]), jnp.array([[0, 9]])).tolist())
print([x.sum().item() for x in jax.tree.leaves(state.params)], mask.tolist())
"""


def _run(script: str, **environment: str) -> str:
    environ = {**os.environ, **compiled.PROCESS, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_random_numbers_do_not_depend_on_settings_of_jax() -> None:
    plain = _run(_RANDOM)
    settings = {
        "JAX_RANDOM_SEED_OFFSET": "1",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_ENABLE_CUSTOM_PRNG": "1",
        "FLAX_FIX_RNG_SEPARATOR": "1",
    }
    assert _run(_RANDOM, **settings) == plain


@pytest.mark.parametrize("seed", SEEDS)
def test_key_of_a_seed_equals_that_of_jax_without_an_offset(seed: int) -> None:
    expected = jax.random.key_data(jax.random.key(np.uint32(seed), impl="threefry2x32"))
    assert jax.random.key_data(numerics.key_of(seed)).tolist() == expected.tolist() == [0, seed]
    assert jax.random.key_data(jax.jit(numerics.key_of)(np.uint32(seed))).tolist() == [0, seed]


def test_package_makes_keys_from_raw_words_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("key", "PRNGKey", "prng_key"):
                assert ast.unparse(node.value) not in ("jax.random", "random"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("name", "value", "recorded"),
    [
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest", "jax_default_matmul_precision=highest"),
        ("JAX_ENABLE_X64", "1", "jax_enable_x64=True"),
        ("JAX_DISABLE_MOST_OPTIMIZATIONS", "1", "jax_disable_most_optimizations=True"),
        ("JAX_OPTIMIZATION_LEVEL", "O1", "jax_optimization_level=O1"),
        ("NVIDIA_TF32_OVERRIDE", "0", "NVIDIA_TF32_OVERRIDE=0"),
        ("ROCBLAS_INTERNAL_FP16_ALT_IMPL", "1", "ROCBLAS_INTERNAL_FP16_ALT_IMPL=1"),
        ("JAX_LOG_COMPILES", "0", None),
        ("MIOPEN_LOG_LEVEL", "3", None),
        ("CUBLAS_LOGINFO_DBG", "1", None),
    ],
)
def test_a_setting_that_can_change_a_number_is_recorded(
    name: str, value: str, recorded: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = numerics.environment()
    setting = name.lower()
    if setting in jax.config.values:
        monkeypatch.setitem(os.environ, name, value)
        holder = jax.config.values[setting]
        jax.config.update(setting, {"0": False, "1": True}.get(value, value))
        try:
            found = numerics.environment()
        finally:
            jax.config.update(setting, holder)
    else:
        found = numerics.environment({name: value})
    assert set(found) - set(before) == ({recorded} if recorded else set())


def test_a_processor_is_named_with_its_vector_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: AMD  EPYC 7B13\nflags\t\t: fpu sse4_2 smep avx2 avx fma\n\nprocessor\t: 1\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **kwargs: text)
    numerics._cpuinfo.cache_clear()
    assert numerics.processor() == "AMD EPYC 7B13"
    assert numerics.instruction_sets() == ("avx", "avx2", "fma", "sse4_2")
    monkeypatch.undo()
    numerics._cpuinfo.cache_clear()
    assert numerics.processor()
    assert numerics.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        ("--xla_a=1 --xla_b=x/y", "--xla_a=1 --xla_b=x/y"),
        ("--xla_dump_to=/home/ann/d --xla_c=/tmp/e,/tmp/f", "--xla_dump_to=d --xla_c=e,f"),
        ("--xla_dump_to=~/d", "--xla_dump_to=d"),
        ("--xla_dump_to='/home/ann/d'", "--xla_dump_to='d'"),
        ("/home/ann/", ""),
        ("/home//ann/d", "d"),
        ("//home/ann/d", "d"),
        ("file:///home/ann/d", "d"),
        ("[/home/ann/d]", "[d]"),
        ("--a=../ann/d", "--a=d"),
        ("~ann/d", "d"),
        (str(Path.home()), ""),
        (f"--a={Path.home()}/d", "--a=d"),
    ],
)
def test_paths_are_cut_to_file_names(given: str, kept: str) -> None:
    assert numerics.without_directories(given) == kept
