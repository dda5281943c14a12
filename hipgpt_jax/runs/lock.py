"""A lock on a run's directory, so that one process at a time trains a run, prepares its data or replaces it."""

import contextlib
import fcntl
import os
import re
import socket
from pathlib import Path
from types import TracebackType

from hipgpt_jax.runs import directory


class HeldError(ValueError):
    """Another process holds the lock."""


class Lock:
    """An exclusive lock on a run, held by the kernel, so that any end of the process frees it.

    Two locks together: one on a file beside the run, because the directory may not exist yet and ``--reset`` replaces
    it; and one on the directory itself, which stays the same when it is renamed or reached by another path.
    """

    def __init__(self, run_directory: Path) -> None:
        """Names the lock; nothing is opened before the ``with`` block."""
        self._directory = run_directory
        self._path = directory.beside(run_directory, "lock")
        self._made_parent = False
        self._file: int | None = None
        self._held: int | None = None

    def __enter__(self) -> "Lock":
        """Takes the lock.

        Raises:
            HeldError: Another process holds it.
            OSError: The directory of runs cannot be written.
        """
        try:
            self._make_parent()
            self._open()
            self.hold(self._directory)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frees the lock, and removes its file, and the directory of runs if that was made here and is empty."""
        self._release()

    def hold(self, path: Path) -> None:
        """Locks a directory that is to be the run's, in place of an earlier one. One that is absent is no error."""
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise ValueError(f"{path} is a file, not the directory of a run: give another --run-name") from error
        try:
            _lock(held, path.name, None)
        except BaseException:
            os.close(held)
            raise
        if self._held is not None:
            os.close(self._held)
        self._held = held

    def require_same(self) -> None:
        """Raises OSError where the run's path no longer leads to the directory that is locked."""
        if self._held is None:
            return
        try:
            same = os.path.samestat(os.stat(self._directory), os.fstat(self._held))
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(
                f"{self._directory} was moved, renamed or deleted while the run was trained. Nothing more was written; "
                f"resume it with --resume under its new name"
            )

    def _make_parent(self) -> None:
        """Makes the directory of runs, but not what a link leads to, which may be a disk that is not mounted."""
        parent = self._directory.parent
        if not os.path.lexists(parent):
            parent.mkdir(parents=True)
            self._made_parent = True
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a directory: runs are directories in it")
        if not self._path.parent.is_dir():
            target = os.readlink(self._directory)
            raise FileNotFoundError(f"{self._directory} is a link to {target}: there is no directory to make that in")

    def _open(self) -> None:
        """Opens and locks the file beside the run; one that its last holder removed meanwhile is opened again."""
        while True:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                if self._directory.is_dir():
                    return  # behind a link into a directory of others: the run's own directory is locked all the same
                raise OSError(f"the lock {self._path} cannot be opened: {error.strerror}") from error
            try:
                _lock(file, self._directory.name, self._path)
            except BaseException:
                os.close(file)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    break
            os.close(file)
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # before the lock is freed: who opens the file now finds it gone
            os.close(self._file)
        self._held = self._file = None
        if self._made_parent:
            with contextlib.suppress(OSError):
                self._directory.parent.rmdir()


def _lock(file: int, run: str, owner: Path | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HeldError(
            f"run {run!r} is being trained by {_owner(owner)}: wait until it has ended, or give another --run-name"
        ) from error
    except OSError:
        return  # a file system without locks is no reason to stop


def _owner(path: Path | None) -> str:
    """The process that holds the lock, by what it wrote into the file; it may not have come so far."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = path.read_text(encoding="ascii") if path else ""
        if match := re.fullmatch(r"(\d+) ([\w.-]+)\n", text):
            here = match[2] == socket.gethostname()
            return f"process {match[1]}" + ("" if here else f" on {match[2]}")
    return "another process"
