"""Files that a run's name and step refer to, and the errors if they are invalid."""

import contextlib
import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fakes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import config, files, json_files
from hipgpt_jax.runs import directory, weights

SETTINGS = settings(deadline=None, derandomize=True, database=None)

MODEL = fakes.RUN_MODEL

# Required fields of a step's config, and their types.
REQUIRED: dict[tuple[str, str], type] = {
    **{("model", field.name): int for field in dataclasses.fields(config.ModelConfig)},
    ("tokenizer", "path"): str,
    ("tokenizer", "sha256"): str,
    ("checkpoint", "latest"): str,
    ("checkpoint", "step"): int,
    ("checkpoint", "sha256"): str,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    return fakes.make_run(tmp_path_factory.mktemp("made") / "checkpoints", "tiny")


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """``checkpoints/`` and the runs in the package, both empty."""
    found = tmp_path / "checkpoints", tmp_path / "shipped"
    for root, name in zip(found, ("CHECKPOINTS", "SHIPPED"), strict=True):
        root.mkdir()
        monkeypatch.setattr(directory, name, root)
    return found


@pytest.fixture
def run(made: Path, roots: tuple[Path, Path]) -> Path:
    """A run named ``tiny``, with the steps 2 and 10, to be damaged."""
    return Path(shutil.copytree(made, roots[0] / "tiny", symlinks=True))


def test_a_step_means_its_own_files(run: Path) -> None:
    at_2 = directory.read_checkpoint("tiny", 2)
    assert at_2 == directory.Checkpoint(
        run="tiny",
        step=2,
        directory=run,
        model=MODEL,
        weights=run / "tiny_step2.bin",
        weights_sha256=files.sha256(run / "tiny_step2.bin"),
        tokenizer=run / "tokenizer.json",
        tokenizer_sha256=files.sha256(run / "tokenizer.json"),
        config_sha256=files.sha256(run / "tiny_step2_config.json"),
    )
    at_2.verify()
    read = weights.read(at_2.weights, at_2.model)
    assert (read["wte"]["embedding"] == fakes.random_params(MODEL, seed=2)["wte"]["embedding"]).all()


def test_no_step_means_the_latest_by_number(run: Path) -> None:
    latest = directory.read_checkpoint("tiny")
    assert latest == directory.read_checkpoint("tiny", 10)
    assert latest.weights.name == "tiny_step10.bin"
    assert (run / "latest_checkpoint.bin").readlink() == Path("tiny_step10.bin")
    assert (run / "latest_config.json").readlink() == Path("tiny_step10_config.json")
    latest.verify()


def test_a_copied_run_opens_under_its_own_name_elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = run.parent.rename(run.parent.with_name("elsewhere"))
    monkeypatch.setattr(directory, "CHECKPOINTS", moved)
    checkpoint = directory.read_checkpoint("tiny")
    assert checkpoint.directory == moved / "tiny"
    checkpoint.verify()


def test_own_runs_come_before_those_in_the_package(run: Path, roots: tuple[Path, Path]) -> None:
    checkpoints, shipped = roots
    for name in ("tiny", "shakespeare"):
        (shipped / name).mkdir()
        json_files.write(shipped / name / "latest_config.json", {})
    assert directory.names() == ["shakespeare", "tiny"]
    assert directory.find("tiny") == checkpoints / "tiny"
    assert directory.find("shakespeare") == shipped / "shakespeare"


def test_a_run_without_a_checkpoint_says_so_and_hides_its_namesake(run: Path, roots: tuple[Path, Path]) -> None:
    """Else the one who trains a run of their own would generate from another's."""
    checkpoints, shipped = roots
    (shipped / "begun").mkdir()
    json_files.write(shipped / "begun" / "latest_config.json", {})
    assert directory.find("begun") == shipped / "begun"
    (checkpoints / "begun").mkdir()
    (run / "latest_config.json").unlink()
    (run / "latest_config.json").symlink_to("gone.json")
    for name in ("begun", "tiny"):
        with pytest.raises(FileNotFoundError, match=f"run '{name}' in .* has no whole checkpoint yet"):
            directory.find(name)
    assert directory.names() == []


def test_every_name_that_is_listed_is_found(run: Path) -> None:
    """A notebook server leaves ``.ipynb_checkpoints``, whose name no run can have."""
    shutil.copytree(run, run.parent / ".ipynb_checkpoints")
    (run.parent / "latest_config.json").write_text("{}")
    assert [directory.find(name).name for name in directory.names()] == directory.names() != []


def test_an_unknown_run_lists_the_runs(run: Path) -> None:
    shutil.copytree(run, run.parent / "other")
    with pytest.raises(FileNotFoundError, match=r"run 'tinny' not found in .*Runs: other, tiny$"):
        directory.read_checkpoint("tinny")


def test_an_unknown_step_lists_the_steps_by_number(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run 'tiny' has no step 3\. Steps: 2, 10$"):
        directory.read_checkpoint("tiny", 3)
    for wrong in (-1, 0):
        with pytest.raises(FileNotFoundError, match=f"has no step {wrong}"):
            directory.read_checkpoint("tiny", wrong)


def test_steps_are_those_with_a_config_whatever_the_run_was_called(tmp_path: Path) -> None:
    path = tmp_path / "a.b+c"
    path.mkdir()
    for name in (
        "a.b+c_step10_config.json",
        "a.b+c_step9_config.json",
        "a.b+c_step7.bin",
        "old name_step6_config.json",
        ".a.b+c_step5_config.json.77.tmp",
        "a.b+c_step4_config.json.old",
        "a.b+c_stepx_config.json",
        "latest_config.json",
    ):
        (path / name).touch()
    assert directory.steps(path) == [6, 9, 10]
    assert directory.config_name("a.b+c", 9) == "a.b+c_step9_config.json"
    assert directory.weights_name("a.b+c", 9) == "a.b+c_step9.bin"


@pytest.mark.parametrize("name", ["tiny", "run_20260101-120000", "v1.2", "my run", "naïve", "-x", "a.b+c", "*"])
def test_a_plain_name_is_a_run_name(name: str) -> None:
    assert directory.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/tmp",
        "../tiny",
        "tiny/..",
        "a..b",
        "a\\b",
        "tiny\n",
        "a\nb",
        "a\x00b",
        "\t",
        "\x9b",
        "\u202e",
        "\udcff",
    ],
)
def test_a_name_that_could_leave_the_directory_is_refused(run: Path, name: str) -> None:
    for function in (directory.check_name, directory.find, directory.read_checkpoint):
        with pytest.raises(ValueError, match=re.escape(f"got {name!r}")):
            function(name)


@SETTINGS
@given(name=st.text() | st.lists(st.sampled_from("ab./\\\n")).map("".join))
def test_an_accepted_name_is_one_directory_below(name: str) -> None:
    try:
        directory.check_name(name)
    except ValueError:
        return
    assert (Path("/checkpoints") / name).parent == Path("/checkpoints")
    assert Path(name).name == name
    assert name not in ("", ".", "..")


@pytest.mark.parametrize("at", [None, 2])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_config_that_is_no_json_object_is_named(run: Path, at: int | None, content: bytes) -> None:
    path = run / ("latest_config.json" if at is None else "tiny_step2_config.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        directory.read_checkpoint("tiny", at)


# A number in these files is one of JSON's: no NaN, no infinity, at most 31 digits.
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_INTEGERS = st.integers(-(10**28), 10**28)
OTHER_KINDS: dict[type, Any] = {
    int: st.none() | st.booleans() | _FLOATS | st.text() | st.lists(_INTEGERS),
    str: st.none() | st.booleans() | _FLOATS | _INTEGERS | st.lists(st.text()) | st.dictionaries(st.text(), st.text()),
}


@SETTINGS
@given(data=st.data(), place=st.sampled_from(sorted(REQUIRED)))
def test_a_config_with_a_key_lost_or_altered_is_named(made: Path, data: st.DataObject, place: tuple[str, str]) -> None:
    section, key = place
    value = json_files.read(made / "latest_config.json")
    if data.draw(st.booleans(), "lost"):
        del value[section][key]
    else:
        value[section][key] = data.draw(OTHER_KINDS[REQUIRED[place]], "altered")
    _assert_names(made, value, key)


@SETTINGS
@given(
    section=st.sampled_from(["model", "tokenizer", "checkpoint"]),
    other=st.none() | st.text() | _INTEGERS | st.just([]),
)
def test_a_config_without_a_section_is_named(made: Path, section: str, other: Any) -> None:
    value = json_files.read(made / "latest_config.json")
    _assert_names(made, {name: part for name, part in value.items() if name != section}, section)
    _assert_names(made, value | {section: other}, section)


def _assert_names(made: Path, value: dict[str, Any], text: str) -> None:
    """Asserts that a run with this config is refused in words that name the file and the key."""
    path = made.parent / "altered" / "latest_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(directory, "CHECKPOINTS", made.parent)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}\b.*{text}"):
            directory.read_checkpoint("altered")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(config.ModelConfig)])
def test_a_config_of_an_impossible_model_is_named(run: Path, field: str) -> None:
    path = run / "latest_config.json"
    value = json_files.read(path)
    value["model"][field] = 0
    json_files.write(path, value)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {field} must be an integer of at least 1"):
        directory.read_checkpoint("tiny")


@pytest.mark.parametrize("place", [("tokenizer", "path"), ("checkpoint", "latest")])
@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "a/b", "a/", "./a", ".", "..", ""])
def test_a_config_names_files_beside_it(run: Path, place: tuple[str, str], name: str) -> None:
    path = run / "latest_config.json"
    value = copy.deepcopy(json_files.read(path))
    value[place[0]][place[1]] = name
    json_files.write(path, value)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} must name files in its own directory: got {name!r}"):
        directory.read_checkpoint("tiny")


@pytest.mark.parametrize("name", ["tiny_step10.bin", "tokenizer.json"])
def test_verify_notices_a_file_that_was_cut_changed_or_lost(run: Path, name: str) -> None:
    path = run / name
    whole = path.read_bytes()
    at_10 = directory.read_checkpoint("tiny")
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (whole[:-1], whole[:100], b"", whole + b"\n", flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not the file that the config of step 10"):
            at_10.verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} is missing, though .* step 10 names it"):
        at_10.verify()
    path.write_bytes(whole)
    at_10.verify()


def test_verify_notices_weights_of_another_step(run: Path) -> None:
    shutil.copy(run / "tiny_step2.bin", run / "tiny_step10.bin")
    directory.read_checkpoint("tiny", 2).verify()
    with pytest.raises(ValueError, match=r"tiny_step10\.bin is not the file"):
        directory.read_checkpoint("tiny", 10).verify()


def test_a_config_of_another_step_is_named(run: Path) -> None:
    path = run / "tiny_step10_config.json"
    shutil.copy(run / "tiny_step2_config.json", path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*step"):
        directory.read_checkpoint("tiny", 10)


def test_a_renamed_run_keeps_its_steps_and_is_tidied(run: Path) -> None:
    renamed = run.rename(run.parent / "other")
    assert directory.read_checkpoint("other", 2).weights == renamed / "tiny_step2.bin"
    with pytest.raises(FileNotFoundError, match=r"run 'other' has no step 3\. Steps: 2, 10$"):
        directory.read_checkpoint("other", 3)
    fakes.write_step(renamed, 12, keep_last=2)
    assert {path.name for path in renamed.glob("*_step*.bin")} == {*("tiny_step10.bin", "other_step12.bin")}
    fakes.write_step(renamed, 10, keep_last=2)
    assert {path.name for path in renamed.glob("*_step*")} == {
        *("other_step10.bin", "other_step10_config.json", "other_step12.bin", "other_step12_config.json")
    }
    assert directory.read_checkpoint("other", 10).weights.name == "other_step10.bin"
    directory.read_checkpoint("other").verify()


def test_the_links_follow_a_run_that_resumes_from_an_older_step(run: Path) -> None:
    found = fakes.writer(run, keep_last=1)
    found.write(12, fakes.random_params(MODEL), best=True)
    found.link_latest(12)
    found.write(8, fakes.random_params(MODEL), best=False)
    found.rewind(8, best=None)
    assert (run / "latest_checkpoint.bin").readlink() == Path("tiny_step8.bin")
    assert not (run / "best_config.json").is_symlink()
    found.write(9, fakes.random_params(MODEL), best=False)
    found.link_latest(9)
    directory.read_checkpoint("tiny").verify()
    assert directory.read_checkpoint("tiny").step == 9
    found.rewind(9, best=8)  # which is pruned
    assert not (run / "best_config.json").is_symlink()
    found.rewind(12, best=12)
    assert (run / "best_config.json").readlink() == Path("tiny_step12_config.json")


@pytest.mark.parametrize("name", ["tiny", "naïve", "日" * 60, "n" * 222])
def test_a_name_is_refused_where_its_longest_file_would_not_fit(tmp_path: Path, name: str) -> None:
    """As the writer writes them: under a temporary name with the largest process number."""
    longest = f".{directory.config_name(name, 4000)}.4194304.tmp"
    fits = len(longest.encode()) <= 255
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="run name of 222 bytes is too long"):
        assert directory.check_new_name(name, 4000) == name
    with contextlib.nullcontext() if fits else pytest.raises(OSError, match="File name too long"):
        (tmp_path / longest).touch()
    assert directory.check_new_name("n" * 221, 4000)


def test_a_run_has_a_checkpoint_if_it_can_be_resumed(run: Path) -> None:
    assert directory.has_checkpoint(run)
    (run / "latest_config.json").unlink()
    assert directory.has_checkpoint(run)
    for at in directory.steps(run):
        (run / directory.config_name("tiny", at)).unlink()
    assert not directory.has_checkpoint(run)
    assert not directory.has_checkpoint(run / "nosuch")
    (run / "train_state").mkdir()
    (run / "train_state" / "7.orbax-checkpoint-tmp").mkdir()
    assert not directory.has_checkpoint(run)
    (run / "train_state" / "7").mkdir()
    assert directory.has_checkpoint(run)
