"""``hipgpt-generate``: text from a trained run."""

import dataclasses
import functools
import re
import secrets
import sys
from pathlib import Path

import absl.flags

from hipgpt_jax import api, config, devices
from hipgpt_jax.cli import flags, generate_output, output, program
from hipgpt_jax.records import planning, provenance, shards, writer
from hipgpt_jax.runs import directory, loading

SUMMARY = """Generate text from a trained run. The text goes to stdout token by token, diagnostics to stderr.

The same weights, prompt, settings and seed give the same tokens, whatever the values of --num_tokens and
--num_samples, and with or without --stream. Examples:

  hipgpt-generate --prompt "To be, or not to be:" --run-name shakespeare
  hipgpt-generate --prompt "Once upon a time" --run-name my_run --step 1500 --temp 0.8 --seed 7"""

FLAGS = absl.flags.FlagValues()
_string = functools.partial(absl.flags.DEFINE_string, flag_values=FLAGS)
_boolean = functools.partial(absl.flags.DEFINE_boolean, flag_values=FLAGS)

_PROMPT = _string(
    "prompt", None, "Text to continue; empty begins a document, and - reads stdin, without one final line break."
)
_PROMPT_IDS = _string("prompt_ids", None, "Token ids to continue instead of a text, separated by commas.")
_PARSE_SPECIAL = _boolean(
    "parse_special", False, "Read prompts that spell a special token, such as an end token, as that token."
)
_PROMPTS_FILE = _string(
    "prompts_file",
    None,
    "File of prompts instead: one per line, or in a .jsonl file one JSON object per line with prompt, id, seed, "
    "prompt_ids, num_samples, num_tokens, stop and other flags of sampling. May be .gz or .zst; - reads stdin.",
)
_RUN_NAME = flags.define_shared(FLAGS, "run-name")
_STEP = flags.define_shared(FLAGS, "step")
flags.define_config(FLAGS, config.GenerationConfig, eos_id=None)
flags.define_config(FLAGS, config.SamplingConfig)
flags.define_config(FLAGS, config.DecodingConfig)
_STREAM = _boolean("stream", True, "Print each token at once.")
_SEPARATOR = _string("separator", None, "Line to print between two samples, for programs that read the text.")
_ECHO = _boolean("echo", False, "Print the prompt before its continuation.")
_OUTPUT = _string(
    "output",
    None,
    "Record file to append to, one JSON line per sample; samples that it already holds are skipped. A name that ends "
    "in .zst compresses it. - writes the records to stdout instead of the text. Records of a --prompts_file are "
    "written instead of the text, too.",
)
_OVERWRITE = _boolean("overwrite", False, "Replace the records in --output.")
_SHARD = _string(
    "shard",
    None,
    "I/N: generate only part I, from 0 to N-1, of the samples of all prompts; auto takes I and N from a job of Slurm "
    "or Open MPI. hipgpt-records merge joins the record files.",
)
_ONLY = _string("only", None, "Generate only the samples listed in this file, as hipgpt-records merge writes it.")
_VERBOSE = _boolean("verbose", False, flags.VERBOSE_HELP)
_DEVICE = flags.define_shared(FLAGS, "device")
_DEVICES = flags.define_shared(FLAGS, "devices")

_ESCAPE = re.compile(r"\\[nrt]")  # typed instead of the character that it stands for
_MANY_SLOTS = 16  # the logits of more slots may exceed the memory that glibc keeps


def main() -> None:
    """Runs ``hipgpt-generate``."""
    program.run("generate", SUMMARY, FLAGS, _generate)


def _generate() -> None:
    origin = provenance.Invocation(argv=provenance.arguments("hipgpt-generate", sys.argv))
    run_name = program.required(_RUN_NAME)
    decoding = flags.build(config.DecodingConfig, FLAGS)
    sampling = flags.build(config.SamplingConfig, FLAGS)
    # Both are replaced below: the end token may be the run's, and the seed one that is drawn.
    generation = flags.build(
        config.GenerationConfig,
        FLAGS,
        eos_id=-1 if FLAGS.eos_id is None else FLAGS.eos_id,
        seed=0 if FLAGS.seed == -1 else FLAGS.seed,
    )
    devices.check_number(_DEVICES.value)
    _check_flags(generation)
    shard = None if _SHARD.value is None else shards.Shard.parse(_SHARD.value)
    cells = None if _ONLY.value is None else shards.Cells(Path(_ONLY.value))
    prompts = program.read_prompts(
        _PROMPT.value, _PROMPTS_FILE.value, _PROMPT_IDS.value, parse_special=_PARSE_SPECIAL.value
    )
    name, path = directory.parse_run(run_name)
    source = loading.open_run(name, directory.parse_step(_STEP.value), decoding, path)
    checkpoint = source.checkpoint
    if FLAGS.eos_id is None:
        generation = dataclasses.replace(generation, eos_id=checkpoint.eos_id)
    inputs = [_PROMPTS_FILE.value, _ONLY.value]
    with output.open_records(_OUTPUT.value, overwrite=_OVERWRITE.value, inputs=inputs) as out:
        records = out if isinstance(out, writer.RecordFile) else None
        if FLAGS.seed == -1:
            generation = dataclasses.replace(generation, seed=_draw_seed(records))
        plan = planning.Plan(source, prompts, sampling, generation, records, shard=shard, cells=cells)
        if shard:
            program.note(f"shard {shard}: {plan.samples} samples")
        device = program.start_device(_DEVICE.value, decoding.dtype)
        if device.platform == "cpu" and decoding.batch_size >= _MANY_SLOTS:
            program.keep_freed_memory(verbose=_VERBOSE.value)  # a step of 64 slots of GPT-2 takes 132 ms instead of 163
        parent = checkpoint.directory.parent
        root = "the package" if parent == directory.SHIPPED else f"{parent}/"
        program.note(f"{checkpoint.run} step {checkpoint.step} of {root} on {device}, seed {generation.seed}")
        run = api.Run(source, device, origin, _DEVICES.value)
        if records:
            records.check_shared(run.recorder.shared_fingerprint())
            program.outlive_stdout(matters=_shows_text())
        style = generate_output.Style(stream=_STREAM.value, echo=_ECHO.value, separator=_SEPARATOR.value)
        generate_output.write(run, plan, out, style if _shows_text() else None)


def _shows_text() -> bool:
    """Returns whether text goes to stdout, and not records instead of it."""
    return _OUTPUT.value is None or not (_PROMPTS_FILE.value or output.is_stdout(_OUTPUT.value))


def _check_flags(generation: config.GenerationConfig) -> None:
    for text in filter(_ESCAPE.search, generation.stop):
        program.note(f"--stop {program.printable(text)!r} has a backslash and a letter: a line break is $'\\n' in bash")
    if generation.top_logprobs and _OUTPUT.value is None:
        raise ValueError("--top_logprobs needs --output: alternatives are only recorded")
    if FLAGS.window_stride > 1 and FLAGS.overflow != "roll":
        raise ValueError(f"--window_stride needs --overflow roll: with {FLAGS.overflow}, the window never slides")
    if _OVERWRITE.value and (_OUTPUT.value is None or output.is_stdout(_OUTPUT.value)):
        raise ValueError("--overwrite needs --output FILE, the record file to replace")
    if _PARSE_SPECIAL.value and _PROMPT_IDS.value is not None:
        raise ValueError("--parse_special needs a text, and --prompt_ids has none")
    for flag in (_SEPARATOR, _ECHO):
        if flag.value not in (None, False) and not _shows_text():
            raise ValueError(f"--{flag.name} needs text on stdout, and the records are written instead of it")
    if _OUTPUT.value in (None, "-"):
        program.require_stdout("the text")


def _draw_seed(records: writer.RecordFile | None) -> int:
    """Returns the seed for ``--seed -1``: that of the records in the output, so that a command can be repeated."""
    seeds = records.seeds if records else set()
    if not seeds:
        return secrets.randbelow(config.MAX_SEED + 1)
    if len(seeds) > 1:
        raise ValueError(
            "--seed -1 continues with the seed of the records in --output, but they have several: give one"
        )
    return next(iter(seeds))


if __name__ == "__main__":
    main()
