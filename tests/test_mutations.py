"""Readers of files, given 600 mutations of a good one each: a valid value, or an error of one line, and soon."""

import copy
import dataclasses
import gzip
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import zstandard

from hipgpt_jax import config, json_files
from hipgpt_jax.records import planning
from hipgpt_jax.runs import directory, weights
from hipgpt_jax.text import corpus, dataset, documents, preparation, prompts, tokenizer

NUMBER = 600
TEXT = "To be, or not to be: that is the question. — naïve 🙂\n" * 9
PROBE = "".join(map(chr, range(0x600))) + TEXT
MODEL = config.ModelConfig(vocab_size=5, max_seq_len=3, embed_dim=4, num_heads=2, ff_hidden_dim=6, num_layers=1)
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.0, 1.5, 2**31, 2**63, 10**25, "", "x", "\x1b[2J\n", "\ud800", "BPE", [], {}, [0]),
    *([1.0], {"a": 1}, [[]], {"type": "ByteLevel"}, {"type": "Split", "pattern": {"Regex": "("}}, "a" * 10_000),
]
TEXTS = [
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"1" * 5000,
    b"[" * 2000,
    b'{"a":1,"a":2}',
    b'"\\ud800"',
    b"\xff",
    b"\0",
    b"\n",
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each container and key of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def mutated_json(draw: random.Random, value: Any) -> bytes:
    """Returns a JSON text with parts replaced, removed, added or exchanged, or with damaged bytes."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        if not (found := list(places(value))):
            break
        holder, key = draw.choice(found)
        action = draw.random()
        if action < 0.6:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif action < 0.75:
            del holder[key]
        elif action < 0.85 and isinstance(holder, dict):
            holder[draw.choice(["more", "", "\n"])] = holder[key]
        else:
            other, place = draw.choice(found)
            holder[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
    content = json.dumps(value).encode()
    return mutated_bytes(draw, content) if draw.random() < 0.4 else content


def mutated_bytes(draw: random.Random, content: bytes, near: int | None = None) -> bytes:
    """Returns bytes with some flipped, cut out, repeated or put in, most of them before ``near``."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        limit = len(content) if near is None or draw.random() < 0.2 else min(near, len(content))
        at, size, action = draw.randrange(limit + 1), draw.randrange(1, 40), draw.random()
        if action < 0.5 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif action < 0.65:
            content = content[:at] + content[at + size :]
        elif action < 0.75:
            content = content[: at + size] + content[at:]
        elif action < 0.95:
            content = content[:at] + draw.choice([*TEXTS, draw.randbytes(size)]) + content[at:]
        else:
            content = content[:at]
    return content


def read_all(
    path: Path, mutate: Callable[[random.Random], bytes], read: Callable[[], Any], seed: int = 0
) -> tuple[int, int]:
    """Reads ``NUMBER`` mutations of a file; returns how many were accepted and how many refused."""
    draw, accepted = random.Random(seed), 0
    for number in range(NUMBER):
        path.write_bytes(mutate(draw))
        began = time.perf_counter()
        try:
            read()
            accepted += 1
        except (ValueError, OSError) as error:
            text = str(error)
            assert text, f"mutation {number}"
            assert "\n" not in text, f"mutation {number}: {text}"
            assert len(text) < 1500, f"mutation {number}: {text[:300]}"
        assert time.perf_counter() - began < 2, f"mutation {number}"
    return accepted, NUMBER - accepted


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is written past Python, as a panic of a library in Rust is."""
    yield
    assert capfd.readouterr().err == ""


def test_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    good = json.loads(tokenizer.Tokenizer.train([TEXT], 280, has_end=True).to_json())
    tokens = [{"content": "be", "special": False}, {"content": "<mask>", "special": True}]
    flags = {"id": 280, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    good["added_tokens"] += [flags | token for token in tokens]
    level = good["pre_tokenizer"]
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    good["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {"type": "Digits", "individual_digits": True}, level],
    }

    def mutate(draw: random.Random) -> bytes:
        rest = {name: part for name, part in good.items() if name != "model"}
        model = {name: part for name, part in good["model"].items() if name not in ("vocab", "merges")}
        settings: dict[str, Any] = copy.deepcopy(rest | {"model": model})
        if draw.random() < 0.3:  # the two large parts get few of the mutations
            return mutated_json(draw, good)
        changed = json.loads(mutated_json_value(draw, settings))
        if isinstance(changed.get("model"), dict):
            changed["model"] |= {name: good["model"][name] for name in ("vocab", "merges")}
        return json.dumps(changed).encode()

    def read() -> None:
        vocabulary = tokenizer.Tokenizer.load(path)
        assert vocabulary.decode(ids := vocabulary.encode(PROBE)) == PROBE
        assert vocabulary.encode(PROBE) == ids
        assert max(ids) < vocabulary.vocab_size

    accepted, refused = read_all(path, mutate, read)
    assert min(accepted, refused) > 50


def mutated_json_value(draw: random.Random, value: Any) -> bytes:
    """Returns ``mutated_json`` that is JSON still."""
    while True:
        content = mutated_json(draw, value)
        try:
            if isinstance(json.loads(content), dict):
                return content
        except (ValueError, RecursionError):
            continue


def prepared(directory: Path) -> None:
    (directory / "text.txt").write_text(TEXT)
    preparation.prepare(directory, directory / "text.txt", 280)


def test_manifests(tmp_path: Path) -> None:
    prepared(tmp_path)
    good = json.loads((tmp_path / "data.json").read_text())

    def read() -> None:
        found = dataset.Dataset(tmp_path)
        assert (len(found.train), len(found.validation)) == (
            found.manifest.train_tokens,
            found.manifest.validation_tokens,
        )
        assert max(map(max, (found.train, found.validation))) < found.manifest.vocab_size
        assert found.manifest.name
        json.dumps(dataclasses.asdict(found.manifest), allow_nan=False)

    accepted, refused = read_all(tmp_path / "data.json", lambda draw: mutated_json(draw, good), read)
    assert accepted > 5
    assert refused > 400


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = {"prompt": "To be", "id": "x", "seed": 7, "num_samples": 3, "stop": ["."], "temp": 0.5, "top_k": 9}

    def mutate(draw: random.Random) -> bytes:
        return json.dumps({**good, "id": "y"}).encode() + b"\n" + mutated_json(draw, good) + b"\n"

    def read() -> None:
        found = list(prompts.PromptFile(path))
        names = planning.NameIndex()
        for prompt in found:
            names.add(prompt)
        names.check_unique(found)
        assert all(isinstance(prompt.text, str) for prompt in found)

    accepted, refused = read_all(path, mutate, read)
    assert min(accepted, refused) > 50


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_documents(tmp_path: Path, name: str) -> None:
    lines = b"".join(json.dumps({"text": TEXT[:60], "id": 1, "more": [{"a": None}]}).encode() + b"\n" for _ in range(4))
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix)

    def mutate(draw: random.Random) -> bytes:
        if packed is None:
            return lines + mutated_json(draw, json.loads(lines.splitlines()[0])) + b"\n" + lines
        if draw.random() < 0.3:
            return packed(mutated_bytes(draw, lines))
        return mutated_bytes(draw, packed(lines), near=20)

    def read() -> None:
        (file,) = documents.find(tmp_path / name)
        sizes = [len(found.stream.read().decode(errors="replace")) for found in file.documents("text")]
        if any(sizes):
            assert corpus.Corpus(tmp_path / name).documents == sum(size > 0 for size in sizes)

    accepted, refused = read_all(tmp_path / name, mutate, read)
    assert min(accepted, refused) > 50


def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "run.bin"
    weights.write(path, fakes.random_params(MODEL), MODEL)
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")

    def mutate(draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return mutated_bytes(draw, good, near=end)
        header = mutated_json(draw, json.loads(good[8:end]))
        return len(header).to_bytes(8, "little") + header + good[end:]

    def read() -> None:
        params = weights.read(path, MODEL)
        for place, shape in weights.layout(MODEL).items():
            leaf: Any = params
            for part in place:
                leaf = leaf[part]
            assert (leaf.shape, leaf.dtype) == (shape, np.float32)

    accepted, refused = read_all(path, mutate, read)
    assert accepted > 5
    assert refused > 400


def test_run_configs(tmp_path: Path) -> None:
    shipped = directory.SHIPPED / "shakespeare"
    good = json_files.read(shipped / directory.LATEST_CONFIG)

    def read() -> None:
        found = directory.read_checkpoint("run", None, tmp_path)
        assert type(found.step) is int
        assert found.weights.parent == found.tokenizer.parent == tmp_path
        assert weights.count(found.model) > 0

    accepted, refused = read_all(tmp_path / directory.LATEST_CONFIG, lambda draw: mutated_json(draw, good), read)
    assert min(accepted, refused) > 50
