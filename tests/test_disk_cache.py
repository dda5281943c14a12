"""The cache directory: damage is found, old entries go first, writers need no lock, and no one else can write there."""

import grp
import os
import pwd
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hipgpt_jax import disk_cache


def make(directory: Path, max_bytes: int | None = None) -> tuple[disk_cache.DiskCache, list[str]]:
    """Returns a cache and the lines that it logs."""
    logged: list[str] = []
    return disk_cache.DiskCache(directory, (".xla", ".program"), max_bytes, logged.append), logged


def age(cache: disk_cache.DiskCache, *names: str) -> None:
    """Has entries used last in this order, a long time ago."""
    for number, name in enumerate(names):
        os.utime(cache.directory / name, (number, number))


def names(cache: disk_cache.DiskCache) -> list[str]:
    """Returns the names of all files in the directory."""
    return sorted(os.listdir(cache.directory))


@pytest.mark.parametrize("name", ["jit_steps-0a.xla", "0a-steps-1b.program"])
def test_no_flipped_bit_nor_cut_is_ever_read_as_the_payload(name: str, tmp_path: Path) -> None:
    chance = random.Random(26)
    payload = chance.randbytes(5000)
    cache, logged = make(tmp_path)
    cache.put(name, payload)
    path = tmp_path / name
    whole = path.read_bytes()
    head = len(whole) - len(payload)
    bits = [*range(8 * head), *(chance.randrange(8 * len(whole)) for _ in range(300))]
    damaged = [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in bits]
    damaged += [whole[:length] for length in (0, 1, head - 1, head, head + 1, len(whole) - 1)]
    damaged += [whole + b"\0", whole[:-1] + b"\0", payload, b"\0" * len(whole)]
    for content in damaged:
        path.write_bytes(content)
        assert [found for found, _ in cache.find_damaged()] == [name]
        assert cache.get(name) is None
        assert names(cache) == []
        cache.put(name, payload)
        assert cache.get(name) == payload
    assert len(logged) == 1, "one line, however many are damaged"
    assert f"removed a damaged file from the cache, {name}: " in logged[0]


def test_an_entry_is_bound_to_its_name(tmp_path: Path) -> None:
    cache, logged = make(tmp_path)
    cache.put("a.xla", b"the code of a")
    cache.put("b.xla", b"the code of b")
    (tmp_path / "b.xla").rename(tmp_path / "a.xla")
    assert cache.get("a.xla") is None
    assert "SHA-256 does not match" in logged[0]
    for name, payload in (("c.xla", b"\0d"), ("c.xla\0", b"d")):
        assert disk_cache._digest(name, payload) not in {disk_cache._digest("c.xla", b"d")}


def test_unreadable_files_are_no_entries(tmp_path: Path) -> None:
    cache, logged = make(tmp_path)
    assert cache.get("none.xla") is None
    assert logged == []
    (tmp_path / "folder.xla").mkdir()
    assert [name for name, _ in cache.find_damaged()] == ["folder.xla"]
    assert cache.get("folder.xla") is None
    cache.put("folder.xla", b"code")
    assert [line.partition(":")[0] for line in logged] == [
        "recompiling",
        "the cache of compiled programs cannot be written",
    ]
    assert names(cache) == ["folder.xla"]


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache, logged = make(tmp_path, max_bytes=3 * 1100)
    for name in ("a.xla", "b.program", "c.xla"):
        cache.put(name, bytes(1000))
    (tmp_path / "notes.txt").write_bytes(bytes(9000))
    age(cache, "a.xla", "b.program", "c.xla")
    assert cache.get("a.xla") == bytes(1000)  # the one used last from now on
    cache.put("d.xla", bytes(1000))
    assert names(cache) == ["a.xla", "c.xla", "d.xla", "notes.txt"]
    age(cache, "a.xla", "c.xla", "d.xla")
    cache.put("d.xla", bytes(1100))  # in the place of the older one, which needs no room
    assert names(cache) == ["a.xla", "c.xla", "d.xla", "notes.txt"]
    age(cache, "a.xla", "c.xla", "d.xla")
    cache.put("e.program", bytes(2000))
    assert names(cache) == ["d.xla", "e.program", "notes.txt"]
    cache.put("large.xla", bytes(3300))
    assert names(cache) == ["d.xla", "e.program", "notes.txt"], "it would be larger than the limit with its digest"
    assert logged == []


def test_a_killed_writers_file_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    cache, _ = make(tmp_path)
    for name, seconds in (("killed.tmp", 7200), ("writes.tmp", 60)):
        (tmp_path / name).write_bytes(b"cut")
        then = time.time() - seconds
        os.utime(tmp_path / name, (then, then))
    cache.put("a.xla", b"code")
    assert names(cache) == ["a.xla", "writes.tmp"]


def test_an_unwritable_directory_is_logged_once(tmp_path: Path) -> None:
    cache, logged = make(tmp_path / "gone")
    cache.put("a.xla", b"code")
    cache.put("b.xla", b"code")
    assert len(logged) == 1
    assert logged[0].startswith("the cache of compiled programs cannot be written: ")
    assert cache.get("a.xla") is None


def test_processes_write_read_and_evict_at_once_without_harm(tmp_path: Path) -> None:
    """Four of them in a cache that holds a third of what they write; every payload that is read is right."""
    program = """
import random, sys
from pathlib import Path
from hipgpt_jax import disk_cache
def refuse(line):
    raise AssertionError(line)
cache = disk_cache.DiskCache(Path(sys.argv[1]), (".xla",), 20_000, refuse)
chance, hits = random.Random(int(sys.argv[2])), 0
for _ in range(400):
    number = chance.randrange(60)
    payload = random.Random(number).randbytes(1000)
    found = cache.get(f"{number}.xla")
    assert found in (None, payload)
    if found is None:
        cache.put(f"{number}.xla", payload)
    hits += found is not None
print(hits)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(4)]
    hits = [int(process.communicate(timeout=60)[0]) for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert min(hits) > 20
    cache, logged = make(tmp_path, max_bytes=20_000)
    assert list(cache.find_damaged()) == []
    cache.put("last.xla", bytes(1000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert logged == []


def test_a_link_to_a_directory_of_the_users_own_is_resolved_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("real")
    assert disk_cache.safe_directory(tmp_path / "link") == tmp_path / "real"
    assert disk_cache.safe_directory(tmp_path / "link/new/er") == tmp_path / "real/new/er"
    assert (tmp_path / "real").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "real/new").stat().st_mode & 0o7777 == 0o700


def test_a_sticky_parent_protects_what_the_user_owns_in_it(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    assert disk_cache.safe_directory(tmp_path / "tmp/mine") == tmp_path / "tmp/mine"
    with pytest.raises(PermissionError, match=f"other users can write to {tmp_path}/tmp "):
        disk_cache.safe_directory(tmp_path / "tmp")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to other users")
def test_a_parent_of_another_user_is_refused_even_where_it_is_sticky(tmp_path: Path) -> None:
    for mode in (0o755, 0o1777):
        (tmp_path / f"{mode:o}/mine").mkdir(parents=True)
        (tmp_path / f"{mode:o}").chmod(mode)
        os.chown(tmp_path / f"{mode:o}", 65534, 65534)
        with pytest.raises(PermissionError, match=f"{mode:o} belongs to user 65534"):
            disk_cache.safe_directory(tmp_path / f"{mode:o}/mine")


def test_only_a_group_of_the_user_alone_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of a user ``ann`` who is not root; Debian and Fedora give every user one."""
    ann = pwd.struct_passwd(("ann", "x", 1000, 1000, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: ann)

    def group(name: str, *members: str) -> bool:
        monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, [*members])))
        return disk_cache._is_private_group(1000)

    assert group("ann")
    assert group("ann", "ann")
    assert not group("ann", "ann", "bob")
    assert not group("users")
    assert not disk_cache._is_private_group(1001)
    monkeypatch.undo()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o770)
    os.chown(tmp_path / "shared", -1, os.getgid() if os.geteuid() else 54321)
    if os.geteuid() == 0:
        with pytest.raises(PermissionError):
            disk_cache.safe_directory(tmp_path / "shared")
