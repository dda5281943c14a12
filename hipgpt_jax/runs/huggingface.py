"""Names of Hugging Face GPT-2 folders, and their conversion to runs."""

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hipgpt_jax import config, files, json_files, version
from hipgpt_jax.runs import directory, lock, reset, weights
from hipgpt_jax.text import manifest, tokenizer

# Name in GPT2Config of each field of ``config.ModelConfig``.
SIZES = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "embed_dim": "n_embd",
    "num_heads": "n_head",
    "ff_hidden_dim": "n_inner",
    "num_layers": "n_layer",
}

# Fields of GPT2Config that change the logits, with GPT-2's values, which are also the defaults of absent fields.
ARITHMETIC: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_INDEX = f"{WEIGHTS}.index.json"
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

_INTEGER = {"type": "integer"}
_CONFIG_SCHEMA = json_files.Schema(
    "GPT-2 config",
    {
        "type": "object",
        "required": [name for name in SIZES.values() if name != "n_inner"],
        "properties": {**dict.fromkeys(SIZES.values(), _INTEGER), "n_inner": {"type": ["integer", "null"]}},
    },
)
_END_SCHEMA = json_files.Schema(
    "generation config",
    {"properties": {"eos_token_id": {"type": ["integer", "array", "null"], "items": _INTEGER, "minItems": 1}}},
)
_INDEX_SCHEMA = json_files.Schema(
    "index of weights",
    {
        "type": "object",
        "required": ["weight_map"],
        "properties": {"weight_map": {"type": "object", "additionalProperties": {"type": "string"}}},
    },
)
_TOKEN: dict[str, Any] = {"required": ["content"], "properties": {"content": {"type": "string", "minLength": 1}}}
_TOKENIZER_SCHEMA = json_files.Schema(
    "tokenizer config",
    {
        "type": "object",
        "properties": {
            "eos_token": {"type": ["string", "object", "null"], **_TOKEN},
            "added_tokens_decoder": {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]{1,8}$"},
                "additionalProperties": {"type": "object", **_TOKEN},
            },
        },
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face GPT-2 folder that this package can compute with.

    Attributes:
        folder: The folder.
        model: Shape of the model.
        params: Its parameters, float32.
        vocabulary: The tokenizer.
        end_id: Id of the end token; None if there is none.
        files: Files that were read.
        notes: Differences between the folder and the run made from it, for the user.
    """

    folder: Path
    model: config.ModelConfig
    params: dict[str, Any]
    vocabulary: tokenizer.Tokenizer
    end_id: int | None
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def read(folder: Path) -> Source:
    """Reads a Hugging Face folder.

    Raises:
        FileNotFoundError: The folder or a file does not exist.
        ValueError: A file is invalid, or the model is not a GPT-2 as this package computes it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. A model of the Hugging Face Hub must be downloaded first: "
            f"hf download {shlex.quote(str(folder))} --local-dir FOLDER"
        )
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give a folder that transformers saved a GPT-2 in")
    value = json_files.read(folder / CONFIG)
    model = _read_model(folder / CONFIG, value)
    weight_files = _find_weights(folder)
    places, notes = _find_tensors(weight_files)
    head = places.pop("lm_head.weight", None)
    weights.check_names(folder, set(places), {weights.tensor_name(key) for key in weights.layout(model)})
    params = weights.read_tensors(places, model)
    if head is not None and not _is_equal(*head, params["wte"]["embedding"]):
        raise ValueError(f"{head[0]}: lm_head.weight must equal wte.weight, as in GPT-2, whose output layer is tied")
    vocabulary, end_token, tokenizer_files = _read_tokenizer(folder)
    if vocabulary.vocab_size != model.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {vocabulary.vocab_size} tokens and the model {model.vocab_size}: they must "
            f"be equal. Use model.resize_token_embeddings({vocabulary.vocab_size}) and save_pretrained of transformers"
        )
    generation = folder / GENERATION
    ends = [(folder / CONFIG, value), *([(generation, json_files.read(generation))] if generation.is_file() else [])]
    return Source(
        folder=folder,
        model=model,
        params=params,
        vocabulary=vocabulary,
        end_id=_find_end(ends[::-1], vocabulary, end_token, notes),
        files=(*(path for path, _ in ends), *weight_files, *tokenizer_files),
        notes=tuple(notes),
    )


def _read_model(path: Path, value: dict[str, Any]) -> config.ModelConfig:
    for name, expected in ARITHMETIC.items():
        if (given := value.get(name, expected)) != expected:
            raise ValueError(
                f"{path}: {name} must be {expected!r}, GPT-2's, because this package computes nothing else: "
                f"got {config.shortened(given)}"
            )
    _CONFIG_SCHEMA.check(value, str(path))
    sizes: dict[str, Any] = {ours: value.get(theirs) for ours, theirs in SIZES.items()}
    if sizes["ff_hidden_dim"] is None:
        sizes["ff_hidden_dim"] = 4 * value["n_embd"]
    try:
        return config.ModelConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find_weights(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / _INDEX).is_file():
        names = set(_INDEX_SCHEMA.read(folder / _INDEX)["weight_map"].values())
        return [directory.file_beside(folder / _INDEX, name) for name in sorted(names)]
    if any(folder.glob("pytorch_model*.bin")):
        code = f"from transformers import GPT2LMHeadModel as M; f = {str(folder)!r}; "
        code += "M.from_pretrained(f).save_pretrained(f)"
        raise ValueError(
            f"{folder} has its weights in pytorch_model.bin, a pickle, which could run any code and is not read. "
            f"Convert it with transformers: python -c {shlex.quote(code)}"
        )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}, nor {_INDEX}")


def _find_tensors(paths: Sequence[Path]) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """Returns the file of each tensor and its name there by its name without prefix, except for masks; and notes."""
    places: dict[str, tuple[Path, str]] = {}
    types: set[str] = set()
    for path in paths:
        with weights.open_file(path) as file:
            for name in sorted(file.keys()):
                plain = name.removeprefix("transformer.")
                if _MASK.fullmatch(plain):
                    continue
                if plain in places:
                    raise ValueError(f"{path} has a second tensor {files.shortened(plain)}")
                places[plain] = path, name
                types.add(file.get_slice(name).get_dtype())
    return places, [f"weights of type {kind} are converted to float32" for kind in sorted(types - {"F32"})]


def _is_equal(path: Path, name: str, value_VD: np.ndarray) -> bool:
    with weights.open_file(path) as file:
        if tuple(file.get_slice(name).get_shape()) != value_VD.shape:
            return False
    return np.array_equal(weights.read_tensor(path, name).view(np.uint32), value_VD.view(np.uint32))


def _read_tokenizer(folder: Path) -> tuple[tokenizer.Tokenizer, str | None, list[Path]]:
    """Returns the tokenizer, its end token, and the files of both."""
    path, parts = folder / TOKENIZER, [folder / "vocab.json", folder / "merges.txt"]
    settings_path = folder / TOKENIZER_CONFIG
    settings = _TOKENIZER_SCHEMA.read(settings_path) if settings_path.is_file() else {}
    if settings.get("add_prefix_space"):
        raise ValueError(f"{settings_path}: add_prefix_space must be false: it adds a space in front of text")
    end = settings.get("eos_token")
    end = end["content"] if isinstance(end, dict) else end
    used = [settings_path] if settings else []
    if path.is_file():
        value = json_files.read(path)
        used.append(path)
    elif all(part.is_file() for part in parts):
        path = Path(f"{parts[0]} with {parts[1].name}")  # for messages
        value = _join(*parts)
        used += parts
        if end is None and tokenizer.END_TOKENS[0] in value["model"]["vocab"]:
            end = tokenizer.END_TOKENS[0]
    else:
        raise FileNotFoundError(f"{folder} has no {TOKENIZER}, nor both of vocab.json and merges.txt")
    listed = sorted((int(number), token) for number, token in settings.get("added_tokens_decoder", {}).items())
    special = [token["content"] for _, token in listed if token.get("special") is True]
    vocabulary = tokenizer.Tokenizer.from_value(value, path, special if end is None else [*special, end])
    for token_id, token in listed:
        if token_id >= vocabulary.vocab_size or vocabulary.show(token_id) != token["content"]:
            raise ValueError(
                f"{settings_path}: added token {config.shortened(token['content'])} with id {token_id} is not in {path}"
            )
    return vocabulary, end, used


def _join(vocab: Path, merges: Path) -> dict[str, Any]:
    """Returns the ``tokenizer.json`` of GPT-2's older pair of files."""
    try:
        first, *lines = merges.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges} is not UTF-8 text: {error}") from error
    lines = lines if first.startswith("#version") else [first, *lines]
    return {
        "model": {"vocab": json_files.read(vocab), "merges": [line.rstrip("\r") for line in lines if line.strip()]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    }


def _find_end(
    sources: Sequence[tuple[Path, dict[str, Any]]],
    vocabulary: tokenizer.Tokenizer,
    end_token: str | None,
    notes: list[str],
) -> int | None:
    """Returns the id of the end token: that of the first source with one in the vocabulary, else the tokenizer's."""
    for path, value in sources:
        _END_SCHEMA.check(value, str(path))
    for path, value in sources:
        given = value.get("eos_token_id", -1)
        if isinstance(given, list):
            given, *more = given
            notes += [f"{path.name} has several end tokens: the run has the first, {given}"] if more else []
        if given is None or 0 <= given < vocabulary.vocab_size:
            return given
        if given >= 0:
            notes.append(f"{path.name}: the end token {given} is not in the vocabulary of {vocabulary.vocab_size}")
    return vocabulary.special_tokens.get(end_token or "")


def write_run(run: str, source: Source) -> Path:
    """Makes a run of a folder, and returns its directory; a kill at any moment leaves a whole run or none.

    Raises:
        ValueError: The run exists, or its name is not valid.
        OSError: It cannot be written.
    """
    target = directory.new(run, 0)
    with lock.Lock(target):
        reset.recover(target)
        if os.path.lexists(target):
            raise ValueError(f"{target} exists already: give another --run-name, or delete it first")
        new = directory.beside(target, "new")
        try:
            if problem := reset.remove(new):
                raise OSError(f"{new}, where the run is prepared, could not be emptied: {problem}")
            new.mkdir()
            _fill(new, target.name, source)
            new.rename(target)
        except BaseException:
            reset.remove(new)
            raise
    return target


def _fill(new: Path, run: str, source: Source) -> None:
    path, config_path = new / directory.weights_name(run, 0), new / directory.config_name(run, 0)
    files.write_text(new / manifest.TOKENIZER_NAME, source.vocabulary.to_json())
    weights.write(path, source.params, source.model)
    origin = [{"name": one.name, "bytes": one.stat().st_size, "sha256": files.sha256(one)} for one in source.files]
    value = {
        "model": dataclasses.asdict(source.model),
        "tokenizer": {"path": manifest.TOKENIZER_NAME, "sha256": files.sha256(new / manifest.TOKENIZER_NAME)},
        "data": {"eos_id": source.end_id},
        "source": {"format": "huggingface", "folder": source.folder.resolve().name, "files": origin},
        "checkpoint": {"latest": path.name, "step": 0, "dtype": "float32", "sha256": files.sha256(path)},
        "version": {"hipgpt_jax": version.__version__},
    }
    json_files.write(config_path, value)
    files.link(new / directory.LATEST_CHECKPOINT, path.name)
    files.link(new / directory.LATEST_CONFIG, config_path.name)
