"""``hipgpt-import``: a Hugging Face GPT-2 folder as a run."""

from pathlib import Path

from absl import flags

from hipgpt_jax.cli import program
from hipgpt_jax.runs import huggingface, weights

SUMMARY = """Make a run of a GPT-2 in Hugging Face's format: a folder with config.json, model.safetensors (or its shards
and their index), and tokenizer.json (or vocab.json and merges.txt). Nothing is downloaded. Example:

  hipgpt-import gpt2 --run-name gpt2"""

FLAGS = flags.FlagValues()
_FOLDER = flags.DEFINE_string("folder", None, "The folder; the flag's name may be omitted.", flag_values=FLAGS)
_RUN_NAME = flags.DEFINE_string(
    "run-name", None, "Name of the new run, in checkpoints/, or the path of its directory.", flag_values=FLAGS
)


def main() -> None:
    """Runs ``hipgpt-import``."""
    program.run("import", SUMMARY, FLAGS, _import, operand="folder")


def _import() -> None:
    folder, run = Path(program.required(_FOLDER)), program.required(_RUN_NAME)
    source = huggingface.read(folder)
    path = huggingface.write_run(run, source)
    for line in source.notes:
        program.note(line)
    size = f"{weights.count(source.model) / 1e6:.1f}M parameters"
    end = "no end token" if source.end_id is None else f"end token {source.end_id}"
    program.note(f"{path}: {size}, context {source.model.max_seq_len}, vocabulary {source.model.vocab_size}, {end}")
    words = [*program.command("generate"), "--run-name", run, "--prompt", "TEXT"]
    program.note(f"done: {program.shell_command(words)}")


if __name__ == "__main__":
    main()
