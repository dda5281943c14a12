"""Throughput of many samples, by decode width, and the cost of records."""

import argparse
import dataclasses
import random
import time
from pathlib import Path

from benchmarks import generate, table
from hipgpt_jax import api, config, devices, files, json_files
from hipgpt_jax.records import provenance, writer
from hipgpt_jax.runs import directory as runs
from hipgpt_jax.runs import loading
from hipgpt_jax.text import prompts, tokenizer

NARROW, WIDE, RECORDED = "width 1", "width 16", "width 16, recorded"
RATIOS_TO = (NARROW, WIDE)
HELD = ((WIDE, NARROW), (RECORDED, WIDE))

_SAMPLES = 64
_WIDTH = 16


def rows_of(model: config.ModelConfig, options: argparse.Namespace, directory: Path) -> table.Rows:
    """Returns the rows of a shape: 64 samples of one prompt, decoded to text, with and without a record file.

    The time includes prefill, decoding, detokenization, token statistics and writing records.
    """
    write_run(model, directory)
    device = devices.start("cpu", lambda line: None)
    narrow, wide = (
        api.Run(
            loading.open_run("run", None, config.DecodingConfig(batch_size=width), directory),
            device,
            provenance.Invocation(),
        )
        for width in (1, _WIDTH)
    )
    num_tokens = min(options.num_tokens, model.max_seq_len - 32)
    return {
        NARROW: [_request_for(narrow, num_tokens, None)],
        WIDE: [_request_for(wide, num_tokens, None)],
        RECORDED: [_request_for(wide, num_tokens, directory / "records.jsonl")],
    }


def write_run(model: config.ModelConfig, directory: Path) -> None:
    """Writes a run with random weights and a vocabulary of random words."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = ["".join(rng.choices("bdfgklmnprstvz", k=6)) + rng.choice("aeiou") for _ in range(30_000)]
    vocabulary = tokenizer.Tokenizer.train([" ".join(words)], model.vocab_size)
    if vocabulary.vocab_size < model.vocab_size:
        raise ValueError(f"the random words give {vocabulary.vocab_size} tokens, but {model.vocab_size} are needed")
    model = dataclasses.replace(model, vocab_size=vocabulary.vocab_size)
    generate.random_params(model, directory)
    files.write_text(directory / "tokenizer.json", vocabulary.to_json())
    weights, words_file = directory / "model.safetensors", directory / "tokenizer.json"
    json_files.write(
        directory / runs.LATEST_CONFIG,
        {
            "model": dataclasses.asdict(model),
            "tokenizer": {"path": words_file.name, "sha256": files.sha256(words_file)},
            "checkpoint": {"latest": weights.name, "step": 0, "sha256": files.sha256(weights)},
        },
    )


def _request_for(run: api.Run, num_tokens: int, path: Path | None) -> table.Request:
    generation = config.GenerationConfig(num_tokens=num_tokens, num_samples=_SAMPLES)
    resolved = list(run.files.resolve_all([prompts.Prompt(text="mana tovi")], config.SamplingConfig(), generation))

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        out = writer.RecordFile(path, overwrite=True) if path else None
        for output in run.outputs(run.requests_of(resolved), measure=out is not None):
            if out and output.finish_reason:
                out.append(run.recorder.build(output.sequence))
        if out:
            out.close()
        return _SAMPLES * num_tokens, time.perf_counter() - began

    return request
