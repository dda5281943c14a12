"""A lock on a run's directory: at most one process trains a run, prepares its data or replaces it."""

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
    """An exclusive lock on a run, held by the kernel, so that any end of the process releases it.

    It consists of two locks: on a file beside the run, because the directory may not exist yet and ``--reset`` replaces
    it; and on the directory itself, which stays the same under a new name or another path.
    """

    def __init__(self, run_directory: Path) -> None:
        """Opens nothing yet; the ``with`` block takes the lock."""
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
            self._lock_file()
            self.lock_directory(self._directory)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the lock; removes its file, and the directory of runs if the lock created it and it is empty."""
        self._release()

    def lock_directory(self, path: Path) -> None:
        """Locks a directory that becomes the run's, in place of an earlier one; does nothing if it is missing."""
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise ValueError(f"{path} is a file, not the directory of a run: give another --run-name") from error
        _lock(held, path.name, None)
        if self._held is not None:
            os.close(self._held)
        self._held = held

    def check_directory(self) -> None:
        """Raises OSError if the run's path no longer refers to the locked directory."""
        if self._held is not None and not _is_same(self._held, self._directory):
            raise OSError(
                f"{self._directory} was moved, renamed or deleted while the run was trained. Nothing more was written; "
                f"resume it with --resume under its new name"
            )

    def _make_parent(self) -> None:
        """Creates the directory of runs, but not the target of a link, which may be on a disk that is not mounted."""
        parent = self._directory.parent
        if not os.path.lexists(parent):
            parent.mkdir(parents=True)
            self._made_parent = True
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a directory: runs are directories in it")
        if not self._path.parent.is_dir():
            target = os.readlink(self._directory)
            raise FileNotFoundError(f"{self._directory} is a link to {target}: there is no directory to make that in")

    def _lock_file(self) -> None:
        while True:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                # A link may lead into a read-only directory; the run's own directory is locked all the same.
                if self._directory.is_dir():
                    return
                raise OSError(f"the lock {self._path} cannot be opened: {error.strerror}") from error
            _lock(file, self._directory.name, self._path)
            if _is_same(file, self._path):
                break
            os.close(file)  # The last holder removed the file between our open and our lock.
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
        if self._file is not None:
            # Removed before it is released, so that a process that has just opened it sees that it is gone.
            self._path.unlink(missing_ok=True)
            os.close(self._file)
        self._held = self._file = None
        if self._made_parent:
            with contextlib.suppress(OSError):
                self._directory.parent.rmdir()


def _is_same(file: int, path: Path) -> bool:
    """Returns whether a path refers to an open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: int, run: str, owner: Path | None) -> None:
    """Locks an open file; closes it and raises HeldError if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise HeldError(
            f"run {run!r} is being trained by {_owner(owner)}: wait until it has ended, or give another --run-name"
        ) from error
    except OSError:
        return  # Some file systems have no locks; that is no reason not to train.


def _owner(path: Path | None) -> str:
    """Describes the process that holds the lock; it may not have written its number yet."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = path.read_text(encoding="ascii") if path else ""
        if match := re.fullmatch(r"(\d+) ([\w.-]+)\n", text):
            return f"process {match[1]}" + ("" if match[2] == socket.gethostname() else f" on {match[2]}")
    return "another process"
