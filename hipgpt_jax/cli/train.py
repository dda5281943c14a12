"""``hipgpt-train``: a run from a text."""

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from hipgpt_jax import config, devices
from hipgpt_jax.cli import program
from hipgpt_jax.runs import directory
from hipgpt_jax.text import dataset

if TYPE_CHECKING:
    from hipgpt_jax.training import loop

SUMMARY = """Train a GPT-2-style model on a text, into checkpoints/[run-name]/. Log lines go to stdout. Examples:

  hipgpt-train --data-path data/data.txt --run-name my_run
  hipgpt-train --flagfile=configs/shakespeare.flags"""

FLAGS = flags.FlagValues()
_MODEL, _TRAIN = config.ModelConfig(), config.TrainConfig()


def _integer(name: str, default: int, text: str) -> flags.FlagHolder[int]:
    return flags.DEFINE_integer(name, default, text, flag_values=FLAGS)


def _float(name: str, default: float | None, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_float(name, default, text, flag_values=FLAGS)


_DATA_PATH = flags.DEFINE_string(
    "data-path", "data/data.txt", "Text file to train on; its last tenth is the validation split.", flag_values=FLAGS
)
_RUN_NAME = flags.DEFINE_string("run-name", None, "Name of the run; run_ and the time if absent.", flag_values=FLAGS)
_SEQ = _integer("seq", _MODEL.max_seq_len, "Context: tokens in a training sequence.")
_VOCAB_SIZE = _integer("vocab-size", _MODEL.vocab_size, "Ids of the tokenizer, 256 upwards; 256 is plain bytes.")
_DIM = _integer("dim", _MODEL.embed_dim, "Width of the model.")
_HEADS = _integer("heads", _MODEL.num_heads, "Attention heads; they must divide the width.")
_FF = _integer("ff", _MODEL.ff_hidden_dim, "Width of the feed-forward layer.")
_LAYERS = _integer("layers", _MODEL.num_layers, "Transformer blocks.")
_BATCH = _integer("batch", _TRAIN.batch_size, "Sequences in a step.")
_STEPS = _integer("steps", _TRAIN.steps, "Optimizer steps in all.")
_LR = _float("lr", _TRAIN.learning_rate, "Peak learning rate.")
_WARMUP_STEPS = _integer("warmup-steps", _TRAIN.warmup_steps, "Steps of linear warm-up to the peak.")
_MIN_LR = _float("min-lr", _TRAIN.min_lr, "Learning rate at the last step; a tenth of --lr if absent.")
_BETA2 = _float("beta2", _TRAIN.beta2, "AdamW's decay of the second moment.")
_WEIGHT_DECAY = _float("weight-decay", _TRAIN.weight_decay, "AdamW's decay of matrices.")
_CLIP = _float("clip", _TRAIN.clip, "Largest global norm of the gradient.")
_DROPOUT = _float("dropout", _TRAIN.dropout, "Share of activations dropped while training.")
_SEED = _integer("seed", _TRAIN.seed, "Seed of the weights, the data order and dropout.")
_LOG_EVERY = _integer("log-every", _TRAIN.log_every, "Steps between log lines.")
_EVAL_EVERY = _integer("eval-every", _TRAIN.eval_every, "Steps between evaluations; 0: with each checkpoint.")
_EVAL_BATCHES = _integer("eval-batches", _TRAIN.eval_batches, "Batches in an evaluation; 0: the whole split.")
_CKPT_EVERY = _integer("ckpt-every", _TRAIN.ckpt_every, "Steps between checkpoints; 0: only the last.")
_KEEP_LAST = _integer("keep-last", _TRAIN.keep_last, "Checkpoints kept, the newest by step.")
_WEIGHTS_DTYPE = flags.DEFINE_enum(
    "weights-dtype", "float32", ["float32", "float16"], "Type of the weights on disk.", flag_values=FLAGS
)
_RESET = flags.DEFINE_boolean("reset", False, "Delete the run of this name and start it anew.", flag_values=FLAGS)
_RESUME = flags.DEFINE_boolean("resume", False, "Go on from the newest saved state of the run.", flag_values=FLAGS)
_DEVICE = flags.DEFINE_string("device", "auto", f"One of {', '.join(devices.DEVICES)}.", flag_values=FLAGS)


def main() -> None:
    """Runs ``hipgpt-train``."""
    program.run("train", SUMMARY, FLAGS, _train)


def _train() -> None:
    train = train_config()
    model_config(_VOCAB_SIZE.value)
    run = directory.check_name(_RUN_NAME.value or time.strftime("run_%Y%m%d-%H%M%S"))
    run_directory = directory.CHECKPOINTS / run
    _check_start(run_directory)
    device = devices.start(_DEVICE.value, program.note)
    devices.use_compilation_cache(program.note)
    data = _prepare(run_directory, Path(_DATA_PATH.value))
    model = model_config(data.manifest.vocab_size)
    if data.manifest.vocab_size < _VOCAB_SIZE.value:
        program.note(f"the text gave {data.manifest.vocab_size} ids, fewer than --vocab-size {_VOCAB_SIZE.value}")
    program.note(
        f"run {run} on {device}: {data.manifest.train_tokens} training and "
        f"{data.manifest.validation_tokens} validation tokens"
    )

    from hipgpt_jax.training import checkpoint, loop

    if _RESUME.value:
        checkpoint.require_same(run_directory, model, train)
    with _reporting(train.steps) as report:
        loop.train(run_directory, data, model, train, report, resume=_RESUME.value, weights_dtype=_WEIGHTS_DTYPE.value)
    program.note(f"done: hipgpt-generate --run-name {run} --prompt TEXT")


def _check_start(run_directory: Path) -> None:
    """Decides between a new run, a resumed one and one started anew, before anything is written."""
    if _RESET.value and _RESUME.value:
        raise ValueError("--reset deletes the run and --resume goes on with it: give one of them")
    if not _RESET.value and (run_directory / dataset.MANIFEST_NAME).is_file():
        dataset.require_same(run_directory, Path(_DATA_PATH.value), _VOCAB_SIZE.value)
    begun = directory.is_begun(run_directory)
    if _RESUME.value and not begun:
        raise FileNotFoundError(f"run {run_directory.name!r} has nothing to resume in {directory.CHECKPOINTS}/")
    if begun and not (_RESET.value or _RESUME.value):
        raise ValueError(
            f"run {run_directory.name!r} exists already: --resume goes on with it, --reset deletes it and starts anew"
        )
    if not (begun or _RESET.value) and _holds_something_else(run_directory):
        raise ValueError(f"{run_directory} exists and is no run: give another --run-name, or --reset to delete it")


def _holds_something_else(run_directory: Path) -> bool:
    """Whether a directory holds more than what a run that was cut short before its first checkpoint leaves."""
    known = {dataset.MANIFEST_NAME, dataset.TOKENIZER_NAME, dataset.TOKENS_NAME}
    known |= {directory.METRICS_NAME, directory.TRAIN_STATE_NAME}
    if not run_directory.is_dir():
        return run_directory.exists()
    return any(path.name not in known and not path.name.endswith(".tmp") for path in run_directory.iterdir())


def _prepare(run_directory: Path, source: Path) -> dataset.Dataset:
    """Prepares the data beside the run, and moves it into place, over the old run at a reset, when it is whole."""
    if _RESUME.value:
        return dataset.Dataset(run_directory)  # _check_start has held it against the flags
    fresh = run_directory.with_name(f".{run_directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        dataset.prepare(fresh, source, _VOCAB_SIZE.value).check_length(_SEQ.value)
        shutil.rmtree(run_directory, ignore_errors=True)
        fresh.rename(run_directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return dataset.Dataset(run_directory)


def model_config(vocab_size: int) -> config.ModelConfig:
    """Returns the flags of the model as validated values, with the vocabulary that was learned."""
    return config.ModelConfig(
        vocab_size=vocab_size,
        max_seq_len=_SEQ.value,
        embed_dim=_DIM.value,
        num_heads=_HEADS.value,
        ff_hidden_dim=_FF.value,
        num_layers=_LAYERS.value,
    )


def train_config() -> config.TrainConfig:
    """Returns the flags of training as validated values."""
    return config.TrainConfig(
        batch_size=_BATCH.value,
        steps=_STEPS.value,
        learning_rate=_LR.value,
        warmup_steps=_WARMUP_STEPS.value,
        min_lr=_MIN_LR.value,
        beta2=_BETA2.value,
        weight_decay=_WEIGHT_DECAY.value,
        clip=_CLIP.value,
        dropout=_DROPOUT.value,
        seed=_SEED.value,
        log_every=_LOG_EVERY.value,
        eval_every=_EVAL_EVERY.value,
        eval_batches=_EVAL_BATCHES.value,
        ckpt_every=_CKPT_EVERY.value,
        keep_last=_KEEP_LAST.value,
    )


@contextlib.contextmanager
def _reporting(steps: int) -> Iterator["loop.Report"]:
    """Log lines on stdout, and a progress bar on stderr where that is a terminal."""
    from rich import console, progress

    from hipgpt_jax.training import loop

    columns = (
        progress.TextColumn("step {task.completed}/{task.total}"),
        progress.BarColumn(),
        progress.TextColumn("loss {task.fields[loss]:.3f}"),
        progress.TimeRemainingColumn(),
    )
    terminal = console.Console(stderr=True)
    bar = progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal)
    if terminal.is_terminal and sys.stdout.isatty():  # on one screen the bar must make way for a line
        line = functools.partial(terminal.print, soft_wrap=True, markup=False, highlight=False)
    else:
        line = functools.partial(print, flush=True)
    with bar:
        task = bar.add_task("train", total=steps, loss=float("nan"))
        yield loop.Report(
            line=line,
            progress=lambda step, loss: bar.update(task, completed=step, loss=loss),
        )


if __name__ == "__main__":
    main()
