"""Measures what ``hipgpt-replay --forced`` sees: records of the run ``shakespeare``, screened after planted changes.

``python scripts/screening.py`` prints a table in Markdown: per sampling setting and change, the tokens drawn otherwise
and those that rounding does not explain, per 100,000; the largest log-probability error; and the number of tokens in
which an unexplained one is seen with a probability of 95 %.
"""

import argparse
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

import hipgpt_jax
from hipgpt_jax import files, json_files
from hipgpt_jax.records import record
from hipgpt_jax.runs import directory

_PROMPTS = ("ROMEO:", "To be, or not to be:", "First Citizen:", "Once upon a time")
_TOKENS = 200  # per sample
_PLAIN = hipgpt_jax.SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
_SETTINGS = {"default": hipgpt_jax.SamplingConfig(), "plain sampling": _PLAIN}
_DECODING = hipgpt_jax.DecodingConfig(window_stride=16, batch_size=16)

_Tensors = dict[str, np.ndarray]


def main(num_tokens: int) -> None:
    """Prints the table for at least ``num_tokens`` tokens per sampling setting."""
    run = hipgpt_jax.load_run("shakespeare", decoding=_DECODING)
    weights = safetensors.numpy.load_file(run.files.checkpoint.weights)
    with tempfile.TemporaryDirectory() as work:
        runs = {
            "none": run,
            "one weight, its last bit": _planted(run, Path(work) / "bit", _last_bit(weights)),
            "weights in bfloat16": _planted(run, Path(work) / "bfloat16", _bfloat16(weights)),
            "weights in int8, a scale per row": _planted(run, Path(work) / "int8", _int8(weights)),
        }
    print("| settings | change | drawn otherwise | unexplained | log-probability error | tokens until seen |")
    print("|---|---|--:|--:|--:|--:|")
    for name, settings in _SETTINGS.items():
        num_samples = -(-num_tokens // (_TOKENS * len(_PROMPTS)))
        records = run.generate(_PROMPTS, settings, num_samples=num_samples, num_tokens=_TOKENS)
        for change, planted in runs.items():
            print(f"| {name} | {change} {_row(planted, records)}", flush=True)
        top_p = min(1.0, settings.top_p * 1.01) if settings.top_p < 1 else 0.99
        edits = {
            "temperature by 1 %": {"temperature": settings.temperature * 1.01},
            "top_p by 1 %": {"top_p": top_p},
        }
        for change, edit in edits.items():
            print(f"| {name} | {change} {_row(run, (_edited(one, **edit) for one in records))}", flush=True)


def _row(run: hipgpt_jax.Run, records: Iterable[record.Record]) -> str:
    """Returns the last cells of a row: the screening of all records, as if the run had made them."""
    own = {"weights_sha256": run.files.checkpoint.weights_sha256}
    found = [run.screen(dataclasses.replace(one, run=dataclasses.replace(one.run, **own))) for one in records]
    tokens, redrawn, unexplained = (
        sum(numbers) for numbers in zip(*((f.tokens, len(f.redrawn), f.unexplained) for f in found), strict=True)
    )
    share = unexplained / tokens
    until = "not seen" if not share else "1" if share == 1 else f"{math.ceil(math.log(0.05) / math.log1p(-share)):,}"
    per = 100_000 / tokens
    error = max(f.logprob_error for f in found)
    return f"| {redrawn * per:,.0f} | {unexplained * per:,.0f} | {error:.1g} | {until} |"


def _planted(run: hipgpt_jax.Run, path: Path, weights: _Tensors) -> hipgpt_jax.Run:
    """Returns the run with other weights."""
    shutil.copytree(run.files.checkpoint.directory, path)
    config = json_files.read(path / directory.LATEST_CONFIG)
    target = path / config["checkpoint"]["latest"]
    safetensors.numpy.save_file(weights, target, metadata={"format": "pt"})
    config["checkpoint"]["sha256"] = files.sha256(target)
    json_files.write(path / directory.LATEST_CONFIG, config)
    return hipgpt_jax.load_run("shakespeare", decoding=_DECODING, where=path)


def _last_bit(weights: _Tensors) -> _Tensors:
    changed = weights["h.0.attn.c_attn.weight"].copy()
    changed[0, 0] = np.nextafter(changed[0, 0], np.float32(np.inf))
    return weights | {"h.0.attn.c_attn.weight": changed}


def _bfloat16(weights: _Tensors) -> _Tensors:
    return {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in weights.items()}


def _int8(weights: _Tensors) -> _Tensors:
    return {name: _rounded(value) if value.ndim == 2 else value for name, value in weights.items()}


def _rounded(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    return np.round(weight / scale) * scale


def _edited(one: record.Record, **settings: float) -> record.Record:
    return dataclasses.replace(one, settings=dataclasses.replace(one.settings, **settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=20_000, help="per sampling setting (default: %(default)s)")
    main(**vars(parser.parse_args()))
