"""Tests of the transformer: causality, dropout, initial weights, the tied head, prefill and dtypes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hipgpt_jax import config, training_config
from hipgpt_jax.model import attention, parameters, transformer
from hipgpt_jax.model import cache as kv

MODEL = fakes.MODEL
T = 9
TOKENS_BT = np.random.RandomState(0).permutation(MODEL.vocab_size)[: 2 * T].reshape(2, T)


@functools.partial(jax.jit, static_argnames="dropout")
def forward(
    params: dict[str, Any], tokens_BT: jax.Array, key: jax.Array | None = None, dropout: float = 0.0
) -> jax.Array:
    rngs = None if key is None else {"dropout": key}
    return transformer.Transformer(MODEL).bind({"params": params}, rngs=rngs)(tokens_BT, dropout=dropout)


@jax.jit
def prefill(params: dict[str, Any], tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, Any]:
    return transformer.Transformer(MODEL).bind({"params": params}).prefill(tokens_BT, length_B)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return fakes.random_params(MODEL)


@pytest.fixture(scope="module")
def first_params() -> tuple[config.ModelConfig, dict[str, Any]]:
    """The initial weights of a model large enough for statistics."""
    model = config.ModelConfig(
        vocab_size=500, max_seq_len=100, embed_dim=64, num_heads=4, ff_hidden_dim=96, num_layers=2
    )
    init = jax.jit(functools.partial(transformer.Transformer(model).init, dropout=0.0))
    return model, init(jax.random.key(0, impl="threefry2x32"), jnp.zeros((1, 1), jnp.int32))["params"]


def test_attention_is_causal(params: dict[str, Any]) -> None:
    """A loss at position X has zero gradient for later inputs, and nonzero gradient for all up to X.

    Row ``t`` of the position table enters the network only at position ``t``. The token table is
    unsuitable, because the head reads all of it. A masked score is exactly 0 after softmax, forward
    and backward, so the test requires exactly 0. The network is an analytic function of that row.
    Its gradient, if it depends on the row, vanishes at most on a set of measure zero.
    """

    def loss(wpe_WD: jax.Array, position: jax.Array) -> jax.Array:
        logits_BTV = forward({**params, "wpe": {"embedding": wpe_WD}}, TOKENS_BT[:1])
        return jnp.sin(logits_BTV[0, position] * jnp.arange(1.0, MODEL.vocab_size + 1)).sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    gradient_XWD = gradients(params["wpe"]["embedding"], jnp.arange(T))
    reach_XW = np.abs(np.asarray(gradient_XWD)).max(axis=-1)
    sees_XW = np.arange(MODEL.max_seq_len)[None] <= np.arange(T)[:, None]
    assert np.all(reach_XW[~sees_XW] == 0)
    assert np.all(reach_XW[sees_XW] > 1e-3)


def test_logits_are_independent_of_later_tokens_and_other_rows(params: dict[str, Any]) -> None:
    logits_BTV = np.asarray(forward(params, TOKENS_BT))
    for position in range(1, T):
        changed_BT = TOKENS_BT.copy()
        changed_BT[0, position:] = (changed_BT[0, position:] + 1) % MODEL.vocab_size
        changed_BTV = np.asarray(forward(params, changed_BT))
        np.testing.assert_array_equal(changed_BTV[0, :position], logits_BTV[0, :position])
        np.testing.assert_array_equal(changed_BTV[1], logits_BTV[1])
        assert np.all(np.any(changed_BTV[0, position:] != logits_BTV[0, position:], axis=-1))


def test_order_of_the_past_matters(params: dict[str, Any]) -> None:
    swapped_BT = TOKENS_BT[:, [1, 0, *range(2, T)]]
    difference_BTV = np.asarray(forward(params, swapped_BT)) - np.asarray(forward(params, TOKENS_BT))
    assert np.all(np.abs(difference_BTV[:, -1]).max(axis=-1) > 1e-2)


def test_forward_without_dropout_is_deterministic_and_needs_no_key(params: dict[str, Any]) -> None:
    once_BTV = np.asarray(forward(params, TOKENS_BT))
    np.testing.assert_array_equal(forward(params, TOKENS_BT), once_BTV)


def test_dropout_is_a_function_of_its_key(params: dict[str, Any]) -> None:
    first, again, other = (
        np.asarray(forward(params, TOKENS_BT, jax.random.key(seed), dropout=0.5)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - forward(params, TOKENS_BT)).max() > 0.1


@pytest.mark.parametrize(
    "source",
    [
        ("wpe", "embedding"),
        ("h_0", "attn", "c_proj", "bias"),
        ("h_1", "attn", "c_proj", "bias"),
        ("h_0", "mlp", "c_proj", "bias"),
        ("h_1", "mlp", "c_proj", "bias"),
    ],
)
def test_dropout_applies_to_every_residual_branch(source: tuple[str, ...], params: dict[str, Any]) -> None:
    """All sources of the residual stream but one are zero, so only dropping that one can show."""
    names = {("wte", "embedding"), source}

    def isolate(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        name = tuple(key.key for key in path)
        return leaf if name in names else np.full_like(leaf, name[-1] == "scale")

    alone = jax.tree_util.tree_map_with_path(isolate, params)
    alone["wte"] = {"embedding": params["wte"]["embedding"].copy()}
    alone["wte"]["embedding"][0] = 0
    zeros_BT = np.zeros((2, T), np.int32)
    first_BTV, other_BTV = (forward(alone, zeros_BT, jax.random.key(seed), dropout=0.5) for seed in (1, 2))
    assert np.all(np.abs(first_BTV - other_BTV).max(axis=-1) > 1e-3)


def test_dropout_applies_to_the_attention_weights() -> None:
    """With values of 1, attention returns the sum of its weights: 1 without dropout, 1 on average with it."""
    q_BTNH, k_BTNH = np.random.RandomState(0).normal(size=(2, 40, 30, 4, 8)).astype(np.float32)
    ones_BTNH = np.ones_like(q_BTNH)
    attend = jax.jit(attention.causal_attention, static_argnames="dropout")
    whole_BTNH = attend(q_BTNH, k_BTNH, ones_BTNH, dropout=0.0, dropout_key=None)
    np.testing.assert_allclose(whole_BTNH, 1, rtol=1e-5)
    left_BTNH = attend(q_BTNH, k_BTNH, ones_BTNH, dropout=0.2, dropout_key=jax.random.key(2))
    left_BTN = np.asarray(left_BTNH, np.float64)[..., 0]
    assert left_BTN.std() > 0.1
    assert left_BTN.mean() == pytest.approx(1, abs=5 * left_BTN.std() / math.sqrt(left_BTN.size))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_drop_zeroes_its_rate_and_preserves_the_mean(rate: float) -> None:
    n = 200_000
    x = jnp.full((n,), 3.0)
    dropped = np.asarray(attention.drop(x, rate, jax.random.key(7)))
    five_sigma = 5 * math.sqrt(rate * (1 - rate) / n)
    assert np.mean(dropped == 0) == pytest.approx(rate, abs=five_sigma + 2**-17)
    np.testing.assert_allclose(dropped[dropped != 0], 3 / (1 - rate), rtol=2**-16 / (1 - rate))
    assert dropped.mean() == pytest.approx(3, abs=3 * five_sigma / (1 - rate) + 1e-4)


def test_drop_accepts_every_valid_rate() -> None:
    rate = training_config.TrainConfig(dropout=math.nextafter(1, 0)).dropout
    assert np.all(np.isfinite(attention.drop(jnp.ones(1000), rate, jax.random.key(0))))


def test_initial_weights_follow_gpt2(first_params: tuple[config.ModelConfig, dict[str, Any]]) -> None:
    model, params = first_params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = tuple(key.key for key in path)
        value = np.asarray(leaf)
        if name[-1] in ("bias", "scale"):
            assert np.all(value == (name[-1] == "scale")), name
            continue
        stddev = 0.02 / math.sqrt(2 * model.num_layers) if name[-2] == "c_proj" else 0.02
        assert value.std() == pytest.approx(stddev, rel=5 / math.sqrt(2 * value.size)), name
        assert value.mean() == pytest.approx(0, abs=5 * stddev / math.sqrt(value.size)), name
        assert np.abs(value).max() > 3.2 * stddev, f"{name} is cut off, not normal"


def test_initial_loss_is_that_of_a_uniform_guess(first_params: tuple[config.ModelConfig, dict[str, Any]]) -> None:
    model, params = first_params
    tokens_BT, next_BT = np.random.RandomState(0).randint(0, model.vocab_size, (2, 8, 50))
    apply = jax.jit(functools.partial(transformer.Transformer(model).apply, dropout=0.0))
    logprobs_BTV = np.asarray(jax.jit(jax.nn.log_softmax)(apply({"params": params}, tokens_BT)))
    loss = -np.take_along_axis(logprobs_BTV, next_BT[..., None], axis=-1).mean()
    assert loss == pytest.approx(math.log(model.vocab_size), abs=0.05)


def test_head_is_tied_to_the_token_embedding(params: dict[str, Any]) -> None:
    """The logit of a token that was not read is linear in its embedding, and no other logit moves."""
    used, a, b, v = 1, 2, 3, 4
    tokens_BT = np.full((2, T), used)
    wte_VD = np.array(params["wte"]["embedding"])
    before_TV = np.asarray(forward(params, tokens_BT))[0]
    wte_VD[v] = 2 * wte_VD[a] - wte_VD[b]
    after_TV = np.asarray(forward({**params, "wte": {"embedding": wte_VD}}, tokens_BT))[0]
    np.testing.assert_allclose(after_TV[:, v], 2 * before_TV[:, a] - before_TV[:, b], atol=1e-4)
    others = np.arange(MODEL.vocab_size) != v
    np.testing.assert_array_equal(after_TV[:, others], before_TV[:, others])


def test_prefill_gives_the_logits_of_the_last_real_token_at_every_length(params: dict[str, Any]) -> None:
    full_TV = np.asarray(forward(params, TOKENS_BT))[0]
    logits_TV, _ = prefill(params, np.repeat(TOKENS_BT[:1], T, axis=0), jnp.arange(1, T + 1))
    np.testing.assert_allclose(logits_TV, full_TV, rtol=1e-5, atol=1e-5)
    assert np.abs(np.diff(full_TV, axis=0)).max(axis=-1).min() > 0.1, (
        "the logits of adjacent positions must differ for the comparison to be meaningful"
    )


def test_prefill_ignores_padding(params: dict[str, Any]) -> None:
    """The logits, keys and values of real tokens are bit-identical whatever the padding holds."""
    length_B = jnp.arange(1, T + 1)
    real_BT = np.arange(T)[None] < length_B[:, None]
    tokens_BT = np.repeat(TOKENS_BT[:1], T, axis=0)
    results = []
    for padding in (0, MODEL.vocab_size - 1, np.random.RandomState(5).randint(0, MODEL.vocab_size, tokens_BT.shape)):
        logits_BV, cache = prefill(params, np.where(real_BT, tokens_BT, padding), length_B)
        results.append([logits_BV, *(np.where(real_BT[:, None, :, None], x, 0) for x in jax.tree.leaves(cache))])
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


def decode_of(model: transformer.Transformer) -> Callable[..., Any]:
    return lambda params, *arguments: model.bind({"params": params}).decode(*arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_in_half_precision_keeps_softmax_and_logits_in_float32(params: dict[str, Any], dtype: str) -> None:
    model = transformer.Transformer(MODEL, dtype)
    cache = kv.empty(kv.Layout((4, 4)).shapes(MODEL, 2, dtype))
    narrow = parameters.cast(params, dtype)
    program = jax.make_jaxpr(decode_of(model))(narrow, jnp.asarray([1, 2]), cache, jnp.asarray([3, 5]))
    taken: dict[str, set[str]] = {}
    for equation in fakes.equations(program.jaxpr):
        taken.setdefault(equation.primitive.name, set()).update(str(var.aval.dtype) for var in equation.invars)
    assert taken["dot_general"] == {dtype}
    assert taken["exp"] == taken["rsqrt"] == {"float32"}
    assert program.out_avals[0].dtype == np.float32
    assert {out.dtype for out in program.out_avals[1:]} == {jnp.dtype(dtype)}, "keys and values"


def test_cast_parameters_give_the_logits_of_float32_ones(params: dict[str, Any]) -> None:
    model = transformer.Transformer(MODEL, "bfloat16")
    whole, narrow = (
        jax.jit(lambda params: model.bind({"params": params})(jnp.asarray(TOKENS_BT), dropout=0.0))(given)
        for given in (params, parameters.cast(params, "bfloat16"))
    )
    np.testing.assert_array_equal(whole, narrow)
    exact = forward(params, TOKENS_BT)
    assert 0 < np.abs(whole - exact).max() < 0.1 * np.abs(exact).max()


def test_cast_skips_layer_norms_and_does_not_copy_unchanged_arrays(params: dict[str, Any]) -> None:
    narrow = parameters.cast(params, "bfloat16")
    kinds = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(narrow)}
    assert all((dtype == np.float32) == ("ln_" in name) for name, dtype in kinds.items())
    same = parameters.cast(params, "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_matmul_precision_is_independent_of_jax_settings(params: dict[str, Any], dtype: str, precision: str) -> None:
    """A setting of the environment must not replace float32 by TF32, which would change tokens on a GPU."""
    model = transformer.Transformer(MODEL, dtype, full_precision=True)
    tokens_1T, length_1 = TOKENS_BT[:1], jnp.asarray([T])
    programs = {
        "decode": (
            decode_of(model),
            (jnp.asarray([1]), kv.empty(kv.Layout((4,)).shapes(MODEL, 1, dtype)), jnp.asarray([3])),
        ),
        "prefill": (lambda params, *a: model.bind({"params": params}).prefill(*a), (tokens_1T, length_1)),
        "forward": (lambda params, a: model.bind({"params": params})(a, dropout=0.0), (tokens_1T,)),
    }
    for own in ("tensorfloat32", "float32", "bfloat16"):
        for name, (function, arguments) in programs.items():
            with jax.default_matmul_precision(own):
                program = jax.make_jaxpr(function)(params, *arguments)
            dots = [one for one in fakes.equations(program.jaxpr) if one.primitive.name == "dot_general"]
            assert len(dots) >= 4 * MODEL.num_layers + 1, name
            assert {str(dot.params["precision"][0]) for dot in dots} == {precision}, name
