"""Replacing a run: a kill at any moment leaves the old run or the new one, and foreign files are never deleted."""

import shutil
from pathlib import Path

import fakes
import pytest

from hipgpt_jax.runs import directory, reset
from hipgpt_jax.text import manifest

OPERATIONS = ("rename", "unlink", "rmdir")


class Killed(BaseException):
    """A kill, at a moment of the test's choice."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, a training state and event files, and beside it the data of its successor."""
    root = tmp_path_factory.mktemp("made") / "checkpoints"
    run = fakes.make_run(root, "mine", steps=(2,))
    fakes.make_state(run, 2)
    (run / "tensorboard").mkdir()
    for name in ("metrics.jsonl", "settings.json", "tensorboard/events.out.tfevents.1.host", ".mine_step3.bin.77.tmp"):
        (run / name).touch()
    fakes.make_run(root, ".mine.new", steps=())
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = Path(shutil.copytree(made, tmp_path / "checkpoints", symlinks=True))
    monkeypatch.setattr(directory, "CHECKPOINTS", found)
    return found


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def test_names_of_data_files_match_the_manifest() -> None:
    assert {manifest.TOKENIZER_NAME, manifest.TOKENS_NAME, manifest.MANIFEST_NAME} == reset._DATA


def test_files_of_a_run_are_not_foreign(root: Path, trained: Path) -> None:
    assert reset.find_foreign(root / "mine") is None
    assert reset.find_foreign(trained / "checkpoints/tiny") is None


def test_a_kill_at_any_moment_leaves_the_old_run_or_the_new_one(made: Path, tmp_path: Path) -> None:
    """At every change of the disk, in the replacement, in the deletion, and in the recovery of either."""
    old, outcomes, ended = names(made / "mine"), [], False
    for kill in range(1, 100):
        root = Path(shutil.copytree(made, tmp_path / str(kill) / "checkpoints", symlinks=True))
        run, left = root / "mine", [kill]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(directory, "CHECKPOINTS", root)
            for name in OPERATIONS:
                patch.setattr(Path, name, killing(getattr(Path, name), left))
            try:
                reset.replace(run)
                left[0] += 1000  # no kill while the new run's checkpoint is written
                fakes.write_step(run, 9)
                left[0] -= 1000
                reset.finish(run)
                ended = True
            except Killed:
                pass
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(directory, "CHECKPOINTS", root)
            reset.recover(run)
            found = directory.read_checkpoint("mine")
            found.verify()
            outcomes.append(found.step)
            assert found.step == 9 or names(run) == old
            assert not (root / ".mine.old").exists()
        if ended:
            break
    assert ended
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {2, 9}


def killing(operation, left: list[int]):
    def operate(self: Path, *arguments: object, **more: object) -> object:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        return operation(self, *arguments, **more)

    return operate


def test_failed_new_run_is_undone_and_its_data_kept(root: Path) -> None:
    run, data = root / "mine", names(root / ".mine.new")
    old = names(run)
    reset.replace(run)
    (run / "settings.json").touch()
    (run / "train_state/1.orbax-checkpoint-tmp-0").mkdir(parents=True)
    assert "restores it" not in str(directory.beside(run, "old"))
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint yet.*\.mine\.old.*restores it"):
        directory.find("mine")
    line = reset.recover(run)
    assert line is not None
    assert "is again what it was before --reset" in line
    assert names(run) == old
    assert data <= names(root / ".mine.new")
    assert reset.recover(run) is None
    reset.replace(run)
    assert names(run) == data


@pytest.mark.parametrize(
    "name", ["notes.txt", "train_state/notes.txt", "train_state/2/n.txt", "tensorboard/n", "dir/a"]
)
def test_foreign_file_is_found_and_never_deleted(root: Path, name: str) -> None:
    path = root / "mine" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work")
    found = reset.find_foreign(root / "mine")
    assert found is not None
    assert found in (path, path.parent)
    problem = reset.remove(root / "mine")
    assert problem is not None
    assert f"{found} is not a file of a run" in problem
    assert path.read_text() == "years of work"
    assert not (root / "mine/tokens.bin").exists()


def test_links_are_deleted_without_their_targets(root: Path) -> None:
    kept = root.parent / "kept"
    kept.mkdir()
    (kept / "a").write_text("a")
    (root / "mine/best_checkpoint.bin").symlink_to(kept / "a")
    (root / "mine/train_state/2/default/link").symlink_to(kept)
    (root / "mine/train_state/2/sha256.json").unlink()
    assert reset.remove(root / "mine") is None
    assert not (root / "mine").exists()
    assert (kept / "a").read_text() == "a"


def test_failed_deletion_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name == "tokens.bin":
            raise PermissionError(1, "Operation not permitted")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert reset.remove(root / "mine") == f"{root / 'mine/tokens.bin'}: Operation not permitted"


@pytest.mark.parametrize("place", ["mine/tokens.bin", ".mine.new/data.json", ".mine.old/x", "alias/tokens.bin", "link"])
def test_inputs_inside_the_run_are_refused(root: Path, place: str) -> None:
    (root / "alias").symlink_to("mine")
    (root / "link").symlink_to("mine/tokenizer.json")
    with pytest.raises(ValueError, match="lies in the directory of the run, which a new run replaces"):
        reset.check_outside(root / "mine", [root.parent / "text.txt", root / place])
    reset.check_outside(root / "mine", [root.parent / "text.txt", root / "mine2/tokens.bin"])


def test_only_temporary_files_of_killed_writers_are_removed(root: Path) -> None:
    for name in (".latest_config.json.9.tmp", ".a.txt.9.tmp", ".mine_step3.bin.tmp"):
        (root / "mine" / name).touch()
    reset.remove_temporaries(root / "mine")
    assert {name for name in names(root / "mine") if name.endswith(".tmp")} == {".a.txt.9.tmp", ".mine_step3.bin.tmp"}


def test_run_behind_a_link_is_replaced_at_its_target(root: Path) -> None:
    big = root.parent / "big"
    big.mkdir()
    (root / "mine").rename(big / "far")
    (root / ".mine.new").rename(big / ".far.new")
    (root / "mine").symlink_to(big / "far")
    reset.replace(root / "mine")
    fakes.write_step(root / "mine", 9)
    assert reset.finish(root / "mine") is None
    assert (root / "mine").is_symlink()
    assert {path.name for path in big.iterdir()} == {"far"}
    directory.read_checkpoint("mine").verify()


@pytest.mark.parametrize("name", ["train_state", "tensorboard", "latest_config.json", "metrics.jsonl", "settings.json"])
def test_wrong_kind_of_file_is_an_error(root: Path, name: str) -> None:
    path = root / "mine" / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    with pytest.raises(OSError, match=rf"{name} is not a .*, which a run needs there"):
        reset.check_writable(root / "mine")
