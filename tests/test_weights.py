"""Weights round-trip bitwise under Hugging Face's names; other files are refused by name."""

import contextlib
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import config
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import weights

SETTINGS = settings(deadline=None, derandomize=True, database=None)

MODEL = config.ModelConfig(vocab_size=5, max_seq_len=3, embed_dim=4, num_heads=2, ff_hidden_dim=6, num_layers=1)

# The state dict of Hugging Face's GPT2Model with these sizes.
GPT2 = {
    "wte.weight": (5, 4),
    "wpe.weight": (3, 4),
    "h.0.ln_1.weight": (4,),
    "h.0.ln_1.bias": (4,),
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_attn.bias": (12,),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.attn.c_proj.bias": (4,),
    "h.0.ln_2.weight": (4,),
    "h.0.ln_2.bias": (4,),
    "h.0.mlp.c_fc.weight": (4, 6),
    "h.0.mlp.c_fc.bias": (6,),
    "h.0.mlp.c_proj.weight": (6, 4),
    "h.0.mlp.c_proj.bias": (4,),
    "ln_f.weight": (4,),
    "ln_f.bias": (4,),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "whole.bin"
    weights.write(path, fakes.random_params(MODEL), MODEL)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "run_step1.bin"


def assert_same_bits(one: Any, two: Any) -> None:
    for found, expected in zip(leaves(one), leaves(two), strict=True):
        assert found[0] == expected[0]
        assert found[1].dtype == expected[1].dtype
        assert found[1].shape == expected[1].shape
        assert found[1].tobytes() == expected[1].tobytes()


def leaves(params: Any) -> list[tuple[tuple[str, ...], np.ndarray]]:
    found = jax.tree_util.tree_leaves_with_path(params)
    return [(tuple(entry.key for entry in path), np.asarray(leaf)) for path, leaf in found]


@SETTINGS
@given(seed=st.integers(0, 2**32 - 1))
def test_float32_round_trip_is_bitwise(scratch: Path, seed: int) -> None:
    """Of any bits: zeros of either sign, subnormal numbers, infinities and NaNs."""
    rng = np.random.RandomState(seed)
    params = jax.tree.map(
        lambda leaf: rng.randint(0, 2**32, leaf.shape, np.uint32).view(np.float32), fakes.random_params(MODEL)
    )
    weights.write(scratch, params, MODEL)
    assert_same_bits(weights.read(scratch, MODEL), params)


def test_device_arrays_round_trip_is_bitwise(tmp_path: Path) -> None:
    params = jax.tree.map(jnp.asarray, fakes.random_params(MODEL))
    weights.write(tmp_path / "run.bin", params, MODEL)
    assert_same_bits(weights.read(tmp_path / "run.bin", MODEL), params)


def test_transposed_arrays_round_trip(tmp_path: Path) -> None:
    """NumPy views of device arrays can have any strides."""
    params = fakes.random_params(MODEL)
    lying = jax.tree.map(np.asfortranarray, params)
    weights.write(tmp_path / "run.bin", lying, MODEL)
    assert_same_bits(weights.read(tmp_path / "run.bin", MODEL), params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_to_nearest_even(tmp_path: Path, dtype: str) -> None:
    """For float16 and bfloat16; 2**-25 is half of the smallest float16."""
    half_type = np.dtype(dtype)
    step = float(np.finfo(np.float16).eps if dtype == "float16" else 2**-7)
    params = fakes.random_params(MODEL)
    table = params["wte"]["embedding"]
    table.flat[:8] = [0.0, -0.0, 1 + step / 2, 1 + step * 3 / 2, 2**-24, 2**-25, 65504.0, 0.1]
    weights.write(tmp_path / "run.bin", params, MODEL, dtype)
    read = weights.read(tmp_path / "run.bin", MODEL)
    for (_, found), (_, exact) in zip(leaves(read), leaves(params), strict=True):
        half = found.astype(half_type)
        assert found.dtype == np.float32
        assert (half == found).all()
        error = np.abs(found.astype(np.float64) - exact)
        for side in (-np.inf, np.inf):
            with np.errstate(over="ignore"):
                beside = np.nextafter(half, half_type.type(side)).astype(np.float64)
            assert (error <= np.abs(beside - exact)).all()
    smallest = 0.0 if dtype == "float16" else 2**-25
    assert read["wte"]["embedding"].flat[2:6].tolist() == [1.0, 1 + 2 * step, 2**-24, smallest]


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_file_has_the_names_and_shapes_of_hugging_face(tmp_path: Path, dtype: str, stored: str) -> None:
    params = fakes.random_params(MODEL)
    weights.write(tmp_path / "run.bin", params, MODEL, dtype)
    with safetensors.safe_open(tmp_path / "run.bin", framework="numpy") as file:
        names = file.keys()
        assert {name: tuple(file.get_slice(name).get_shape()) for name in names} == GPT2
        assert {file.get_slice(name).get_dtype() for name in GPT2} == {stored}
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(
            file.get_tensor("h.0.mlp.c_fc.weight"), params["h_0"]["mlp"]["c_fc"]["kernel"].astype(dtype)
        )
        np.testing.assert_array_equal(file.get_tensor("ln_f.weight"), params["ln_f"]["scale"].astype(dtype))


def test_jax_does_not_copy_weights(tmp_path: Path) -> None:
    """The weights are not held twice, and tensors larger than the parts they are read in are complete."""
    model = config.ModelConfig(vocab_size=70_001, embed_dim=16, num_heads=2, ff_hidden_dim=8, num_layers=1)
    params = fakes.random_params(model)
    weights.write(tmp_path / "run.bin", params, model)
    read = weights.read(tmp_path / "run.bin", model)
    assert_same_bits(read, params)
    for found, on_device in zip(jax.tree.leaves(read), jax.tree.leaves(jax.device_put(read)), strict=True):
        assert found.ctypes.data % 64 == 0
        assert on_device.unsafe_buffer_pointer() == found.ctypes.data


def test_the_eleventh_block_is_named_by_its_number() -> None:
    assert weights.tensor_name(("h_10", "attn", "c_attn", "kernel")) == "h.10.attn.c_attn.weight"


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        config.ModelConfig(vocab_size=7, max_seq_len=5, embed_dim=6, num_heads=1, ff_hidden_dim=9, num_layers=12),
        config.ModelConfig(),
    ],
)
def test_layout_matches_the_model(model: config.ModelConfig) -> None:
    initialise = functools.partial(transformer.Transformer(model).init, dropout=0.0)
    shapes = jax.eval_shape(initialise, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    found = jax.tree_util.tree_leaves_with_path(shapes)
    assert weights.layout(model) == {tuple(entry.key for entry in path): leaf.shape for path, leaf in found}
    names = [weights.tensor_name(path) for path in weights.layout(model)]
    assert len(set(names)) == len(names)


def test_a_file_cut_anywhere_is_refused(scratch: Path, whole: bytes) -> None:
    scratch.write_bytes(whole)
    for length in reversed(range(len(whole))):
        os.truncate(scratch, length)
        with pytest.raises(ValueError, match=f"^{re.escape(str(scratch))} is not a whole safetensors file"):
            weights.read(scratch, MODEL)
    scratch.write_bytes(whole)
    weights.read(scratch, MODEL)


@SETTINGS
@given(content=st.binary())
def test_foreign_bytes_are_refused(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(scratch))} is not a whole safetensors file"):
        weights.read(scratch, MODEL)


@SETTINGS
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(scratch: Path, whole: bytes, data: st.DataObject) -> None:
    """One byte of the header changes: a name, shape, type or offset, or the JSON is invalid."""
    end = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(0, end - 1), "place")
    byte = data.draw(st.integers(0, 255), "byte")
    scratch.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    with contextlib.suppress(ValueError):
        assert_same_bits(weights.read(scratch, MODEL), fakes.random_params(MODEL))


def write_tensors(path: Path, changes: dict[str, np.ndarray | None]) -> None:
    tensors: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in GPT2.items()} | changes
    safetensors.numpy.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize("name", GPT2)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.bin"
    write_tensors(path, {name: None})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} lacks 1 tensors .* the first is {re.escape(name)}$"):
        weights.read(path, MODEL)


def test_tensors_of_a_deeper_model_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.bin"
    write_tensors(path, {"h.1.ln_1.weight": np.ones(4, np.float32), "lm_head.weight": np.ones((5, 4), np.float32)})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} has 2 tensors .* the first is h.1.ln_1.weight$"):
        weights.read(path, MODEL)


@pytest.mark.parametrize("name", GPT2)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    path, shape = tmp_path / "run.bin", GPT2[name]
    for other in ((math.prod(shape) + 1,), (1, *shape), (*shape[:-1], shape[-1] + 1), ()):
        write_tensors(path, {name: np.ones(other, np.float32)})
        text = f"{path}: {name} must have shape {shape}: got {other}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            weights.read(path, MODEL)


@pytest.mark.parametrize(("dtype", "size"), [("F64", 8), ("I32", 4), ("BOOL", 1), ("F8_E4M3", 1)])
def test_a_tensor_of_another_type_is_named(tmp_path: Path, dtype: str, size: int) -> None:
    path = tmp_path / "run.bin"
    header, end = {}, 0
    for name, shape in GPT2.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}.*{dtype}"):
        weights.read(path, MODEL)


def test_a_file_too_small_for_the_model_is_refused_before_its_tensors_are_listed(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "run.bin"
    path.write_bytes(whole)
    large = config.ModelConfig(embed_dim=2**16, ff_hidden_dim=2**20, num_layers=2**10)
    text = f"^{re.escape(str(path))} has {len(whole)} bytes: the model in its config has {weights.count(large)} param"
    with pytest.raises(ValueError, match=text):
        weights.read(path, large)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nosuch.bin", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"weights not found: {path}")):
            weights.read(path, MODEL)


def test_weights_that_cannot_be_written_leave_the_old_ones(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "run.bin"
    path.write_bytes(whole)
    broken = fakes.random_params(MODEL)
    del broken["ln_f"]
    with pytest.raises(KeyError):
        weights.write(path, broken, MODEL)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.bin"
    path.write_bytes(whole)

    def save_half(tensors: dict[str, np.ndarray], to: Path, metadata: dict[str, str]) -> None:
        to.write_bytes(whole[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", save_half)
    with pytest.raises(OSError, match="no space left"):
        weights.write(path, fakes.random_params(MODEL, seed=1), MODEL)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
