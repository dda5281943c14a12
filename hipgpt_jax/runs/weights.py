"""A checkpoint's ``.bin``: a safetensors file, tensors named and shaped as Hugging Face's GPT-2."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from hipgpt_jax import config, files

_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PART_BYTES = 2**22
_ALIGNMENT = 64
_LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns the file's name for a parameter: ``("h_0", "ln_1", "scale")`` is ``h.0.ln_1.weight``."""
    return ".".join(
        (path[0].replace("_", ".") if path[0].startswith("h_") else path[0], *path[1:-1], _LEAF_NAMES[path[-1]])
    )


def layout(model: config.ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of every parameter of a model by its path."""
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
        path: The file.
        params: Nested parameters of ``model``, arrays of any float type.
        model: Their shape.
        dtype: One of ``training_config.WEIGHTS_DTYPES``.
    """
    # safetensors writes an array's memory as it lies, so one that lies transposed must be laid out anew.
    tensors = {
        tensor_name(key): np.ascontiguousarray(_leaf(params, key)).astype(dtype, order="C") for key in layout(model)
    }
    with files.replacing(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})


def read(path: Path, model: config.ModelConfig) -> dict[str, Any]:
    """Reads the parameters of ``model``, widened to float32, in memory that JAX takes over without a copy on a CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole safetensors file, or its tensors are not those of the model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    params: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            _check_size(path, model)
            _check_names(path, set(file.keys()), {tensor_name(key) for key in layout(model)})
            for key, shape in layout(model).items():
                name = tensor_name(key)
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape:
                    raise ValueError(f"{path}: {name} must have shape {shape}: got {tuple(found.get_shape())}")
                if found.get_dtype() not in _TYPES:
                    raise ValueError(f"{path}: {name} must be one of {', '.join(_TYPES)}: got {found.get_dtype()}")
        for key in layout(model):
            _store(params, key, _read_tensor(path, tensor_name(key)))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {files.shortened(str(error))}") from error
    return params


def _read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads a tensor in parts, and lets go of the file's pages before the next one.

    With ``get_tensor`` from a file that stays open GPT-2 takes 2.0 times its weights, then 2.0 times again
    as JAX copies them; so it takes 1.0 times.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        found = file.get_slice(name)
        value = _aligned(found.get_shape())
        rows = max(1, _PART_BYTES // value[0].nbytes)
        for first in range(0, len(value), rows):
            last = min(first + rows, len(value))
            value[first:last] = found[first:last]
    return value


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """Returns float32 memory that begins at a multiple of what XLA wants, or else copies."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)


def count(model: config.ModelConfig) -> int:
    """Returns the number of parameters of a model, without listing them."""
    V, P, D, F, L = (model.vocab_size, model.max_seq_len, model.embed_dim, model.ff_hidden_dim, model.num_layers)
    block = 2 * 2 * D + (D + 1) * 3 * D + (D + 1) * D + (D + 1) * F + (F + 1) * D
    return (V + P) * D + L * block + 2 * D


def _check_size(path: Path, model: config.ModelConfig) -> None:
    least = 2 * count(model)
    if (size := path.stat().st_size) < least:
        raise ValueError(
            f"{path} has {size} bytes: the model in its config has {count(model)} parameters, which need {least} or "
            f"more. Restore the file, or its config"
        )


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
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
