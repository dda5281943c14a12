"""Parameter counts, floating-point operations per token and utilisation."""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from hipgpt_jax import config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import transformer
from hipgpt_jax.training import flops

SMALL = config.ModelConfig(vocab_size=70, max_seq_len=8, embed_dim=12, num_heads=3, ff_hidden_dim=20, num_layers=2)
GPT2 = config.ModelConfig(
    vocab_size=50257, max_seq_len=1024, embed_dim=768, num_heads=12, ff_hidden_dim=3072, num_layers=12
)


def shapes(model: config.ModelConfig) -> Any:
    """Returns the shapes of a model's parameters, without making them."""
    tokens_BT = jnp.zeros((1, model.max_seq_len), jnp.int32)
    made = transformer.Transformer(model)
    return jax.eval_shape(lambda key: made.init(key, tokens_BT, dropout=0.0), jax.random.key(0))["params"]


def products(jaxpr: Any) -> int:
    """Returns the multiplications and additions of all matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                total += products(value.jaxpr)
    return total


def test_parameter_count_is_that_of_gpt2() -> None:
    """124,439,808 is the published size of GPT-2's smallest model."""
    assert flops.size(shapes(GPT2)) == flops.Size(124_439_808, 124_439_808 - 1024 * 768)


def test_flops_per_token_equal_the_matrix_products_of_a_step() -> None:
    """The formula counts biases and LayerNorms as if they were matrices; all else is the program's own."""
    made, params = transformer.Transformer(SMALL), shapes(SMALL)

    def mean_loss(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return jnp.sum(loss.score_tokens(made.bind({"params": params})(tokens_BT, dropout=0.0), tokens_BT).nll_BT)

    tokens_BT = jnp.zeros((3, SMALL.max_seq_len), jnp.int32)
    counted = products(jax.make_jaxpr(jax.value_and_grad(mean_loss))(params, tokens_BT).jaxpr)
    vectors = sum(leaf.size for leaf in jax.tree.leaves(params) if len(leaf.shape) == 1)
    assert flops.per_token(SMALL, flops.size(params)) - 6 * vectors == counted / tokens_BT.size


def test_flops_per_token_equal_a_count_by_hand() -> None:
    D, F, V, T, L = 12, 20, 70, 8, 2
    forward = L * (2 * D * 3 * D + 2 * D * D + 2 * 2 * D * F + 2 * 2 * T * D) + 2 * D * V
    vectors = L * (4 * D + 3 * D + D + F + D) + 2 * D
    assert flops.per_token(SMALL, flops.size(shapes(SMALL))) == 3 * forward + 6 * vectors


@pytest.mark.parametrize(
    ("kind", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA GH200 480GB", "tensorfloat32", 494.7),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_half_of_the_peak_is_a_utilisation_of_half(kind: str, precision: str, tera: float) -> None:
    tokens_per_second = 4 * tera * 1e12 / 2 / 1e9
    assert flops.mfu(1e9, tokens_per_second, kind, 4, precision) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("cpu", "float32"),
        ("NVIDIA L40", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("AMD Instinct MI210", "tensorfloat32"),
    ],
)
def test_an_unknown_peak_gives_no_utilisation(kind: str, precision: str) -> None:
    assert flops.mfu(1e9, 1e3, kind, 1, precision) is None


@pytest.mark.parametrize(
    ("parameters", "cost", "text"),
    [
        (2_445_888, 16_002_432, "2.4 M parameters, 16 MFLOP per token"),
        (124_439_808, 855e6, "124 M parameters, 855 MFLOP per token"),
        (1_557_611_200, 10.28e9, "1.6 B parameters, 10 GFLOP per token"),
        (950, 5_700, "950 parameters, 5.7 kFLOP per token"),
        (999_600, 999.6e6, "1 M parameters, 1 GFLOP per token"),
        (12, 99, "12 parameters, 99 FLOP per token"),
        (3_000_000_000_000, 2e15, "3000 B parameters, 2000 TFLOP per token"),
    ],
)
def test_size_and_cost_as_text(parameters: int, cost: float, text: str) -> None:
    assert flops.describe(flops.Size(parameters, 0), cost) == text
