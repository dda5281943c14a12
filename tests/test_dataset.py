"""Ids on disk are the text's ids, prepared once; a batch is a function of its arguments alone."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import files
from hipgpt_jax.text import corpus, dataset, encoding, tokenizer

SETTINGS = settings(deadline=None, derandomize=True, database=None)

TEXT = "".join(f"Speaker {i % 7}:\nTo be, or not to be — line {i * i % 97}.\n\n" for i in range(100))
NAMES = ("tokenizer.json", "tokens.bin", "data.json")


def write_text(folder: Path, text: str = TEXT, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def run_directory(folder: Path, name: str = "run") -> Path:
    path = folder / name
    path.mkdir()
    return path


def write_ids(directory: Path, train: int, validation: int) -> dataset.Dataset:
    """Writes a data set whose ids count up from 0, so that a window shows where it begins."""
    np.arange(train + validation, dtype="<u2").tofile(directory / "tokens.bin")
    manifest = dataset.Manifest(
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
    files.write_json(directory / "data.json", dataclasses.asdict(manifest))
    return dataset.Dataset(directory)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    return write_ids(tmp_path_factory.mktemp("counting"), train=900, validation=100)


def test_the_splits_are_the_first_nine_tenths_and_the_last_tenth(tmp_path: Path) -> None:
    source = write_text(tmp_path)
    data = dataset.prepare(run_directory(tmp_path), source, 300)
    vocabulary = tokenizer.Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    content = TEXT.encode()
    split = len(content) * 9 // 10
    while content[split] & 0xC0 == 0x80:
        split += 1
    assert vocabulary.decode_bytes(data.train) == content[:split]
    assert vocabulary.decode_bytes(data.validation) == content[split:]
    first = len(vocabulary.decode_bytes(data.validation[:1]))
    assert (data.manifest.scored_bytes, data.manifest.text_bytes) == (len(content) - split - first, len(content))
    assert data.manifest.tokens_sha256 == files.sha256(tmp_path / "run" / "tokens.bin")
    assert (data.manifest.train_tokens, data.manifest.validation_tokens) == (len(data.train), len(data.validation))
    assert list(data.train) == vocabulary.encode(content[:split].decode())
    assert list(data.validation) == vocabulary.encode(content[split:].decode())


def test_the_vocabulary_is_learned_from_the_training_split_alone(tmp_path: Path) -> None:
    source = write_text(tmp_path, "to be or not " * 90 + "qqqqqqqqqqqqq" * 10)
    dataset.prepare(run_directory(tmp_path), source, 5000)
    assert "qq" not in json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"]["vocab"]


def test_ids_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_text(tmp_path)
    whole = dataset.prepare(run_directory(tmp_path, "whole"), source, 300)
    read_text = corpus.read_text
    monkeypatch.setattr(corpus, "read_text", lambda *rest, **_: read_text(*rest, piece_bytes=64))
    monkeypatch.setattr(encoding, "_BATCH_PIECES", 3)
    pieces = dataset.prepare(run_directory(tmp_path, "pieces"), source, 300)
    assert pieces.manifest == whole.manifest
    np.testing.assert_array_equal(pieces.train, whole.train)
    np.testing.assert_array_equal(pieces.validation, whole.validation)


def test_a_second_prepare_gives_the_same_and_writes_nothing(tmp_path: Path) -> None:
    source, directory = write_text(tmp_path), run_directory(tmp_path)
    first = dataset.prepare(directory, source, 300)
    before = {entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns) for entry in directory.iterdir()}
    second = dataset.prepare(directory, write_text(tmp_path, name="a copy elsewhere.txt"), 300)
    assert {entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns) for entry in directory.iterdir()} == before
    assert set(before) == set(NAMES)
    assert second.manifest == first.manifest
    np.testing.assert_array_equal(second.train, first.train)


def test_two_runs_on_one_text_hold_the_same_bytes(tmp_path: Path) -> None:
    source = write_text(tmp_path)
    one, two = run_directory(tmp_path, "one"), run_directory(tmp_path, "two")
    for directory in (one, two):
        dataset.prepare(directory, source, 300)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in NAMES)


@pytest.mark.parametrize(("vocab_size", "width"), [(65536, 2), (65537, 4)])
def test_an_id_has_the_width_that_its_vocabulary_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, width: int
) -> None:
    """Bytes have the last ids here, and byte 0xad the very last, which too narrow a width would cut."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"{number}x" for number in range(vocab_size - 256)]
    vocab = {token: token_id for token_id, token in enumerate([*fillers, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    large = tokenizer.Tokenizer(backend)
    monkeypatch.setattr(tokenizer.Tokenizer, "train", lambda *_, **__: large)
    text = TEXT + "\xad"
    data = dataset.prepare(run_directory(tmp_path), write_text(tmp_path, text), vocab_size)
    ids = large.encode(text)
    assert data.manifest.token_bytes == width
    assert max(ids) == vocab_size - 1
    assert [*data.train, *data.validation] == ids
    content = (tmp_path / "run" / "tokens.bin").read_bytes()
    assert content == b"".join(token_id.to_bytes(width, "little") for token_id in ids)


@pytest.mark.parametrize(
    ("text", "vocab_size", "parts"),
    [
        (TEXT + "more", 300, ["--data-path", "other.txt", "is not its text text.txt"]),
        (TEXT, 301, ["--vocab-size 301 is not its 300"]),
        (TEXT.swapcase(), 256, ["--data-path", "other.txt", "--vocab-size 256 is not its 300"]),
    ],
)
def test_a_run_keeps_its_text_and_vocabulary(tmp_path: Path, text: str, vocab_size: int, parts: list[str]) -> None:
    directory = run_directory(tmp_path)
    dataset.prepare(directory, write_text(tmp_path), 300)
    before = {name: (directory / name).read_bytes() for name in NAMES}
    with pytest.raises(ValueError, match="the run has other data") as caught:
        dataset.prepare(directory, write_text(tmp_path, text, "other.txt"), vocab_size)
    assert all(part in str(caught.value) for part in [*parts, "--reset"])
    assert ("--vocab-size" in str(caught.value)) == (vocab_size != 300)
    assert ("--data-path" in str(caught.value)) == (text != TEXT)
    assert {name: (directory / name).read_bytes() for name in NAMES} == before


def test_a_vocabulary_that_the_text_could_not_fill_is_still_the_one_asked_for(tmp_path: Path) -> None:
    source, directory = write_text(tmp_path), run_directory(tmp_path)
    learned = dataset.prepare(directory, source, 20_000).manifest.vocab_size
    assert learned < 20_000
    assert dataset.prepare(directory, source, 20_000).manifest.vocab_size == learned


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    directory = run_directory(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"data file not found: {tmp_path / 'nosuch.txt'}. ")):
        dataset.prepare(directory, tmp_path / "nosuch.txt", 300)
    assert list(directory.iterdir()) == []


def test_an_empty_text_is_named(tmp_path: Path) -> None:
    directory = run_directory(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'text.txt'} is empty: 0 tokens")):
        dataset.prepare(directory, write_text(tmp_path, ""), 300)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("text", "train"), [("x", 0), ("é", 2), ("x" * 10, 9), ("x" * 4 + "é", 6)])
def test_a_text_that_is_too_short_says_what_it_has_and_needs(tmp_path: Path, text: str, train: int) -> None:
    data = dataset.prepare(run_directory(tmp_path), write_text(tmp_path, text), 256)
    with pytest.raises(ValueError, match=rf"text.txt is too short: its training split has {train} tokens and needs 33"):
        data.check_length(32)


def test_the_shortest_splits_that_will_do(tmp_path: Path) -> None:
    write_ids(run_directory(tmp_path, "a"), train=5, validation=2).check_length(4)
    with pytest.raises(ValueError, match="its training split has 5 tokens and needs 6"):
        dataset.Dataset(tmp_path / "a").check_length(5)
    with pytest.raises(ValueError, match="its validation split has 1 tokens and needs 2"):
        write_ids(run_directory(tmp_path, "b"), train=5, validation=1).check_length(4)


@pytest.mark.parametrize(
    ("step", "seed", "starts"),
    [
        (0, 0, [155, 562, 377]),
        (1, 0, [118, 357, 869]),
        (0, 1, [479, 815, 178]),
        (123_456, 2**32 - 1, [867, 170, 803]),
    ],
)
def test_the_batches_are_these(counting: dataset.Dataset, step: int, seed: int, starts: list[int]) -> None:
    """Golden values: another NumPy, or another machine, trains on the same batches."""
    batch = counting.batch_at(step, seed=seed, batch_size=3, length=4)
    assert batch.tolist() == [[start, start + 1, start + 2, start + 3, start + 4] for start in starts]
    assert batch.dtype == np.int32


def test_a_batch_depends_on_nothing_but_its_arguments(counting: dataset.Dataset, tmp_path: Path) -> None:
    write_ids(tmp_path, train=900, validation=100)
    program = f"""
import pathlib
from hipgpt_jax.text import dataset
data = dataset.Dataset(pathlib.Path({str(tmp_path)!r}))
print(data.batch_at(7, seed=3, batch_size=5, length=6).tolist())
"""
    expected = counting.batch_at(7, seed=3, batch_size=5, length=6)
    counting.batch_at(8, seed=3, batch_size=5, length=6)
    np.random.default_rng(0).random()
    np.testing.assert_array_equal(counting.batch_at(7, seed=3, batch_size=5, length=6), expected)
    there = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert json.loads(there) == expected.tolist()


def test_every_step_and_seed_has_a_batch_of_its_own(counting: dataset.Dataset) -> None:
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


def test_more_rows_go_on_from_fewer(counting: dataset.Dataset) -> None:
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
        *((key, value) for key in ("train_tokens", "validation_tokens") for value in (None, "9", 9.5, [9], -1)),
        *(("token_bytes", value) for value in (None, "2", 3, 0, 1, 8, 2.0, True)),
        *(("tokens_sha256", value) for value in (None, "", "ab", 7)),
        *(("eos_id", value) for value in (1000, -1)),
        ("train_tokens", 10**25),
        *(
            ("sources", value)
            for value in (None, [], ["a.txt"], [{"name": "a"}], {"name": "a", "bytes": 1, "sha256": ""})
        ),
        *(("eos_id", value) for value in ("9", 1.0, True)),
        ("text_field", 7),
        ("tokenizer_sha256", 7),
        ("more", 1),
    ],
)
def test_a_manifest_of_something_else_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write_ids(tmp_path, train=9, validation=2)
    path = tmp_path / "data.json"
    files.write_json(path, files.read_json(path) | {key: value})
    with pytest.raises(ValueError, match=r"data\.json"):
        dataset.Dataset(tmp_path)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(dataset.Manifest)])
def test_a_manifest_that_lacks_a_key_is_named(tmp_path: Path, key: str) -> None:
    write_ids(tmp_path, train=9, validation=2)
    path = tmp_path / "data.json"
    files.write_json(path, {name: value for name, value in files.read_json(path).items() if name != key})
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not a data manifest: .*'{key}'"):
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


def test_an_id_beyond_the_vocabulary_is_refused_even_where_its_digest_is_right(tmp_path: Path) -> None:
    write_ids(tmp_path, train=900, validation=100)
    path = tmp_path / "data.json"
    files.write_json(path, files.read_json(path) | {"vocab_size": 999})
    with pytest.raises(ValueError, match=r"tokens.bin has the id 999, beyond the vocabulary of 999"):
        dataset.Dataset(tmp_path)


def test_what_is_odd_about_a_text_is_noted_before_it_is_encoded(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 " * 100)
    told: list[str] = []
    data = dataset.prepare(run_directory(tmp_path), tmp_path / "text.txt", 256, note=told.append)
    assert [line[:52] for line in told] == [f"100 bytes (the first in {tmp_path / 'text.txt'})"[:52]]
    assert data.manifest.text_bytes == 700, "U+FFFD has 3 bytes"
    assert data.manifest.scored_bytes == len(data.validation) - 1
