"""The draw as docs/promise.md describes it, in NumPy alone: written from that page, not from the package."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_MASK = 0xFFFFFFFF
_SMALLEST_TEMPERATURE = 2.0**-126

Key = tuple[int, int]


def threefry2x32(key: Key, block: tuple[int, int]) -> tuple[int, int]:
    """Encrypts a block of two 32-bit words in 20 rounds."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x0, x1 = (block[0] + keys[0]) & _MASK, (block[1] + keys[1]) & _MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = (x1 << rotation | x1 >> 32 - rotation) & _MASK
            x1 ^= x0
        x0 = (x0 + keys[(group + 1) % 3]) & _MASK
        x1 = (x1 + keys[(group + 2) % 3] + group + 1) & _MASK
    return x0, x1


def fold_in(key: Key, word: int) -> Key:
    """Derives a key from a key and a 32-bit word."""
    return threefry2x32(key, (0, word))


def prompt_word(prompt_ids: Sequence[int]) -> int:
    """Hashes a prompt's ids to 32 bits."""
    digest = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in prompt_ids)).digest()
    return int.from_bytes(digest[:4], "little")


def uniform(seed: int, prompt_ids: Sequence[int], sample: int, index: int) -> np.float32:
    """Returns the uniform number of a token."""
    key = (0, seed)
    for word in (prompt_word(prompt_ids), sample, index):
        key = fold_in(key, word)
    return np.float32(key[0] >> 8) * np.float32(2**-24)


def choose(
    logits: np.ndarray,
    seen: Sequence[int],
    u: np.float32,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> int:
    """Chooses the next token from its logits ``[V]`` in float32."""
    T, p, r = np.float32(temperature), np.float32(top_p), np.float32(repetition_penalty)
    logits, V = logits.copy(), len(logits)
    for token in set(seen):
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    order = sorted(range(V), key=lambda token: (-logits[token], token))
    if T < _SMALLEST_TEMPERATURE:
        return order[0]
    ordered = logits[order]
    weights = np.exp((ordered - ordered[0]) / T)
    sums = np.cumsum(weights, dtype=np.float32)
    kept = V if top_k == 0 else min(top_k, V)
    if p < 1:
        kept = 1 + int(np.argmax(sums >= p * sums[kept - 1]))
    return order[int(np.argmax(sums > u * sums[kept - 1]))]


def window_start(prompt_tokens: int, length: int, window: int, stride: int) -> int:
    """Returns the index of the first token that the model sees of a text of ``length`` tokens."""
    start = max(0, prompt_tokens - window)
    for shorter in range(prompt_tokens, length + 1):
        if shorter - start > window:
            start += stride
    return start


@dataclasses.dataclass
class Model:
    """A run's weights, for a forward pass in float64."""

    weights: dict[str, np.ndarray]
    num_heads: int
    num_layers: int
    max_seq_len: int

    @classmethod
    def load(cls, directory: Path) -> "Model":
        """Reads the latest checkpoint of a run."""
        config = json.loads((directory / "latest_config.json").read_text())
        weights = safetensors_numpy.load_file(directory / config["checkpoint"]["latest"])
        model = config["model"]
        names = ("num_heads", "num_layers", "max_seq_len")
        return cls(
            {name: value.astype(np.float64) for name, value in weights.items()}, *(model[name] for name in names)
        )

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits ``[T, V]`` after each id, in float32."""
        T = len(ids)
        x = self.weights["wte.weight"][list(ids)] + self.weights["wpe.weight"][:T]
        for layer in range(self.num_layers):
            name = f"h.{layer}."
            x = x + self._attention(name + "attn.", self._norm(name + "ln_1", x))
            hidden = _gelu(self._linear(name + "mlp.c_fc", self._norm(name + "ln_2", x)))
            x = x + self._linear(name + "mlp.c_proj", hidden)
        return (self._norm("ln_f", x) @ self.weights["wte.weight"].T).astype(np.float32)

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        T, D = x.shape
        parts = np.split(self._linear(name + "c_attn", x), 3, axis=1)
        q, k, v = (part.reshape(T, self.num_heads, -1).swapaxes(0, 1) for part in parts)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(D // self.num_heads)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = shares / shares.sum(axis=-1, keepdims=True) @ v
        return self._linear(name + "c_proj", mixed.swapaxes(0, 1).reshape(T, D))

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centered = x - x.mean(axis=-1, keepdims=True)
        normed = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-5)
        return normed * self.weights[name + ".weight"] + self.weights[name + ".bias"]


def _gelu(x: np.ndarray) -> Any:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
