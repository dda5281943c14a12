"""One record file out of several: sorted, without duplicates, and the samples that are missing in it.

Lines are sorted on disk in runs of bounded size, which are then merged. So memory does not grow with the files.
"""

import contextlib
import heapq
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from hipgpt_jax import config
from hipgpt_jax.records import header, record, writer

_RUN_BYTES = 1 << 25
_SAME = ("ids", "tokens", "text", "finish_reason", "stop", "error")
_GRID = "-"  # sorts before the digits of a sample


class _Entry(NamedTuple):
    """A record, or the samples that a prompt must have.

    Attributes:
        name: Id of the prompt, as JSON in ASCII.
        sample: Index of the sample in ten digits, or ``_GRID``.
        fingerprint: Hash of the prompt's settings.
        source: Number of the file and of its line.
        content: The record's line, or the start and the end of the samples that must be there.
    """

    name: str
    sample: str
    fingerprint: str
    source: str
    content: str


class Merger:
    """The records of several files as one sequence, in the order of the prompts' ids and the samples.

    Attributes:
        samples: Number of different samples.
        prompts: Number of different prompts.
        duplicates: Number of records that repeat another one.
        missing: Number of missing samples.
        torn: Files whose last line was cut short and skipped.
    """

    def __init__(
        self, paths: Sequence[Path], directory: Path, grid: Iterable[tuple[str, range]] | range | None = None
    ) -> None:
        """Prepares a merger; nothing is read before ``lines``.

        Args:
            paths: The record files.
            directory: Directory of temporary files, which need as much room as the records.
            grid: The samples that must be there: of each prompt by id, or of all prompts found. By default, those up to
                the largest one of the same prompt.
        """
        self._paths, self._directory, self._grid = paths, directory, grid
        self.samples = self.prompts = self.duplicates = self.missing = 0
        self.torn: list[Path] = []

    def lines(self) -> Iterator[bytes | tuple[str, range]]:
        """Yields the lines of the merged file, and between them the id and the range of samples that are missing.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: A line is not a record; records have other settings, weights or numerics than others; two
                records of one sample differ; or a sample is not in the grid.
        """
        entries = _sorted(self._entries(), self._directory)
        for name, group in itertools.groupby(entries, lambda entry: entry.name):
            yield from self._prompt(json.loads(name), group)

    def _entries(self) -> Iterator[_Entry]:
        """Yields the records of all files, and the grid, in the order in which they are read."""
        first: tuple[str, str] | None = None
        for number, path in enumerate(self._paths):
            for line in record.lines(path):
                if line.is_torn:
                    self.torn.append(path)
                    break
                source = f"{path} line {line.number}"
                one = header.parse(line.text, source)
                shared = writer.shared_key(one.settings, one.run, one.numerics)
                first = first or (shared, source)
                if shared != first[0]:
                    _refuse(json.loads(first[0]), first[1], json.loads(shared), source)
                fingerprint = f"{hash(writer.key_of(one)):+020}"
                text = line.text.decode("utf-8-sig").strip()
                yield _Entry(json.dumps(one.id), f"{one.sample:010}", fingerprint, f"{number:06} {line.number}", text)
        if self._grid is not None and not isinstance(self._grid, range):
            for name, wanted in self._grid:
                yield _Entry(json.dumps(name), _GRID, "", "", f"{wanted.start} {wanted.stop}")

    def _prompt(self, name: str, entries: Iterator[_Entry]) -> Iterator[bytes | tuple[str, range]]:
        """Yields the lines of a prompt, and its missing samples."""
        wanted = self._grid if isinstance(self._grid, range) else None
        expected = wanted.start if wanted else 0
        last: _Entry | None = None
        for entry in entries:
            if entry.sample == _GRID:
                start, stop = map(int, entry.content.split())
                wanted = range(min(start, wanted.start), max(stop, wanted.stop)) if wanted else range(start, stop)
                expected = wanted.start
                continue
            sample = int(entry.sample)
            if self._grid is not None and (wanted is None or sample not in wanted):
                raise ValueError(
                    f"{self._source(entry)} is sample {sample} of {config.shortened(name)}, which is not among the "
                    f"samples wanted: give the prompts and numbers of samples of the commands that wrote the files"
                )
            if last is not None:
                if entry.fingerprint != last.fingerprint:
                    old, new = (header.parse(each.content.encode(), self._source(each)) for each in (last, entry))
                    fingerprints = writer.fingerprint_of(old), writer.fingerprint_of(new)
                    _refuse(fingerprints[0], self._source(last), fingerprints[1], self._source(entry))
                if entry.sample == last.sample:
                    self._check_duplicate(last, entry)
                    self.duplicates += 1
                    continue
            if sample > expected:
                yield self._miss(name, range(expected, sample))
            expected, last = sample + 1, entry
            self.samples += 1
            yield entry.content.encode() + b"\n"
        self.prompts += 1
        if wanted is not None and expected < wanted.stop:
            yield self._miss(name, range(expected, wanted.stop))

    def _miss(self, name: str, samples: range) -> tuple[str, range]:
        self.missing += len(samples)
        return name, samples

    def _source(self, entry: _Entry) -> str:
        number, line = entry.source.split()
        return f"{self._paths[int(number)]} line {line}"

    def _check_duplicate(self, one: _Entry, other: _Entry) -> None:
        """Raises ValueError if two records of one sample hold different samples."""
        old, new = (record.parse(entry.content.encode(), self._source(entry)) for entry in (one, other))
        for name in _SAME:
            if getattr(old, name) != getattr(new, name):
                raise ValueError(
                    f"{self._source(one)} and {self._source(other)} are different records of sample {old.sample} of "
                    f"{config.shortened(old.id)}: {name} {config.shortened(getattr(old, name))} and "
                    f"{config.shortened(getattr(new, name))}. hipgpt-replay of both files shows which one is right"
                )


def _refuse(old: writer.Fingerprint, old_source: str, new: writer.Fingerprint, new_source: str) -> NoReturn:
    """Raises ValueError with the first setting in which two fingerprints differ."""
    name = next(name for name in old if old[name] != new[name])
    raise ValueError(
        f"records of different settings cannot be merged: {name} is {config.shortened(old[name])} in {old_source} and "
        f"{config.shortened(new[name])} in {new_source}"
    )


def _sorted(entries: Iterable[_Entry], directory: Path) -> Iterator[_Entry]:
    """Yields entries in order; those that exceed the memory for a run are kept in temporary files."""
    with contextlib.ExitStack() as stack:
        runs: list[Iterable[str]] = []
        for run in _runs(entries):
            if runs:  # the last run stays in memory
                file = stack.enter_context(tempfile.TemporaryFile("w+", dir=directory, encoding="utf-8", newline="\n"))
                file.writelines(f"{line}\n" for line in runs[-1])
                file.seek(0)
                runs[-1] = file
            runs.append(run)
        for text in heapq.merge(*runs):
            yield _Entry(*text.removesuffix("\n").split("\t", 4))


def _runs(entries: Iterable[_Entry]) -> Iterator[list[str]]:
    """Yields sorted texts of entries; JSON has no tabs, so their order is that of the entries."""
    run, size = list[str](), 0
    for entry in entries:
        run.append("\t".join(entry))
        size += len(run[-1])
        if size >= _RUN_BYTES:
            yield sorted(run)
            run, size = [], 0
    yield sorted(run)
