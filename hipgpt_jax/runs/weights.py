"""A checkpoint's ``.bin``: a safetensors file with the names and shapes of Hugging Face's GPT-2."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from hipgpt_jax import config, files

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PART_BYTES = 2**22
_ALIGNMENT = 64  # XLA copies arrays that are aligned to less
_LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns the name in the file of a parameter: ``h.0.ln_1.weight`` for ``("h_0", "ln_1", "scale")``."""
    block = path[0].replace("_", ".") if path[0].startswith("h_") else path[0]
    return ".".join((block, *path[1:-1], _LEAF_NAMES[path[-1]]))


def layout(model: config.ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of each parameter of a model by its path."""
    D, F = model.embed_dim, model.ff_hidden_dim

    def dense(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (rows, columns), "bias": (columns,)}

    norm = {"scale": (D,), "bias": (D,)}
    block = {
        ("ln_1",): norm,
        ("attn", "c_attn"): dense(D, 3 * D),
        ("attn", "c_proj"): dense(D, D),
        ("ln_2",): norm,
        ("mlp", "c_fc"): dense(D, F),
        ("mlp", "c_proj"): dense(F, D),
    }
    modules: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {
        ("wte",): {"embedding": (model.vocab_size, D)},
        ("wpe",): {"embedding": (model.max_seq_len, D)},
        **{(f"h_{i}", *path): leaves for i in range(model.num_layers) for path, leaves in block.items()},
        ("ln_f",): norm,
    }
    return {(*path, leaf): shape for path, leaves in modules.items() for leaf, shape in leaves.items()}


def write(path: Path, params: Mapping[str, Any], model: config.ModelConfig, dtype: str = "float32") -> None:
    """Writes parameters in one atomic replacement.

    Args:
        path: Path of the file.
        params: Nested parameters of ``model``, arrays of any float type.
        model: Shape of the model.
        dtype: Type of the stored tensors, one of ``training_config.WEIGHTS_DTYPES``.
    """
    # safetensors writes the memory of an array in its own order, so transposed arrays have to be copied first.
    tensors = {
        tensor_name(key): np.ascontiguousarray(_leaf(params, key)).astype(dtype, order="C") for key in layout(model)
    }
    with files.replacing(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})


def read(path: Path, model: config.ModelConfig) -> dict[str, Any]:
    """Reads the parameters of ``model`` as float32, in memory that JAX uses on a CPU without copying it.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a complete safetensors file, or its tensors are not those of the model.
    """
    with open_file(path) as file:
        _check_size(path, model)
        check_names(path, set(file.keys()), {tensor_name(key) for key in layout(model)})
    return read_tensors({tensor_name(key): (path, tensor_name(key)) for key in layout(model)}, model)


def read_tensors(places: Mapping[str, tuple[Path, str]], model: config.ModelConfig) -> dict[str, Any]:
    """Reads parameters as ``read`` does, from any number of files.

    Args:
        places: File of each tensor, and its name there, by ``tensor_name``.
        model: Shape of the model.

    Raises:
        ValueError: A file is not a complete safetensors file, or a tensor has the wrong shape or type.
    """
    for key, shape in layout(model).items():
        path, name = places[tensor_name(key)]
        with open_file(path) as file:
            tensor = file.get_slice(name)
            if tuple(tensor.get_shape()) != shape:
                raise ValueError(f"{path}: {name} must have shape {shape}: got {tuple(tensor.get_shape())}")
            if tensor.get_dtype() not in TYPES:
                raise ValueError(f"{path}: {name} must be one of {', '.join(TYPES)}: got {tensor.get_dtype()}")
    params: dict[str, Any] = {}
    for key in layout(model):
        _store(params, key, read_tensor(*places[tensor_name(key)]))
    return params


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Opens a safetensors file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not complete; also if that is found out only within the block.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {files.shortened(str(error))}") from error


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads a tensor of at least one dimension as float32, in parts."""
    # The file is opened per tensor, so that its pages are released. With get_tensor and a file that stays open, loading
    # GPT-2 takes 4.0 times the memory of its weights; so it takes 1.0 times.
    with open_file(path) as file:
        tensor = file.get_slice(name)
        value = _aligned(tensor.get_shape())
        rows = max(1, _PART_BYTES // value[0].nbytes)
        for first in range(0, len(value), rows):
            last = min(first + rows, len(value))
            value[first:last] = tensor[first:last]
    return value


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """Returns an uninitialized float32 array, aligned for XLA."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)


def count(model: config.ModelConfig) -> int:
    """Returns the number of parameters of a model."""
    return sum(map(math.prod, layout(model).values()))


def _check_size(path: Path, model: config.ModelConfig) -> None:
    parameters, size = count(model), path.stat().st_size
    if size < 2 * parameters:
        raise ValueError(
            f"{path} has {size} bytes: the model in its config has {parameters} parameters, which need "
            f"{2 * parameters} or more. Restore the file, or its config"
        )


def check_names(path: Path, found: set[str], expected: set[str]) -> None:
    """Raises ValueError if the tensors of a file are not those of the model."""
    if missing := sorted(expected - found):
        raise ValueError(f"{path} lacks {len(missing)} tensors of the model in its config, the first is {missing[0]}")
    if extra := sorted(found - expected):
        raise ValueError(
            f"{path} has {len(extra)} tensors that its config does not know, the first is {files.shortened(extra[0])}"
        )


def _leaf(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        params = params[key]
    return params


def _store(params: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value
