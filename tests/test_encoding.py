"""Many documents become ids, with an end after each, the same however often the work was cut short."""

import contextlib
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import files, version
from hipgpt_jax.text import corpus, dataset, encoding, tokenizer

SETTINGS = settings(deadline=None, derandomize=True, database=None)
NAMES = ("tokenizer.json", "tokens.bin", "data.json")
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
    """A ready-made tokenizer with an end token of its own name, which has not the last id."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.Tokenizer.train([POEM], 400).to_json())
    backend.add_special_tokens(["</s>", "<pad>"])
    path = tmp_path_factory.mktemp("ready") / "ready.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def whole(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of work that nothing cut short."""
    directory = tmp_path_factory.mktemp("whole")
    dataset.prepare(directory, sources, 400, text_field="body")
    return contents(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("is_ready", [False, True])
def test_an_end_follows_each_document_in_both_splits(
    sources: list[Path], ready: Path, tmp_path: Path, is_ready: bool
) -> None:
    data = dataset.prepare(tmp_path, sources, 400, text_field="body", tokenizer_path=ready if is_ready else None)
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


def test_one_document_has_no_end(tmp_path: Path) -> None:
    for name, content in (("one.txt", POEM), ("one.jsonl", json.dumps({"text": POEM}))):
        (tmp_path / name).write_text(content)
        (tmp_path / f"run {name}").mkdir()
    one, other = (dataset.prepare(tmp_path / f"run {name}", tmp_path / name, 300) for name in ("one.txt", "one.jsonl"))
    assert (one.manifest.eos_id, one.manifest.documents, one.manifest.text_field) == (None, 1, None)
    assert (other.manifest.eos_id, other.manifest.documents, other.manifest.text_field) == (None, 1, "text")
    np.testing.assert_array_equal(one.train, other.train)
    np.testing.assert_array_equal(one.validation, other.validation)


def test_encode_gives_what_is_on_disk(sources: list[Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(whole["tokenizer.json"])
    vocabulary, text = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json"), corpus.Corpus(sources, "body")
    ids = np.frombuffer(whole["tokens.bin"], "<u2")
    count = json.loads(whole["data.json"])["validation_tokens"]
    np.testing.assert_array_equal(encoding.encode(vocabulary, text, text.split, vocabulary.end_id), ids[-count:])
    unended = encoding.encode(vocabulary, text)
    assert vocabulary.decode(unended) == "".join([POEM, *LINES])
    assert unended.dtype == np.int32


class Cut(BaseException):
    """Stands for what ends a process; nothing in the package may catch it."""


@pytest.mark.slow
@SETTINGS
@given(data=st.data())
def test_work_cut_short_is_gone_on_with(
    sources: list[Path], whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut where a batch begins, or between the ids that are on disk and the journal that says so."""
    directory = tmp_path_factory.mktemp("cut")
    learned = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoding, "_BATCH_PIECES", 7)
        train, write = tokenizer.Tokenizer.train, encoding.Journal.write

        def learn(*arguments: Any, **settings: Any) -> tokenizer.Tokenizer:
            nonlocal learned
            learned += 1
            return train(*arguments, **settings)

        patched.setattr(tokenizer.Tokenizer, "train", learn)
        for _ in range(data.draw(st.integers(1, 4), "cuts")):
            left = data.draw(st.integers(0, 12), "steps before the cut")

            def step(*_: object) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Cut

            def write_or_cut(journal: encoding.Journal, where: Path) -> None:
                step()
                write(journal, where)

            patched.setattr(encoding.Journal, "write", write_or_cut)
            with contextlib.suppress(Cut):
                dataset.prepare(directory, sources, 400, text_field="body", progress=step)
        patched.setattr(encoding.Journal, "write", write)
        before = learned
        begun = (directory / "prepare.json").exists() or (directory / "data.json").exists()
        dataset.prepare(directory, sources, 400, text_field="body")
    assert contents(directory) == whole
    assert learned == before + (not begun)


def test_what_was_encoded_is_not_encoded_again(
    sources: list[Path], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_PIECES", 7)
    encode_batch = tokenizer.Tokenizer.encode_batch
    texts: list[str] = []

    def encode(vocabulary: tokenizer.Tokenizer, batch: list[str]) -> Iterator[list[int]]:
        texts.extend(batch)
        return encode_batch(vocabulary, batch)

    def cut_when_some_are_encoded(*_: object) -> None:
        if len(texts) > 30:
            raise Cut

    monkeypatch.setattr(tokenizer.Tokenizer, "encode_batch", encode)
    with pytest.raises(Cut):
        dataset.prepare(tmp_path, sources, 400, text_field="body", progress=cut_when_some_are_encoded)
    dataset.prepare(tmp_path, sources, 400, text_field="body")
    assert "".join(texts) == "".join([POEM, *LINES])
    assert contents(tmp_path) == whole


PROGRAM = """
import pathlib, sys
from hipgpt_jax.text import dataset, encoding
encoding._BATCH_PIECES = 3
directory, *sources = map(pathlib.Path, sys.argv[1:])
dataset.prepare(directory, sources, 400, text_field="body", progress=lambda *fact: print(*fact, flush=True))
"""


def test_a_process_killed_at_any_moment_leaves_work_to_go_on_with(
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
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert contents(tmp_path) == whole
    assert "learning" not in done, "the vocabulary was kept"


@pytest.mark.parametrize(
    "change", ["text", "vocabulary", "field", "tokenizer", "version", "order", "vocabulary on disk", "journal"]
)
def test_work_for_something_else_starts_anew(
    sources: list[Path],
    whole: dict[str, bytes],
    ready: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    (tmp_path / "other.txt").write_text(POEM.upper())
    given: dict[str, Any] = {"sources": sources, "vocab_size": 400, "text_field": "body"} | {
        "text": {"sources": [tmp_path / "other.txt", sources[1]]},
        "vocabulary": {"vocab_size": 333},
        "tokenizer": {"tokenizer_path": ready},
        "order": {"sources": sources[::-1]},
        "field": {"text_field": "text"},
    }.get(change, {})
    directory = tmp_path / "run"
    directory.mkdir()

    def cut_in_the_validation_split(done: int, total: int, what: str) -> None:
        if what == "encoding" and done * 10 > total * 8:
            raise Cut

    monkeypatch.setattr(encoding, "_BATCH_PIECES", 7)
    with monkeypatch.context() as patched:
        if change == "version":
            patched.setattr(version, "__version__", "0.0.1")
        with pytest.raises(Cut):
            dataset.prepare(directory, progress=cut_in_the_validation_split, **given)
    assert (directory / "tokens.bin").stat().st_size > len(whole["tokens.bin"]) / 3
    if change == "vocabulary on disk":
        (directory / "tokenizer.json").write_text(tokenizer.Tokenizer.train([], 256).to_json())
    if change == "journal":
        (directory / "prepare.json").write_text("{")
    dataset.prepare(directory, sources, 400, text_field="body")
    assert contents(directory) == whole


def test_a_tokenizer_without_an_end_token_serves_one_document_only(sources: list[Path], tmp_path: Path) -> None:
    endless = tmp_path / "endless.json"
    endless.write_text(tokenizer.Tokenizer.train([POEM], 300).to_json())
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(endless))} has no end token .* to set 81 documents apart\. Add"
    ):
        dataset.prepare(tmp_path / "run", sources, 300, text_field="body", tokenizer_path=endless)
    assert contents(tmp_path / "run") == {}
    made = dataset.prepare(tmp_path / "run", sources[0], 5000, tokenizer_path=endless).manifest
    assert (made.vocab_size, made.requested_vocab_size, made.eos_id) == (300, 300, None)


def test_a_run_keeps_its_sources_field_and_tokenizer(sources: list[Path], ready: Path, tmp_path: Path) -> None:
    dataset.prepare(tmp_path, sources, 400, text_field="body", tokenizer_path=ready)
    before = contents(tmp_path)
    dataset.prepare(tmp_path, sources, 9999, text_field="body", tokenizer_path=ready)
    for settings_, message in (
        ({"sources": sources[:1]}, "--data-path gives 1 files, not its 2"),
        ({"sources": sources[::-1]}, r"--data-path lines.jsonl \(sha256 .{12}…\) is not its text poem.txt \("),
        ({"text_field": "text"}, "--text-field text is not its body"),
        ({"tokenizer_path": None}, r"--tokenizer-path None \(learned\) is not its tokenizer \(.{12}…\)"),
        ({"tokenizer_path": sources[0]}, r"--tokenizer-path .*poem.txt \(.{12}…\) is not its tokenizer"),
    ):
        asked: dict[str, Any] = {"sources": sources, "text_field": "body", "tokenizer_path": ready} | settings_
        with pytest.raises(ValueError, match=f"the run has other data: .*{message}.*--reset"):
            dataset.require_same(tmp_path, vocab_size=400, **asked)
    with pytest.raises(FileNotFoundError, match=r"tokenizer not found: .*none\.json"):
        dataset.require_same(tmp_path, sources, 400, text_field="body", tokenizer_path=tmp_path / "none.json")
    assert contents(tmp_path) == before


def test_the_same_bytes_in_another_form_are_another_text(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text('{"text": "to be or not to be"}')
    (tmp_path / "run").mkdir()
    dataset.prepare(tmp_path / "run", tmp_path / "a.jsonl", 256)
    with pytest.raises(ValueError, match=r"a\.txt .* is not its text a\.jsonl"):
        dataset.require_same(tmp_path / "run", tmp_path / "a.txt", 256)


def test_progress_goes_from_nothing_to_almost_all(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_PIECES", 7)
    told: list[tuple[int, int, str]] = []
    made = dataset.prepare(tmp_path, sources, 400, text_field="body", progress=lambda *fact: told.append(fact)).manifest
    assert [what for what, _ in itertools.groupby(told, lambda fact: fact[2])] == ["reading", "learning", "encoding"]
    for what, total in (("learning", made.sample_bytes), ("encoding", made.text_bytes)):
        done = [fact[0] for fact in told if fact[2] == what]
        assert {fact[1] for fact in told if fact[2] == what} == {total}
        assert done == sorted(done)
        assert (done[0], done[-1] <= total) == (0, True)
    assert told[-1][0] > 0.8 * made.text_bytes


def cut_short(directory: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a directory whose second split has begun."""

    def cut(done: int, total: int, what: str) -> None:
        if what == "encoding" and done * 100 > total * 95:
            raise Cut

    monkeypatch.setattr(encoding, "_BATCH_PIECES", 7)
    with pytest.raises(Cut):
        dataset.prepare(directory, sources, 400, text_field="body", progress=cut)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["pieces"].__setitem__(0, value["pieces"][0] - 7),
        lambda value: value["pieces"].__setitem__(1, value["pieces"][1] + 7),
        lambda value: value.update(pieces=[value["pieces"][0] - 7, 7], bytes=[1, value["bytes"][1]]),
        lambda value: value["pieces"].__setitem__(0, 2**53),
        lambda value: value["tokens"].__setitem__(0, value["tokens"][0] - 1),
        lambda value: value["tokens"].__setitem__(1, 2**53),
        lambda value: value["bytes"].__setitem__(0, 0),
        lambda value: value.pop("pieces"),
        lambda value: value.update(tokens=[1.0, 2]),
        lambda value: value.update(pieces="ab"),
        lambda value: value.update(more=1),
    ],
)
def test_a_journal_that_is_wrong_is_not_continued(
    sources: list[Path],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], Any],
) -> None:
    cut_short(tmp_path, sources, monkeypatch)
    value = json.loads((tmp_path / "prepare.json").read_text())
    assert value["pieces"][1] > 0
    change(value)
    (tmp_path / "prepare.json").write_text(json.dumps(value))
    dataset.prepare(tmp_path, sources, 400, text_field="body")
    assert contents(tmp_path) == whole


def test_ids_that_changed_before_the_work_went_on_are_written_again(
    sources: list[Path], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(tmp_path, sources, monkeypatch)
    with (tmp_path / "tokens.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\0\0")
    dataset.prepare(tmp_path, sources, 400, text_field="body")
    assert contents(tmp_path) == whole


def test_ids_that_lose_bytes_of_the_text_are_refused(tmp_path: Path) -> None:
    """Of a vocabulary that ``Tokenizer.load`` would have refused: the count does not rely on it."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.Tokenizer.train([POEM], 300).to_json())
    backend.add_tokens([tokenizers.AddedToken("king", lstrip=True)])
    (tmp_path / "a.txt").write_text("a king")
    (tmp_path / "b.txt").write_text("aking")
    text = r"the tokenizer loses text: 6 bytes became ids of 5 bytes, in the text that begins 'a king'"
    with pytest.raises(ValueError, match=text):
        encoding.encode(tokenizer.Tokenizer(backend), corpus.Corpus(tmp_path / "a.txt"))
    assert len(encoding.encode(tokenizer.Tokenizer(backend), corpus.Corpus(tmp_path / "b.txt"))) == 2
