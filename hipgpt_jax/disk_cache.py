"""Disk cache with a digest per entry, least-recently-used eviction and safe directories.

An entry is a file of three parts: a format line, the SHA-256 of the entry's name and payload, and the payload. Entries
are written under a temporary name and renamed, so processes that share a directory need no lock: at worst two of them
write the same entry or evict the same ones.
"""

import contextlib
import grp
import hashlib
import itertools
import os
import pwd
import shlex
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_FORMAT = b"hipgpt-jax cache entry 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_TEMPORARY = ".tmp"
_STALE_TEMPORARY_S = 3600.0


class DiskCache:
    """Named payloads in a directory. Failures cost time but do not raise.

    Attributes:
        directory: The directory, as ``safe_directory`` returns it.
        suffixes: Suffixes of entries; files with other names are ignored.
        max_bytes: Limit of the total size, beyond which the least recently used entries are removed; None for no limit.
            A larger entry is not stored.
        log: Receives one line for the first damaged entry, and one for the first failed write.
    """

    def __init__(
        self, directory: Path, suffixes: tuple[str, ...], max_bytes: int | None, log: Callable[[str], None]
    ) -> None:
        self.directory, self.suffixes, self.max_bytes, self.log = directory, suffixes, max_bytes, log
        self._logged: set[str] = set()
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """Returns the payload of an entry, or None if it is absent or damaged; a damaged entry is removed."""
        path = self.directory / name
        try:
            payload = _decode(name, path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.discard(name, str(error))
            return None
        with contextlib.suppress(OSError):  # the directory may be read-only
            os.utime(path)
        return payload

    def put(self, name: str, payload: bytes) -> None:
        """Writes or replaces an entry, and removes others to stay within ``max_bytes``."""
        content = _FORMAT + _digest(name, payload) + payload
        if self.max_bytes is not None and len(content) > self.max_bytes:
            return
        try:
            self._make_room(name, len(content))
            # Without fsync: after a power cut the digest reveals missing data. The name is unique even if containers
            # with equal process ids share the directory.
            descriptor, temporary = tempfile.mkstemp(dir=self.directory, suffix=_TEMPORARY)
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                os.replace(temporary, self.directory / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            self._log_once("write", f"the cache of compiled programs cannot be written: {error}")

    def discard(self, name: str, reason: str) -> None:
        """Removes a damaged entry, and logs the first one."""
        with contextlib.suppress(OSError):
            (self.directory / name).unlink()
        reason = " ".join(reason.split())[:200]
        self._log_once("damaged", f"recompiling: removed a damaged file from the cache, {name}: {reason}")

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Yields the files of all entries, in any order.

        Raises:
            OSError: The directory cannot be read.
        """
        with os.scandir(self.directory) as found:
            yield from (entry for entry in found if entry.name.endswith(self.suffixes))

    def find_damaged(self) -> Iterator[tuple[str, str]]:
        """Yields the name of each damaged entry and the reason; removes nothing.

        Raises:
            OSError: The directory cannot be read.
        """
        for entry in sorted(self.entries(), key=lambda entry: entry.name):
            try:
                _decode(entry.name, Path(entry.path).read_bytes())
            except FileNotFoundError:  # evicted in the meantime
                continue
            except (OSError, ValueError) as error:
                yield entry.name, str(error)

    def _make_room(self, name: str, size: int) -> None:
        used: list[tuple[float, int, str]] = []
        with os.scandir(self.directory) as found:
            for entry in found:
                is_temporary = entry.name.endswith(_TEMPORARY)
                if not (is_temporary or entry.name.endswith(self.suffixes)) or entry.name == name:
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not is_temporary:
                    used.append((status.st_mtime, status.st_size, entry.path))
                elif status.st_mtime < time.time() - _STALE_TEMPORARY_S:  # its writer was killed
                    _unlink(entry.path)
        if self.max_bytes is None:
            return
        excess = sum(size for _, size, _ in used) + size - self.max_bytes
        for _, freed, path in sorted(used):
            if excess <= 0:
                break
            _unlink(path)
            excess -= freed

    def _log_once(self, kind: str, line: str) -> None:
        with self._lock:  # several threads compile
            is_new = kind not in self._logged
            self._logged.add(kind)
        if is_new:
            self.log(line)


def safe_directory(directory: Path) -> Path:
    """Creates a directory that only this user can access, if it does not exist, and resolves links.

    Returns:
        A path without links. No user except root can write to the directory or replace it or one of its parents.

    Raises:
        PermissionError: Another user can; the message names the remedy.
        OSError: It cannot be created, or is not a directory.
    """
    for path in missing_directories(directory):  # mkdir(parents=True) would give the parents the mode of the umask
        path.mkdir(mode=0o700, exist_ok=True)
    missing_directories(directory)
    return directory.resolve(strict=True)


def missing_directories(directory: Path) -> list[Path]:
    """Returns the directories to create so that ``directory`` exists, parents first.

    Raises:
        PermissionError: Another user can write to the directory or to an existing parent.
        OSError: It cannot be accessed, or is not a directory.
    """
    directory = directory.absolute()
    missing = list(itertools.takewhile(lambda path: not path.exists(), (directory, *directory.parents)))
    existing = (missing[-1].parent if missing else directory).resolve(strict=True)
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a directory")
    _refuse_writable_by_others(existing, is_parent=bool(missing))
    return missing[::-1]


def _refuse_writable_by_others(directory: Path, *, is_parent: bool) -> None:
    for path in (directory, *directory.parents):
        status = path.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{path} belongs to user {status.st_uid}, who could put code there")
        # In a sticky directory such as /tmp, only the owners of the directory and of a file can rename or remove it.
        sticky = (is_parent or path != directory) and status.st_mode & stat.S_ISVTX
        by_group = status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid)
        if (by_group or status.st_mode & stat.S_IWOTH) and not sticky:
            command = f"chmod go-w {shlex.quote(str(path))}"
            raise PermissionError(f"other users can write to {path} and could put code there: run {command}")


def _is_private_group(group: int) -> bool:
    """Returns whether this user is the only member of a group, as by default on Debian and Fedora.

    Their umask of 002 makes directories such as ``~/.cache`` writable for that group.
    """
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    is_own = user.pw_uid != 0 and group == user.pw_gid and found.gr_name == user.pw_name
    return is_own and set(found.gr_mem) <= {user.pw_name}


def _decode(name: str, content: bytes) -> bytes:
    """Returns the payload of an entry's file; raises ValueError if any bit of it, or its name, was changed."""
    head = len(_FORMAT) + _DIGEST_BYTES
    if content[: len(_FORMAT)] != _FORMAT:
        raise ValueError("not a cache entry")
    payload = content[head:]
    if content[len(_FORMAT) : head] != _digest(name, payload):
        raise ValueError("its SHA-256 does not match")
    return payload


def _digest(name: str, payload: bytes) -> bytes:
    digest = hashlib.sha256(name.encode() + b"\0")
    digest.update(payload)
    return digest.digest()


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
