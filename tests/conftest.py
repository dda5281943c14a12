"""Shared fixtures, and JAX settings of all tests: implicit promotions are errors, and there are eight CPU devices."""

import contextlib
import fcntl
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import compiled
import hypothesis
import jax
import programs
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
compiled.use()

_EXAMPLES = {"deadline": None, "derandomize": True, "database": None}
hypothesis.settings.register_profile("quick", max_examples=100, **_EXAMPLES)
hypothesis.settings.register_profile("thorough", max_examples=400, **_EXAMPLES)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _restore_executable_cache() -> Iterator[None]:
    yield
    compiled.restore()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the run ``tiny``: the committed step 600, and a step 20 of smaller weights."""
    directory = tmp_path_factory.mktemp("work")
    for step, scale in ((20, 0.5), (600, 1.0)):
        programs.copy_tiny(directory / "checkpoints" / "tiny", step=step, scale=scale)
    return directory


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A working directory with the run ``tiny`` trained by ``hipgpt-train``, at steps 20 and 40.

    The run is trained once for all test processes; each has its own copy.
    """
    directory = tmp_path_factory.mktemp("work") / "trained"
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    with (shared / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "trained").exists():
            _train(shared / "training")
            (shared / "training").rename(shared / "trained")
    return Path(shutil.copytree(shared / "trained", directory, symlinks=True))


def _train(directory: Path) -> None:
    directory.mkdir()
    (directory / "text.txt").write_text(programs.TEXT)
    flags = "--data-path text.txt --run-name tiny --steps 40 --ckpt-every 20 --log-every 10 --lr 1e-2 --warmup-steps 5"
    arguments = [*flags.split(), *programs.TINY_SIZES.split(), "--mesh", "data=1"]
    with (
        pytest.MonkeyPatch.context() as patch,
        (directory / "log.txt").open("w") as log,
        contextlib.redirect_stdout(log),
        jax.numpy_dtype_promotion("standard"),  # Optax 0.2.8 itself promotes a Python float with an integer count
    ):
        patch.chdir(directory)
        patch.setenv(programs.CACHE, str(compiled.DIRECTORY))
        patch.setattr(sys, "argv", ["hipgpt-train", *arguments])
        programs.MAINS["train"]()


@pytest.fixture
def ctrl_c_heeded() -> Iterator[None]:
    """Enables Ctrl-C, which background jobs of a shell, such as a test run in the background, ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
