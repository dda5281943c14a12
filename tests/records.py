"""Test helpers: records built without a model."""

import dataclasses
import functools
import json
import math
import random
from typing import Any

from hipgpt_jax.records import provenance, record

LARGEST = 3.4028234663852886e38  # of float32

SETTINGS = record.Settings(
    num_tokens=8,
    temperature=1.0,
    top_k=5,
    top_p=0.9,
    repetition_penalty=1.1,
    min_p=0.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    penalty_scope="all",
    no_repeat_ngram=0,
    logit_bias=(),
    ban=(),
    allow=(),
    rule=None,
    eos_id=-1,
    stop=(),
    min_tokens=0,
    window=128,
    window_stride=1,
    overflow="roll",
    top_logprobs=5,
)
RUN = record.Run(
    name="shakespeare", step=4000, weights_sha256="ab" * 32, tokenizer_sha256="cd" * 32, config_sha256="ef" * 32
)
NUMERICS = record.Numerics(
    platform="cpu",
    device_kind="cpu",
    machine="x86_64",
    processor="AMD EPYC 7B13",
    instruction_sets=("avx", "avx2", "fma"),
    cores=2,
    dtype="float32",
    attention="xla",
    batch_size=1,
    xla_flags="",
    environment=(),
)
VERSIONS = provenance.Versions(
    hipgpt_jax="0.1.0",
    git_commit="0123456789abcdef" * 2 + "01234567",
    git_dirty=False,
    python="3.11.2",
    jax="0.10.2",
    jaxlib="0.10.2",
    plugin=None,
    flax="0.12.8",
    tokenizers="0.22.1",
)
_ROOT = record.Record(
    id="p1",
    sample=0,
    seed=7,
    prompt="To be",
    prompt_ids=(3, 4),
    prompt_dropped=0,
    ids=(10, 11),
    tokens=(" or", " not"),
    text=" or not",
    finish_reason="length",
    stop=None,
    error=None,
    logprobs=(-math.log(2), -math.log(16)),
    ranks=(1, 4),
    sampled_logprobs=(-math.log(1.5), -math.log(8)),
    kept=(5, 3),
    kept_mass=(0.75, 0.5),
    leads=(0.25, 1.5),
    cuts=(0.0625, LARGEST),
    top_logprobs=None,
    settings=SETTINGS,
    run=RUN,
    numerics=NUMERICS,
    versions=VERSIONS,
    argv=("hipgpt-generate", "--prompt", "To be", "--output", "a.jsonl"),
    started="2026-01-02T03:04:05Z",
    timings=record.Timings(load=1.0, first_token=0.1, total=0.5),
)


def make_record(**changes: Any) -> record.Record:
    """Returns a valid record of two tokens with the given fields replaced."""
    return dataclasses.replace(_ROOT, **changes)


def with_tokens(*tokens: str, **changes: Any) -> record.Record:
    """Returns a record of the given tokens, each of 3 bits and ranked third of its five alternatives."""
    number = len(tokens)
    best = tuple(
        tuple((100 + place, -math.log(2 + 3 * place), token if place == 2 else f"alt{place}") for place in range(5))
        for token in tokens
    )
    facts: dict[str, Any] = {
        "ids": (102,) * number,
        "tokens": tokens,
        "text": "".join(tokens),
        "logprobs": (-math.log(8),) * number,
        "ranks": (3,) * number,
        "sampled_logprobs": (-math.log(4),) * number,
        "kept": (4,) * number,
        "kept_mass": (0.5,) * number,
        "leads": (0.125,) * number,
        "cuts": (0.25,) * number,
        "top_logprobs": best,
    }
    return make_record(**facts | changes)


def babble(number: int, seed: int, **changes: Any) -> record.Record:
    """Returns a record of ``number`` random English-like tokens with random statistics and five alternatives each."""
    draw = random.Random(seed)
    words = [
        "",
        "the,",
        "of",
        "and",
        "king",
        "lord",
        "my",
        "heart.",
        "night",
        "shall",
        "thou",
        "so",
        "sweet!",
        "love",
        "ing",
        "ed",
        "ly",
        "'tis:\n",
        "O",
        "what's",
    ]
    tokens = tuple(draw.choice(("", " ", " ", " ")) + draw.choice(words[1:]) for _ in range(number))
    logprobs = tuple(-draw.expovariate(0.4) for _ in range(number))
    ids = tuple(draw.randrange(1000) for _ in range(number))
    best = []
    for index in range(number):
        share = sorted((draw.random() for _ in range(5)), reverse=True)
        others = [[draw.randrange(1000, 2000), math.log(p / 5), " " + draw.choice(words[1:])] for p in share]
        if draw.random() < 0.7:
            others[draw.randrange(5)] = [ids[index], logprobs[index], tokens[index]]
        best.append(tuple((i, p, text) for i, p, text in sorted(others, key=lambda other: -other[1])))
    facts: dict[str, Any] = {
        "ids": ids,
        "tokens": tokens,
        "text": "".join(tokens),
        "logprobs": logprobs,
        "ranks": tuple(draw.randrange(1, 40) for _ in range(number)),
        "sampled_logprobs": tuple(logprob / 2 for logprob in logprobs),
        "kept": tuple(draw.randrange(1, 6) for _ in range(number)),
        "kept_mass": tuple(draw.random() for _ in range(number)),
        "leads": tuple(draw.expovariate(2) for _ in range(number)),
        "cuts": tuple(draw.choice((draw.expovariate(2), LARGEST)) for _ in range(number)),
        "top_logprobs": tuple(best),
    }
    return make_record(**facts | changes)


_NASTY = (None, True, [], {}, "", "\ud800", "\0\x1b[2J", "x" * 5000, 0, 0.0, 1.0, -1, 0.5, 2**32, 2**64, 10**29, 10**30)
_NASTY_TEXT = (
    "1e400",
    "-1e400",
    "1e308",
    "-1e308",
    "NaN",
    "-Infinity",
    "9" * 5000,
    "[" * 2000,
    '{"a":1,"a":2}',
    "1E5",
    "-0",
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [deeper for key, one in pairs for deeper in ((*path, key), *_paths(one, (*path, key)))]


def _of_the_same_type(value: Any, draw: random.Random) -> Any:
    if isinstance(value, str):
        return draw.choice(("", "\ud800", "\0\x1b[2J\n", "x" * 5000, "../x", "0" * 64, value + "x"))
    if isinstance(value, int):
        return draw.choice((0, 1, 2, 31, 32, 33, 1000, 2**31, 2**32 - 1, 2**64, 10**29, value + 1))
    if isinstance(value, float):
        return draw.choice((-0.0, 0.0, -1e-300, 1e-300, -1, 1, -3e38, 3e38, 1e300, value / 2, value * 2))
    return draw.sample(value, len(value)) if isinstance(value, list) else value


def mutated(value: dict[str, Any], draw: random.Random, separators: tuple[str, str] | None = None) -> bytes:
    """Returns the JSON line of a record with a value or key replaced, removed or duplicated, or bytes changed."""
    dumps = functools.partial(json.dumps, separators=separators)
    copy: Any = json.loads(json.dumps(value))
    first = draw.choice(list(value))
    place: Any = draw.choice([(first,), *_paths(value[first], (first,))])
    *path, key = place
    inside = copy
    for step in path:
        inside = inside[step]
    way = draw.randrange(10)
    if way > 5:
        inside[key] = _of_the_same_type(inside[key], draw)
    elif way == 0:
        inside[key] = draw.choice(_NASTY)
    elif way == 1:
        inside[key] = "HERE"
        return dumps(copy).replace('"HERE"', draw.choice(_NASTY_TEXT)).encode() + b"\n"
    elif way == 2:
        del inside[key]
    elif way == 3 and isinstance(inside, dict):
        inside[draw.choice(("\u202e", "x" * 5000, "schema", ""))] = inside.pop(key)
    elif way == 4 and isinstance(inside, list):
        inside.insert(key, inside[key])
    else:
        line = bytearray(dumps(copy).encode())
        at = draw.randrange(len(line))
        line[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
        return bytes(line).replace(b"\n", b" ") + b"\n"
    return dumps(copy, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass") + b"\n"
