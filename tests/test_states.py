"""Training states are compared with their digests before anything reads them."""

import json
import os
import random
import shutil
from pathlib import Path

import fakes
import pytest

from hipgpt_jax.runs import states


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the states of steps 4 and 6."""
    for at in (4, 6):
        fakes.make_state(tmp_path / "run", at)
    return tmp_path / "run"


def files_of(state: Path) -> list[Path]:
    return sorted(path for path in state.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_newest_intact_state_is_found(run: Path) -> None:
    assert states.verify_states(run) == [(4, None), (6, None)]
    assert states.find_intact(run) == (6, [])
    assert states.find_intact(run.parent) == (None, [])


def test_any_flipped_bit_of_a_real_state_is_detected(trained: Path, tmp_path: Path) -> None:
    """In the files that Orbax wrote, and in the digests themselves."""
    run = Path(shutil.copytree(trained / "checkpoints/tiny", tmp_path / "tiny", symlinks=True))
    assert states.find_intact(run) == (40, [])
    draw = random.Random(26)
    paths = files_of(states.path_of(run, 40))
    assert len(paths) > 10
    for number in range(80):
        path = paths[number % len(paths)]
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert states.verify(run, 40).fault is not None, (path, bit)
        flip(path, bit)
    flip(paths[-1], 0)
    at, (note,) = states.find_intact(run)
    assert at == 20
    assert note.startswith("the training state of step 40 is damaged (")
    assert note.endswith("): resuming from the state of step 20")


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "default/d/5c1e", "sha256.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "grown", "missing", "link", "directory"])
def test_file_of_another_kind_or_size_is_detected(run: Path, name: str, damage: str) -> None:
    path = states.path_of(run, 6) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "link":
        (run / "elsewhere").write_bytes(data[1:])
        path.symlink_to(run / "elsewhere")
    elif damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-9], "grown": data + b"\0"}[damage])
    at, (note,) = states.find_intact(run)
    assert at == 4
    assert str(path) in note or "no sha256.json" in note


@pytest.mark.parametrize("extra", ["default/d/0000", "notes.txt", "default/link"])
def test_foreign_file_in_a_state_is_detected(run: Path, extra: str) -> None:
    path = states.path_of(run, 6) / extra
    path.symlink_to(run) if "link" in extra else path.touch()
    assert states.verify(run, 6).fault == f"{path} does not belong to it"
    assert list(states.foreign(run)) == [path]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": {}}', '{"files": {"a": 1}}', '{"files": {"a": "00"}}', '{"files": [1e400]}']
)
def test_invalid_digests_are_detected(run: Path, text: str) -> None:
    path = states.path_of(run, 6) / "sha256.json"
    path.write_text(text)
    assert states.verify(run, 6).fault == f"{path} is not a file of digests"


def test_error_lists_the_fault_of_every_state(run: Path) -> None:
    flip(states.path_of(run, 6) / "default/d/5c1e", 77)
    (states.path_of(run, 4) / "default/d/5c1e").unlink()
    with pytest.raises(ValueError, match=r"run 'run' cannot be resumed: .*step 6 .*5c1e was changed.*step 4 .*missing"):
        states.find_intact(run)


def test_state_without_digests_was_not_saved_completely(run: Path) -> None:
    fakes.make_state(run, 8, sealed=False)
    at, (note,) = states.find_intact(run)
    assert (at, "step 8 is damaged (no sha256.json: its save was cut short)" in note) == (6, True)
    (states.path_of(run, 4) / "sha256.json").unlink()
    (states.path_of(run, 6) / "sha256.json").unlink()
    assert states.find_intact(run) == (None, [])


def test_damaged_states_are_set_aside_until_the_next_save(run: Path) -> None:
    (run / "train_state/9.orbax-checkpoint-tmp-1").mkdir()
    states.set_damaged_aside(run, 4)
    assert sorted(os.listdir(run / "train_state")) == ["4", "6.damaged"]
    assert states.steps(run) == [4]
    fakes.make_state(run, 6)
    states.set_damaged_aside(run, 4)  # damaged again: the newer one stays
    states.remove_damaged(run)
    assert sorted(os.listdir(run / "train_state")) == ["4"]


def test_digests_cover_every_file(run: Path) -> None:
    state = states.path_of(run, 4)
    found = json.loads((state / "sha256.json").read_text())["files"]
    assert set(found) == {"_CHECKPOINT_METADATA", "default/manifest.ocdbt", "default/d/5c1e"}
