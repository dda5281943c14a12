"""``hipgpt-replay``: records made anew."""

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from hipgpt_jax import api, compilation, config, devices
from hipgpt_jax.cli import program
from hipgpt_jax.generation import replay, source
from hipgpt_jax.runs import provenance, record
from hipgpt_jax.text import tokenizer

if TYPE_CHECKING:
    from hipgpt_jax.generation import samples

SUMMARY = """Make the samples of a record file anew and compare them token by token. A line for each record, and a
summary. Exit code 0 when all are identical, 1 when any differs, 2 when any could not be tried. Examples:

  hipgpt-replay samples.jsonl
  hipgpt-replay samples.jsonl --ids da0bdec7fe17f901,story-7 --run-dir backup/my_run
  hipgpt-replay samples.jsonl --device cuda --batch_size 16"""

FLAGS = flags.FlagValues()

_RECORDS = flags.DEFINE_string(
    "records", None, "The record file; may be given without the flag's name.", flag_values=FLAGS
)
_IDS = flags.DEFINE_list("ids", None, "Prompt ids to replay, with commas; all if absent.", flag_values=FLAGS)
_RUN_DIR = flags.DEFINE_string(
    "run-dir", None, "Directory of the run; checkpoints/ or the package if absent.", flag_values=FLAGS
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Decode width; the record's own if absent. Another one is other arithmetic.", flag_values=FLAGS
)
_DEVICE = flags.DEFINE_string(
    "device",
    "auto",
    f"One of {', '.join(devices.DEVICES)}. Another platform than the record's is other arithmetic.",
    flag_values=FLAGS,
)


def main() -> None:
    """Runs ``hipgpt-replay``."""
    program.run("replay", SUMMARY, FLAGS, _replay, operand="records", error_code=2)


@dataclasses.dataclass
class _Tally:
    """What became of the records so far."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    logprob_error: float = 0.0
    changes: set[str] = dataclasses.field(default_factory=set)

    @property
    def exit_code(self) -> int:
        return 1 if self.counts["differs"] else 2 if self.counts["not tried"] else 0

    def summary(self) -> str:
        total = sum(self.counts[verdict] for verdict in ("identical", "differs", "not tried"))
        parts = [f"{self.counts['identical']} of {total} identical"]
        if self.counts["differs"]:
            parts.append(f"{self.counts['differs']} differ ({self.counts['rounding']} within floating-point error)")
        if self.counts["not tried"]:
            parts.append(f"{self.counts['not tried']} could not be tried")
        if self.logprob_error:
            parts.append(f"log-probabilities within {self.logprob_error:.1e}")
        elif self.counts["identical"]:
            parts.append("log-probabilities equal to the bit")
        return ", ".join(parts)


def _replay() -> None:
    path = Path(program.required(_RECORDS))
    chosen = None if _IDS.value is None else set(_IDS.value)
    if chosen is not None and not chosen:
        raise ValueError("--ids names no id")
    _check(path, chosen)
    if record.is_torn(path):
        program.note(f"{path}: the last line was cut short and is passed over")
    records = (one for one in record.read(path) if chosen is None or one.id in chosen)
    device = devices.start(_DEVICE.value, program.note)
    compilation.use_cache(program.note)
    tally = _Tally()
    load = functools.lru_cache(maxsize=2)(_load)
    for key, group in itertools.groupby(records, lambda one: (one.run, replay.decoding_of(one, _BATCH_SIZE.value))):
        for line in _lines(tally, functools.partial(load, *key, device), group):
            print(line, flush=True)
    for change in sorted(tally.changes):
        print(f"changed    {change}")
    print(tally.summary())
    sys.exit(tally.exit_code)


def _check(path: Path, chosen: set[str] | None) -> None:
    """Reads the whole file once, so that a bad line or an unknown id is told before anything is tried."""
    ids = {one.id for one in record.read(path)}
    if not ids:
        raise ValueError(f"{path} holds no record")
    if unknown := sorted((chosen or set()) - ids):
        raise ValueError(f"{path} has no record of the id {unknown[0]!r}. Ids: {', '.join(sorted(ids)[:20])}")


def _lines(tally: _Tally, load: Callable[[], api.Run], records: Iterator[record.Record]) -> Iterator[str]:
    """Yields a line for each record of one run and one window, and counts it."""
    try:
        run = load()
    except (OSError, ValueError) as error:
        for one in records:
            yield _not_tried(tally, one, error)
        return
    waiting: collections.deque[record.Record] = collections.deque()
    refused: list[str] = []

    def jobs() -> "Iterator[samples.Job]":
        for one in records:
            try:
                job = run.job_of(one)
            except ValueError as error:
                refused.append(_not_tried(tally, one, error))
                continue
            waiting.append(one)
            yield job

    try:
        for found in run.records_of(jobs()):
            yield from refused
            refused.clear()
            yield _compared(tally, replay.compare(waiting.popleft(), found), run.source.vocabulary)
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        refused += [_not_tried(tally, one, error) for one in (*waiting, *records)]
    yield from refused


def _load(named: record.Run, decoding: config.DecodingConfig, device: devices.Device) -> api.Run:
    """Loads the run that a record names; raises ValueError, with both digests, where its files are others."""
    where = None if _RUN_DIR.value is None else Path(_RUN_DIR.value)
    found = source.open_run(named.name, named.step, decoding, where)
    files = found.checkpoint
    for what, old, new in (
        ("weights", named.weights_sha256, files.weights_sha256),
        ("tokenizer", named.tokenizer_sha256, files.tokenizer_sha256),
    ):
        if old != new:
            raise ValueError(f"other {what}: sha256 {old} in the record, {new} in {files.directory}")
    return api.Run(found, device, provenance.Origin())


def _not_tried(tally: _Tally, one: record.Record, error: Exception) -> str:
    tally.counts["not tried"] += 1
    return f"not tried  {one.id} sample {one.sample}: {' '.join(str(error).split())}"


def _compared(tally: _Tally, result: replay.Comparison, vocabulary: tokenizer.Tokenizer) -> str:
    old, new, difference = result.recorded, result.found, result.difference
    tally.logprob_error = max(tally.logprob_error, result.logprob_error)
    tally.changes |= _changes(old, new)
    name = f"{old.id} sample {old.sample}"
    if difference is None and not result.altered:
        tally.counts["identical"] += 1
        return f"identical  {name}: {len(old.ids)} tokens"
    tally.counts["differs"] += 1
    if difference is None:
        return f"differs    {name}: its ids are the same, but not its {' and '.join(result.altered)}: was it changed?"
    tally.counts["rounding"] += difference.is_rounding

    def show(token: int | None, reason: str) -> str:
        return f"the end ({reason})" if token is None else f"{token} {vocabulary.show(token)!r}"

    verdict = "within floating-point error" if difference.is_rounding else "more than floating-point error explains"
    margins = "" if difference.margin is None else f"; margin {difference.margin:.2g}, gap {difference.gap:.2g}"
    return (
        f"differs    {name}: token {difference.place} is {show(difference.recorded, old.finish_reason)} in the record, "
        f"{show(difference.found, new.finish_reason)} now{margins}: {verdict}"
    )


def _changes(old: record.Record, new: record.Record) -> set[str]:
    """What differs between the making of the record and this one."""
    pairs = [
        (name, before, getattr(group, name))
        for part, group in ((old.numerics, new.numerics), (old.versions, new.versions))
        for name, before in vars(part).items()
    ]
    pairs.append(("config_sha256", old.run.config_sha256, new.run.config_sha256))
    return {f"{name}: {before} in the record, {now} now" for name, before, now in pairs if before != now}


if __name__ == "__main__":
    main()
