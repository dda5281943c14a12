"""The compilation cache: what is set, what is left alone, and what is told."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from hipgpt_jax import compilation

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def read_settings() -> dict[str, object]:
    return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture
def settings() -> Iterator[dict[str, object]]:
    """The configuration that the cache sets, put back after the test."""
    before = read_settings()
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_directory_is_left_alone_and_every_program_is_cached(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    compilation.use_cache(lambda line: None)
    now = read_settings()
    assert now["jax_compilation_cache_dir"] == settings["jax_compilation_cache_dir"]
    assert now["jax_persistent_cache_min_compile_time_secs"] == 0.0
    assert not (tmp_path / "xdg").exists()


def test_a_new_cache_is_the_users_alone_and_told_of_once(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told: list[str] = []
    compilation.use_cache(told.append)
    directory = tmp_path / "hipgpt_jax" / "xla"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert read_settings()["jax_compilation_cache_dir"] == str(directory)
    assert len(told) == 1
    assert "first start" in told[0]
    (directory / "program").write_text("")
    compilation.use_cache(told.append)
    assert len(told) == 1


def test_a_cache_that_cannot_be_written_is_told_and_no_error(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told: list[str] = []
    compilation.use_cache(told.append)
    assert "compiling without a cache" in told[0]
