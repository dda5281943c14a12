"""GPT-2 in plain PyTorch, following nanoGPT; must not import JAX.

``python scripts/benchmarks/plain.py`` corresponds to nanoGPT's ``sample.py``: it generates 50 tokens from the shipped
run.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax import config


def forward_of(model: config.ModelConfig, params: Any, torch: Any) -> Callable[[Any], Any]:
    """Returns a function from ids ``[B, T]`` to the final hidden states, the input of the output head.

    Args:
        model: Model shape.
        params: Tensors under their Flax names, with kernels transposed for ``functional.linear``.
        torch: The module ``torch``.
    """
    functional, N = torch.nn.functional, model.num_heads

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
    model: config.ModelConfig, params: Any, ids: Any, num_tokens: int, torch: Any, settings: config.SamplingConfig
) -> Any:
    """Returns ids ``[1, T]`` followed by ``num_tokens`` sampled ids, like nanoGPT's ``generate``.

    Each token takes a forward pass over the cropped window, logits of its last position, top-k and a draw.
    """
    forward, head = forward_of(model, params, torch), params["wte"]["embedding"]
    with torch.inference_mode():
        for _ in range(num_tokens):
            hidden = forward(ids[:, -model.max_seq_len :])[:, -1]
            logits = torch.nn.functional.linear(hidden, head) / settings.temperature
            best, _ = torch.topk(logits, settings.top_k)
            logits[logits < best[:, [-1]]] = -float("inf")
            drawn = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)
            ids = torch.cat((ids, drawn), dim=1)
    return ids


def main() -> None:
    """Loads the shipped run and prints 50 tokens."""
    import tokenizers

    torch: Any = importlib.import_module("torch")
    load_file = importlib.import_module("safetensors.torch").load_file

    run = Path(config.__file__).parent / "runs/shipped/shakespeare"
    latest = json.loads((run / "latest_config.json").read_text())
    model = config.ModelConfig(**latest["model"])
    params: dict[str, Any] = {}
    for name, tensor in load_file(run / latest["checkpoint"]["latest"]).items():
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
