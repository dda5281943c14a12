"""Kept programs: the same bits whether found or made, found only by what they follow from, and never in the way."""

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fakes
import jax
import numpy as np
import programs as cli
import pytest

from hipgpt_jax import config
from hipgpt_jax.generation import carry, exported, programs, sampler

OURS = {f"jit({name})" for name in ("fill", "enter", "put", "steps", "roll", "roll_row", "where")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(exported, "_directory", lambda settings: tmp_path)
    return tmp_path


def _never(*args: object) -> None:
    raise AssertionError(f"the model is traced: {args}")


def fresh(**settings: Any) -> sampler.Sampler:
    """Returns a sampler that has compiled nothing yet."""
    decode = config.DecodingConfig(**{"window": 11, **settings})
    return sampler.Sampler(fakes.MODEL, fakes.random_params(fakes.MODEL), decode)


def drawn(engine: sampler.Sampler, lengths: Sequence[int]) -> list[tuple[Any, ...]]:
    """Returns tokens and the bits of their numbers; 9 of them after each prompt, so some contexts roll."""
    asked = [fakes.request(fakes.prompt(length), num_tokens=9, sample=length) for length in lengths]
    events = list(engine.run(asked, measure=True))
    return [(event.index, event.token, event.facts and np.asarray(event.facts.numbers_4).tobytes()) for event in events]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ((2,), {}),
        ((2, 9, 11), {}),
        ((2, 9, 11), {"width": 3, "window_stride": 4, "dtype": "bfloat16"}),
    ],
)
def test_bits_are_the_same_without_made_and_found_which_traces_nothing(
    lengths: Sequence[int], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for directory in (None, tmp_path, tmp_path):
        monkeypatch.setattr(exported, "_directory", lambda settings, directory=directory: directory)
        if found and directory == tmp_path and any(tmp_path.iterdir()):
            monkeypatch.setattr(programs, "_module", _never)
        with fakes.compilations() as compiled:
            numbers = drawn(fresh(**settings), lengths)
        found.append((numbers, sorted(name for name in compiled if name in OURS)))
    assert found[0] == found[1] == found[2]
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {name[4:-1] for name in found[0][1]}


def test_a_start_from_kept_programs_imports_no_flax_nor_scipy_and_none_compiles_twice(tmp_path: Path) -> None:
    """The whole command, twice: the second one finds all, and prints the same."""
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


def double(state: carry.Rows) -> carry.Rows:
    return jax.tree.map(lambda x: 2 * x, state)


@pytest.mark.parametrize("damage", [lambda x: x[:-7], lambda x: x[:9], lambda x: b"", lambda x: x[:60] + b"?" + x[61:]])
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], place: Path) -> None:
    rows, _ = carry.blank(1, 1, 1)
    jax.jit(exported.kept(double, ""))(rows)
    (path,) = place.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert exported._read(path) is None
    assert float(jax.jit(exported.kept(double, ""))(rows).settings.temperature_B[0]) == 1.0 * 2
    assert path.read_bytes() == whole


@pytest.fixture
def jax_settings() -> Iterator[Callable[..., None]]:
    """Returns what sets JAX's settings until the test ends."""
    before = {name: jax.config.values[f"jax_{name}"] for name in ("compilation_cache_dir", "enable_compilation_cache")}

    def put(**settings: Any) -> None:
        for name, value in settings.items():
            jax.config.update(f"jax_{name}", value)

    yield put
    put(**before)


def test_a_program_is_found_by_all_that_it_follows_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jax_settings: Callable[..., None]
) -> None:
    def place(settings: str = "s") -> Path | None:
        exported._code.cache_clear()
        return exported._directory(settings)

    jax_settings(compilation_cache_dir="some/place")
    places = [place(), place("t")]
    with jax.default_matmul_precision("bfloat16"):
        places.append(place())
    with jax.default_prng_impl("rbg"):
        places.append(place())
    shutil.copytree(exported._PACKAGE, tmp_path / "code", ignore=shutil.ignore_patterns("shipped", "__pycache__"))
    monkeypatch.setattr(exported, "_PACKAGE", tmp_path / "code")
    assert place() == places[0], "where the code lies does not matter"
    for name in ("config.py", "model/attention.py", "generation/sampling.py"):
        with (tmp_path / "code" / name).open("a") as file:
            file.write("\n")
        places.append(place())
    monkeypatch.setattr("importlib.metadata.version", lambda package: f"{package} of tomorrow")
    places.append(place())
    assert len(set(places)) == len(places) == 8
    exported._code.cache_clear()
    arguments = [0.0, 1, np.float32(0), np.int32(0), np.zeros(3), np.zeros(4)]
    assert len({exported._digest(exported._shape(x)) for x in arguments}) == 6


def test_programs_are_kept_beside_those_of_jax_on_a_cpu_alone(
    jax_settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("", None, "gs://bucket/cache"):
        jax_settings(compilation_cache_dir=other)
        assert exported._directory("") is None
        assert not exported.any_kept("")
    jax_settings(compilation_cache_dir="some/place")
    found = exported._directory("")
    assert found is not None
    assert found.parent == Path("some/place/programs")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert exported._directory("") is None
    jax_settings(enable_compilation_cache=False)
    assert exported._directory("") is None


def test_compiled_code_goes_with_its_sampler() -> None:
    """Without a search for garbage: XLA maps memory for each program, of which Linux allows 65,530 pieces a process."""
    engine = fresh()
    drawn(engine, (2,))
    programs_of = weakref.ref(engine._programs)
    gc.disable()
    try:
        del engine
        assert programs_of() is None
    finally:
        gc.enable()


def test_a_directory_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(exported, "_directory", lambda settings: tmp_path / "file" / "programs")
    assert jax.jit(exported.kept(double, ""))(carry.blank(1, 1, 1)[0])
    assert os.listdir(tmp_path) == ["file"]
