"""GPT-2 as nanoGPT writes it, in plain PyTorch; nothing here imports JAX.

``python scripts/benchmarks/plain.py`` is what nanoGPT's ``sample.py`` is: 50 tokens from the run in the package.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax import config


def forward_of(model: config.ModelConfig, params: Any, of: Any) -> Callable[[Any], Any]:
    """Returns a function of ids ``[B, T]`` that gives what the head multiplies.

    Args:
        model: Its shape.
        params: Tensors by the names of Flax, kernels turned as ``functional.linear`` takes them.
        of: The module ``torch``.
    """
    functional, N = of.nn.functional, model.num_heads

    def norm(x: Any, p: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps=1e-5)

    def linear(x: Any, p: Any) -> Any:
        return functional.linear(x, p["kernel"], p["bias"])

    def forward(ids: Any) -> Any:
        B, T = ids.shape
        x = params["wte"]["embedding"][ids] + params["wpe"]["embedding"][:T]
        for layer in range(model.num_layers):
            p = params[f"h_{layer}"]
            q, k, v = linear(norm(x, p["ln_1"]), p["attn"]["c_attn"]).split(model.embed_dim, dim=2)
            q, k, v = (part.view(B, T, N, -1).transpose(1, 2) for part in (q, k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(B, T, -1), p["attn"]["c_proj"])
            hidden = functional.gelu(linear(norm(x, p["ln_2"]), p["mlp"]["c_fc"]), approximate="tanh")
            x = x + linear(hidden, p["mlp"]["c_proj"])
        return norm(x, params["ln_f"])

    return forward


def crop_and_recompute(
    model: config.ModelConfig, params: Any, ids: Any, number: int, of: Any, settings: config.SamplingConfig
) -> Any:
    """Returns ids ``[1, T]`` and ``number`` more, as nanoGPT's ``generate`` draws them.

    A forward pass of the last tokens for each, the head at the last of them, top-k, a draw.
    """
    forward, head = forward_of(model, params, of), params["wte"]["embedding"]
    with of.inference_mode():
        for _ in range(number):
            hidden = forward(ids[:, -model.max_seq_len :])[:, -1]
            logits = of.nn.functional.linear(hidden, head) / settings.temperature
            best, _ = of.topk(logits, settings.top_k)
            logits[logits < best[:, [-1]]] = -float("inf")
            drawn = of.multinomial(of.softmax(logits, dim=-1), num_samples=1)
            ids = of.cat((ids, drawn), dim=1)
    return ids


def main() -> None:
    """Imports torch, loads the run, prints 50 tokens."""
    import tokenizers

    torch: Any = importlib.import_module("torch")
    load_file = importlib.import_module("safetensors.torch").load_file

    run = Path(config.__file__).parent / "runs/shipped/shakespeare"
    about = json.loads((run / "latest_config.json").read_text())
    model = config.ModelConfig(**about["model"])
    params: dict[str, Any] = {}
    for name, tensor in load_file(run / about["checkpoint"]["latest"]).items():
        *path, leaf = name.replace("h.", "h_", 1).split(".") if name.startswith("h.") else name.split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        kind = "bias" if leaf == "bias" else {"w": "embedding", "l": "scale"}.get(path[-1][0], "kernel")
        node[kind] = tensor.float().T.contiguous() if kind == "kernel" else tensor.float()
    vocabulary = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    ids = torch.tensor([vocabulary.encode("To be, or not to be:").ids])
    sys.stdout.write(
        vocabulary.decode(crop_and_recompute(model, params, ids, 50, torch, config.SamplingConfig())[0].tolist()) + "\n"
    )


if __name__ == "__main__":
    main()
