"""Redraws the tokens of record files: a second implementation of docs/promise.md, written from that page.

Usage: python scripts/verify.py RUN_DIRECTORY RECORDS.jsonl [RECORDS.jsonl ...]. It needs NumPy and safetensors, neither
JAX nor hipgpt_jax. Logits are computed in float64 from the recorded ids, so a token that differs does not change the
next. Prints each token that differs with the lead and the cut computed here, and a line per file. Exit code: 0 if all
are equal or within rounding, 1 if not, 2 if a file cannot be verified.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

F = np.float32
LARGEST = float(np.finfo(F).max)
ROUNDING = {"float32": 2e-4, "bfloat16": 0.3}  # how far two computations move logits apart at most


def threefry2x32(key: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Encrypts blocks of two words in 20 rounds; words are uint32 arrays ``[2, n]``."""
    k = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = block[0] + k[0], block[1] + k[1]
    for group in range(5):
        for r in (17, 29, 16, 24) if group % 2 else (13, 15, 26, 6):
            x0 = x0 + x1
            x1 = x0 ^ (x1 << np.uint32(r) | x1 >> np.uint32(32 - r))
        x0, x1 = x0 + k[(group + 1) % 3], x1 + k[(group + 2) % 3] + np.uint32(group + 1)
    return np.stack([x0, x1])


def fold_in(key: np.ndarray, words: Any) -> np.ndarray:
    """Derives keys ``[2, n]`` from a key ``[2, 1]`` and ``n`` words."""
    words = np.array(words, np.uint32).reshape(-1)
    return threefry2x32(key, np.stack([np.zeros_like(words), words]))


def sample_key(seed: int, prompt_ids: Sequence[int], sample: int) -> np.ndarray:
    """Returns the key ``[2, 1]`` of a sample."""
    digest = hashlib.sha256(np.array(prompt_ids, "<u4").tobytes()).digest()
    words = (*np.frombuffer(digest[:8], "<u4"), sample)
    return functools.reduce(fold_in, words, np.array([[0], [seed]], np.uint32))


def noise(key: np.ndarray, index: int, ids: Any) -> np.ndarray:
    """Returns the noise of candidates for the token ``index`` of a sample."""
    word = fold_in(fold_in(key, index), ids)[0]
    return -np.log1p(-np.minimum((word.astype(F) + F(0.5)) * F(2**-32), F(1 - 2**-24)))


def adjust(logits: np.ndarray, prompt_ids: list[int], ids: list[int], context: list[int], own: Any) -> np.ndarray:
    """Applies bias, bans and penalties, where ``own`` has the settings: steps 1 to 4 of the page."""
    V = len(logits)
    bias = np.full(V, -np.inf if own["allow"] else 0, F)
    bias[own["allow"]] = 0
    for token, value in own["logit_bias"]:
        bias[token] += F(value)
    bias[own["ban"]] = -np.inf
    logits = logits.astype(F) + bias
    if own["eos_id"] >= 0 and len(ids) < own["min_tokens"]:
        logits[own["eos_id"]] = -np.inf
    n, length = own["no_repeat_ngram"], len(context)
    if n > 0:
        places = [p for p in range(n - 1, length) if context[p - n + 1 : p] == context[length - n + 1 :]]
        banned = logits.copy()
        banned[[context[p] for p in places]] = -np.inf
        logits = logits if banned.max() == -np.inf else banned
    counted = prompt_ids + ids if own["penalty_scope"] == "all" else ids
    counts, r = np.bincount(np.array(counted, int), minlength=V), F(own["repetition_penalty"])
    penalized = np.where(logits > 0, logits / r, logits * r) - F(own["frequency_penalty"]) * counts.astype(F)
    logits = np.where(counts > 0, penalized - F(own["presence_penalty"]), logits)
    return np.where(logits == 0, F(0), logits)


@np.errstate(all="ignore")
def draw(logits: np.ndarray, noise: np.ndarray, own: Any) -> SimpleNamespace:
    """Draws a token from the logits that ``adjust`` returns: steps 5 to 10 of the page, and its statistics."""
    V, T, top_p, min_p = len(logits), F(min(own["temperature"], 2.0**126)), F(own["top_p"]), F(own["min_p"])
    is_greedy, T = (True, F(1)) if T < 2.0**-126 else (False, T)
    order = np.lexsort((np.arange(V), -logits))
    ordered = logits[order]
    scaled = (ordered - ordered[0]) / T
    w = np.exp(scaled)
    S = np.cumsum(w, dtype=F)
    k = m = 1 if is_greedy else min(own["top_k"] or V, V)
    m = min(m, 1 + int(np.argmax(top_p * S[k - 1] <= S))) if top_p < 1 else m
    m = min(m, int((w >= min_p).sum())) if min_p > 0 else m
    score = ordered if is_greedy else scaled - np.log(noise[order])
    j = 0 if is_greedy else int(min(np.flatnonzero(score[:m] == score[:m].max()), key=lambda j: order[j]))
    distances = np.full(V, LARGEST)  # that logits must move for another kept id to win
    rivals = slice(None) if is_greedy else slice(m)
    distances[order[rivals]] = np.minimum((score[j] - score[rivals]) * T, LARGEST)
    P, level = np.minimum(S / S[k - 1], F(1 - 2.0**-24)), np.log(top_p) - np.log1p(-top_p)
    before = P[j:m] - (P[j] - (P[j - 1] if j else 0))
    by_top_p = np.maximum(ordered[j] - ordered[j:m], (level - np.log(before) + np.log1p(-before)) * T)
    by_min_p = (scaled[j] - np.log(min_p)) * T + (0 if j else ordered[0] - ordered[1])
    leaves, enters = [LARGEST, by_top_p.min(), by_min_p], [LARGEST]
    if m < V and ordered[m] > -np.inf:  # columns count from 0: m is the first candidate that was cut
        step, odds = ordered[m - 1] - ordered[m], np.log(P[m - 1]) - np.log1p(-P[m - 1])
        leaves.append(ordered[j] - ordered[m] if k < V or top_p < 1 else LARGEST)
        enters = [step if m == k else 0, min(step, (odds - level) * T), (np.log(min_p) - scaled[m]) * T]
    cut = LARGEST if is_greedy else np.clip(min(*leaves, max(enters)), 0, LARGEST)
    return SimpleNamespace(
        token=int(order[j]),
        sampled_logprob=min(float(scaled[j] - np.log(S[m - 1])), 0.0),
        kept=min(m, int((ordered > -np.inf).sum())),
        kept_mass=float(S[m - 1] / S[-1]),
        lead=float(np.delete(distances, order[j]).min(initial=LARGEST)),
        cut=float(cut),
        distances=distances,
    )


@functools.cache
def load(directory: Path, sha256: str) -> tuple[int, Callable[[tuple[int, ...]], np.ndarray]]:
    """Returns the vocabulary's size and the forward pass of the weights in a run's directory that have a digest."""
    configs = [json.loads(path.read_text()) for path in sorted(directory.glob("*_config.json"))]
    paths = {one["checkpoint"]["sha256"]: directory / one["checkpoint"]["latest"] for one in configs}
    if sha256 not in paths or hashlib.sha256(paths[sha256].read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{directory} does not have the weights with the SHA-256 {sha256}")
    weights = {name: value.astype(float) for name, value in safetensors.load_file(paths[sha256]).items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[name + ".weight"] + weights[name + ".bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        normed = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return normed * weights[name + ".weight"] + weights[name + ".bias"]

    @functools.lru_cache(maxsize=1)
    def logits(ids: tuple[int, ...]) -> np.ndarray:
        T, num_heads = len(ids), configs[0]["model"]["num_heads"]
        x = weights["wte.weight"][list(ids)] + weights["wpe.weight"][:T]
        for name in (f"h.{layer}." for layer in range(configs[0]["model"]["num_layers"])):
            qkv = np.split(linear(name + "attn.c_attn", norm(name + "ln_1", x)), 3, axis=1)
            q, k, v = (part.reshape(T, num_heads, -1).swapaxes(0, 1) for part in qkv)
            scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2]), -np.inf)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = (shares / shares.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1).reshape(T, -1)
            x = x + linear(name + "attn.c_proj", mixed)
            u = linear(name + "mlp.c_fc", norm(name + "ln_2", x))
            gelu = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            x = x + linear(name + "mlp.c_proj", gelu)
        return (norm("ln_f", x) @ weights["wte.weight"].T).astype(F)

    return len(weights["wte.weight"]), logits


def redraw(directory: Path, record: dict[str, Any]) -> list[SimpleNamespace]:
    """Draws every token of a record again, each after the recorded ids before it."""
    V, forward = load(directory, record["run"]["weights_sha256"])
    own, prompt, ids = record["settings"], record["prompt_ids"], record["ids"]
    if record["contract"] != 2 or own["rule"] is not None or not all(0 <= token < V for token in prompt + ids):
        raise ValueError(f"the record must be of contract 2, have no rule of its own, and ids below {V}")
    text, W, key = prompt + ids, own["window"], sample_key(record["seed"], prompt, record["sample"])
    start, draws = max(0, len(prompt) - W), []
    for n in range(len(prompt), len(text)):
        start += own["window_stride"] if n - start > W else 0
        logits, t = forward(tuple(text[start : start + W]))[n - start - 1], n - len(prompt)
        draws.append(draw(adjust(logits, prompt, ids[:t], text[start:n], own), noise(key, t, np.arange(V)), own))
    return draws


def verify(directory: Path, path: Path) -> int:
    """Prints the tokens of a file that differ, and a summary; returns how many rounding does not explain."""
    tokens = differing = unexplained = 0
    for number, line in enumerate(lines := path.read_bytes().split(b"\n"), 1):  # texts may have U+2028
        try:
            record = json.loads(line)
            draws, rounding = redraw(directory, record), ROUNDING[record["numerics"]["dtype"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if 1 < number == len(lines) and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                break  # empty, or cut short by a kill
            raise ValueError(f"{path} line {number}: {type(error).__name__}: {error}") from error
        tokens += len(draws)
        for t, (token, new) in enumerate(zip(record["ids"], draws, strict=True)):
            if token != new.token:
                differing += 1
                unexplained += min(new.distances[token], new.cut) >= rounding
                where = f"{path} line {number} token {t}"
                print(f"{where}: {token} recorded, {new.token} drawn, lead {new.lead:.2g}, cut {new.cut:.2g}")
    verdict = f"{unexplained} not explained by rounding" if unexplained else "verified"
    print(f"{path}: {tokens} tokens, {tokens - differing} equal, {differing} differ: {verdict}")
    return unexplained


if __name__ == "__main__":
    try:
        if len(sys.argv) < 3:
            raise ValueError("give the directory of a run, then record files")
        sys.exit(int(sum(verify(Path(sys.argv[1]), Path(file)) for file in sys.argv[2:]) > 0))
    except (OSError, ValueError) as error:
        print(f"verify: error: {error}", file=sys.stderr)
        sys.exit(2)
