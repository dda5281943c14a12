"""The peers, with our weights: plain PyTorch, Hugging Face and CTranslate2; None where one is not installed."""

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
    """Returns PyTorch, set to all cores."""
    try:
        found: Any = importlib.import_module("torch")
    except ImportError:
        return None
    found.set_num_threads(table.CORES)
    return found


def plain_params(params: Any, of: Any) -> Any:
    """Returns parameters as those of PyTorch, its kernels turned as ``functional.linear`` takes them."""

    def parameter(path: Any, array: Any) -> Any:
        value = np.array(array)
        return of.nn.Parameter(of.from_numpy(np.ascontiguousarray(value.T) if path[-1].key == "kernel" else value))

    return jax.tree_util.tree_map_with_path(parameter, params)


def hugging_face(model: config.ModelConfig, params: Any, directory: Path) -> Any:
    """Returns Hugging Face's GPT-2 with the weights of ``directory / "model.safetensors"``, which are ``params``."""
    of = torch()
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
    with of.inference_mode():
        _require_same(peer(of.tensor([_PROBE])).logits.numpy(), model, params)
    return peer


def ctranslate2(
    model: config.ModelConfig, directory: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[table.Request]:
    """Returns ways to generate from prompts with CTranslate2 in float32, of one thread and of all; none if absent.

    Each is in a process of its own: loaded beside PyTorch its threads make Hugging Face three times slower.
    A single prompt is timed from its first token to its last, several from the start.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        return []
    context = multiprocessing.get_context("spawn")
    return [_request_to(context, model, directory, prompts, num_tokens, n) for n in sorted({1, table.CORES})]


def _request_to(context: Any, *arguments: Any) -> table.Request:
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there, *arguments), daemon=True).start()
    if error := here.recv():
        raise RuntimeError(error)

    def request() -> tuple[float, float]:
        here.send(None)
        return here.recv()

    return request


def _serve(
    pipe: Any,
    model: config.ModelConfig,
    directory: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    threads: int,
) -> None:
    """Answers each message with the tokens of a request and their seconds."""
    jax.config.update("jax_platforms", "cpu")
    try:
        peer = _ctranslate2(model, directory, threads)
    except (RuntimeError, ValueError, AssertionError) as error:
        pipe.send(f"CTranslate2: {error}")
        return
    pipe.send("")
    settings, texts = config.SamplingConfig(), [list(map(str, ids)) for ids in prompts]

    def make() -> tuple[float, float]:
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
            pipe.send(make())


def _ctranslate2(model: config.ModelConfig, directory: Path, threads: int) -> Any:
    """Returns a generator of the weights in ``directory``; its token of an id is the id's digits."""
    library: Any = importlib.import_module("ctranslate2")
    params = weights.read(directory / "model.safetensors", model)
    specs = library.specs
    spec = specs.TransformerDecoderModelSpec.from_config(
        model.num_layers, model.num_heads, pre_norm=True, activation=specs.Activation.GELUTanh
    )

    def linear(to: Any, given: Any) -> None:
        to.weight, to.bias = np.ascontiguousarray(given["kernel"].T), given["bias"]

    def norm(to: Any, given: Any) -> None:
        to.gamma, to.beta = given["scale"], given["bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = params["wte"]["embedding"]
    decoder.position_encodings.encodings = params["wpe"]["embedding"]
    norm(decoder.layer_norm, params["ln_f"])
    for number, to in enumerate(decoder.layer):
        given = params[f"h_{number}"]
        norm(to.self_attention.layer_norm, given["ln_1"])
        linear(to.self_attention.linear[0], given["attn"]["c_attn"])
        linear(to.self_attention.linear[1], given["attn"]["c_proj"])
        norm(to.ffn.layer_norm, given["ln_2"])
        linear(to.ffn.linear_0, given["mlp"]["c_fc"])
        linear(to.ffn.linear_1, given["mlp"]["c_proj"])
    spec.register_vocabulary([str(number) for number in range(model.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as converted:
        spec.save(converted)
        found = library.Generator(converted, compute_type="float32", intra_threads=threads)
    _require_same(np.array(found.forward_batch([list(map(str, _PROBE))])), model, params)
    return found


_PROBE = (1, 2, 3, 4)


def _require_same(logits: Any, model: config.ModelConfig, params: Any) -> None:
    expected = transformer.Transformer(model).bind({"params": params})(jnp.asarray([_PROBE]), dropout=0.0)
    np.testing.assert_allclose(logits, np.asarray(expected), atol=1e-3)
