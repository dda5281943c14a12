"""The flags of ``hipgpt-train``."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import absl.flags

from hipgpt_jax import config, training_config
from hipgpt_jax.cli import flags, program
from hipgpt_jax.runs import directory

FLAGS = absl.flags.FlagValues()
_string = functools.partial(absl.flags.DEFINE_string, flag_values=FLAGS)
_integer = functools.partial(absl.flags.DEFINE_integer, flag_values=FLAGS)
_boolean = functools.partial(absl.flags.DEFINE_boolean, flag_values=FLAGS)

DATA_PATH = absl.flags.DEFINE_multi_string(
    "data-path",
    ["data/data.txt"],
    "Text to train on: a file or a directory; may be repeated. .jsonl, .csv and .parquet files have a document per "
    "line or row; .gz and .zst files are decompressed. The last tenth is the validation split.",
    flag_values=FLAGS,
)
TEXT_FIELD = flags.define_shared(FLAGS, "text-field")
TOKENIZER_PATH = _string(
    "tokenizer-path", None, "Existing tokenizer.json to use, for instance GPT-2's, instead of training one."
)
INIT_FROM = _string(
    "init-from",
    None,
    "Start from the weights, tokenizer and model size of another run, by name or path: RUN, RUN:STEP or RUN:best.",
)
RUN_NAME = _string(
    "run-name", None, "Name of the run, in checkpoints/, or the path of its directory; run_ and the time if absent."
)
flags.define_config(FLAGS, config.ModelConfig)
flags.define_config(FLAGS, training_config.TrainConfig)
SEEDS = absl.flags.DEFINE_list(
    "seeds",
    None,
    "Train one run per seed, such as 0,1,2, named by --run-name and _seed0, and print the mean of their losses.",
    flag_values=FLAGS,
)
SAMPLE_PROMPT = _string("sample-prompt", "\n", "Prompt of the text samples.")
WEIGHTS_DTYPE = absl.flags.DEFINE_enum(
    "weights-dtype", "float32", training_config.WEIGHTS_DTYPES, "Type of the weights on disk.", flag_values=FLAGS
)
TENSORBOARD = _boolean("tensorboard", False, "Also write TensorBoard event files into the run's directory.")
VERBOSE = _boolean("verbose", False, flags.VERBOSE_HELP)
RESET = _boolean("reset", False, "Replace the run of this name; the old one is deleted once the new one is saved.")
RESUME = _boolean("resume", False, "Continue from the newest saved state of the run.")
EXTEND = _boolean("extend", False, "With --resume: allow more --steps than the run was started with.")
MESH = _string(
    "mesh",
    None,
    "Devices per axis data, fsdp and model, such as data=4,model=2; if absent, as many on data as divide --batch.",
)
DISTRIBUTED = _boolean("distributed", False, "Join the other processes of a Slurm, Open MPI or Kubernetes job.")
COORDINATOR = _string("coordinator", None, "Address and port of process 0, for several processes without such a job.")
NUM_PROCESSES = _integer("num_processes", None, "Number of processes; with --coordinator.")
PROCESS_ID = _integer("process_id", None, "Index of this process, from 0; with --coordinator.")
DEVICE = flags.define_shared(FLAGS, "device")


# Flags that the command to resume has in its own way, or not; the initial weights are needed only once.
_NOT_RESUMED = ("run-name", "init-from", "reset", "resume", "extend", "flagfile")


def model_config(base: config.ModelConfig | None = None) -> config.ModelConfig:
    """Returns the model that the flags describe.

    Args:
        base: Sizes whose flags are absent; None takes the flags' defaults.
    """
    if base is None:
        return flags.build(config.ModelConfig, FLAGS)
    return dataclasses.replace(base, **flags.given(config.ModelConfig, FLAGS))


def train_config() -> training_config.TrainConfig:
    """Returns the training settings that the flags describe."""
    return flags.build(training_config.TrainConfig, FLAGS)


def seeds() -> list[int]:
    """Returns the seeds of ``--seeds``, or none.

    Raises:
        ValueError: One is not a seed or is given twice, or another flag contradicts ``--seeds``.
    """
    if SEEDS.value is None:
        return []
    numbers = [
        config.require_int(
            "--seeds", int(one) if one.isdigit() else one, 0, "seeds, separated by commas", config.MAX_SEED
        )
        for one in SEEDS.value
    ]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"--seeds must be different seeds, at least one: got {','.join(SEEDS.value)!r}")
    if FLAGS["seed"].present:
        raise ValueError("--seed and --seeds are both given: give one of them")
    if DISTRIBUTED.value or COORDINATOR.value:
        raise ValueError("--seeds trains one run after the other in this process: start one job per --seed instead")
    if RUN_NAME.value is None:
        raise ValueError("--seeds needs --run-name, to which _seed and the seed are added")
    return numbers


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Gives the flags the seed and the name of one of the runs of ``--seeds``, until the end of the block.

    ``--resume`` resumes those runs that exist.
    """
    own = f"{(RUN_NAME.value or '').rstrip('/')}_seed{seed}"
    resumes = RESUME.value and directory.can_resume(directory.new(own, FLAGS.steps))
    changes = {"seed": seed, "run-name": own, "resume": resumes, "extend": resumes and EXTEND.value}
    before = {flag: FLAGS[flag].value for flag in changes}
    try:
        for flag, value in changes.items():
            FLAGS[flag].value = value
        yield
    finally:
        for flag, value in before.items():
            FLAGS[flag].value = value


def resume_command(run: str) -> str:
    """Returns the command that resumes a run, with all flags that were given, also in flag files."""
    if SEEDS.value is not None:
        run = run.removesuffix(f"_seed{FLAGS.seed}")
    words = [*program.command("train"), "--run-name", run]
    for name in FLAGS:
        flag = FLAGS[name]
        if not flag.present or flag.name != name or name in _NOT_RESUMED:
            continue
        if flag.boolean:
            words.append(f"--{'' if flag.value else 'no'}{name}")
        else:
            values: Any = flag.value if isinstance(flag, absl.flags.MultiFlag) else [flag.value]
            if name == "seeds":
                values = [",".join(values[0])]
            words += [word for value in values for word in (f"--{name}", str(value))]
    return program.shell_command([*words, "--resume"])
