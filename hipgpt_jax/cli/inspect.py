"""``hipgpt-inspect``: a record file as a page to read in a browser."""

from pathlib import Path

from absl import flags

from hipgpt_jax import files
from hipgpt_jax.cli import outputs, program
from hipgpt_jax.records import record
from hipgpt_jax.report import page

SUMMARY = """Write a record file as one HTML page: each token coloured by its surprise, its facts where you point.

The page holds all it needs and reaches no network. Alternatives are shown of samples that were recorded with
--top_logprobs 5. Example:

  hipgpt-inspect samples.jsonl --html samples.html"""

FLAGS = flags.FlagValues()
_RECORDS = flags.DEFINE_string(
    "records", None, "The record file; may be given without the flag's name.", flag_values=FLAGS
)
_HTML = flags.DEFINE_string(
    "html", None, "The page to write; an older page is replaced. - writes it to stdout.", flag_values=FLAGS
)
_TITLE = flags.DEFINE_string("title", None, "The page's title; the record file's name if absent.", flag_values=FLAGS)


def main() -> None:
    """Runs ``hipgpt-inspect``."""
    program.run("inspect", SUMMARY, FLAGS, _inspect, operand="records")


def _inspect() -> None:
    records, target = Path(program.required(_RECORDS)), outputs.path_of(program.required(_HTML))
    outputs.check(
        "html",
        target,
        source=records,
        kind="page of hipgpt-inspect",
        is_ours=lambda path: outputs.begins_with(path, page.MARKER),
    )
    made = page.Page(_TITLE.value or records.name)
    for sample in record.read(records):
        made.add(sample)
    if not made.samples:
        raise ValueError(f"{records} holds no whole record")
    if record.is_torn(records):
        program.note(f"{records}: the last line was cut short and is passed over")
    size = 0
    with files.writing(target) as file:
        for piece in made.html():
            size += len(piece)
            file.write(piece)
    made_of = f"{page.count(made.samples, 'sample')} of {page.count(made.prompts, 'prompt')}"
    program.note(f"{target}: {made_of}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
