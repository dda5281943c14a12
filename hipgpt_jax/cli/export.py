"""``hipgpt-export``: a run as a Hugging Face GPT-2 folder."""

import functools
import os
from pathlib import Path

from absl import flags as absl_flags

from hipgpt_jax import config
from hipgpt_jax.cli import flags, output, program
from hipgpt_jax.report import card
from hipgpt_jax.runs import directory, export, loading

SUMMARY = """Write a run as a GPT-2 in Hugging Face's format: weights in float32, config, tokenizer and model card.
A folder that this program wrote before is replaced. Example:

  hipgpt-export --run-name shakespeare --output shakespeare-gpt2"""

FLAGS = absl_flags.FlagValues()
_RUN_NAME = flags.define_shared(FLAGS, "run-name")
_STEP = flags.define_shared(FLAGS, "step")
_OUTPUT = absl_flags.DEFINE_string("output", None, "The folder to write.", flag_values=FLAGS)


def main() -> None:
    """Runs ``hipgpt-export``."""
    program.run("export", SUMMARY, FLAGS, _export)


def _export() -> None:
    run, folder = program.required(_RUN_NAME), Path(program.required(_OUTPUT))
    step = directory.parse_step(_STEP.value)
    _check(folder)
    name, path = directory.parse_run(run)
    source = loading.open_run(name, step, config.DecodingConfig(), path)
    export.write(source, folder, functools.partial(card.write, source))
    program.note(f"{folder}: step {source.checkpoint.step} of {run}")


def _check(folder: Path) -> None:
    """Raises an error if the folder cannot be made, or exists and is not an export."""
    target = Path(os.path.realpath(folder))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--output {folder} cannot be written: there is no directory {target.parent}")
    if not target.exists():
        return
    names, found = set(os.listdir(target)), target / export.CARD
    is_ours = names <= export.NAMES and found.is_file() and output.begins_with(found, card.MARKER)
    if names and not is_ours:
        raise ValueError(f"--output {folder} exists and was not written by hipgpt-export: give another name")


if __name__ == "__main__":
    main()
