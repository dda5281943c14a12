"""Strict settings, before JAX starts: silent promotions are errors, and eight devices stand by."""

import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import programs
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that the programs of one test process share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A working directory in which ``hipgpt-train`` has made the run ``tiny``, at steps 20 and 40."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "text.txt").write_text(programs.TEXT)
    flags = "--data-path text.txt --run-name tiny --vocab-size 300 --steps 40 --ckpt-every 20 --log-every 10 --lr 1e-2"
    done = programs.spawn("train", *flags.split(), "--warmup-steps", "5", cwd=directory, cache=cache)
    assert done.code == 0, done.err
    (directory / "log.txt").write_text(done.out)
    return directory


@pytest.fixture
def ctrl_c_heeded() -> Iterator[None]:
    """What a shell's background job starts ignores Ctrl-C, as a test run put in the background would here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
