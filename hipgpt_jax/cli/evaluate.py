"""``hipgpt-evaluate``: loss and accuracy of a run on a text."""

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

import absl.flags
import numpy as np

from hipgpt_jax import api, config, files, json_files
from hipgpt_jax.cli import choices, flags, output, program
from hipgpt_jax.records import planning, provenance
from hipgpt_jax.runs import directory, loading
from hipgpt_jax.text import corpus, dataset, manifest, preparation, prompts

if TYPE_CHECKING:
    from hipgpt_jax.evaluation import score

SUMMARY = """Evaluate a run on a text: loss, perplexity, bits per byte and accuracy over all tokens. The text is the
run's validation split, a given text, or prompts, which can be scored token by token. Examples:

  hipgpt-evaluate --run-name my_run
  hipgpt-evaluate --run-name shakespeare --data-path data/data.txt --split validation --stride 32
  hipgpt-evaluate --run-name shakespeare --prompt "To be, or not to be" --output -
  hipgpt-evaluate --run-name shakespeare --prompt "To be, or not to be" --as-sampled --temp 0.8"""

FLAGS = absl.flags.FlagValues()
SPLITS = ("validation", "all")
_MAX_LINE = 2**28  # bytes read to recognise a file of this program

_string = functools.partial(absl.flags.DEFINE_string, flag_values=FLAGS)

_RUN_NAME = flags.define_shared(FLAGS, "run-name")
_STEP = flags.define_shared(FLAGS, "step")
_DATA_PATH = absl.flags.DEFINE_multi_string(
    "data-path",
    None,
    "Text to score: a text, .jsonl, .csv or .parquet file, also .gz or .zst, or a directory of such files; may be "
    "repeated. The run's own data if absent.",
    flag_values=FLAGS,
)
_TEXT_FIELD = flags.define_shared(FLAGS, "text-field")
_SPLIT = absl.flags.DEFINE_enum(
    "split",
    None,
    SPLITS,
    "The last tenth of the text, or all of it. If absent, all with --data-path and validation without it.",
    flag_values=FLAGS,
)
_PROMPT = _string("prompt", None, "Text to score instead; - reads stdin, without one final line break.")
_PROMPTS_FILE = _string("prompts_file", None, "Texts to score instead: one per line, or the prompts of a .jsonl file.")
_CHOICES = _string(
    "choices",
    None,
    "Compare texts that may follow a prompt instead: a file of JSON lines with prompt, choices, a list of texts, and "
    "optionally id.",
)
_OUTPUT = _string(
    "output",
    None,
    "File to write with --prompt, --prompts_file or --choices, one JSON line per text or list of choices: ids and "
    "log-probabilities. - writes to stdout.",
)
_AS_SAMPLED = absl.flags.DEFINE_boolean(
    "as-sampled",
    False,
    "Also give the log-probability of each token under the sampling settings, with --prompt or --prompts_file; null in "
    "the output for a token that they cut.",
    flag_values=FLAGS,
)
_OVERWRITE = absl.flags.DEFINE_boolean(
    "overwrite", False, "Replace the file of --output if it is empty or this program wrote it.", flag_values=FLAGS
)
_STRIDE = absl.flags.DEFINE_integer(
    "stride",
    None,
    "Tokens between the starts of two windows. 1 gives each token as much context as generation does; the window's "
    "length, the value if absent, is the fastest.",
    flag_values=FLAGS,
)
flags.define_config(FLAGS, config.SamplingConfig)
flags.define_field(FLAGS, config.DecodingConfig, "window")
flags.define_field(FLAGS, config.DecodingConfig, "dtype")
_DEVICE = flags.define_shared(FLAGS, "device")


def main() -> None:
    """Runs ``hipgpt-evaluate``."""
    program.run("evaluate", SUMMARY, FLAGS, _evaluate)


def _evaluate() -> None:
    origin = provenance.Invocation(argv=provenance.arguments("hipgpt-evaluate", sys.argv))
    run_name = program.required(_RUN_NAME)
    _check_flags()
    target = _check_output()
    decoding = flags.build(config.DecodingConfig, FLAGS)
    name, path = directory.parse_run(run_name)
    source = loading.open_run(name, directory.parse_step(_STEP.value), decoding, path)
    stride = source.window if _STRIDE.value is None else _STRIDE.value
    if not 1 <= stride <= source.window:
        raise ValueError(
            f"--stride must be at least 1 and at most the window of {source.window} tokens: got {_STRIDE.value}"
        )
    texts = _read_prompts(source) if _has_prompts() else None
    questions = None if _CHOICES.value is None else choices.read(Path(_CHOICES.value), source)
    data = None if texts or questions else _read_text(source)
    with _open(target) as out:
        device = program.start_device(_DEVICE.value, decoding.dtype)
        checkpoint = source.checkpoint
        program.note(f"{checkpoint.run} step {checkpoint.step} on {device}, window {source.window}, stride {stride}")
        run = api.Run(source, device, origin)
        if questions:
            choices.write(run, questions, out, shows_table=not _is_stdout(target))
        elif texts:
            _score_texts(run, texts, stride, out, shows_table=not _is_stdout(target))
        elif data:
            count = functools.partial(source.vocabulary.count_bytes, end_id=data.end_id)
            print(f"{program.printable(data.name)}: {len(data.ids)} tokens, {count(data.ids)} bytes")
            with program.spinner("evaluating"):
                found = run.evaluate(data.ids, text_bytes=count(data.ids[1:]), stride=stride)
            _print(found)


def _has_prompts() -> bool:
    return _PROMPT.value is not None or _PROMPTS_FILE.value is not None


def _check_flags() -> None:
    for flag in (_PROMPT, _PROMPTS_FILE, _DATA_PATH, _SPLIT, _STRIDE):
        if _CHOICES.value is not None and flag.value is not None:
            raise ValueError(f"--{flag.name} excludes --choices: give one of them")
    for flag in (_DATA_PATH, _SPLIT):
        if flag.value is not None and _has_prompts():
            raise ValueError(f"--{flag.name} excludes --prompt and --prompts_file: give one of them")
    if _OUTPUT.value is not None and not _has_prompts() and _CHOICES.value is None:
        raise ValueError("--output needs --prompt, --prompts_file or --choices")
    if _AS_SAMPLED.value and not _has_prompts():
        raise ValueError("--as-sampled needs --prompt or --prompts_file")
    if not _AS_SAMPLED.value and (unused := flags.given(config.SamplingConfig, FLAGS)):
        raise ValueError(f"{next(iter(unused))} needs --as-sampled: the model's own probabilities do not depend on it")
    if _TEXT_FIELD.present and _DATA_PATH.value is None:
        raise ValueError("--text-field needs --data-path, the files with that field")
    if _OVERWRITE.value and _OUTPUT.value in (None, "-"):
        raise ValueError("--overwrite needs --output FILE, the file to replace")


def _check_output() -> Path | None:
    """Returns the path of ``--output``, if any, after checking that it may be written."""
    if _OUTPUT.value is None:
        program.require_stdout("the scores")
        return None
    path = output.path_of(_OUTPUT.value)
    if path.is_file() and not files.is_stream(path) and not _OVERWRITE.value:
        raise ValueError(f"--output {path} exists: give another name, or --overwrite")
    given = _PROMPTS_FILE.value or _CHOICES.value
    source = None if given is None else Path(given)
    output.check("output", path, source=source, kind="file of hipgpt-evaluate", is_ours=_is_ours)
    if not _is_stdout(path):
        program.outlive_stdout(matters=True)  # stdout shows the table
    return path


def _read_prompts(source: loading.RunFiles) -> list[prompts.Prompt]:
    texts = list(program.read_prompts(_PROMPT.value, _PROMPTS_FILE.value))
    if any(one.generation or (one.sampling and not _AS_SAMPLED.value) for one in texts):
        program.note("generation settings in the prompts file are ignored: they do not affect the score of a text")
    sampling = flags.build(config.SamplingConfig, FLAGS)
    planning.Plan(source, texts, sampling, config.GenerationConfig())  # checks the settings
    for number, one in enumerate(texts, 1):
        if len(source.encode(one)) < 2:
            name = config.shortened(one.text if one.id is None else one.id)
            raise ValueError(f"{one.location or f'text {number}'} ({name}): a text to score needs at least 2 tokens")
    return texts


def _is_stdout(path: Path | None) -> bool:
    return path is not None and files.descriptor(path) == 1


def _is_ours(path: Path) -> bool:
    """Returns whether the first line of a file is one that this program made."""
    with path.open("rb") as file:
        try:
            line = json_files.parse(file.readline(_MAX_LINE))
        except ValueError:
            return False
    kinds = {"id", "text", "ids", "tokens", "logprobs", "ranks", "stride"}, {"id", "prompt_ids", "choices", "best"}
    return isinstance(line, dict) and any(line.keys() >= kind for kind in kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text:
    """A text to score.

    Attributes:
        name: Its name in the output.
        ids: Its token ids.
        end_id: The id that ends each document and stands for no text; None if there is none.
    """

    name: str
    ids: np.ndarray
    end_id: int | None


def _read_text(source: loading.RunFiles) -> _Text:
    """Reads the text of ``--data-path``, or the data of the run."""
    if _DATA_PATH.value is None:
        return _read_run_data(source)
    text = corpus.Corpus([Path(path) for path in _DATA_PATH.value], _TEXT_FIELD.value)
    for line in text.notes:
        program.note(line)
    end_id = source.checkpoint.eos_id if text.documents > 1 and source.checkpoint.eos_id >= 0 else None
    if text.documents > 1 and end_id is None:
        program.note(f"the run has no end token: {text.documents} documents are scored as one text")
    start = text.split if _SPLIT.value == "validation" else 0
    ids = preparation.encode(source.vocabulary, text, start, end_id)
    name = text.sources[0].name if len(text.sources) == 1 else f"{len(text.sources)} files"
    if len(ids) < 2:
        raise ValueError(f"{name} is too short: {len(ids)} tokens, and a score needs at least 2")
    name = f"validation split of {name}" if _SPLIT.value == "validation" else name
    return _Text(name=name, ids=ids, end_id=end_id)


def _read_run_data(source: loading.RunFiles) -> _Text:
    root = source.checkpoint.directory
    if not (root / manifest.MANIFEST_NAME).is_file():
        raise FileNotFoundError(
            f"run {source.checkpoint.run!r} does not include its training text: give --data-path, and --split "
            f"validation for the last tenth of it"
        )
    data = dataset.Dataset(root)
    if _SPLIT.value == "all":
        ids = np.concatenate([data.train, data.validation])
        return _Text(name=data.manifest.name, ids=ids, end_id=data.manifest.eos_id)
    name = f"validation split of {data.manifest.name}"
    return _Text(name=name, ids=data.validation, end_id=data.manifest.eos_id)


def _score_texts(
    run: api.Run, texts: list[prompts.Prompt], stride: int, out: TextIO | None, *, shows_table: bool
) -> None:
    """Scores texts one by one, and writes a line of JSON, rows of a table, or both for each."""
    sampling = flags.build(config.SamplingConfig, FLAGS)
    for text in texts:
        _, settings = run.files.resolve_settings(text, sampling, config.GenerationConfig())
        settings = settings if _AS_SAMPLED.value else None
        (scored,) = run.score([run.files.encode(text)], stride=stride, settings=settings)
        if out is not None:
            line = _line(run, text, scored, stride) | _sampled(settings, scored.sampled_logprobs)
            out.write(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
            out.flush()
        if shows_table:
            print(f"{program.printable(text.name)}: {len(scored.ids)} tokens")
            _print(scored.score)
            if scored.sampled_logprobs is not None:
                _print_sampled(scored.sampled_logprobs)


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
        "window": run.files.window,
        "stride": stride,
        **run.recorder.common_fields(),
    }


def _sampled(settings: config.SamplingConfig | None, logprobs: "np.ndarray | None") -> dict[str, Any]:
    if settings is None or logprobs is None:
        return {}
    values = [float(str(value)) if math.isfinite(value) else None for value in logprobs]
    return {"sampled_logprobs": [None, *values], "sampling": vars(settings)}


def _print_sampled(logprobs: np.ndarray) -> None:
    kept = logprobs[np.isfinite(logprobs)].astype(np.float64)
    if len(kept):
        print(f"  sampled loss   {-kept.mean():9.4f} nats per token that the sampling settings keep")
    print(f"  cut            {len(logprobs) - len(kept):9} of the tokens by the sampling settings")


def _figures(found: "score.Score") -> dict[str, float]:
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "nats_per_byte": found.nats_per_byte,
        "bits_per_byte": found.bits_per_byte,
        "accuracy": found.accuracy,
    }


def _print(found: "score.Score") -> None:
    units = {"loss": "nats per token", "accuracy": "of the tokens were the most likely"}
    for name, value in _figures(found).items():
        number = f"{value:9.4f}" if value < 1e6 else f"{value:9.4g}"
        print(f"  {name.replace('_', ' '):14} {number} {units.get(name, '')}".rstrip())


def _open(path: Path | None) -> contextlib.AbstractContextManager[TextIO | None]:
    """Opens the path of ``--output``; a regular file is replaced at the end."""
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
