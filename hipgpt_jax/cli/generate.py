"""``hipgpt-generate``: text from a trained run."""

import dataclasses
import re
import secrets
import sys

from absl import flags

from hipgpt_jax import api, compilation, config, devices
from hipgpt_jax.cli import program, writing
from hipgpt_jax.records import planning, provenance, writer
from hipgpt_jax.runs import directory, loading

SUMMARY = """Generate text from a trained run. The text goes to stdout as it is made, the facts to stderr.

The same weights, prompt, settings and seed give the same tokens, whatever --num_tokens, --num_samples and
streaming are. Examples:

  hipgpt-generate --prompt "To be, or not to be:" --run-name shakespeare
  hipgpt-generate --prompt "Once upon a time" --run-name my_run --step 1500 --temp 0.8 --seed 7"""

FLAGS = flags.FlagValues()
_ESCAPE = re.compile(r"\\[nrt]")  # typed, instead of the character that it means
_WIDE = 16  # rows whose logits may be more memory than glibc keeps
_SAMPLING, _DECODING, _GENERATION = config.SamplingConfig(), config.DecodingConfig(), config.GenerationConfig()

_PROMPT = flags.DEFINE_string(
    "prompt",
    None,
    "Text to continue, at least one token; - reads it from stdin, without one final line break.",
    flag_values=FLAGS,
)
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "File of prompts instead: one per line, or in a .jsonl file one JSON object per line, with prompt, id, seed, "
    "num_samples, num_tokens, eos_id, stop, temp, top_k, top_p, rep_penalty; also .gz or .zst. - reads stdin.",
    flag_values=FLAGS,
)
_RUN_NAME = flags.DEFINE_string(
    "run-name", None, "Run to generate from: a directory in checkpoints/, or a run of the package.", flag_values=FLAGS
)
_STEP = flags.DEFINE_string(
    "step",
    None,
    "Training step to load, or best: that of the lowest validation loss; the latest if absent.",
    flag_values=FLAGS,
)
_NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", _GENERATION.num_tokens, "New tokens after the prompt.", flag_values=FLAGS
)
_MAX_SEQ_LEN = flags.DEFINE_integer(
    "max_seq_len", None, "Tokens the model sees at most; the run's own context if absent.", flag_values=FLAGS
)
_WINDOW_STRIDE = flags.DEFINE_integer(
    "window_stride",
    _DECODING.window_stride,
    "Tokens dropped at a time once the window is full; 1 is exact, N recomputes every N tokens.",
    flag_values=FLAGS,
)
_OVERFLOW = flags.DEFINE_string(
    "overflow",
    _DECODING.overflow,
    "When the window is full: roll it, stop the sample there, or refuse as an error.",
    flag_values=FLAGS,
)
_EOS_ID = flags.DEFINE_integer(
    "eos_id",
    None,
    "Token that ends the text and is not printed; -1 for none. If absent that of the run, where it was trained on "
    "several documents, else none.",
    flag_values=FLAGS,
)
_TOP_K = flags.DEFINE_integer(
    "top_k", _SAMPLING.top_k, "Keep the k most likely tokens; 0 keeps all.", flag_values=FLAGS
)
_TEMP = flags.DEFINE_float(
    "temp", _SAMPLING.temperature, "Temperature; 0 takes the most likely token.", flag_values=FLAGS
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    _SAMPLING.top_p,
    "Keep the smallest set of tokens whose probability reaches p; 1 keeps all.",
    flag_values=FLAGS,
)
_REP_PENALTY = flags.DEFINE_float(
    "rep-penalty",
    _SAMPLING.repetition_penalty,
    "Penalty on tokens already in the text, once each; 1 is none.",
    flag_values=FLAGS,
)
_STOP = flags.DEFINE_multi_string(
    "stop", list(_GENERATION.stop), "Text that ends a sample and is cut off; may be given again.", flag_values=FLAGS
)
_SEED = flags.DEFINE_integer(
    "seed", _GENERATION.seed, "Seed of the random numbers; -1 draws one and shows it.", flag_values=FLAGS
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", _GENERATION.num_samples, "Texts to generate.", flag_values=FLAGS)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", _DECODING.width, "Samples decoded side by side; part of the numerics.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_string(
    "dtype",
    _DECODING.dtype,
    f"Type of the arithmetic, {' or '.join(config.DTYPES)}; part of the numerics.",
    flag_values=FLAGS,
)
_STREAM = flags.DEFINE_boolean("stream", True, "Print each token when it is made.", flag_values=FLAGS)
_ECHO = flags.DEFINE_boolean("echo", False, "Print the prompt before its continuation.", flag_values=FLAGS)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "File to append a record of each sample to, a JSON line; a finished sample in it is not made again. - writes the "
    "records to stdout, in place of the text. Records of a --prompts_file are written in place of the text too.",
    flag_values=FLAGS,
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace the records in --output.", flag_values=FLAGS)
_TOP_LOGPROBS = flags.DEFINE_integer(
    "top_logprobs",
    _GENERATION.top_logprobs,
    f"Alternatives to record with each token, up to {config.MAX_ALTERNATIVES}.",
    flag_values=FLAGS,
)
_DEVICE = flags.DEFINE_string("device", "auto", f"One of {', '.join(devices.DEVICES)}.", flag_values=FLAGS)


def main() -> None:
    """Runs ``hipgpt-generate``."""
    program.run("generate", SUMMARY, FLAGS, _generate)


def _generate() -> None:
    origin = provenance.Origin(argv=provenance.arguments("hipgpt-generate", sys.argv))
    run_name = program.required(_RUN_NAME)
    decode, generation, sampling = _configs()
    if _OUTPUT.value in (None, "-"):
        program.require_stdout("the text")
    several = program.read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
    found = loading.open_run(run_name, directory.parse_step(_STEP.value), decode)
    if _EOS_ID.value is None:
        generation = dataclasses.replace(generation, eos_id=found.checkpoint.eos_id)
    with writing.open_output(_OUTPUT.value, overwrite=_OVERWRITE.value, inputs=[_PROMPTS_FILE.value]) as out:
        records = out if isinstance(out, writer.Output) else None
        if _SEED.value == -1:
            generation = dataclasses.replace(generation, seed=_draw_seed(records))
        plan = planning.Plan(found, several, sampling, generation, records)
        device = devices.start(_DEVICE.value, program.note)
        compilation.use_cache(program.note)
        program.note_emulation(device.platform, decode.dtype)
        if device.platform == "cpu" and decode.width >= _WIDE:
            program.keep_freed_memory()  # a step of 64 rows of GPT-2 takes 132 ms instead of 163
        step = found.checkpoint
        program.note(f"{step.run} step {step.step} of {_place(step)} on {device}, seed {generation.seed}")
        run = api.Run(found, device, origin)
        if records:
            records.require_shared(run.recorder.shared_basis())
        shows_text = out is None or (out is not sys.stdout and not _PROMPTS_FILE.value)
        if records:
            program.outlive_stdout(matters=shows_text)
        writing.write(run, plan, out, shows_text=shows_text, stream=_STREAM.value, echo=_ECHO.value)


def _draw_seed(records: writer.Output | None) -> int:
    """Returns the seed for ``--seed -1``: that of the records in the output, so that a command can be run again."""
    seeds = records.seeds if records else set()
    if not seeds:
        return secrets.randbelow(config.MAX_SEED + 1)
    if len(seeds) > 1:
        raise ValueError("--seed -1 goes on with the seed in --output, and that has records of several: give --seed")
    return next(iter(seeds))


def _configs() -> tuple[config.DecodingConfig, config.GenerationConfig, config.SamplingConfig]:
    """Returns the flags as validated settings; for a seed of -1, which is drawn later, with seed 0."""
    decode = config.DecodingConfig(
        window=_MAX_SEQ_LEN.value,
        window_stride=_WINDOW_STRIDE.value,
        overflow=_OVERFLOW.value,
        width=_BATCH_SIZE.value,
        dtype=_DTYPE.value,
    )
    generation = config.GenerationConfig(
        num_tokens=_NUM_TOKENS.value,
        num_samples=_NUM_SAMPLES.value,
        seed=0 if _SEED.value == -1 else _SEED.value,
        eos_id=_GENERATION.eos_id if _EOS_ID.value is None else _EOS_ID.value,
        stop=tuple(_STOP.value),
        top_logprobs=_TOP_LOGPROBS.value,
    )
    for text in filter(_ESCAPE.search, generation.stop):
        program.note(
            f"--stop {program.printable(text)!r} holds a backslash and a letter: a line break is $'\\n' in bash"
        )
    if generation.top_logprobs and _OUTPUT.value is None:
        raise ValueError("--top_logprobs is for the record: give --output too")
    if _OVERWRITE.value and (_OUTPUT.value is None or writing.is_stdout(_OUTPUT.value)):
        raise ValueError("--overwrite is for the record file: give --output too")
    sampling = config.SamplingConfig(
        temperature=_TEMP.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        repetition_penalty=_REP_PENALTY.value,
    )
    return decode, generation, sampling


def _place(checkpoint: directory.Checkpoint) -> str:
    return "the package" if checkpoint.directory.parent == directory.SHIPPED else f"{directory.CHECKPOINTS}/"


if __name__ == "__main__":
    main()
