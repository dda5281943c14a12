"""Model card of an exported run."""

import shlex

from hipgpt_jax import json_files, version
from hipgpt_jax.report import curves
from hipgpt_jax.runs import directory, loading, weights

MARKER = b"<!-- written by hipgpt-export -->"

_FILES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "sha256"],
        "properties": {"name": {"type": "string"}, "sha256": {"type": "string"}},
    },
}
_SCHEMA = json_files.Schema(
    "config",
    {
        "type": "object",
        "properties": {
            "data": {"type": "object", "properties": {"sources": _FILES}},
            "source": {"type": "object", "required": ["files"], "properties": {"files": _FILES}},
        },
    },
)


def write(source: loading.RunFiles, weights_sha256: str) -> str:
    """Returns the model card of a run, in Markdown, for a file of weights with this digest."""
    found, model = source.checkpoint, source.checkpoint.model
    value = _SCHEMA.read(directory.config_path(found.directory, found.step))
    rows = [
        ("parameters", f"{weights.count(model):,}"),
        ("layers, heads, width", f"{model.num_layers}, {model.num_heads}, {model.embed_dim}"),
        ("context, vocabulary", f"{model.max_seq_len}, {model.vocab_size}"),
        ("step", str(found.step)),
        ("validation loss", _loss(found)),
        ("model.safetensors", f"sha256 {weights_sha256}"),
        ("weights of the run", f"sha256 {found.weights_sha256}"),
        ("tokenizer of the run", f"sha256 {found.tokenizer_sha256}"),
        ("config of the run", f"sha256 {found.config_sha256}"),
    ]
    if found.init_from:
        start = found.init_from
        rows.append(("started from", f"{_code(start.run)}, step {start.step}, weights sha256 {start.sha256}"))
    for kind, section, key in (("trained on", "data", "sources"), ("imported from", "source", "files")):
        rows += [(kind, f"{_code(one['name'])}, sha256 {one['sha256']}") for one in value.get(section, {}).get(key, [])]
    table = "\n".join(f"| {name} | {_plain(text)} |" for name, text in rows)
    name = shlex.quote(found.run)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
{MARKER.decode()}

# {_code(found.run)}

A GPT-2 exported from a run of hipgpt_jax {version.__version__}.

| | |
|---|---|
{table}

Samples can be replayed token for token: import this folder, generate with a record, and replay the record. Records of
the run itself name the digests above and are replayed with the run.

```bash
hipgpt-import FOLDER --run-name {name}
hipgpt-generate --run-name {name} --prompt TEXT --output samples.jsonl
hipgpt-replay samples.jsonl
```
"""


def _loss(found: directory.Checkpoint) -> str:
    path = found.directory / directory.METRICS_NAME
    if not path.is_file():
        return "unknown"
    run = curves.read(path, found.run)
    units = {unit: run.validation("loss", unit) for unit in curves.UNITS}
    losses = {unit: dict(zip(*curve, strict=True)).get(found.step) for unit, curve in units.items()}
    return ", ".join(f"{loss:.4f} nats per {unit}" for unit, loss in losses.items() if loss is not None) or "unknown"


def _plain(text: str) -> str:
    """Returns text on one line, without the separator of columns."""
    return " ".join(text.replace("|", "/").split())


def _code(text: str) -> str:
    return f"`{_plain(text.replace('`', ' '))}`"
