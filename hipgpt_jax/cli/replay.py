"""``hipgpt-replay``: regenerates samples and compares them with their records."""

import collections
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import absl.flags
import numpy as np

from hipgpt_jax import api, config, devices
from hipgpt_jax.cli import flags, program
from hipgpt_jax.records import provenance, record, replay
from hipgpt_jax.runs import loading
from hipgpt_jax.text import tokenizer

if TYPE_CHECKING:
    from hipgpt_jax.generation import requests
    from hipgpt_jax.records import comparison

SUMMARY = """Regenerate the samples of a record file and compare them token by token: ids, text, log-probabilities,
ranks, leads, cuts, alternatives. Prints one line per record and a summary. The exit code is 0 if all are identical,
1 if any differs, else 2 if any was skipped. With --forced, the recorded ids are fed to the model and every token is
drawn again: a fast check of all tokens, which passes those that differ by rounding; docs/records.md tells which
changes it sees. Examples:

  hipgpt-replay samples.jsonl
  hipgpt-replay samples.jsonl --ids da0bdec7fe17f901,story-7 --run-dir backup/my_run
  hipgpt-replay samples.jsonl --device cuda --batch_size 16
  hipgpt-replay samples.jsonl --forced"""

FLAGS = absl.flags.FlagValues()
_RECORDS = flags.define_shared(FLAGS, "records")
_IDS = absl.flags.DEFINE_list(
    "ids", None, "Ids of the prompts to replay, separated by commas; all if absent.", flag_values=FLAGS
)
_RUN_DIR = absl.flags.DEFINE_string(
    "run-dir", None, "Directory of the run; found by its name if absent.", flag_values=FLAGS
)
_BATCH_SIZE = absl.flags.DEFINE_integer(
    "batch_size",
    None,
    "Batch size; the record's own if absent, or 16. Another one rounds differently, except with invariant numerics.",
    lower_bound=1,
    flag_values=FLAGS,
)
_MESH = absl.flags.DEFINE_string(
    "mesh",
    None,
    "Share the model between N devices: model=N; the record's own if absent. Another mesh rounds differently.",
    flag_values=FLAGS,
)
_FORCED = absl.flags.DEFINE_boolean(
    "forced",
    False,
    "Feed the recorded ids to the model and draw each again, instead of generating them; 0 if rounding explains all.",
    flag_values=FLAGS,
)
_DEVICE = flags.define_shared(FLAGS, "device")


_MOST_SHOWN = 3  # tokens per record


def main() -> None:
    """Runs ``hipgpt-replay``."""
    program.run("replay", SUMMARY, FLAGS, _replay, operand="records", error_code=2)


@dataclasses.dataclass
class _Tally:
    """Verdicts so far.

    Attributes:
        counts: Records per verdict: identical, agrees, differs, skipped; those that differ only by rounding; and tokens
            that are drawn otherwise by rounding.
        logprob_error: Largest difference of a log-probability in identical records, or with --forced in all.
        changes: Lines about software and numerics that differ between records and replay.
        unused: Records that are identical or agree per setting that had no effect on them.
        tokens: Tokens that were drawn again.
        unexplained: Those that rounding does not explain.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    logprob_error: float = 0.0
    changes: set[str] = dataclasses.field(default_factory=set)
    unused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0
    unexplained: int = 0

    @property
    def exit_code(self) -> int:
        return 1 if self.counts["differs"] else 2 if self.counts["skipped"] else 0

    def screening(self) -> str:
        """Returns the statement about all tokens that were drawn again."""
        limit = _largest_share(self.unexplained, self.tokens) * 100_000
        skipped = f"; {self.counts['skipped']} records skipped" if self.counts["skipped"] else ""
        return (
            f"{self.unexplained} of {self.tokens:,} tokens unexplained, {self.counts['redrawn']} differ within "
            f"floating-point error: at 95 % confidence, fewer than {_rounded(limit)} in 100,000 are unexplained; "
            f"largest log-probability error {self.logprob_error:.0e}{skipped}"
        )

    def unused_settings(self) -> str:
        """Returns the settings that ``unused`` records do not verify, grouped by their number of records."""
        names: dict[int, list[str]] = {}
        for name, count in self.unused.items():
            names.setdefault(count, []).append(name)
        groups = sorted(names.items(), reverse=True)
        return ", ".join(f"{', '.join(group)} ({count} record{'s' * (count > 1)})" for count, group in groups)

    def summary(self) -> str:
        counts, verdict = self.counts, "agree" if _FORCED.value else "identical"
        same = counts["agrees"] if _FORCED.value else counts["identical"]
        parts = [f"{same} of {same + counts['differs'] + counts['skipped']} {verdict}"]
        if counts["differs"]:
            parts.append(f"{counts['differs']} differ ({counts['rounding']} within floating-point error)")
        if counts["skipped"]:
            parts.append(f"{counts['skipped']} skipped")
        if self.logprob_error:
            parts.append(f"log-probabilities within {self.logprob_error:.1e}")
        elif counts["identical"]:
            parts.append("log-probabilities equal to the bit")
        return ", ".join(parts)

    def skip(self, name: str, problem: Exception | str) -> str:
        """Counts a record that cannot be replayed and returns its line."""
        self.counts["skipped"] += 1
        return f"skipped    {name}: {_shown(' '.join(str(problem).split()), 400)}"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A line of the record file: a record with its decoding configuration, or the reason to skip it."""

    name: str
    recorded: record.Record | None = None
    decoding: config.DecodingConfig | None = None
    problem: str = ""

    @property
    def group(self) -> tuple[record.Run, config.DecodingConfig] | None:
        """Key of the records that are replayed together; None for an entry to skip."""
        return None if self.recorded is None or self.decoding is None else (self.recorded.run, self.decoding)


def _replay() -> None:
    path = Path(program.required(_RECORDS))
    chosen = None if _IDS.value is None else set(_IDS.value)
    if chosen is not None and not chosen:
        raise ValueError("--ids is empty: give at least one id")
    if _FORCED.value and _BATCH_SIZE.value is not None:
        raise ValueError("--forced generates nothing, so --batch_size does not affect it: give one of them")
    config.DecodingConfig(mesh=_MESH.value)  # a mesh that is none is an error, not a reason to skip every record
    _check(path, chosen)
    device = program.start_device(_DEVICE.value)
    tally = _Tally()
    load = functools.lru_cache(maxsize=2)(_load)
    with program.spinner("compiling") as stop:
        for key, group in itertools.groupby(_entries(path, chosen), lambda entry: entry.group):
            for line in _lines(tally, functools.partial(load, *key, device) if key else None, group):
                stop()
                print(line, flush=True)
    for change in sorted(tally.changes):
        print(f"changed    {change}")
    if tally.unused:
        print(f"not exercised: {tally.unused_settings()}")
    print(tally.screening() if _FORCED.value and tally.tokens else tally.summary())
    sys.exit(tally.exit_code)


def _check(path: Path, chosen: set[str] | None) -> None:
    """Reads the whole file once, so that an unknown id or another kind of file is an error before JAX starts."""
    ids: set[str] = set()
    first_error = None
    is_torn = False
    for line in record.lines(path):
        if is_torn := line.is_torn:
            break
        try:
            ids.add(record.parse(line.text, f"{path} line {line.number}").id)
        except ValueError as error:
            first_error = first_error or error
    if not ids:
        raise first_error or ValueError(f"{path} has no records")
    if unknown := sorted((chosen or set()) - ids):
        known = ", ".join(_shown(one) for one in sorted(ids)[:20])
        raise ValueError(f"{path} has no record of the id {_shown(unknown[0])!r}. Ids: {known}")
    if is_torn:
        program.note(f"{path}: skipped an incomplete last line")


def _entries(path: Path, chosen: set[str] | None) -> Iterator[_Entry]:
    """Yields the lines of the file with chosen ids; invalid lines may have any id, so they are included."""
    for line in record.lines(path):
        if line.is_torn:
            return
        try:
            one = record.parse(line.text, "it")
        except ValueError as error:
            yield _Entry(f"line {line.number}", problem=str(error))
            continue
        if chosen is not None and one.id not in chosen:
            continue
        name = f"{_shown(one.id)} sample {one.sample}"
        try:
            yield _Entry(name, one, replay.decoding_config(one, _BATCH_SIZE.value, _MESH.value))
        except ValueError as error:
            yield _Entry(name, problem=str(error))


def _lines(tally: _Tally, load: Callable[[], api.Run] | None, entries: Iterator[_Entry]) -> Iterator[str]:
    """Replays the entries of one group and yields a line for each; ``load`` is None if they are to be skipped."""
    run, problem = None, ""
    try:
        run = load() if load is not None else None
    except (OSError, ValueError) as error:
        problem = str(error)
    if run is None:
        for entry in entries:
            yield tally.skip(entry.name, entry.problem or problem)
        return
    if _FORCED.value:
        for entry in entries:
            assert entry.recorded is not None
            try:
                yield _screen(tally, entry.name, entry.recorded, run)
            except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
                yield tally.skip(entry.name, error)
        return
    waiting: collections.deque[_Entry] = collections.deque()
    skipped: list[str] = []

    def samples() -> "Iterator[requests.Request]":
        for entry in entries:
            assert entry.recorded is not None
            try:
                request = run.request_of(entry.recorded)
            except ValueError as error:
                skipped.append(tally.skip(entry.name, error))
                continue
            waiting.append(entry)
            yield request

    try:
        for found in run.records_of(samples()):
            yield from skipped
            skipped.clear()
            entry = waiting.popleft()
            assert entry.recorded is not None
            tally.changes |= _changes(entry.recorded, run)
            yield _verdict(tally, entry.name, run.compare(entry.recorded, found), run.files.vocabulary)
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        skipped += [tally.skip(entry.name, error) for entry in (*waiting, *entries)]
    yield from skipped


def _load(named: record.Run, decoding: config.DecodingConfig, device: devices.Device) -> api.Run:
    """Loads the run of a record, which may have other files than the record names."""
    if device.platform != "cpu":
        decoding = dataclasses.replace(decoding, numerics="fast")
    run_directory = None if _RUN_DIR.value is None else Path(_RUN_DIR.value)
    source = loading.open_run(named.name, named.step, decoding, run_directory)
    return api.Run(source, device, provenance.Invocation())


def _verdict(tally: _Tally, name: str, result: "comparison.Comparison", vocabulary: tokenizer.Tokenizer) -> str:
    """Counts a comparison and returns its line."""
    old, new = result.recorded, result.regenerated
    if result.is_identical:
        tally.counts["identical"] += 1
        tally.logprob_error = max(tally.logprob_error, result.logprob_error)
        tally.unused.update(replay.unused_settings(old))
        error = "" if old.error is None else f", then the same error: {_shown(old.error)}"
        return f"identical  {name}: {len(old.ids)} tokens{error}"
    tally.counts["differs"] += 1
    tally.counts["rounding"] += result.is_rounding
    mismatches = " and ".join(_mismatch(one) for one in result.mismatches)
    if result.fork is None:
        return f"differs    {name}: its ids are the same, but not its {mismatches}: was it changed?"
    verdict = "within floating-point error" if result.is_rounding else "more than floating-point error explains"
    return (
        f"differs    {name}: {_forked(result.fork, old, new, vocabulary)}: {verdict}"
        f"{f'; nor is its {mismatches} explained' if mismatches else ''}"
    )


def _screen(tally: _Tally, name: str, recorded: record.Record, run: api.Run) -> str:
    """Draws the tokens of a record again and returns its line."""
    found = run.screen(recorded)
    tally.changes |= _changes(recorded, run)
    tally.tokens += found.tokens
    tally.unexplained += found.unexplained
    tally.logprob_error = max(tally.logprob_error, found.logprob_error)
    tally.counts["redrawn"] += sum(one.is_rounding for one in found.redrawn)
    tally.counts["agrees" if found.is_explained else "differs"] += 1
    if found.is_explained:
        tally.unused.update(replay.unused_settings(recorded))
    line = f"{'agrees' if found.is_explained else 'differs':9}  {name}: "
    line += f"{found.tokens - len(found.redrawn)} of {found.tokens} tokens"
    for one in found.redrawn[:_MOST_SHOWN]:
        old, new = (f"{token} {_shown(repr(run.files.vocabulary.show(token)))}" for token in (one.recorded, one.drawn))
        verdict = "within floating-point error" if one.is_rounding else "more than floating-point error explains"
        line += (
            f"; token {one.index} is {old} in the record, {new} now; lead {one.lead:.2g}, cut {one.cut:.2g}: {verdict}"
        )
    if len(found.redrawn) > _MOST_SHOWN:
        line += f"; and {len(found.redrawn) - _MOST_SHOWN} more"
    mismatches = " and ".join(_mismatch(one) for one in found.mismatches)
    return line + (f"; not its {mismatches}: was it changed?" if mismatches else "")


def _largest_share(seen: int, number: int) -> float:
    """Returns the upper end of the one-sided 95 % confidence interval of a share, after Clopper and Pearson.

    >>> round(_largest_share(0, 50_000) * 50_000, 2), round(_largest_share(1, 50_000) * 50_000, 2)
    (3.0, 4.74)
    """
    if seen >= number:
        return 1.0
    k = np.arange(seen + 1.0)
    log_ways = np.append(0, np.cumsum(np.log((number - k[:-1]) / k[1:])))  # of choosing k of the number

    def tail(share: float) -> float:  # the probability of at most as many
        return float(np.exp(log_ways + k * math.log(share) + (number - k) * math.log1p(-share)).sum())

    low, high = seen / number, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 0.05 else (low, middle)
    return high


def _forked(fork: "comparison.Fork", old: record.Record, new: record.Record, vocabulary: tokenizer.Tokenizer) -> str:
    """Returns the first token that differs, with the lead and the cut of this replay there."""

    def show(token: int | None, reason: str) -> str:
        return f"the end ({reason})" if token is None else f"{token} {_shown(repr(vocabulary.show(token)))}"

    near = "" if fork.lead is None else f"; lead {fork.lead:.2g}, cut {fork.cut:.2g}"
    return (
        f"token {fork.index} is {show(fork.recorded, old.finish_reason)} in the record, "
        f"{show(fork.regenerated, new.finish_reason)} now{near}"
    )


def _mismatch(one: "comparison.Mismatch") -> str:
    """Returns the name of a field, and its token and both values if it has them."""
    if one.index is None:
        return one.field
    values = "" if one.recorded is None else f": {one.recorded:.9g} in the record, {one.regenerated:.9g} now"
    return f"{one.field} (at token {one.index}{values})"


def _changes(old: record.Record, run: api.Run) -> set[str]:
    """Returns the differences in software and numerics between a record and this replay."""
    new = run.recorder.common_fields()
    before = {**old.numerics.fields(), **vars(old.versions), "config_sha256": old.run.config_sha256}
    now = {**new["numerics"], **new["versions"], "config_sha256": new["run"]["config_sha256"]}
    return {
        f"{name}: {_shown(str(before.get(name)))} in the record, {_shown(str(now.get(name)))} now"
        for name in before | now
        if before.get(name) != now.get(name)
    }


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _shown(text: str, limit: int = 80) -> str:
    """Returns text of a record for one line: escaped, and cut if it is long."""
    return program.printable(text if len(text) <= limit else f"{text[: limit - 3]}...")


if __name__ == "__main__":
    main()
