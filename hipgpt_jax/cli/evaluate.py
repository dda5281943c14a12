"""``hipgpt-evaluate``: how well a run predicts a text."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from absl import flags

from hipgpt_jax import api, compilation, config, devices, files
from hipgpt_jax.cli import outputs, program
from hipgpt_jax.records import provenance
from hipgpt_jax.runs import directory, loading
from hipgpt_jax.text import corpus, dataset, encoding, prompts

if TYPE_CHECKING:
    from hipgpt_jax.evaluation import loss, score

SUMMARY = """Say how well a run predicts a text: loss, perplexity, bits a byte, accuracy, over every token once. The
text is the run's validation split, another one, or prompts, which may be scored token by token. Examples:

  hipgpt-evaluate --run-name my_run
  hipgpt-evaluate --run-name shakespeare --data-path data/data.txt --split validation --stride 32
  hipgpt-evaluate --run-name shakespeare --prompt "To be, or not to be" --output -"""

FLAGS = flags.FlagValues()
SPLITS = ("validation", "all")
_MAX_LINE = 2**28  # bytes read of a file to find out if it is ours

_RUN_NAME = flags.DEFINE_string(
    "run-name", None, "Run to evaluate: a directory in checkpoints/, or a run of the package.", flag_values=FLAGS
)
_STEP = flags.DEFINE_string(
    "step",
    None,
    "Training step to load, or best: that of the lowest validation loss; the latest if absent.",
    flag_values=FLAGS,
)
_DATA_PATH = flags.DEFINE_multi_string(
    "data-path",
    None,
    "Text to score: a file, .txt or .jsonl, also .gz or .zst, or a directory of such; may be repeated. The run's own "
    "data if absent.",
    flag_values=FLAGS,
)
_TEXT_FIELD = flags.DEFINE_string(
    "text-field", corpus.DEFAULT_TEXT_FIELD, "Field of the text in a line of a .jsonl file.", flag_values=FLAGS
)
_SPLIT = flags.DEFINE_string(
    "split",
    None,
    "validation (the last tenth of the text) or all of it; all for --data-path and validation without it, if absent.",
    flag_values=FLAGS,
)
_PROMPT = flags.DEFINE_string(
    "prompt",
    None,
    "Text to score instead; - reads it from stdin, without one final line break.",
    flag_values=FLAGS,
)
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Texts to score instead: one a line, or the prompts of a .jsonl file.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "File to write for --prompt and --prompts_file, a JSON line a text: ids, tokens, and the log-probability and "
    "the rank of each. - writes it to stdout.",
    flag_values=FLAGS,
)
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Replace the file of --output if this program wrote it, or if it is empty.", flag_values=FLAGS
)
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens from one window to the next. 1 predicts every token from as many as generation would see; the window's "
    "length, the value if absent, is the fastest.",
    flag_values=FLAGS,
)
_MAX_SEQ_LEN = flags.DEFINE_integer(
    "max_seq_len", None, "Tokens the model sees at most; the run's own context if absent.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_string(
    "dtype",
    config.DecodingConfig().dtype,
    f"Type of the arithmetic: {' or '.join(config.DTYPES)}.",
    flag_values=FLAGS,
)
_DEVICE = flags.DEFINE_string("device", "auto", f"One of {', '.join(devices.DEVICES)}.", flag_values=FLAGS)


def main() -> None:
    """Runs ``hipgpt-evaluate``."""
    program.run("evaluate", SUMMARY, FLAGS, _evaluate)


def _evaluate() -> None:
    origin = provenance.Origin(argv=provenance.arguments("hipgpt-evaluate", sys.argv))
    run_name = program.required(_RUN_NAME)
    _check_flags()
    output = _check_output()
    decode = config.DecodingConfig(window=_MAX_SEQ_LEN.value, dtype=_DTYPE.value)
    found = loading.open_run(run_name, directory.parse_step(_STEP.value), decode)
    stride = found.window if _STRIDE.value is None else _STRIDE.value
    if not 1 <= stride <= found.window:
        raise ValueError(f"stride must be at least 1 and at most the window of {found.window} tokens: got {stride}")
    texts = _read_texts() if _is_prompts() else None
    for place, one in enumerate(texts or (), 1):
        if len(found.vocabulary.encode(one.text)) < 2:
            name = config.shortened(one.text if one.id is None else one.id)
            raise ValueError(f"{one.place or f'text {place}'} ({name}): a text to score needs at least 2 tokens")
    text = None if texts else _read_text(found)
    with _open(output) as out:
        device = devices.start(_DEVICE.value, program.note)
        compilation.use_cache(program.note)
        program.note_emulation(device.platform, decode.dtype)
        checkpoint = found.checkpoint
        program.note(f"{checkpoint.run} step {checkpoint.step} on {device}, windows of {found.window}, stride {stride}")
        run = api.Run(found, device, origin)
        if texts:
            _score_texts(run, texts, stride, out, shows_table=not _is_stdout(output))
        elif text:
            count = functools.partial(found.vocabulary.count_bytes, end_id=text.end_id)
            print(f"{program.printable(text.name)}: {len(text.ids)} tokens, {count(text.ids)} bytes")
            _print(run.evaluate(text.ids, text_bytes=count(text.ids[1:]), stride=stride))


def _read_texts() -> list[prompts.Prompt]:
    texts = list(program.read_prompts(_PROMPT.value, _PROMPTS_FILE.value))
    prompts.require_distinct(texts)
    if any(one.generation or one.sampling for one in texts):
        program.note("settings of generation in the prompts file are ignored: they do not change a text's score")
    return texts


def _is_prompts() -> bool:
    return _PROMPT.value is not None or _PROMPTS_FILE.value is not None


def _check_flags() -> None:
    if _SPLIT.value not in (None, *SPLITS):
        raise ValueError(f"split must be one of {', '.join(SPLITS)}: got {_SPLIT.value!r}")
    for flag in (_DATA_PATH, _SPLIT):
        if flag.value is not None and _is_prompts():
            raise ValueError(f"--{flag.name} does not go with --prompt or --prompts_file: give one of them")
    if _OUTPUT.value is not None and not _is_prompts():
        raise ValueError("--output is for --prompt and --prompts_file: give one of them too")
    if _OVERWRITE.value and _OUTPUT.value in (None, "-"):
        raise ValueError("--overwrite is for the file of --output: give its name too")


def _check_output() -> Path | None:
    """Returns the path of ``--output``, if any, once it is known that it may be written."""
    if _OUTPUT.value is None:
        program.require_stdout("the scores")
        return None
    path = outputs.path_of(_OUTPUT.value)
    if path.is_file() and not files.is_stream(path) and not _OVERWRITE.value:
        raise ValueError(f"--output {path} exists: give another name, or --overwrite")
    source = None if _PROMPTS_FILE.value is None else Path(_PROMPTS_FILE.value)
    outputs.check("output", path, source=source, kind="file of hipgpt-evaluate", is_ours=_is_ours)
    if not _is_stdout(path):
        program.outlive_stdout(matters=True)  # the table is shown there
    return path


def _is_stdout(path: Path | None) -> bool:
    return path is not None and files.descriptor(path) == 1


def _is_ours(path: Path) -> bool:
    """Returns whether the first line of a file is one that ``_line`` made."""
    with path.open("rb") as file:
        try:
            line = files.parse_json(file.readline(_MAX_LINE))
        except ValueError:
            return False
    return isinstance(line, dict) and line.keys() >= {"id", "text", "ids", "tokens", "logprobs", "ranks", "stride"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text:
    """A text to score, and the id in it that ends a document, which stands for no text."""

    name: str
    ids: np.ndarray
    end_id: int | None


def _read_text(found: loading.Source) -> _Text:
    if _DATA_PATH.value is None:
        return _read_own(found)
    text = corpus.Corpus([Path(path) for path in _DATA_PATH.value], _TEXT_FIELD.value)
    for line in text.notes:
        program.note(line)
    start = text.split if _SPLIT.value == "validation" else 0
    end_id = _end_id(found, text)
    ids = encoding.encode(found.vocabulary, text, start, end_id)
    name = text.sources[0].name if len(text.sources) == 1 else f"{len(text.sources)} files"
    if len(ids) < 2:
        raise ValueError(f"{name} is too short: {len(ids)} tokens to score, and it needs 2")
    name = f"validation split of {name}" if _SPLIT.value == "validation" else name
    return _Text(name=name, ids=ids, end_id=end_id)


def _end_id(found: loading.Source, text: corpus.Corpus) -> int | None:
    """The token that the run was taught to see after a document; none where it knows none, or there is one document."""
    if text.documents == 1:
        return None
    if found.checkpoint.eos_id < 0:
        program.note(f"the run knows no end token: {text.documents} documents are scored as one text")
        return None
    return found.checkpoint.eos_id


def _read_own(found: loading.Source) -> _Text:
    where = found.checkpoint.directory
    if not (where / dataset.MANIFEST_NAME).is_file():
        raise FileNotFoundError(
            f"run {found.checkpoint.run!r} does not carry the text it was trained on: give --data-path, "
            f"and --split validation for the last tenth of it"
        )
    data = dataset.Dataset(where)
    if _SPLIT.value == "all":
        ids = np.concatenate([data.train, data.validation])
        return _Text(name=data.manifest.name, ids=ids, end_id=data.manifest.eos_id)
    name = f"validation split of {data.manifest.name}"
    return _Text(name=name, ids=data.validation, end_id=data.manifest.eos_id)


def _score_texts(
    run: api.Run, texts: list[prompts.Prompt], stride: int, out: TextIO | None, *, shows_table: bool
) -> None:
    """Scores texts one by one, each into a line of JSON, rows of a table, or both."""
    for text in texts:
        (scored,) = run.score([text.text], stride=stride)
        if out is not None:
            line = _line(run, text, scored, stride)
            out.write(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
            out.flush()
        if shows_table:
            print(f"{program.printable(text.name)}: {len(scored.ids)} tokens")
            _print(scored.score)


def _line(run: api.Run, text: prompts.Prompt, scored: "score.TextScore", stride: int) -> dict[str, Any]:
    return {
        "id": text.name,
        "text": "".join(scored.tokens),
        "ids": scored.ids,
        "tokens": scored.tokens,
        "logprobs": [None, *(float(str(value)) for value in scored.logprobs)],
        "ranks": [None, *scored.ranks.tolist()],
        # JSON has no infinity, which a perplexity may be.
        **{name: value if math.isfinite(value) else None for name, value in _figures(scored.score).items()},
        "window": run.source.window,
        "stride": stride,
        **run.recorder.about(),
    }


def _figures(found: "loss.Score") -> dict[str, float]:
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "nats_per_byte": found.nats_per_byte,
        "bits_per_byte": found.bits_per_byte,
        "accuracy": found.accuracy,
    }


def _print(found: "loss.Score") -> None:
    units = {"loss": "nats per token", "accuracy": "of the tokens were the likeliest"}
    for name, value in _figures(found).items():
        number = f"{value:9.4f}" if value < 1e6 else f"{value:9.4g}"
        print(f"  {name.replace('_', ' '):14} {number} {units.get(name, '')}".rstrip())


def _open(path: Path | None) -> contextlib.AbstractContextManager[TextIO | None]:
    """Opens the path of ``--output``; a regular file becomes whole or stays what it was."""
    if path is None:
        return contextlib.nullcontext()
    return _open_stdout() if _is_stdout(path) else files.writing(path)


@contextlib.contextmanager
def _open_stdout() -> Iterator[TextIO]:
    """Yields stdout as UTF-8 text, whatever the locale."""
    out = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="\n")
    try:
        yield out
    finally:
        out.detach()


if __name__ == "__main__":
    main()
