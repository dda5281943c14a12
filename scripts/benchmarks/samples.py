"""Many samples: what the decode width gains, and what records cost."""

import argparse
import dataclasses
import random
import time
from pathlib import Path

from benchmarks import generate, table
from hipgpt_jax import api, config, devices, files
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
    """Returns the rows of a shape: 64 samples of one prompt, made as text, and with their records in a file.

    All is timed: reading the prompt, every token, its text, its facts and its record.
    """
    write_run(model, directory)
    device = devices.start("cpu", lambda line: None)
    narrow, wide = (
        api.Run(
            loading.open_run("run", None, config.DecodingConfig(width=width), directory),
            device,
            provenance.Invocation(),
        )
        for width in (1, _WIDTH)
    )
    num_tokens = min(options.num_tokens, model.max_seq_len - 32)
    return {
        NARROW: [_make(narrow, num_tokens, None)],
        WIDE: [_make(wide, num_tokens, None)],
        RECORDED: [_make(wide, num_tokens, directory / "records.jsonl")],
    }


def write_run(model: config.ModelConfig, directory: Path) -> None:
    """Writes a run of random weights and a vocabulary of made-up words."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("bdfgklmnprstvz", k=6)) + draw.choice("aeiou") for _ in range(30_000)]
    vocabulary = tokenizer.Tokenizer.train([" ".join(words)], model.vocab_size)
    if vocabulary.vocab_size < model.vocab_size:
        raise ValueError(f"the made-up words hold {vocabulary.vocab_size} tokens, {model.vocab_size} are needed")
    model = dataclasses.replace(model, vocab_size=vocabulary.vocab_size)
    generate.random_params(model, directory)
    files.write_text(directory / "tokenizer.json", vocabulary.to_json())
    weights, words_file = directory / "model.safetensors", directory / "tokenizer.json"
    files.write_json(
        directory / runs.LATEST_CONFIG,
        {
            "model": dataclasses.asdict(model),
            "tokenizer": {"path": words_file.name, "sha256": files.sha256(words_file)},
            "checkpoint": {"latest": weights.name, "step": 0, "sha256": files.sha256(weights)},
        },
    )


def _make(run: api.Run, num_tokens: int, path: Path | None) -> table.Request:
    generation = config.GenerationConfig(num_tokens=num_tokens, num_samples=_SAMPLES)
    asked = list(run.files.resolve_all([prompts.Prompt(text="mana tovi")], config.SamplingConfig(), generation))

    def request() -> tuple[float, float]:
        began = time.perf_counter()
        out = writer.RecordFile(path, overwrite=True) if path else None
        for output in run.outputs(run.requests_of(asked), measure=out is not None):
            if out and output.finish_reason:
                out.append(run.recorder.build(output.sequence))
        if out:
            out.close()
        return _SAMPLES * num_tokens, time.perf_counter() - began

    return request
