"""The file that records are appended to: resumable, and consistent in its settings."""

import array
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import re
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from hipgpt_jax import compression, config, files, json_files
from hipgpt_jax.records import header, record

# The beginning of every record. Only a file that begins so is cut or replaced; any other is somebody else's.
_BEGINNING = re.compile(rb'(?:\xef\xbb\xbf)?\{\s*"schema"\s*:\s*\d+\s*,\s*"contract"\s*:')
_PREFIX = b'{"schema":'
_HEAD_BYTES = 200
_MAX_FOREIGN_LINE = 1 << 20  # a file of something else may be one line of gigabytes
_FRAME_BYTES = 1 << 20
_SECONDS_PER_FRAME = 1.0
_UNSORTED = 1 << 16  # samples that are sorted together; one by one would take quadratic time

_OF_PROMPT = ("prompt", "prompt_ids", "seed")

Fingerprint = dict[str, Any]


def prompt_fingerprint(prompt: str, prompt_ids: Sequence[int], seed: int, settings: Mapping[str, Any]) -> Fingerprint:
    """Returns all inputs of a prompt's samples that may differ from those of another prompt in the same file.

    Args:
        prompt: Text of the prompt.
        prompt_ids: Its token ids; the same text may have others.
        seed: Seed.
        settings: Values of ``record.Settings`` by name.
    """
    fields = [*dataclasses.fields(config.GenerationConfig), *dataclasses.fields(config.SamplingConfig)]
    names = [field.name for field in fields if field.name != "seed" and field.name not in config.NUMBERING]
    values = {name: settings[name] for name in names}
    values |= {field.name: float(values[field.name]) for field in fields if field.type is float}
    return {"prompt": prompt, "prompt_ids": prompt_ids, "seed": seed, "rule": settings.get("rule"), **values}


def shared_fingerprint(settings: record.Settings, run: record.Run, numerics: record.Numerics) -> Fingerprint:
    """Returns all inputs of samples that are the same throughout a file.

    Versions and the processor are not among them, so that a file may be resumed after an upgrade.
    """
    names = ("platform", "device_kind", "dtype", "attention", "xla_flags")
    return {
        **{name: getattr(settings, name) for name in ("window", "window_stride", "overflow")},
        "weights": run.weights_sha256,
        "tokenizer": run.tokenizer_sha256,
        **{name: getattr(numerics, name) for name in names},
        "batch_size": "invariant" if numerics.batch_size is None else numerics.batch_size,
        "environment": list(numerics.environment),
        "mesh": numerics.mesh,
    }


class Samples:
    """Set of finished samples, in 32 bytes per range of consecutive samples of a prompt.

    Ids and fingerprints are compared by 64-bit hashes. Among 10^6 ids two are confused with probability 3e-8.
    """

    # A dictionary with a list of ranges per prompt took 300 bytes per prompt.

    def __init__(self) -> None:
        # Added samples, not sorted yet: hash of the id, index, hash of the fingerprint.
        self._new = (array.array("q"), array.array("q"), array.array("q"))
        # Ranges sorted by id and start: hash of the id, start, end, hash of the fingerprint.
        self._ranges = np.zeros((4, 0), np.int64)
        self._size = 0
        self._repeated: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self._size

    def __contains__(self, prompt_id: str) -> bool:
        """Returns whether the set has a sample of the prompt."""
        return self._of(prompt_id).size > 0

    def add(self, prompt_id: str, sample: int, fingerprint: Hashable) -> None:
        """Adds a sample."""
        ids, samples, fingerprints = self._new
        ids.append(hash(prompt_id))
        samples.append(sample)
        fingerprints.append(hash(fingerprint))
        self._size += 1
        if len(samples) >= max(_UNSORTED, self._ranges.shape[1] // 2):
            self._sort()

    @property
    def num_prompts(self) -> int:
        """Number of prompts with a sample in the set."""
        self._sort()
        return len(np.unique(self._ranges[0]))

    def repeated(self) -> tuple[int, int] | None:
        """Returns the hash of the id and the index of a sample that was added twice; None if there is none."""
        self._sort()
        return self._repeated

    def missing(self, prompt_id: str, wanted: range) -> Iterator[int]:
        """Yields those of the wanted samples of a prompt that are not in the set."""
        _, starts, ends, _ = self._of(prompt_id)
        for start, end in zip(starts, ends, strict=True):
            yield from _below(int(start), wanted)
            wanted = wanted[len(_below(int(end), wanted)) :]
        yield from wanted

    def count(self, prompt_id: str, wanted: range) -> int:
        """Returns how many of the wanted samples of a prompt are in the set."""
        _, starts, ends, _ = self._of(prompt_id).tolist()
        pairs = zip(starts, ends, strict=True)
        return sum(len(_below(end, wanted)) - len(_below(start, wanted)) for start, end in pairs)

    def differs(self, prompt_id: str, fingerprint: Hashable) -> bool:
        """Returns whether the set has samples of a prompt with another fingerprint."""
        *_, fingerprints = self._of(prompt_id)
        return bool((fingerprints != hash(fingerprint)).any())

    def _of(self, prompt_id: str) -> np.ndarray:
        """Returns the ranges of a prompt."""
        self._sort()
        ids, key = self._ranges[0], np.int64(hash(prompt_id))
        return self._ranges[:, ids.searchsorted(key) : ids.searchsorted(key, "right")]

    def _sort(self) -> None:
        """Sorts the added samples into the ranges, and joins adjacent ranges with equal fingerprints."""
        if not self._new[0]:
            return
        new_ids, samples, new_fingerprints = (np.array(each, np.int64) for each in self._new)
        for each in self._new:
            del each[:]
        added = np.stack([new_ids, samples, samples + 1, new_fingerprints])
        ranges = np.concatenate([self._ranges, added], axis=1)
        ranges = ranges[:, np.lexsort((ranges[1], ranges[0]))]
        ids, starts, ends, fingerprints = ranges
        is_same = ids[1:] == ids[:-1]
        overlaps = np.flatnonzero(is_same & (starts[1:] < ends[:-1]))
        if overlaps.size and self._repeated is None:
            place = overlaps[0] + 1
            self._repeated = int(ids[place]), int(starts[place])
        is_joined = is_same & (starts[1:] == ends[:-1]) & (fingerprints[1:] == fingerprints[:-1])
        firsts = np.flatnonzero(np.append(True, ~is_joined))
        self._ranges = ranges[:, firsts]
        self._ranges[2] = ends[np.append(firsts[1:], len(ids)) - 1]


def _below(limit: int, wanted: range) -> range:
    """Returns the part of a range of positive step that is below a limit."""
    return range(wanted.start, min(limit, wanted.stop), wanted.step)


class RecordFile:
    """A record file, open for appending and locked against other writers.

    Each line is appended by one write, and removed again if the disk is full. So after a kill at any moment the file
    has whole lines and at most one torn last line, which is dropped when the file is next opened.

    If the name ends in ``.zst``, the records of a second are compressed together and appended as one Zstandard frame,
    in the same way. A kill loses at most those records.

    Attributes:
        path: Path of the file.
        finished: Samples in the file.
        dropped: Size in bytes of the torn last line or frame that was dropped on opening.
        seeds: Up to two of the seeds in the file.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Opens the file and reads its records. Nothing is written, except to repair the last line.

        Args:
            path: Path of the file, created if it does not exist. Devices and pipes are allowed.
            overwrite: Whether the first record appended replaces the records in the file.

        Raises:
            OSError: The file cannot be written.
            ValueError: Another process writes the file, or it holds something other than records.
        """
        self.path = path
        self.finished = Samples()
        self.dropped = 0
        self.seeds: set[int] = set()
        self._shared: dict[str, str] = {}  # a sample for each shared fingerprint
        self._packer = zstandard.ZstdCompressor(write_checksum=True) if compression.is_zstandard(path) else None
        self._buffer = bytearray()  # lines of the next frame
        self._first_buffered = ""  # name of the sample of the first of them
        self._flushed = 0.0  # time
        self._last: json_files.Line | None = None
        try:
            self._target = files.destination(path)
            self._is_new = not self._target.exists()
            self._file = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # ValueError: the name has a NUL character. RuntimeError: links form a loop.
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise OSError(f"--output {path} cannot be written: {reason}") from error
        self._replace = overwrite
        self._is_regular = self._target.is_file()
        try:
            if self._is_regular:
                self._lock()
                if overwrite:
                    self._check_replaceable()
                else:
                    self._read()
        except BaseException:
            self._remove_if_unused()
            os.close(self._file)
            raise

    def append(self, new: record.Record) -> None:
        """Appends a record.

        Raises:
            OSError: The disk is full; the file still ends with the line or frame before.
        """
        line = new.to_json().encode() + b"\n"
        self._first_buffered = self._first_buffered or f"sample {new.sample} of {new.id}"
        self._buffer += line
        if self._packer is None or len(self._buffer) >= _FRAME_BYTES:
            self.flush()
        else:
            self.flush_if_due()

    def flush_if_due(self) -> None:
        """Appends the buffered records if the last frame is a second old."""
        if self._buffer and time.monotonic() >= self._flushed + _SECONDS_PER_FRAME:
            self.flush()

    def flush(self) -> None:
        """Appends the buffered records; only a compressed file has any. Raises OSError if the disk is full."""
        if not self._buffer:
            return
        data, sample = bytes(self._buffer), self._first_buffered
        self._buffer.clear()
        self._first_buffered, self._flushed = "", time.monotonic()
        self._write(data, sample)

    def _write(self, data: bytes, sample: str) -> None:
        """Appends whole lines by one write, or nothing; ``sample`` is the first of them."""
        data = self._packer.compress(data) if self._packer else data
        if self._replace and self._is_regular:
            os.ftruncate(self._file, 0)
        self._replace = False
        start = os.fstat(self._file).st_size
        written, reason = 0, "the disk is full"
        try:
            while written < len(data) and (count := os.write(self._file, data[written:])):
                written += count
                if self._is_regular:
                    break  # a short write means a full disk; a pipe may take a line in parts
        except OSError as error:
            if not self._is_regular:
                raise
            reason = error.strerror or str(error)
        if written < len(data):
            os.ftruncate(self._file, start)
            raise OSError(
                f"{self.path}: no room for {sample} ({reason}). The file is whole; "
                f"make room and run the same command again to resume"
            )

    def close(self) -> None:
        """Flushes the file to disk and closes it. A file that was created here and got no record is removed."""
        try:
            self.flush()
            if self._is_regular:
                self._remove_if_unused()
                os.fsync(self._file)
        except OSError as error:
            if error.strerror is None:  # of a frame that has no room
                raise
            raise OSError(f"{self.path} could not be flushed to disk: {error.strerror}") from error
        finally:
            os.close(self._file)

    def check_shared(self, expected: Fingerprint) -> None:
        """Raises ValueError if the file has a record with another shared fingerprint."""
        for found, sample in self._shared.items():
            self._check_equal(json.loads(found), expected, sample)

    def check_prompt(self, prompt_id: str, expected: Fingerprint) -> None:
        """Raises ValueError if the file has a record of the prompt with another prompt fingerprint."""
        if not self.finished.differs(prompt_id, _key(expected)):
            return
        for _, one in self._records():  # only hashes are kept, so the file is read again to name the setting
            if one.id == prompt_id:
                self._check_equal(fingerprint_of(one), expected, f"sample {one.sample} of {prompt_id}")

    def _check_equal(self, old: Fingerprint, new: Fingerprint, sample: str) -> None:
        for name in (name for name in old if old[name] != new[name]):
            raise ValueError(
                f"{self.path} was made by other settings: {name} {config.shortened(old[name])} in {sample}, "
                f"{config.shortened(new[name])} now. Repeat its settings, use another --output, or --overwrite"
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is being written by another process: wait, or use another --output"
            ) from error
        except OSError:
            return  # some file systems have no locks

    def _remove_if_unused(self) -> None:
        if self._is_new and self._is_regular and os.fstat(self._file).st_size == 0:
            self._target.unlink(missing_ok=True)

    def _begins_with_record(self) -> bool:
        if self._packer is None:
            with self._target.open("rb") as file:
                return _BEGINNING.match(file.read(_HEAD_BYTES)) is not None
        head = compression.head(self.path, _HEAD_BYTES)
        # A first frame that was cut short may have no block that can be decompressed, for us or anybody else.
        return _BEGINNING.match(head) is not None or not (head or compression.size_of_whole_frames(self.path))

    def _check_replaceable(self) -> None:
        if self._target.stat().st_size and not self._begins_with_record():
            raise ValueError(
                f"--overwrite replaces files of records, and {self.path} does not begin with one: "
                f"use another --output, or remove the file"
            )

    def _read(self) -> None:
        for _, one in self._records():
            sample = f"sample {one.sample} of {one.id}"
            self.finished.add(one.id, one.sample, key_of(one))
            self._shared.setdefault(shared_key(one.settings, one.run, one.numerics), sample)
            if len(self.seeds) < 2:
                self.seeds.add(one.seed)
        if (repeated := self.finished.repeated()) is not None:
            self._refuse_repeated(*repeated)
        self._repair()

    def _refuse_repeated(self, prompt: int, sample: int) -> None:
        """Raises ValueError for a sample that is in the file twice, of a prompt with a hash."""
        found = ((source, one) for source, one in self._records() if (hash(one.id), one.sample) == (prompt, sample))
        source, one = next(itertools.islice(found, 1, None))
        raise ValueError(f"{source} repeats sample {sample} of {one.id}: use another --output, or --overwrite")

    def _records(self) -> Iterator[tuple[str, header.Header]]:
        """Yields each line's name and record, except for a torn last line."""
        is_ours = self._begins_with_record()
        for line in json_files.read_lines(self.path, None if is_ours else _MAX_FOREIGN_LINE):
            self._last, source = line, f"{self.path} line {line.number}"
            if not line.is_torn:
                yield source, header.parse(line.text, source)
                is_ours = True
            elif not is_ours or not line.text.startswith(_PREFIX[: len(line.text)]):
                raise ValueError(f"{source} is not a record: use another --output, or --overwrite")
            elif line.text and self._packer:
                raise ValueError(f"{source} is incomplete, in a whole frame: unpack the file, and use that as --output")

    def _repair(self) -> None:
        """Drops a torn last line or frame, and adds a missing line feed."""
        line = self._last
        if line is not None and line.is_torn:
            size = os.fstat(self._file).st_size
            whole = compression.size_of_whole_frames(self.path) if self._packer else size - len(line.text)
            os.ftruncate(self._file, whole)
            self.dropped = size - whole
        elif line is not None and not line.text.endswith(b"\n"):
            self._write(b"\n", "a line feed")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file for lines of records, which becomes or replaces a record file if the block does not raise.

    Raises:
        OSError: The file cannot be written.
        ValueError: Another process writes it, or it holds something other than records.
    """
    with (
        files.replacing(files.destination(path)) as temporary,
        contextlib.closing(RecordFile(path, overwrite=True)),  # for its checks and its lock
        zstandard.open(temporary, "wb") if compression.is_zstandard(path) else temporary.open("wb") as file,
    ):
        yield file


def _key(own: Fingerprint) -> Hashable:
    """Returns a hashable form of a prompt's fingerprint."""
    return own["prompt"], tuple(own["prompt_ids"]), own["seed"], _encode_settings(own)


def _encode_settings(own: Fingerprint) -> str:
    return json.dumps({name: value for name, value in own.items() if name not in _OF_PROMPT}, sort_keys=True)


def key_of(one: header.Header) -> Hashable:
    """Returns a hashable form of the prompt fingerprint of a record."""
    return one.prompt, one.prompt_ids, one.seed, _settings_key(one.settings)


# Encoding the settings and the numerics of every record would take twice as long as reading it.
@functools.lru_cache(maxsize=256)
def _settings_key(settings: record.Settings) -> str:
    return _encode_settings(prompt_fingerprint("", (), 0, vars(settings)))


@functools.lru_cache(maxsize=256)
def shared_key(settings: record.Settings, run: record.Run, numerics: record.Numerics) -> str:
    """Returns ``shared_fingerprint`` as JSON."""
    return json.dumps(shared_fingerprint(settings, run, numerics), sort_keys=True)


def fingerprint_of(one: header.Header) -> Fingerprint:
    """Returns the prompt fingerprint of a record."""
    return prompt_fingerprint(one.prompt, one.prompt_ids, one.seed, vars(one.settings))
