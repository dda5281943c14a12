"""Peer libraries loaded with our weights: plain PyTorch, Hugging Face and CTranslate2."""

import contextlib
import importlib
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import table
from hipgpt_jax import config
from hipgpt_jax.model import transformer
from hipgpt_jax.runs import weights


def torch() -> Any:
    """Returns the module ``torch``, set to use all cores, or None if it is not installed."""
    try:
        module: Any = importlib.import_module("torch")
    except ImportError:
        return None
    module.set_num_threads(table.CORES)
    return module


def plain_params(params: Any, torch_module: Any) -> Any:
    """Returns the parameters as PyTorch parameters, with kernels transposed for ``functional.linear``."""

    def parameter(path: Any, array: Any) -> Any:
        value = np.array(array)
        return torch_module.nn.Parameter(
            torch_module.from_numpy(np.ascontiguousarray(value.T) if path[-1].key == "kernel" else value)
        )

    return jax.tree_util.tree_map_with_path(parameter, params)


def sampling_arguments() -> dict[str, Any]:
    """Returns the default sampling settings as arguments of ``generate`` in transformers; all others are neutral."""
    settings = config.SamplingConfig()
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "repetition_penalty": settings.repetition_penalty,
    }


def hugging_face(model: config.ModelConfig, params: Any, directory: Path) -> Any:
    """Returns Hugging Face's GPT-2 with the weights in ``directory``, or None if it is not installed.

    Its logits must equal those of ``params``.
    """
    torch_module = torch()
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = {"n_embd": model.embed_dim, "n_layer": model.num_layers, "n_head": model.num_heads}
    sizes |= {"n_inner": model.ff_hidden_dim, "vocab_size": model.vocab_size, "n_positions": model.max_seq_len}
    transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None).save_pretrained(directory)
    peer = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype="float32")
    with torch_module.inference_mode():
        _require_same(peer(torch_module.tensor([_PROBE])).logits.numpy(), model, params)
    return peer


def ctranslate2(
    model: config.ModelConfig, directory: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[table.Request]:
    """Returns CTranslate2 requests in float32, with one thread and with all cores; none if it is not installed.

    Each runs in its own process. A single prompt is timed from its first token to its last, several from the start.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        return []
    # In the same process as PyTorch, CTranslate2's threads make Hugging Face three times slower.
    context = multiprocessing.get_context("spawn")
    return [_request_to(context, model, directory, prompts, num_tokens, n) for n in sorted({1, table.CORES})]


def _request_to(context: Any, *arguments: Any) -> table.Request:
    pipe, remote = context.Pipe()
    context.Process(target=_serve, args=(remote, *arguments), daemon=True).start()
    if error := pipe.recv():
        raise RuntimeError(error)

    def request() -> tuple[float, float]:
        pipe.send(None)
        return pipe.recv()

    return request


def _serve(
    pipe: Any,
    model: config.ModelConfig,
    directory: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    threads: int,
) -> None:
    """Answers each message with the token count and the duration of a request."""
    jax.config.update("jax_platforms", "cpu")
    try:
        peer = _ctranslate2(model, directory, threads)
    except (RuntimeError, ValueError, AssertionError) as error:
        pipe.send(f"CTranslate2: {error}")
        return
    pipe.send("")
    settings, texts = config.SamplingConfig(), [list(map(str, ids)) for ids in prompts]

    def generate() -> tuple[float, float]:
        times: list[float] = []
        began = time.perf_counter()
        peer.generate_batch(
            texts,
            include_prompt_in_result=False,
            max_length=num_tokens,
            min_length=num_tokens,
            sampling_topk=settings.top_k,
            sampling_topp=settings.top_p,
            sampling_temperature=settings.temperature,
            repetition_penalty=settings.repetition_penalty,
            callback=(lambda _: bool(times.append(time.perf_counter()))) if len(texts) == 1 else None,
        )
        if len(texts) == 1:
            return len(times) - 1, times[-1] - times[0]
        return len(texts) * num_tokens, time.perf_counter() - began

    with contextlib.suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(generate())


def _ctranslate2(model: config.ModelConfig, directory: Path, threads: int) -> Any:
    """Returns a CTranslate2 generator with the weights in ``directory``; the token of an id is its decimal digits."""
    library: Any = importlib.import_module("ctranslate2")
    params = weights.read(directory / "model.safetensors", model)
    specs = library.specs
    spec = specs.TransformerDecoderModelSpec.from_config(
        model.num_layers, model.num_heads, pre_norm=True, activation=specs.Activation.GELUTanh
    )

    def linear(target: Any, source: Any) -> None:
        target.weight, target.bias = np.ascontiguousarray(source["kernel"].T), source["bias"]

    def norm(target: Any, source: Any) -> None:
        target.gamma, target.beta = source["scale"], source["bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = params["wte"]["embedding"]
    decoder.position_encodings.encodings = params["wpe"]["embedding"]
    norm(decoder.layer_norm, params["ln_f"])
    for number, target in enumerate(decoder.layer):
        source = params[f"h_{number}"]
        norm(target.self_attention.layer_norm, source["ln_1"])
        linear(target.self_attention.linear[0], source["attn"]["c_attn"])
        linear(target.self_attention.linear[1], source["attn"]["c_proj"])
        norm(target.ffn.layer_norm, source["ln_2"])
        linear(target.ffn.linear_0, source["mlp"]["c_fc"])
        linear(target.ffn.linear_1, source["mlp"]["c_proj"])
    spec.register_vocabulary([str(number) for number in range(model.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as converted:
        spec.save(converted)
        generator = library.Generator(converted, compute_type="float32", intra_threads=threads)
    _require_same(np.array(generator.forward_batch([list(map(str, _PROBE))])), model, params)
    return generator


_PROBE = (1, 2, 3, 4)


def _require_same(logits: Any, model: config.ModelConfig, params: Any) -> None:
    expected = transformer.Transformer(model).bind({"params": params})(jnp.asarray([_PROBE]), dropout=0.0)
    np.testing.assert_allclose(logits, np.asarray(expected), atol=1e-3)
