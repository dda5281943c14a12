"""Tests of the cache of exported programs: identical output on hit and miss, exact keys, tolerance of damage."""

import gc
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fakes
import jax
import jax.export
import numpy as np
import programs as cli
import pytest

from hipgpt_jax import compilation, config, disk_cache
from hipgpt_jax.generation import executables, export_cache, sampling, scheduler

OURS = {f"jit({name})" for name in ("prefill", "insert", "decode", "slide", "slide_slot", "merge")}


PARAMS = sampling.sampling_params([config.SamplingConfig()], 8)


def cache_in(directory: Path, messages: list[str] | None = None) -> disk_cache.DiskCache:
    """Returns a cache that appends its messages to a list."""
    return disk_cache.DiskCache(
        directory, (compilation.PROGRAM,), None, [].append if messages is None else messages.append
    )


@pytest.fixture
def messages() -> list[str]:
    """Messages of the cache."""
    return []


@pytest.fixture
def place(tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = cache_in(tmp_path, messages)
    monkeypatch.setattr(export_cache, "_cache", lambda: cache)
    return tmp_path


def _never(*args: object) -> None:
    raise AssertionError(f"the model is traced: {args}")


def fresh(**settings: Any) -> scheduler.Scheduler:
    """Returns a scheduler that has compiled nothing yet."""
    decode = config.DecodingConfig(**{"window": 11, **settings})
    return scheduler.Scheduler(fakes.MODEL, fakes.random_params(fakes.MODEL), decode)


def outputs_of(source: scheduler.Scheduler, lengths: Sequence[int]) -> list[tuple[Any, ...]]:
    """Returns 9 tokens per prompt with the bits of their statistics; some windows slide."""
    requested = [fakes.request(fakes.prompt(length), num_tokens=9, sample=length) for length in lengths]
    events = list(source.run(requested, measure=True))
    return [(event.index, event.token, event.stats and fakes.stats_bytes(event.stats)) for event in events]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ((2,), {}),
        ((2, 9, 11), {}),
        ((2, 9, 11), {"batch_size": 3, "window_stride": 4, "dtype": "bfloat16"}),
    ],
)
def test_output_is_the_same_without_a_cache_on_a_miss_and_on_a_hit(
    lengths: Sequence[int], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for directory in (None, tmp_path, tmp_path):
        cache = directory and cache_in(directory)
        monkeypatch.setattr(export_cache, "_cache", lambda cache=cache: cache)
        if found and directory == tmp_path and any(tmp_path.iterdir()):
            monkeypatch.setattr(executables, "_module", _never)
        with fakes.compilations() as compiled:
            numbers = outputs_of(fresh(**settings), lengths)
        found.append((numbers, sorted(name for name in compiled if name in OURS)))
    assert found[0] == found[1] == found[2]
    assert {path.name.split("-")[1] for path in tmp_path.iterdir()} == {name[4:-1] for name in found[0][1]}


@pytest.mark.slow
def test_a_start_from_cached_programs_imports_neither_flax_nor_scipy(tmp_path: Path) -> None:
    """Runs the command twice. The second run hits the cache, prints the same and compiles nothing twice."""
    program = """
import sys
import jax
from hipgpt_jax.cli import generate
names = []
def listen(event, seconds, **found):
    if event == "/jax/core/compile/backend_compile_duration":
        names.append(found.get("fun_name"))
jax.monitoring.register_event_duration_secs_listener(listen)
sys.argv = ["hipgpt-generate", "--run-name", "shakespeare", "--prompt", "To be", "--num_tokens", "5"]
try:
    generate.main()
finally:
    print(len(names) - len(set(names)), *sorted({"flax", "scipy"} & {*sys.modules}))
"""
    lines = []
    for _ in range(2):
        env = cli.environment(tmp_path)
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines())
    assert (lines[0][-1], lines[1][-1]) == ("0 flax", "0")
    assert lines[0][:-1] == lines[1][:-1] != []


@pytest.mark.slow
def test_a_damaged_cache_neither_changes_tokens_nor_ends_the_process(tmp_path: Path) -> None:
    """Flips bits of, or truncates, cached executables and exported programs, chosen by a fixed seed."""
    arguments = ("--run-name", "shakespeare", "--prompt", "To be", "--num_tokens", "9", "--output", "-")

    def generate() -> tuple[str, list[str]]:
        done = cli.spawn("generate", *arguments, cwd=tmp_path, cache=tmp_path)
        assert done.code == 0, done.err
        assert not re.search("Traceback|Warning", done.err)
        return json.loads(done.out)["ids"], [line for line in done.err.splitlines() if "damaged" in line]

    right, _ = generate()
    entries = sorted((tmp_path / "hipgpt_jax/compiled").iterdir())
    assert {path.suffix for path in entries} == {compilation.EXECUTABLE, compilation.PROGRAM}
    rng = random.Random(0)
    rng.shuffle(entries)
    while entries:
        for path in (entries.pop(), entries.pop()):
            content = bytearray(path.read_bytes())
            if rng.random() < 0.3:
                del content[rng.randrange(len(content)) :]
            else:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        ids, messages = generate()
        assert ids == right
        assert len(messages) == 1
    assert generate() == (right, [])


def double(state: sampling.SamplingParams) -> sampling.SamplingParams:
    return jax.tree.map(lambda x: 2 * x, state)


def halve(state: sampling.SamplingParams) -> sampling.SamplingParams:
    return jax.tree.map(lambda x: x // 2 if x.dtype == np.int32 else x / 2, state)


def doubled() -> float:
    """Returns the default temperature, 1, doubled by a program from the cache."""
    return float(jax.jit(export_cache.cached(double, ""))(PARAMS).temperature_B[0])


def put_program(function: Callable[..., Any], path: Path, *, named: str | None = None) -> None:
    """Writes a program with a valid digest under the key of ``double``."""
    function.__name__ = named or function.__name__
    shapes = jax.tree.map(export_cache._shape, (PARAMS,))
    program = jax.export.export(jax.jit(function))(*shapes).serialize()
    cache_in(path.parent).put(path.name, bytes(program))


@pytest.mark.parametrize("damage", [lambda x: x[:-7], lambda x: x[:9], lambda x: b"", lambda x: x[:60] + b"?" + x[61:]])
def test_a_damaged_file_is_rewritten(damage: Callable[[bytes], bytes], place: Path, messages: list[str]) -> None:
    assert doubled() == 2
    (path,) = place.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert doubled() == 2
    assert len(messages) == 1
    assert path.read_bytes() == whole


def test_a_program_of_another_name_or_signature_is_refused(place: Path, messages: list[str]) -> None:
    """Each replacement has a valid digest; ``halve`` also has the same signature."""
    assert doubled() == 2
    (path,) = place.iterdir()
    whole = path.read_bytes()
    exports = cache_in(place)

    def swapped(state: sampling.SamplingParams) -> tuple[sampling.SamplingParams, ...]:
        return (state, state)

    put_program(halve, path)
    assert exports.get(path.name) not in (None, whole)
    assert doubled() == 2
    assert "it is the program 'halve'" in messages[0]
    assert path.read_bytes() == whole
    shapes = jax.tree.map(
        export_cache._shape, sampling.sampling_params([config.SamplingConfig()] * 2, 8)
    )  # an argument of two slots
    exports.put(path.name, bytes(jax.export.export(jax.jit(double))(shapes).serialize()))
    assert doubled() == 2
    assert path.read_bytes() == whole
    with_digest_of_old_form = hashlib.sha256(whole).digest() + whole
    path.write_bytes(with_digest_of_old_form)
    assert doubled() == 2
    assert len(messages) == 1


def test_an_invalid_program_with_a_valid_digest_is_traced_again(place: Path, messages: list[str]) -> None:
    """Flatbuffers raises errors of any type on such bytes: struct.error, IndexError, UnicodeDecodeError."""
    assert doubled() == 2
    (path,) = place.iterdir()
    exports = cache_in(place)
    program = exports.get(path.name)
    assert program is not None
    # The tables of a flatbuffer are at its end; the StableHLO before them is protected only by the digest.
    for content in (b"", b"?", program[:4], bytes(len(program)), b"\xff" * 64 + program[64:], program[::-1]):
        exports.put(path.name, content)
        assert doubled() == 2
    assert len(messages) == 1
    assert exports.get(path.name) == program


@pytest.fixture
def jax_settings() -> Iterator[Callable[..., None]]:
    """Function that changes JAX settings until the test ends."""
    before = {name: jax.config.values[f"jax_{name}"] for name in ("compilation_cache_dir", "enable_compilation_cache")}

    def put(**settings: Any) -> None:
        for name, value in settings.items():
            jax.config.update(f"jax_{name}", value)

    yield put
    put(**before)


def test_the_key_of_a_program_covers_all_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jax_settings: Callable[..., None]
) -> None:
    def place(settings: str = "s") -> str:
        export_cache._code.cache_clear()
        return export_cache._prefix(settings)

    places = [place(), place("t")]
    with jax.default_matmul_precision("bfloat16"):
        places.append(place())
    with jax.default_prng_impl("rbg"):
        places.append(place())
    shutil.copytree(export_cache._PACKAGE, tmp_path / "code", ignore=shutil.ignore_patterns("shipped", "__pycache__"))
    monkeypatch.setattr(export_cache, "_PACKAGE", tmp_path / "code")
    assert place() == places[0], "the key is independent of the location of the package"
    for name in ("config.py", "model/attention.py", "generation/sampling.py"):
        with (tmp_path / "code" / name).open("a") as file:
            file.write("\n")
        places.append(place())
    monkeypatch.setattr("importlib.metadata.version", lambda package: f"{package} of tomorrow")
    places.append(place())
    assert len(set(places)) == len(places) == 8
    export_cache._code.cache_clear()
    arguments = [0.0, 1, np.float32(0), np.int32(0), np.zeros(3), np.zeros(4)]
    assert len({export_cache._digest(export_cache._shape(x)) for x in arguments}) == 6


def test_programs_are_cached_in_the_directory_of_jax_only_on_a_cpu(
    tmp_path: Path, jax_settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(tmp_path)
    monkeypatch.setattr(compilation, "_active", cache)
    for other in ("", None, "gs://bucket/cache", "some/place"):
        jax_settings(compilation_cache_dir=other)
        assert export_cache._cache() is None
        assert not export_cache.has_cached("")
    jax_settings(compilation_cache_dir=str(tmp_path))
    assert export_cache._cache() is cache
    assert not export_cache.has_cached("")
    assert doubled() == 2
    assert (export_cache.has_cached(""), export_cache.has_cached("other")) == (True, False)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert export_cache._cache() is None
    jax_settings(enable_compilation_cache=False)
    assert export_cache._cache() is None


def test_compiled_code_is_freed_with_its_scheduler() -> None:
    """By reference counting alone. XLA maps memory per program, and Linux allows 65,530 mappings per process."""
    source = fresh()
    outputs_of(source, (2,))
    programs = weakref.ref(source._programs[0])
    gc.disable()
    try:
        del source
        assert programs() is None
    finally:
        gc.enable()


def test_an_unwritable_directory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(export_cache, "_cache", lambda: cache_in(tmp_path / "file" / "programs"))
    assert not export_cache.has_cached("")
    assert jax.jit(export_cache.cached(double, ""))(PARAMS)
    assert os.listdir(tmp_path) == ["file"]
