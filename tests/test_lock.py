"""At most one process holds the lock of a run."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hipgpt_jax.runs import lock

HOLDER = """
import sys, time
from pathlib import Path
from hipgpt_jax.runs import lock
with lock.Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory."""
    path = tmp_path / "checkpoints" / "mine"
    path.mkdir(parents=True)
    return path


def refused(path: Path) -> str:
    with pytest.raises(lock.HeldError) as caught, lock.Lock(path):
        pass
    return str(caught.value)


def test_second_process_is_refused_until_the_first_is_killed(run: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert refused(run).startswith(f"run 'mine' is being trained by process {holder.pid}: ")
        holder.kill()
    assert (run.parent / ".mine.lock").exists()
    with lock.Lock(run):
        refused(run)
    assert os.listdir(run.parent) == ["mine"]


def test_lock_holds_behind_a_link_and_under_a_new_name(run: Path) -> None:
    (run.parent / "alias").symlink_to("mine")
    with lock.Lock(run) as held:
        refused(run.parent / "alias")
        held.check_directory()
        renamed = run.rename(run.parent / "renamed")
        assert "is being trained by another process" in refused(renamed)
        with pytest.raises(OSError, match="mine was moved, renamed or deleted while the run was trained"):
            held.check_directory()
        run.mkdir()
        with pytest.raises(OSError, match="was moved, renamed or deleted"):
            held.check_directory()
    with lock.Lock(renamed):
        pass


def test_missing_run_is_locked_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "new"
    with lock.Lock(path) as held:
        refused(path)
        held.check_directory()
    assert os.listdir(tmp_path) == []
    with lock.Lock(path) as held:
        (path.parent / ".new.new").mkdir()
        (path.parent / ".new.new").rename(path)
        held.lock_directory(path)
        path.rename(path.parent / "other")
        refused(path.parent / "other")
    assert os.listdir(path.parent) == ["other"]


def test_one_of_many_concurrent_lockers_succeeds(tmp_path: Path) -> None:
    """The holder removes the lock's file, which another may have opened already."""
    path, holders, most, taken = tmp_path / "run", [0], [0], [0]

    def work() -> None:
        for _ in range(150):
            try:
                with lock.Lock(path):
                    holders[0] += 1
                    most[0] = max(most[0], holders[0])
                    taken[0] += 1
                    holders[0] -= 1
            except lock.HeldError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert taken[0] > 150


def test_file_system_without_locks_is_no_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def flock(*args: object) -> None:
        calls.append(args)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.Lock(run):
        tried = len(calls)
        with lock.Lock(run):
            assert len(calls) == 2 * tried > 0, "each lock was tried and refused"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: (run.rmdir(), run.touch()), "mine is a file, not the directory of a run"),
        (lambda run: (run.rmdir(), run.symlink_to("/nosuch/disk/x")), "is a link to /nosuch/disk/x: there is no"),
        (lambda run: (run.rmdir(), run.symlink_to("mine")), "Too many levels of symbolic links"),
        (lambda run: (run.rmdir(), run.parent.rmdir(), run.parent.touch()), "checkpoints is not a directory"),
        (lambda run: (run.rmdir(), run.parent.rmdir(), run.parent.symlink_to("/nosuch/x")), "is not a directory"),
    ],
)
def test_invalid_run_directory_is_an_error(run: Path, make, message: str) -> None:
    make(run)
    with pytest.raises((OSError, ValueError), match=message), lock.Lock(run):
        pass
    assert not Path("/nosuch").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_run_in_a_read_only_directory_is_locked_by_its_own(run: Path) -> None:
    (run.parent / "mine").rename(run.parent.parent / "mine")
    run.symlink_to("../mine")
    run.parent.parent.chmod(0o555)
    try:
        with lock.Lock(run):
            refused(run)
    finally:
        run.parent.parent.chmod(0o755)
