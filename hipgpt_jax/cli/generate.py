"""``hipgpt-generate``: text from a trained run."""

import dataclasses
import secrets
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from hipgpt_jax import config, devices
from hipgpt_jax.cli import program
from hipgpt_jax.runs import directory, weights
from hipgpt_jax.text import tokenizer

if TYPE_CHECKING:
    from hipgpt_jax.generation import sampler

SUMMARY = """Generate text from a trained run. The text goes to stdout as it is made, the facts to stderr.

The same weights, prompt, settings and seed give the same tokens, whatever --num_tokens, --num_samples and
streaming are. Examples:

  hipgpt-generate --prompt "To be, or not to be:" --run-name shakespeare
  hipgpt-generate --prompt "Once upon a time" --run-name my_run --step 1500 --temp 0.8 --seed 7"""

FLAGS = flags.FlagValues()
_SAMPLING, _DECODING, _GENERATION = config.SamplingConfig(), config.DecodingConfig(), config.GenerationConfig()

_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; at least one token.", flag_values=FLAGS)
_RUN_NAME = flags.DEFINE_string(
    "run-name", None, "Run to generate from: a directory in checkpoints/, or a run of the package.", flag_values=FLAGS
)
_STEP = flags.DEFINE_integer("step", None, "Training step to load; the latest if absent.", flag_values=FLAGS)
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
    "eos_id", _GENERATION.eos_id, "Token that ends the text and is not printed; -1 for none.", flag_values=FLAGS
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
_SEED = flags.DEFINE_integer(
    "seed", _GENERATION.seed, "Seed of the random numbers; -1 draws one and shows it.", flag_values=FLAGS
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", _GENERATION.num_samples, "Texts to generate.", flag_values=FLAGS)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", _DECODING.width, "Samples decoded side by side; part of the numerics.", flag_values=FLAGS
)
_STREAM = flags.DEFINE_boolean("stream", True, "Print each token when it is made.", flag_values=FLAGS)
_ECHO = flags.DEFINE_boolean("echo", False, "Print the prompt before its continuation.", flag_values=FLAGS)
_DEVICE = flags.DEFINE_string("device", "auto", f"One of {', '.join(devices.DEVICES)}.", flag_values=FLAGS)


@dataclasses.dataclass(kw_only=True)
class _Clock:
    """Times of one command, in seconds since it began, and the tokens it drew."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    loaded: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    tokens: int = 0

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def count_token(self) -> None:
        self.last_token = self.elapsed()
        self.first_token = self.first_token or self.last_token
        self.tokens += 1

    def summary(self) -> str:
        facts = [f"loaded in {self.loaded:.2f} s"]
        if self.tokens:
            facts.append(f"first token {self.first_token - self.loaded:.2f} s later")
        if self.tokens > 1:
            facts.append(f"then {(self.tokens - 1) / (self.last_token - self.first_token):.0f} tokens/s")
        return f"{self.tokens} tokens: {', '.join(facts)}, {self.elapsed():.2f} s in all"


def main() -> None:
    """Runs ``hipgpt-generate``."""
    program.run("generate", SUMMARY, FLAGS, _generate)


def _generate() -> None:
    clock = _Clock()
    prompt, run = program.required(_PROMPT), program.required(_RUN_NAME)
    decode, generation, sampling = _configs()
    checkpoint = directory.read_checkpoint(run, _STEP.value)
    decode.resolve_window(checkpoint.model)
    generation.check_vocabulary(checkpoint.model.vocab_size)
    checkpoint.verify()
    vocabulary = tokenizer.Tokenizer.load(checkpoint.tokenizer)
    if vocabulary.vocab_size != checkpoint.model.vocab_size:
        raise ValueError(
            f"{checkpoint.tokenizer} has {vocabulary.vocab_size} ids: the model in its config needs "
            f"{checkpoint.model.vocab_size}. Restore the tokenizer that the run was trained with"
        )
    prompt_ids = tuple(vocabulary.encode(prompt))
    if not prompt_ids:
        raise ValueError("--prompt is empty: it must hold at least one token")
    device = devices.start(_DEVICE.value, program.note)
    devices.use_compilation_cache(program.note)
    program.note(f"{checkpoint.run} step {checkpoint.step} of {_place(checkpoint)} on {device}, seed {generation.seed}")

    from hipgpt_jax.generation import sampler

    engine = sampler.Sampler(checkpoint.model, weights.read(checkpoint.weights, checkpoint.model), decode)
    first = sampler.Request(prompt_ids=prompt_ids, sample=0, generation=generation, sampling=sampling)
    requests = (dataclasses.replace(first, sample=i) for i in range(generation.num_samples))
    if dropped := engine.dropped(first):
        program.note(f"the prompt has {len(prompt_ids)} tokens: the first {dropped} are beyond the window and not read")
    clock.loaded = clock.elapsed()
    _write(
        vocabulary,
        sampler.in_order(engine.run(requests)),
        clock,
        before=vocabulary.decode(prompt_ids) if _ECHO.value else "",
    )
    program.note(clock.summary())


def _configs() -> tuple[config.DecodingConfig, config.GenerationConfig, config.SamplingConfig]:
    """The flags as validated values; a seed of -1 becomes a drawn one."""
    decode = config.DecodingConfig(
        window=_MAX_SEQ_LEN.value,
        window_stride=_WINDOW_STRIDE.value,
        overflow=_OVERFLOW.value,
        width=_BATCH_SIZE.value,
    )
    generation = config.GenerationConfig(
        num_tokens=_NUM_TOKENS.value,
        num_samples=_NUM_SAMPLES.value,
        seed=secrets.randbelow(config.MAX_SEED + 1) if _SEED.value == -1 else _SEED.value,
        eos_id=_EOS_ID.value,
    )
    sampling = config.SamplingConfig(
        temperature=_TEMP.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        repetition_penalty=_REP_PENALTY.value,
    )
    return decode, generation, sampling


def _place(checkpoint: directory.Checkpoint) -> str:
    return "the package" if checkpoint.directory.parent == directory.SHIPPED else f"{directory.CHECKPOINTS}/"


def _write(vocabulary: tokenizer.Tokenizer, events: Iterator["sampler.Event"], clock: _Clock, *, before: str) -> None:
    """Writes each sample, ``before`` first and a line end last, token by token where streaming was asked for."""
    decoder = None
    for event in events:
        if decoder is None:
            decoder = vocabulary.decoder()
            sys.stdout.write(before)
        if event.token is not None:
            clock.count_token()
            sys.stdout.write(decoder.push(event.token))
        else:
            sys.stdout.write(decoder.finish() + "\n")
            decoder = None
        if _STREAM.value:
            sys.stdout.flush()


if __name__ == "__main__":
    main()
