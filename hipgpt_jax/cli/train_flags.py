"""The flags of ``hipgpt-train``, and the validated values that they stand for."""

from typing import Any

from absl import flags

from hipgpt_jax import config, devices, training_config
from hipgpt_jax.cli import program
from hipgpt_jax.text import corpus

FLAGS = flags.FlagValues()
_MODEL, _TRAIN = config.ModelConfig(), training_config.TrainConfig()


def _string(name: str, default: str | None, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_string(name, default, text, flag_values=FLAGS)


def _integer(name: str, default: int | None, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_integer(name, default, text, flag_values=FLAGS)


def _float(name: str, default: float | None, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_float(name, default, text, flag_values=FLAGS)


def _boolean(name: str, text: str) -> flags.FlagHolder[bool]:
    return flags.DEFINE_boolean(name, False, text, flag_values=FLAGS)


DATA_PATH = flags.DEFINE_multi_string(
    "data-path",
    ["data/data.txt"],
    "Text to train on: a file or a directory, may be given again. A .jsonl file holds a document a line; .gz and .zst "
    "are read too. The last tenth is the validation split.",
    flag_values=FLAGS,
)
TEXT_FIELD = _string("text-field", corpus.DEFAULT_TEXT_FIELD, "Field of a .jsonl line that holds the text.")
TOKENIZER_PATH = _string(
    "tokenizer-path", None, "Ready-made tokenizer.json to take, GPT-2's for one, in place of learning one."
)
RUN_NAME = _string("run-name", None, "Name of the run; run_ and the time if absent.")
SEQ = _integer("seq", _MODEL.max_seq_len, "Context: tokens in a training sequence.")
VOCAB_SIZE = _integer("vocab-size", _MODEL.vocab_size, "Ids of the tokenizer, 256 upwards; 256 is plain bytes.")
_DIM = _integer("dim", _MODEL.embed_dim, "Width of the model.")
_HEADS = _integer("heads", _MODEL.num_heads, "Attention heads; they must divide the width.")
_FF = _integer("ff", _MODEL.ff_hidden_dim, "Width of the feed-forward layer.")
_LAYERS = _integer("layers", _MODEL.num_layers, "Transformer blocks.")
_BATCH = _integer("batch", _TRAIN.batch_size, "Sequences in a step.")
_STEPS = _integer("steps", _TRAIN.steps, "Optimizer steps in all; the schedule ends there.")
_LR = _float("lr", _TRAIN.learning_rate, "Peak learning rate.")
_WARMUP_STEPS = _integer("warmup-steps", _TRAIN.warmup_steps, "Steps of linear warm-up to the peak.")
_MIN_LR = _float("min-lr", _TRAIN.min_lr, "Learning rate at the last step; a tenth of --lr if absent.")
_BETA2 = _float("beta2", _TRAIN.beta2, "AdamW's decay of the second moment.")
_WEIGHT_DECAY = _float("weight-decay", _TRAIN.weight_decay, "AdamW's decay of matrices.")
_CLIP = _float("clip", _TRAIN.clip, "Largest global norm of the gradient.")
_DROPOUT = _float("dropout", _TRAIN.dropout, "Share of activations dropped while training.")
DTYPE = _string("dtype", _TRAIN.dtype, f"Type of the arithmetic: {' or '.join(config.DTYPES)}.")
_GRAD_ACCUM = _integer("grad-accum", _TRAIN.grad_accum, "Parts that a step's batch is computed in, to save memory.")
_REMAT = _boolean("remat", "Compute activations again for the backward pass, to save memory.")
_SEED = _integer("seed", _TRAIN.seed, "Seed of the weights, the data order and dropout.")
_LOG_EVERY = _integer("log-every", _TRAIN.log_every, "Steps between log lines.")
_EVAL_EVERY = _integer("eval-every", _TRAIN.eval_every, "Steps between evaluations; 0: with each checkpoint.")
_EVAL_BATCHES = _integer("eval-batches", _TRAIN.eval_batches, "Batches in an evaluation; 0: the whole split.")
SAMPLE_EVERY = _integer("sample-every", _TRAIN.sample_every, "Steps between samples of text; 0: none.")
SAMPLE_PROMPT = _string("sample-prompt", "\n", "Text that the samples continue.")
_CKPT_EVERY = _integer("ckpt-every", _TRAIN.ckpt_every, "Steps between checkpoints; 0: only the last.")
_KEEP_LAST = _integer("keep-last", _TRAIN.keep_last, "Checkpoints kept, the newest by step; and the best one.")
WEIGHTS_DTYPE = flags.DEFINE_enum(
    "weights-dtype", "float32", training_config.WEIGHTS_DTYPES, "Type of the weights on disk.", flag_values=FLAGS
)
TENSORBOARD = _boolean("tensorboard", "Write TensorBoard event files too, into the run's directory.")
RESET = _boolean("reset", "Start the run of this name again; the old one is deleted once the new one is saved.")
RESUME = _boolean("resume", "Go on from the newest saved state of the run.")
EXTEND = _boolean("extend", "With --resume: let --steps be more than the run was begun with.")
MESH = _string(
    "mesh", None, "Devices along data, fsdp and model, as data=4,model=2; as many on data as divide --batch if absent."
)
DISTRIBUTED = _boolean("distributed", "Join the other processes of a Slurm, Open MPI or Kubernetes job.")
COORDINATOR = _string("coordinator", None, "Address and port of process 0, for many processes without such a system.")
NUM_PROCESSES = _integer("num_processes", None, "Processes in all; with --coordinator.")
PROCESS_ID = _integer("process_id", None, "Number of this process, from 0; with --coordinator.")
DEVICE = _string("device", "auto", f"One of {', '.join(devices.DEVICES)}.")


def model_config(vocab_size: int) -> config.ModelConfig:
    """Returns the flags of the model as validated values, with the vocabulary that was learned."""
    return config.ModelConfig(
        vocab_size=vocab_size,
        max_seq_len=SEQ.value,
        embed_dim=_DIM.value,
        num_heads=_HEADS.value,
        ff_hidden_dim=_FF.value,
        num_layers=_LAYERS.value,
    )


def train_config() -> training_config.TrainConfig:
    """Returns the flags of training as validated values."""
    return training_config.TrainConfig(
        batch_size=_BATCH.value,
        steps=_STEPS.value,
        learning_rate=_LR.value,
        warmup_steps=_WARMUP_STEPS.value,
        min_lr=_MIN_LR.value,
        beta2=_BETA2.value,
        weight_decay=_WEIGHT_DECAY.value,
        clip=_CLIP.value,
        dropout=_DROPOUT.value,
        dtype=DTYPE.value,
        grad_accum=_GRAD_ACCUM.value,
        remat=_REMAT.value,
        seed=_SEED.value,
        log_every=_LOG_EVERY.value,
        eval_every=_EVAL_EVERY.value,
        eval_batches=_EVAL_BATCHES.value,
        sample_every=SAMPLE_EVERY.value,
        ckpt_every=_CKPT_EVERY.value,
        keep_last=_KEEP_LAST.value,
    )


def resume_command(run: str) -> str:
    """Returns the command that resumes a run: the flags as they were parsed, those of a flagfile too."""
    words = ["hipgpt-train", "--run-name", run]
    for name in FLAGS:
        flag = FLAGS[name]
        if not flag.present or flag.name != name or name in ("run-name", "reset", "resume", "extend", "flagfile"):
            continue
        if flag.boolean:
            words.append(f"--{'' if flag.value else 'no'}{name}")
        else:
            values: Any = flag.value if isinstance(flag, flags.MultiFlag) else [flag.value]
            words += [word for value in values for word in (f"--{name}", str(value))]
    return program.shell_command([*words, "--resume"])
