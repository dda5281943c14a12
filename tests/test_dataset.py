"""Token ids on disk are verified before use; a batch is a function of its arguments alone."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import files, json_files
from hipgpt_jax.text import corpus, dataset, manifest

SETTINGS = settings(deadline=None, derandomize=True, database=None)


def write_ids(directory: Path, train: int, validation: int) -> dataset.Dataset:
    """Writes a data set whose ids count up from 0, so that a window shows where it begins."""
    np.arange(train + validation, dtype="<u2").tofile(directory / "tokens.bin")
    data = manifest.Manifest(
        sources=(corpus.Source(name="text.txt", bytes=0, sha256="ab" * 32),),
        text_field=None,
        documents=1,
        text_bytes=0,
        eos_id=None,
        tokenizer_sha256=None,
        requested_vocab_size=1000,
        vocab_size=1000,
        sample_bytes=0,
        token_bytes=2,
        tokens_sha256=files.sha256(directory / "tokens.bin"),
        train_tokens=train,
        validation_tokens=validation,
        scored_bytes=0,
    )
    json_files.write(directory / "data.json", dataclasses.asdict(data))
    return dataset.Dataset(directory)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    return write_ids(tmp_path_factory.mktemp("counting"), train=900, validation=100)


def test_check_length_accepts_the_shortest_splits(tmp_path: Path) -> None:
    write_ids(tmp_path, train=5, validation=2).check_length(4)
    with pytest.raises(ValueError, match="its training split has 5 tokens and needs 6"):
        dataset.Dataset(tmp_path).check_length(5)
    with pytest.raises(ValueError, match="its validation split has 1 tokens and needs 2"):
        write_ids(tmp_path, train=5, validation=1).check_length(4)


@pytest.mark.parametrize(
    ("step", "seed", "starts"),
    [
        (0, 0, [155, 562, 377]),
        (1, 0, [118, 357, 869]),
        (0, 1, [479, 815, 178]),
        (123_456, 2**32 - 1, [867, 170, 803]),
    ],
)
def test_batches_are_pinned(counting: dataset.Dataset, step: int, seed: int, starts: list[int]) -> None:
    """Golden values: another NumPy, or another machine, trains on the same batches."""
    batch = counting.batch_at(step, seed=seed, batch_size=3, length=4)
    assert batch.tolist() == [[start, start + 1, start + 2, start + 3, start + 4] for start in starts]
    assert batch.dtype == np.int32


def test_batches_differ_by_step_and_seed(counting: dataset.Dataset) -> None:
    batches = {
        counting.batch_at(step, seed=seed, batch_size=8, length=4).tobytes() for step in range(40) for seed in range(5)
    }
    assert len(batches) == 200


@SETTINGS
@given(step=st.integers(0, 2**40), seed=st.integers(0, 2**32 - 1), length=st.integers(1, 899))
def test_targets_follow_inputs_inside_the_training_split(
    counting: dataset.Dataset, step: int, seed: int, length: int
) -> None:
    batch = counting.batch_at(step, seed=seed, batch_size=4, length=length)
    assert batch.shape == (4, length + 1)
    np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)
    assert batch.min() >= 0
    assert batch.max() < 900


def test_every_window_of_the_training_split_is_drawn(tmp_path: Path) -> None:
    data = write_ids(tmp_path, train=9, validation=2)
    assert set(data.batch_at(0, seed=0, batch_size=200, length=5)[:, 0]) == {0, 1, 2, 3}
    assert set(data.batch_at(0, seed=0, batch_size=20, length=8)[:, 0]) == {0}


class _Recorded:
    """Ids that record the positions at which they are read."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self.starts = ids, []

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, key: slice) -> np.ndarray:
        self.starts.append(key.start)
        return self._ids[key]


def test_rows_of_a_batch_are_read_alone(counting: dataset.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counting.batch_at(5, seed=1, batch_size=8, length=4)
    for rows in (slice(2, 4), slice(6, None), slice(None)):
        recorded = _Recorded(counting.train)
        monkeypatch.setattr(counting, "train", recorded)
        found = counting.batch_at(5, seed=1, batch_size=8, length=4, rows=rows)
        monkeypatch.undo()
        np.testing.assert_array_equal(found, whole[rows])
        assert recorded.starts == whole[rows, 0].tolist(), "of ids that count, the first is the position"


def test_a_larger_batch_extends_a_smaller_one(counting: dataset.Dataset) -> None:
    few = counting.batch_at(3, seed=0, batch_size=3, length=4)
    np.testing.assert_array_equal(counting.batch_at(3, seed=0, batch_size=9, length=4)[:3], few)


@pytest.mark.parametrize("size", [0, 1, 21, 23, 44])
def test_a_tokens_file_of_the_wrong_size_is_named(tmp_path: Path, size: int) -> None:
    write_ids(tmp_path, train=9, validation=2)
    (tmp_path / "tokens.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'tokens.bin'))} must hold 11 .*got {size} bytes"):
        dataset.Dataset(tmp_path)


@pytest.mark.parametrize("name", ["tokens.bin", "data.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_ids(tmp_path, train=9, validation=2)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        dataset.Dataset(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train_tokens", value) for value in (None, "9", 9.5, -1, 10**25)),
        *(("token_bytes", value) for value in (3, 2.0, True)),
        *(("tokens_sha256", value) for value in ("", "ab", 7)),
        *(("eos_id", value) for value in (1000, -1, 1.0)),
        *(("sources", value) for value in ([], ["a.txt"], [{"name": "a"}])),
        ("text_field", 7),
        ("more", 1),
    ],
)
def test_an_invalid_manifest_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write_ids(tmp_path, train=9, validation=2)
    path = tmp_path / "data.json"
    json_files.write(path, json_files.read(path) | {key: value})
    with pytest.raises(ValueError, match=r"data\.json"):
        dataset.Dataset(tmp_path)


def test_a_manifest_needs_every_field(tmp_path: Path) -> None:
    write_ids(tmp_path, train=9, validation=2)
    path = tmp_path / "data.json"
    value = json_files.read(path)
    for field in dataclasses.fields(manifest.Manifest):
        json_files.write(path, {name: part for name, part in value.items() if name != field.name})
        with pytest.raises(
            ValueError,
            match=rf"{re.escape(str(path))} is not a valid data manifest: data manifest has no '{field.name}'",
        ):
            dataset.Dataset(tmp_path)


def test_a_flipped_bit_of_the_ids_is_found(tmp_path: Path) -> None:
    write_ids(tmp_path, train=900, validation=100)
    path = tmp_path / "tokens.bin"
    whole = path.read_bytes()
    for place in np.random.RandomState(0).randint(0, 8 * len(whole), 200):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not the file that data.json describes"):
            dataset.Dataset(tmp_path)
    path.write_bytes(whole)
    assert dataset.Dataset(tmp_path).train[-1] == 899


def test_an_id_beyond_the_vocabulary_is_refused_despite_a_correct_digest(tmp_path: Path) -> None:
    write_ids(tmp_path, train=900, validation=100)
    path = tmp_path / "data.json"
    json_files.write(path, json_files.read(path) | {"vocab_size": 999})
    with pytest.raises(ValueError, match=r"tokens.bin has the id 999, beyond the vocabulary of 999"):
        dataset.Dataset(tmp_path)
