"""The file that records are appended to: whole lines, resumable, never of two makings."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax.runs import record

_BEGINNING = b'{"schema":'


class Output:
    """A record file, open for appending and locked against other writers.

    A line is appended by one write, and cut off again where the disk had no room for all of it. So a
    kill at any moment leaves whole lines and at most one torn last line, which the next opening drops.

    Attributes:
        path: The file.
        done: The basis of each sample that is in the file, by prompt id and sample index. A basis is
            ``basis`` of its record as JSON; equal ones are one object.
        dropped: Bytes of a torn last line that were dropped at the opening.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Opens the file, reads what is done, and writes nothing that matters yet.

        Args:
            path: The file; it is made if it is not there. A device or a pipe is written to as it is.
            overwrite: Whether the records in it are replaced, at the first one appended.

        Raises:
            OSError: It cannot be written.
            ValueError: Another process is writing it, or a line in it is no record.
        """
        self.path = path
        self.done: dict[tuple[str, int], str] = {}
        self.dropped = 0
        self._target = path.resolve()  # a link may lead where nothing is yet
        self._is_new = not self._target.exists()
        try:
            self._file = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"--output {path} cannot be written: {error.strerror}") from error
        self._replace = overwrite
        self._is_regular = self._target.is_file()
        try:
            if self._is_regular:
                self._lock()
                if not overwrite:
                    self._read()
        except (OSError, ValueError):
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
        self._replace, self._is_new = False, False
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
        """Flushes the file to disk and closes it; one that was made here and got no record vanishes."""
        if self._is_regular:
            os.fsync(self._file)
            if self._is_new:
                self._target.unlink(missing_ok=True)
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is being written by another process: wait, or use another --output"
            ) from error
        except OSError:
            return  # a file system without locks is no reason to stop

    def _read(self) -> None:
        """Reads what is done, and cuts off a torn last line where the file is one of records."""
        same: dict[str, str] = {}
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{self.path} line {number}"
                if not line.endswith(b"\n"):
                    if not line.startswith(_BEGINNING[: len(line)]):
                        raise ValueError(f"{place} is not a record: use another --output, or --overwrite")
                    self.dropped = len(line)
                    os.ftruncate(self._file, end)
                    return
                value = record.parse_object(line, place)
                try:
                    key, found = (str(value["id"]), int(value["sample"])), json.dumps(basis(value), sort_keys=True)
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{place} is not a whole record: {error!r}") from error
                if key in self.done:
                    raise ValueError(
                        f"{place} repeats sample {key[1]} of {key[0]}: use another --output, or --overwrite"
                    )
                self.done[key] = same.setdefault(found, found)
                end += len(line)

    def require_same(self, expected: Callable[[str], dict[str, Any] | None], common: dict[str, Any]) -> None:
        """Raises ValueError where a record in the file was made by other settings than it would be now.

        Args:
            expected: Gives for a prompt's id the basis that its record would have, or None for an id it
                does not know: another command's prompt, which may ask for other settings.
            common: What is the same for any prompt, which must be the same for those too.
        """
        for (prompt_id, sample), found in self.done.items():
            old = json.loads(found)
            wanted = expected(prompt_id) or {**old, **common}
            for name in (name for name in {**old, **wanted} if old.get(name) != wanted.get(name)):
                raise ValueError(
                    f"{self.path} was made by other settings: {name} {old.get(name)!r} in sample {sample} of "
                    f"{prompt_id}, {wanted.get(name)!r} now. Repeat its settings, use another --output, or --overwrite"
                )


def basis(value: dict[str, Any]) -> dict[str, Any]:
    """Returns what a record's tokens follow from, of its JSON, apart from the sample's index.

    Versions and the processor are not in it: a file may be continued after an upgrade, and its records name both.
    """
    run, numerics = value["run"], value["numerics"]
    return {
        "prompt": value["prompt"],
        "seed": value["seed"],
        **value["settings"],
        "weights": run["weights_sha256"],
        "tokenizer": run["tokenizer_sha256"],
        **{
            name: numerics[name]
            for name in ("platform", "device_kind", "dtype", "attention", "decode_width", "xla_flags", "environment")
        },
    }
