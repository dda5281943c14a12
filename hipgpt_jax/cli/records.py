"""``hipgpt-records``: joins and describes record files."""

import contextlib
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import absl.flags

from hipgpt_jax import config, files
from hipgpt_jax.cli import flags, output, program
from hipgpt_jax.records import merging, record, summary, writer
from hipgpt_jax.text import prompts

SUMMARY = """Merge record files, or summarize them.

merge joins the record files of several processes (hipgpt-generate --shard) into one, in order. Files of other settings,
weights or numerics are refused, and so are two different records of one sample; equal ones are kept once. Give the
prompts and the number of samples of the command, to learn which are missing; --only generates those. Examples:

  hipgpt-records merge part*.jsonl --output all.jsonl --num_samples 100 --missing missing.jsonl
  hipgpt-records summarize all.jsonl"""

FLAGS = absl.flags.FlagValues()
_string = functools.partial(absl.flags.DEFINE_string, flag_values=FLAGS)
_boolean = functools.partial(absl.flags.DEFINE_boolean, flag_values=FLAGS)
_COMMAND = absl.flags.DEFINE_multi_string(
    "command", [], "merge or summarize, and the record files; the flag's name may be omitted.", flag_values=FLAGS
)
_PROMPTS_FILE = _string("prompts_file", None, "File of prompts, all of whose samples must be there; as of the command.")
_PARSE_SPECIAL = _boolean("parse_special", False, "As of the command; part of the default id of a prompt.")
flags.define_field(FLAGS, config.GenerationConfig, "num_samples", num_samples=None)
flags.define_field(FLAGS, config.GenerationConfig, "first_sample")
_OUTPUT = _string("output", None, "The merged record file.")
_OVERWRITE = _boolean("overwrite", False, "Replace an existing --output.")
_MISSING = _string("missing", None, "File to list the missing samples in, for hipgpt-generate --only.")


def main() -> None:
    """Runs ``hipgpt-records``."""
    program.run("records", SUMMARY, FLAGS, _run, operand="command")


def _run() -> None:
    command, *names = _COMMAND.value or [""]
    if command not in ("merge", "summarize"):
        given = f"got {command!r}" if command else "give one"
        raise ValueError(f"the commands are merge and summarize: {given}; --help shows examples")
    if not names:
        raise ValueError(f"{command} needs record files, such as part*.jsonl")
    paths = [Path(name) for name in names]
    if missing := next((path for path in paths if not path.exists()), None):
        raise FileNotFoundError(f"record file not found: {missing}")
    if command == "merge":
        _merge(paths)
        return
    if given := [name for name in FLAGS if name != _COMMAND.name and FLAGS[name].present]:
        raise ValueError(f"--{given[0]} is a flag of merge: summarize has none")
    _summarize(paths)


def _merge(paths: list[Path]) -> None:
    target = Path(program.required(_OUTPUT))
    if files.is_stream(target) or output.is_stdout(str(target)):
        raise ValueError(f"--output {target} must be a file, which appears when it is complete")
    if target.exists() and not _OVERWRITE.value:
        raise ValueError(f"--output {target} exists: give another name, or --overwrite")
    if target.exists() and any(target.samefile(path) for path in paths):
        raise ValueError(f"--output {target} is one of the files to merge: give another name")
    missing = None if _MISSING.value is None else output.path_of(_MISSING.value)
    if missing is not None:
        if files.destination(missing) == files.destination(target):
            raise ValueError(f"--missing {missing} is the --output too: give another name")
        is_ours = functools.partial(output.begins_with, marker=b'"first_sample"')
        output.check("missing", missing, source=None, kind="list of samples", is_ours=is_ours)
    merger = merging.Merger(paths, target.resolve().parent, _grid())
    with contextlib.ExitStack() as stack:
        listed = None if missing is None else stack.enter_context(files.writing(missing))
        merged = stack.enter_context(writer.replacing(target))
        for part in merger.lines():
            if isinstance(part, bytes):
                merged.write(part)
            elif listed:
                name, samples = part
                line = {"id": name, "first_sample": samples.start, "num_samples": len(samples)}
                listed.write(f"{json.dumps(line, ensure_ascii=False)}\n")
        if not merger.samples:
            raise ValueError(f"no records in {', '.join(map(str, paths))}")
    for path in merger.torn:
        program.note(f"{path}: skipped an incomplete last line")
    duplicates = f", {merger.duplicates} equal records dropped" if merger.duplicates else ""
    program.note(f"{target}: {merger.samples} samples of {merger.prompts} prompts{duplicates}")
    if merger.missing:
        where = f"{_MISSING.value} lists them" if _MISSING.value else "--missing FILE lists them"
        raise ValueError(f"{target} lacks {merger.missing} samples: {where}, for hipgpt-generate --only")


def _grid() -> Iterable[tuple[str, range]] | range | None:
    """Returns the samples that must be there; None if the flags do not say."""
    number = FLAGS.num_samples
    generation = flags.build(config.GenerationConfig, FLAGS, num_samples=1 if number is None else number)
    if _PROMPTS_FILE.value is not None:
        several = prompts.PromptFile(Path(_PROMPTS_FILE.value), parse_special=_PARSE_SPECIAL.value)
        return ((prompt.name, prompt.samples(generation.samples)) for prompt in several)
    if _PARSE_SPECIAL.value:
        raise ValueError("--parse_special needs --prompts_file, whose prompts it applies to")
    if number is None and generation.first_sample:
        raise ValueError("--first_sample needs --num_samples")
    return None if number is None else generation.samples


def _summarize(paths: list[Path]) -> None:
    found = summary.Summary()
    for path in paths:
        for one in record.read(path):
            found.add(one)
    if not len(found):
        raise ValueError(f"no records in {', '.join(map(str, paths))}")
    for name, value in found.lines():
        print(f"{name:10} {program.printable(value)}")


if __name__ == "__main__":
    main()
