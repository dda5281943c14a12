"""A corpus of many documents becomes ids with an end token after each, the same after any interruption."""

import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from hipgpt_jax import files
from hipgpt_jax.text import corpus, preparation, tokenizer

NAMES = ("tokenizer.json", "tokens.bin", "data.json")
TEXT = "".join(f"Speaker {i % 7}:\nTo be, or not to be — line {i * i % 97}.\n\n" for i in range(100))
POEM = "".join(f"line {number * number % 89} of a poem — naïve, the end\n" for number in range(60))
LINES = [f"{number}: the king <|endoftext|> and {number * 7 % 13} fools\n" for number in range(80)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "poem.txt").write_text(POEM)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"body": line, "text": "to be"}) + "\n" for line in LINES))
    return [folder / "poem.txt", folder / "lines.jsonl"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ready-made tokenizer whose end token has another name and not the last id."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.Tokenizer.train([POEM], 400).to_json())
    backend.add_special_tokens(["</s>", "<pad>"])
    path = tmp_path_factory.mktemp("ready") / "ready.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def whole(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted preparation."""
    directory = tmp_path_factory.mktemp("whole")
    preparation.prepare(directory, sources, 400, text_field="body")
    return contents(directory)


def write_text(folder: Path, text: str = TEXT, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def run_directory(folder: Path, name: str = "run") -> Path:
    path = folder / name
    path.mkdir()
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("is_ready", [False, True])
def test_an_end_token_follows_each_document_in_both_splits(
    sources: list[Path], ready: Path, tmp_path: Path, is_ready: bool
) -> None:
    data = preparation.prepare(tmp_path, sources, 400, text_field="body", tokenizer_path=ready if is_ready else None)
    vocabulary, made = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json"), data.manifest
    content = "".join([POEM, *LINES]).encode()
    split = len(content) * 9 // 10
    first = len(vocabulary.decode_bytes(data.validation[:1]))
    assert (made.documents, made.text_bytes, made.scored_bytes) == (81, len(content), len(content) - split - first)
    assert made.eos_id == vocabulary.end_id
    if is_ready:
        size = len(tokenizers.Tokenizer.from_file(str(ready)).get_vocab())
        assert (made.eos_id, made.vocab_size, made.requested_vocab_size, made.sample_bytes) == (size - 2, size, size, 0)
        assert made.tokenizer_sha256 == files.sha256(ready)
    else:
        assert (made.eos_id, made.vocab_size, made.sample_bytes) == (399, 400, split)
        assert made.tokenizer_sha256 is None
    ids = np.concatenate([data.train, data.validation])
    ends = np.flatnonzero(ids == made.eos_id)
    starts = [0, *(ends + 1)]
    found = [vocabulary.decode(ids[start:end]) for start, end in zip(starts, ends, strict=False)]
    assert found == [POEM, *LINES]
    assert ends[-1] == len(ids) - 1
    is_text = data.train != made.eos_id
    assert vocabulary.decode_bytes(data.train[is_text]) == content[:split]


def test_a_single_document_has_no_end_token(tmp_path: Path) -> None:
    for name, content in (("one.txt", POEM), ("one.jsonl", json.dumps({"text": POEM}))):
        (tmp_path / name).write_text(content)
        (tmp_path / f"run {name}").mkdir()
    one, other = (
        preparation.prepare(tmp_path / f"run {name}", tmp_path / name, 300) for name in ("one.txt", "one.jsonl")
    )
    assert (one.manifest.eos_id, one.manifest.documents, one.manifest.text_field) == (None, 1, None)
    assert (other.manifest.eos_id, other.manifest.documents, other.manifest.text_field) == (None, 1, "text")
    np.testing.assert_array_equal(one.train, other.train)
    np.testing.assert_array_equal(one.validation, other.validation)


def test_encode_equals_the_ids_on_disk(sources: list[Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(whole["tokenizer.json"])
    vocabulary, text = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json"), corpus.Corpus(sources, "body")
    ids = np.frombuffer(whole["tokens.bin"], "<u2")
    count = json.loads(whole["data.json"])["validation_tokens"]
    np.testing.assert_array_equal(preparation.encode(vocabulary, text, text.split, vocabulary.end_id), ids[-count:])
    unended = preparation.encode(vocabulary, text)
    assert vocabulary.decode(unended) == "".join([POEM, *LINES])
    assert unended.dtype == np.int32


class Cut(BaseException):
    """Simulates the end of the process; nothing in the package may catch it."""


@pytest.mark.parametrize("reports", [0, 1, 2, 3, 4, 10, 20])
@pytest.mark.parametrize("is_ready", [False, True])
def test_an_interrupted_preparation_leaves_no_partial_file_and_starts_over(
    sources: list[Path],
    ready: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reports: int,
    is_ready: bool,
) -> None:
    """Cut in each phase. A tokenizer that an interrupted preparation wrote is replaced, not used."""
    counter = itertools.count()

    def cut(*_: object) -> None:
        if next(counter) == reports:
            raise Cut

    monkeypatch.setattr(preparation, "_BATCH_PIECES", 7)
    with pytest.raises(Cut):
        preparation.prepare(
            tmp_path, sources, 400, text_field="body", tokenizer_path=ready if is_ready else None, progress=cut
        )
    assert set(contents(tmp_path)) <= {"tokenizer.json"}
    preparation.prepare(tmp_path, sources, 400, text_field="body")
    assert contents(tmp_path) == whole


PROGRAM = """
import pathlib, sys
from hipgpt_jax.text import preparation
preparation._BATCH_PIECES = 3
directory, *sources = map(pathlib.Path, sys.argv[1:])
preparation.prepare(directory, sources, 400, text_field="body", progress=lambda *report: print(*report, flush=True))
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_no_partial_file(
    sources: list[Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    draws = random.Random(0)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *map(str, sources)]
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(draws.randrange(2, 20)):
                process.stdout.readline()
            time.sleep(draws.random() * 0.003)
            process.kill()
        assert all(whole[name] == content for name, content in contents(tmp_path).items() if name in NAMES)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    assert {name: content for name, content in contents(tmp_path).items() if name in NAMES} == whole


def test_several_documents_need_an_end_token(sources: list[Path], tmp_path: Path) -> None:
    endless = tmp_path / "endless.json"
    endless.write_text(tokenizer.Tokenizer.train([POEM], 300).to_json())
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(endless))} has no end token .* to separate 81 documents\. Add"
    ):
        preparation.prepare(tmp_path / "run", sources, 300, text_field="body", tokenizer_path=endless)
    assert contents(tmp_path / "run") == {}
    made = preparation.prepare(tmp_path / "run", sources[0], 5000, tokenizer_path=endless).manifest
    assert (made.vocab_size, made.requested_vocab_size, made.eos_id) == (300, 300, None)


def test_other_sources_fields_and_tokenizers_are_refused(sources: list[Path], ready: Path, tmp_path: Path) -> None:
    preparation.prepare(tmp_path, sources, 400, text_field="body", tokenizer_path=ready)
    before = contents(tmp_path)
    preparation.prepare(tmp_path, sources, 9999, text_field="body", tokenizer_path=ready)
    for settings_, message in (
        ({"sources": sources[:1]}, "--data-path gives 1 files, not its 2"),
        ({"sources": sources[::-1]}, r"--data-path lines.jsonl \(sha256 .{12}…\) is not its text poem.txt \("),
        ({"text_field": "text"}, "--text-field text is not its body"),
        ({"tokenizer_path": None}, r"the tokenizer to be learned is not its tokenizer \(sha256 .{12}…\)"),
        ({"tokenizer_path": sources[0]}, r"the tokenizer .*poem.txt \(sha256 .{12}…\) is not its tokenizer"),
    ):
        asked: dict[str, Any] = {"sources": sources, "text_field": "body", "tokenizer_path": ready} | settings_
        with pytest.raises(ValueError, match=f"the run has other data: .*{message}.*--run-name"):
            preparation.check_same_data(tmp_path, vocab_size=400, **asked)
    with pytest.raises(FileNotFoundError, match=r"tokenizer not found: .*none\.json"):
        preparation.check_same_data(tmp_path, sources, 400, text_field="body", tokenizer_path=tmp_path / "none.json")
    assert contents(tmp_path) == before


def test_the_same_bytes_in_another_format_are_other_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text('{"text": "to be or not to be"}')
    (tmp_path / "run").mkdir()
    preparation.prepare(tmp_path / "run", tmp_path / "a.jsonl", 256)
    with pytest.raises(ValueError, match=r"a\.txt .* is not its text a\.jsonl"):
        preparation.check_same_data(tmp_path / "run", tmp_path / "a.txt", 256)


def test_progress_covers_each_phase(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_BATCH_PIECES", 7)
    reports: list[tuple[int, int, str]] = []
    made = preparation.prepare(
        tmp_path, sources, 400, text_field="body", progress=lambda *report: reports.append(report)
    ).manifest
    assert [what for what, _ in itertools.groupby(reports, lambda report: report[2])] == [
        "reading",
        "learning",
        "encoding",
    ]
    for what, total in (("learning", made.sample_bytes), ("encoding", made.text_bytes)):
        done = [report[0] for report in reports if report[2] == what]
        assert {report[1] for report in reports if report[2] == what} == {total}
        assert done == sorted(done)
        assert (done[0], done[-1] <= total) == (0, True)
    assert reports[-1][0] == made.text_bytes


def test_ids_that_lose_bytes_of_the_text_are_refused(tmp_path: Path) -> None:
    """Even with a vocabulary that ``Tokenizer.load`` would refuse."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.Tokenizer.train([POEM], 300).to_json())
    backend.add_tokens([tokenizers.AddedToken("king", lstrip=True)])
    (tmp_path / "a.txt").write_text("a king")
    (tmp_path / "b.txt").write_text("aking")
    text = r"the tokenizer loses text: 6 bytes became ids of 5 bytes, in the text that begins 'a king'"
    with pytest.raises(ValueError, match=text):
        preparation.encode(tokenizer.Tokenizer(backend), corpus.Corpus(tmp_path / "a.txt"))
    assert len(preparation.encode(tokenizer.Tokenizer(backend), corpus.Corpus(tmp_path / "b.txt"))) == 2


def test_the_splits_are_the_first_nine_tenths_and_the_last_tenth(tmp_path: Path) -> None:
    source = write_text(tmp_path)
    data = preparation.prepare(run_directory(tmp_path), source, 300)
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
    preparation.prepare(run_directory(tmp_path), source, 5000)
    assert "qq" not in json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"]["vocab"]


def test_ids_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_text(tmp_path)
    whole = preparation.prepare(run_directory(tmp_path, "whole"), source, 300)
    read_text = corpus.read_text
    monkeypatch.setattr(corpus, "read_text", lambda *rest, **_: read_text(*rest, piece_bytes=64))
    monkeypatch.setattr(preparation, "_BATCH_PIECES", 3)
    pieces = preparation.prepare(run_directory(tmp_path, "pieces"), source, 300)
    assert pieces.manifest == whole.manifest
    np.testing.assert_array_equal(pieces.train, whole.train)
    np.testing.assert_array_equal(pieces.validation, whole.validation)


def test_a_second_preparation_writes_nothing(tmp_path: Path) -> None:
    source, directory = write_text(tmp_path), run_directory(tmp_path)
    first = preparation.prepare(directory, source, 300)
    before = {entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns) for entry in directory.iterdir()}
    second = preparation.prepare(directory, write_text(tmp_path, name="a copy elsewhere.txt"), 300)
    assert {entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns) for entry in directory.iterdir()} == before
    assert set(before) == set(NAMES)
    assert second.manifest == first.manifest
    np.testing.assert_array_equal(second.train, first.train)


@pytest.mark.parametrize(("vocab_size", "width"), [(65536, 2), (65537, 4)])
def test_an_id_has_the_width_that_its_vocabulary_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, width: int
) -> None:
    """Bytes have the last ids, and byte 0xad the very last, which a width that is too narrow would truncate."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"{number}x" for number in range(vocab_size - 256)]
    vocab = {token: token_id for token_id, token in enumerate([*fillers, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    large = tokenizer.Tokenizer(backend)
    monkeypatch.setattr(tokenizer.Tokenizer, "train", lambda *_, **__: large)
    text = TEXT + "\xad"
    data = preparation.prepare(run_directory(tmp_path), write_text(tmp_path, text), vocab_size)
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
def test_other_text_and_vocabularies_are_refused(tmp_path: Path, text: str, vocab_size: int, parts: list[str]) -> None:
    directory = run_directory(tmp_path)
    preparation.prepare(directory, write_text(tmp_path), 300)
    before = {name: (directory / name).read_bytes() for name in NAMES}
    with pytest.raises(ValueError, match="the run has other data") as caught:
        preparation.prepare(directory, write_text(tmp_path, text, "other.txt"), vocab_size)
    assert all(part in str(caught.value) for part in [*parts, "--run-name"])
    assert ("--vocab-size" in str(caught.value)) == (vocab_size != 300)
    assert ("--data-path" in str(caught.value)) == (text != TEXT)
    assert {name: (directory / name).read_bytes() for name in NAMES} == before


def test_a_vocabulary_smaller_than_requested_matches_the_request(tmp_path: Path) -> None:
    source, directory = write_text(tmp_path), run_directory(tmp_path)
    learned = preparation.prepare(directory, source, 20_000).manifest.vocab_size
    assert learned < 20_000
    assert preparation.prepare(directory, source, 20_000).manifest.vocab_size == learned


def test_notes_of_the_corpus_are_reported(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 " * 100)
    notes: list[str] = []
    data = preparation.prepare(run_directory(tmp_path), tmp_path / "text.txt", 256, note=notes.append)
    assert [line[:52] for line in notes] == [f"100 bytes (the first in {tmp_path / 'text.txt'})"[:52]]
    assert data.manifest.text_bytes == 700, "U+FFFD has 3 bytes"
    assert data.manifest.scored_bytes == len(data.validation) - 1


@pytest.mark.parametrize(("text", "message"), [(None, "data file not found: {}. "), ("", "{} is empty: 0 tokens")])
def test_a_missing_or_empty_text_is_named_and_leaves_no_file(tmp_path: Path, text: str | None, message: str) -> None:
    directory, source = run_directory(tmp_path), tmp_path / "text.txt"
    if text is not None:
        write_text(tmp_path, text)
    error = FileNotFoundError if text is None else ValueError
    with pytest.raises(error, match=re.escape(message.format(source))):
        preparation.prepare(directory, source, 300)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("text", "train"), [("x", 0), ("é", 2), ("x" * 10, 9), ("x" * 4 + "é", 6)])
def test_a_text_that_is_too_short_is_refused_with_its_length(tmp_path: Path, text: str, train: int) -> None:
    data = preparation.prepare(run_directory(tmp_path), write_text(tmp_path, text), 256)
    with pytest.raises(ValueError, match=rf"text.txt is too short: its training split has {train} tokens and needs 33"):
        data.check_length(32)


def test_a_given_end_token_follows_a_single_document_too(ready: Path, tmp_path: Path) -> None:
    text, end_id = write_text(tmp_path), tokenizer.Tokenizer.load(ready).special_tokens["<pad>"]
    data = preparation.prepare(run_directory(tmp_path), text, 400, tokenizer_path=ready, end_id=end_id)
    assert data.manifest.eos_id == end_id
    assert data.validation[-1] == end_id
    assert np.count_nonzero(data.train == end_id) + np.count_nonzero(data.validation == end_id) == 1
    with pytest.raises(ValueError, match=f"its documents end with {end_id}, not with the token 9"):
        preparation.check_same_data(tmp_path / "run", text, 400, tokenizer_path=ready, end_id=9)
    with pytest.raises(ValueError, match=r"the tokenizer to be learned is not its tokenizer \(sha256 [0-9a-f]{12}…\)"):
        preparation.check_same_data(tmp_path / "run", text, 400)
