"""The file that records are appended to: whole lines, resumable, all made by the same settings."""

import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax import config, files
from hipgpt_jax.records import record

# The beginning of every record. A file that begins so may be appended to and replaced; any other belongs to someone.
_BEGINNING = re.compile(rb'(?:\xef\xbb\xbf)?\{\s*"schema"\s*:\s*\d+\s*,\s*"contract"\s*:')
_PREFIX = b'{"schema":'
_BLOCK = 1024  # bits of one integer
_ENDS = 2 * config.MAX_SAMPLES
_FLOATS = ("temperature", "top_p", "repetition_penalty")


class Samples:
    """Set of finished samples, in about 130 bytes per prompt id and, after a gap, one bit per sample.

    Per id it holds the number of samples that are finished from 0 on, and a hash of their basis. Ids and bases are
    compared by 64 bits of their hashes: two of 10^6 ids are taken for equal with probability 3e-8.
    """

    def __init__(self) -> None:
        self._of_ids: dict[int, int] = {}  # hash of the basis and number, in one integer: a tuple takes 100 bytes more
        self._bits: dict[int, dict[int, int]] = {}  # of each id with a gap, by block
        self._mixed: set[int] = set()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, prompt_id: str) -> bool:
        """Returns whether a sample of the prompt is in the set."""
        return hash(prompt_id) in self._of_ids

    def add(self, prompt_id: str, sample: int, basis: str) -> bool:
        """Adds a sample, and returns whether it is new."""
        key = hash(prompt_id)
        found, end = divmod(self._of_ids.get(key, hash(basis) * _ENDS), _ENDS)
        if found != hash(basis):
            self._mixed.add(key)
        bits = self._bits.get(key, {})
        if sample < end or _has(bits, sample):
            return False
        if sample == end:
            end += 1
            while _has(bits, end):
                end += 1
            for block in [block for block in bits if (block + 1) * _BLOCK <= end]:
                del bits[block]
        else:
            block, place = divmod(sample, _BLOCK)
            self._bits.setdefault(key, bits)[block] = bits.get(block, 0) | 1 << place
        self._of_ids[key] = found * _ENDS + end
        self._size += 1
        return True

    def missing(self, prompt_id: str, number: int, first: int = 0) -> Iterator[int]:
        """Yields the samples of a prompt, from ``first`` to the one before ``number``, that are not in the set."""
        bits = self._bits.get(hash(prompt_id), {})
        wanted = range(max(first, self._end(prompt_id)), number)
        return (sample for sample in wanted if not _has(bits, sample)) if bits else iter(wanted)

    def count(self, prompt_id: str, number: int) -> int:
        """Returns how many of the first ``number`` samples of a prompt are in the set."""
        end = min(number, self._end(prompt_id))
        beyond = 0
        for block, bits in self._bits.get(hash(prompt_id), {}).items():
            low, high = (min(max(0, limit - block * _BLOCK), _BLOCK) for limit in (end, number))
            beyond += (bits >> low & (1 << max(0, high - low)) - 1).bit_count()
        return end + beyond

    def differs(self, prompt_id: str, basis: str) -> bool:
        """Returns whether the set has samples of a prompt that were made from another basis."""
        key = hash(prompt_id)
        return key in self._mixed or self._of_ids.get(key, hash(basis) * _ENDS) // _ENDS != hash(basis)

    def _end(self, prompt_id: str) -> int:
        return self._of_ids.get(hash(prompt_id), 0) % _ENDS


def _has(bits: dict[int, int], sample: int) -> int:
    return bits.get(sample // _BLOCK, 0) >> sample % _BLOCK & 1


class Output:
    """A record file, open for appending and locked against other writers.

    A line is appended by one write, and cut off again where the disk had no room for all of it. So a
    kill at any moment leaves whole lines and at most one torn last line, which the next opening drops.

    Attributes:
        path: The file.
        done: The samples that are in the file.
        dropped: Bytes of a torn last line that were dropped at the opening.
        seeds: Up to two of the seeds of the records in the file.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Opens the file and reads what is finished, without writing to it except to drop a torn last line.

        Args:
            path: The file; it is created if it does not exist. A device or a pipe is written to as it is.
            overwrite: Whether the first record appended replaces the records in the file.

        Raises:
            OSError: It cannot be written.
            ValueError: Another process is writing it, or it holds something other than records.
        """
        self.path = path
        self.done = Samples()
        self.dropped = 0
        self.seeds: set[int] = set()
        self._shared: dict[str, str] = {}  # each way the records were made, and the name of a sample made so
        try:
            self._target = files.destination(path)
            self._is_new = not self._target.exists()
            self._file = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # ValueError: a NUL in the name; RuntimeError: links in a loop
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise OSError(f"--output {path} cannot be written: {reason}") from error
        self._replace = overwrite
        self._is_regular = self._target.is_file()
        try:
            if self._is_regular:
                self._lock()
                if overwrite:
                    self._require_own()
                else:
                    self._read()
        except BaseException:
            self._forget()
            os.close(self._file)
            raise

    def append(self, found: record.Record) -> None:
        """Appends a record.

        Raises:
            OSError: The disk has no room; the file is whole up to the line before.
        """
        line = found.to_json().encode() + b"\n"
        if self._replace and self._is_regular:
            os.ftruncate(self._file, 0)
        self._replace = False
        start = os.fstat(self._file).st_size
        written, reason = 0, "the disk is full"
        try:
            while written < len(line) and (count := os.write(self._file, line[written:])):
                written += count
                if self._is_regular:
                    break  # a short write is a full disk; a pipe may take a line in parts
        except OSError as error:
            if not self._is_regular:
                raise
            reason = error.strerror or str(error)
        if written < len(line):
            os.ftruncate(self._file, start)
            raise OSError(
                f"{self.path}: no room for sample {found.sample} of {found.id} ({reason}). The file is whole; "
                f"make room and run the same command again to go on"
            )

    def close(self) -> None:
        """Flushes the file to disk and closes it; one that was created here and got no record is removed."""
        try:
            if self._is_regular:
                self._forget()
                os.fsync(self._file)
        except OSError as error:
            raise OSError(f"{self.path} could not be flushed to disk: {error.strerror}") from error
        finally:
            os.close(self._file)

    def require_shared(self, expected: dict[str, Any]) -> None:
        """Raises ValueError where a record in the file was not made by this run, on this platform, in this window.

        Args:
            expected: ``shared_basis`` of the records to be made.
        """
        for found, sample in self._shared.items():
            self._require_equal(json.loads(found), expected, sample)

    def require_same(self, prompt_id: str, expected: dict[str, Any]) -> None:
        """Raises ValueError where a record of a prompt in the file was made by other settings.

        Args:
            prompt_id: The prompt's id; the file need not have it.
            expected: ``own_basis`` of the records to be made.
        """
        if not self.done.differs(prompt_id, _words(expected)):
            return
        for _, value in self._lines():  # to say which setting it is; only its hash is kept
            if value["id"] == prompt_id:
                self._require_equal(own_basis(value), expected, f"sample {value['sample']} of {prompt_id}")

    def _require_equal(self, old: dict[str, Any], new: dict[str, Any], sample: str) -> None:
        for name in (name for name in {**old, **new} if old.get(name) != new.get(name)):
            raise ValueError(
                f"{self.path} was made by other settings: {name} {config.shortened(old.get(name))} in {sample}, "
                f"{config.shortened(new.get(name))} now. Repeat its settings, use another --output, or --overwrite"
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is being written by another process: wait, or use another --output"
            ) from error
        except OSError:
            return  # a file system without locks is no reason to stop

    def _forget(self) -> None:
        """Removes a file that was created here and has no record."""
        if self._is_new and self._is_regular and os.fstat(self._file).st_size == 0:
            self._target.unlink(missing_ok=True)

    def _require_own(self) -> None:
        with self._target.open("rb") as file:
            head = file.read(200)
        if head and not _BEGINNING.match(head):
            raise ValueError(
                f"--overwrite replaces files of records, and {self.path} does not begin with one: "
                f"use another --output, or remove the file"
            )

    def _read(self) -> None:
        for place, value in self._lines():
            try:
                prompt_id, sample, seed = value["id"], value["sample"], value["seed"]
                own, shared = _words(own_basis(value)), _words(shared_basis(value))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{place} is not a whole record: {error!r}") from error
            if not isinstance(prompt_id, str) or type(sample) is not int or not 0 <= sample < config.MAX_SAMPLES:
                found = config.shortened((prompt_id, sample))
                raise ValueError(f"{place} is not a whole record: its id and sample are {found}")
            if not self.done.add(prompt_id, sample, own):
                raise ValueError(
                    f"{place} repeats sample {sample} of {prompt_id}: use another --output, or --overwrite"
                )
            self._shared.setdefault(shared, f"sample {sample} of {prompt_id}")
            if len(self.seeds) < 2 and type(seed) is int:
                self.seeds.add(seed)

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the records of the file and their places, and cuts off a torn last line."""
        end = 0
        with self._target.open("rb") as file:
            is_own = bool(_BEGINNING.match(file.peek(200)[:200]))
            for number in itertools.count(1):
                # Any other file may be one line of gigabytes, which is not read to refuse it.
                line = file.readline(record.MAX_LINE_BYTES + 1 if is_own else 1 << 20)
                if not line:
                    return
                place = f"{self.path} line {number}"
                if len(line) > record.MAX_LINE_BYTES:
                    raise ValueError(f"{place} is longer than {record.MAX_LINE_BYTES >> 20} MiB: use another --output")
                if not line.endswith(b"\n"):
                    yield from self._torn(line, place, end, is_own=is_own)
                    return
                end += len(line)
                if line.strip():
                    yield place, record.parse_object(line, place)
                    is_own = True

    def _torn(self, line: bytes, place: str, end: int, *, is_own: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields a last line that lacks only its line feed, and adds that; drops one that was cut elsewhere."""
        if not is_own or not line.startswith(_PREFIX[: len(line)]):
            raise ValueError(f"{place} is not a record: use another --output, or --overwrite")
        try:
            record.parse(line, place)
        except ValueError:
            self.dropped = len(line)
            os.ftruncate(self._file, end)
        else:
            os.write(self._file, b"\n")
            yield place, record.parse_object(line, place)


def own_basis(value: dict[str, Any]) -> dict[str, Any]:
    """Returns what the tokens of a prompt's samples follow from and another prompt's may not, of a record's JSON."""
    settings = value["settings"]
    names = ("num_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "eos_id", "stop", "top_logprobs")
    found = {"prompt": value["prompt"], "seed": value["seed"], **{name: settings[name] for name in names}}
    return {**found, **{name: float(found[name]) for name in _FLOATS}, "stop": list(found["stop"])}


def shared_basis(value: dict[str, Any]) -> dict[str, Any]:
    """Returns what the tokens of all samples in a file follow from, of a record's JSON.

    Versions and the processor are not in it: a file may be resumed after an upgrade, and its records name both.
    """
    settings, run, numerics = value["settings"], value["run"], value["numerics"]
    return {
        **{name: settings[name] for name in ("window", "window_stride", "overflow")},
        "weights": run["weights_sha256"],
        "tokenizer": run["tokenizer_sha256"],
        **{
            name: numerics[name]
            for name in ("platform", "device_kind", "dtype", "attention", "decode_width", "xla_flags")
        },
        "environment": list(numerics["environment"]),
    }


def _words(basis: dict[str, Any]) -> str:
    return json.dumps(basis, sort_keys=True)
