"""``hipgpt-inspect``: a record file as an HTML page."""

import functools
from pathlib import Path

import absl.flags

from hipgpt_jax import files
from hipgpt_jax.cli import flags, output, program
from hipgpt_jax.records import record
from hipgpt_jax.report import page

SUMMARY = """Write a record file as one HTML page: each token coloured by its surprise, with details on hover.

The page is self-contained and makes no network requests. It shows alternatives of samples that were recorded with
--top_logprobs 5. Example:

  hipgpt-inspect samples.jsonl --html samples.html"""

FLAGS = absl.flags.FlagValues()
_string = functools.partial(absl.flags.DEFINE_string, flag_values=FLAGS)
_RECORDS = flags.define_shared(FLAGS, "records")
_HTML = _string("html", None, "The page to write; an existing page is replaced. - writes to stdout.")
_TITLE = _string("title", None, "Title of the page; the record file's name if absent.")


def main() -> None:
    """Runs ``hipgpt-inspect``."""
    program.run("inspect", SUMMARY, FLAGS, _inspect, operand="records")


def _inspect() -> None:
    records, target = Path(program.required(_RECORDS)), output.path_of(program.required(_HTML))
    output.check(
        "html",
        target,
        source=records,
        kind="page of hipgpt-inspect",
        is_ours=lambda path: output.begins_with(path, page.MARKER),
    )
    document = page.Page(_TITLE.value or records.name)
    is_torn = False
    for line in record.lines(records):
        if is_torn := line.is_torn:
            break
        document.add(record.parse(line.text, f"{records} line {line.number}"))
    if not document.samples:
        raise ValueError(f"{records} has no complete record")
    if is_torn:
        program.note(f"{records}: skipped an incomplete last line")
    size = 0
    with files.writing(target) as file:
        for piece in document.html():
            size += len(piece)
            file.write(piece)
    contents = f"{page.count(document.samples, 'sample')} of {page.count(document.prompts, 'prompt')}"
    program.note(
        f"{target}: {contents}, {size / 1e6:.1f} MB" if size >= 1e6 else f"{target}: {contents}, {size // 1000} kB"
    )


if __name__ == "__main__":
    main()
