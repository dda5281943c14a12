"""Several devices: equal losses on every mesh, and states restored on another one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hipgpt_jax import config, training_config
from hipgpt_jax.model import mesh, transformer
from hipgpt_jax.runs import weights
from hipgpt_jax.training import checkpoint, optimizer, train_step

MODEL = config.ModelConfig(vocab_size=301, max_seq_len=16, embed_dim=32, num_heads=4, ff_hidden_dim=64, num_layers=2)
TRAIN = training_config.TrainConfig(batch_size=8, steps=20, warmup_steps=2, learning_rate=3e-3)
MESHES = ("fsdp=2", "data=8", "fsdp=8", "model=4", "data=4,model=2", "data=2,fsdp=2,model=2")
KEY = jax.random.key(3, impl="threefry2x32")


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Optax 0.2.8 itself promotes a Python float with an integer count; our own code is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def layout_of(text: str, train: training_config.TrainConfig = TRAIN) -> mesh.Layout:
    rows = train.batch_size // train.grad_accum
    return mesh.Layout.create(mesh.parse(text, batch_size=rows, available=jax.device_count()))


def batch_at(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 301, (8, 17)).astype(np.int32)


def shard(layout: mesh.Layout, number: int) -> jax.Array:
    batch = batch_at(number)
    return layout.shard_batch(batch.shape, batch.__getitem__)


def parts_of(train: training_config.TrainConfig) -> tuple[transformer.Transformer, Any]:
    return transformer.Transformer(MODEL, train.dtype, train.remat), optimizer.make(train)


def test_given_parameters_are_sharded_and_copied() -> None:
    params = fakes.random_params(MODEL)
    layout, (_, tx) = layout_of("data=2,fsdp=2,model=2"), parts_of(TRAIN)
    state = train_step.start_from(layout, tx, params)
    like = train_step.init_sharded(layout, transformer.Transformer(MODEL), tx, KEY)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
    expected = jax.tree.map(np.copy, params)
    jax.tree.map(lambda x: x.fill(0), params)
    jax.tree.map(np.testing.assert_array_equal, layout.to_host(state.params), expected)
    assert int(state.step) == 0
    assert all(not np.any(np.asarray(x)) for x in jax.tree.leaves(state.opt_state))


def run(text: str, **changes: Any) -> tuple[np.ndarray, train_step.TrainState]:
    """Losses of 20 steps, and the state after them."""
    train = dataclasses.replace(TRAIN, **changes)
    layout, (model, tx) = layout_of(text, train), parts_of(train)
    state = train_step.init_sharded(layout, model, tx, KEY)
    take_step = train_step.make_train_step(model, tx, train, KEY, layout)
    losses = []
    for number in range(20):
        state, measured = take_step(state, shard(layout, number % 2))
        losses.append(float(measured.loss))
    return np.asarray(losses), state


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    with jax.numpy_dtype_promotion("standard"):
        return run("data=1")[0]


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
def test_losses_equal_those_of_one_device(text: str, alone: np.ndarray) -> None:
    losses, state = run(text)
    np.testing.assert_allclose(losses, alone, atol=1e-5)
    assert losses[-1] < losses[0] - 0.05, "it learns"
    sizes = layout_of(text).mesh.shape
    kernel = state.params["h_0"]["mlp"]["c_fc"]["kernel"]
    moment = state.opt_state[1][0].mu["h_0"]["mlp"]["c_fc"]["kernel"]
    for array in (kernel, moment):
        assert array.addressable_shards[0].data.shape == (32 // sizes["fsdp"], 64 // sizes["model"])


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_mesh() -> None:
    np.testing.assert_allclose(run("data=2,model=2", dropout=0.2)[0], run("data=1", dropout=0.2)[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["data=1", "data=2"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(text: str, alone: np.ndarray) -> None:
    np.testing.assert_allclose(run(text, grad_accum=4)[0], alone, atol=1e-5)
    model, tx = parts_of(TRAIN)
    layout = layout_of(text)
    found = []
    for parts in (1, 2, 4):
        train = dataclasses.replace(TRAIN, grad_accum=parts, clip=1e9)
        state = train_step.init_sharded(layout, model, tx, KEY)
        _, measured = train_step.make_train_step(model, tx, train, KEY, layout)(state, shard(layout, 0))
        found.append((float(measured.loss), float(measured.accuracy), float(measured.gradient_norm)))
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-6)


@pytest.mark.slow
def test_remat_changes_no_loss(alone: np.ndarray) -> None:
    np.testing.assert_allclose(run("data=1", remat=True)[0], alone, atol=1e-6)
    model, tx = parts_of(dataclasses.replace(TRAIN, remat=True))
    layout = layout_of("data=1")
    jaxpr = jax.make_jaxpr(train_step.make_train_step(model, tx, TRAIN, KEY, layout))(
        train_step.init_sharded(layout, model, tx, KEY), batch_at(0)
    )
    assert "remat" in str(jaxpr) or "checkpoint" in str(jaxpr)


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_softmax_in_float32(alone: np.ndarray) -> None:
    losses, state = run("data=1", dtype="bfloat16")
    assert 0 < np.abs(losses - alone).max() < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim} == {
        np.dtype("float32")
    }
    model, _ = parts_of(dataclasses.replace(TRAIN, dtype="bfloat16"))
    jaxpr = jax.make_jaxpr(lambda params, ids: model.apply({"params": params}, ids, dropout=0.0))(
        state.params, batch_at(0)[:, :-1]
    )
    taken: dict[str, set[str]] = {}
    for equation in fakes.equations(jaxpr.jaxpr):
        taken.setdefault(equation.primitive.name, set()).update(str(var.aval.dtype) for var in equation.invars)
    assert taken["dot_general"] == {"bfloat16"}
    assert taken["exp"] == taken["rsqrt"] == {"float32"}
    assert jaxpr.out_avals[0].dtype == np.float32


def test_every_parameter_has_a_sharding() -> None:
    shapes = train_step.param_shapes(MODEL)
    assert len(jax.tree.leaves(shapes)) == len(weights.layout(MODEL))
    shardings = layout_of("data=2,fsdp=2,model=2").shardings_for(shapes)
    divided = [sharding.spec != PartitionSpec() for sharding in jax.tree.leaves(shardings)]
    assert sum(divided) == 2 + 2 * 6


@pytest.mark.parametrize(
    ("saved", "opened"),
    [
        pytest.param("data=8", "data=1", marks=pytest.mark.slow),
        ("data=1", "fsdp=4,model=2"),
        pytest.param("fsdp=8", "model=4", marks=pytest.mark.slow),
    ],
)
def test_state_is_restored_on_another_mesh(tmp_path: Path, saved: str, opened: str) -> None:
    model, tx = parts_of(TRAIN)
    state = train_step.init_sharded(layout_of(saved), model, tx, KEY)
    store = checkpoint.StateStore(tmp_path)
    store.save(state)
    store.close()
    store = checkpoint.StateStore(tmp_path)
    target = layout_of(opened)
    like = train_step.init_sharded(target, model, tx, jax.random.key(9, impl="threefry2x32"))
    restored = store.restore(0, like, target)
    store.close()
    for one, other, sharding in zip(*map(jax.tree.leaves, (restored, state, target.shardings_for(state))), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(sharding, one.ndim)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=0", "mesh must be such as data=4,model=2"),
        ("data", "mesh must be such as"),
        ("data=2,data=2", "mesh must be such as"),
        ("pipe=2", "mesh must be such as"),
        ("data=-1", "mesh must be such as"),
        ("data=9", "mesh data=9 needs 9 devices: JAX has 8"),
        ("data=3", "mesh data=3 divides the rows of a step by 3: 8 rows"),
        ("fsdp=5", "by 5: 8 rows"),
    ],
)
def test_invalid_mesh_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh.parse(text, batch_size=8, available=8)


def test_default_mesh_uses_as_many_devices_as_divide_the_batch() -> None:
    for batch, available, used in ((8, 8, 8), (6, 8, 2), (5, 8, 1), (12, 8, 4), (4, 1, 1)):
        assert mesh.parse(None, batch_size=batch, available=available)["data"] == used
