"""The compile cache: its directory, its checks in JAX, and what is logged."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache as of_jax

from hipgpt_jax import compilation

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
)


def read_settings() -> dict[str, object]:
    return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """JAX's settings, which the cache changes, put back after the test; the user's cache directory is a new one."""
    for name in (compilation.CACHE_VARIABLE, compilation.SIZE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(compilation, "_active", None)
    monkeypatch.setattr(of_jax, "get_file_cache", of_jax.get_file_cache)
    before = read_settings()
    jax.config.update("jax_compilation_cache_dir", None)  # that of programs that ran in this process before
    of_jax.reset_cache()
    yield before
    for name, value in before.items():
        jax.config.update(name, value)
    of_jax.reset_cache()


def run_program() -> np.ndarray:
    """Returns what a program computes that is given to XLA, or looked for in the cache, at every call."""
    return np.asarray(jax.jit(lambda x: jnp.tanh(x) * 3)(np.arange(5, dtype=np.float32)))


def place() -> Path:
    """Returns the cache directory that JAX uses."""
    return Path(jax.config.values["jax_compilation_cache_dir"])


def executables() -> list[Path]:
    """Returns the files of XLA's executables."""
    return sorted(place().glob(f"*{compilation.EXECUTABLE}"))


def test_a_new_cache_is_private_and_logged_once(tmp_path: Path) -> None:
    logged: list[str] = []
    compilation.use_cache(logged.append)
    assert place() == tmp_path / "xdg" / "hipgpt_jax" / "compiled"
    assert [line for line in logged if "first start" in line] == logged != []
    run_program()
    assert {oct(path.stat().st_mode & 0o7777) for path in executables()} == {"0o600"}
    compilation.use_cache(logged.append)
    assert len(logged) == 1
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.0


def test_directories_are_made_for_the_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        compilation.use_cache(lambda line: None)
    finally:
        os.umask(before)
    for directory in (place(), place().parent, tmp_path / "xdg"):
        assert directory.stat().st_mode & 0o7777 == 0o700


def test_the_users_directory_keeps_its_files_and_ours_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o755)
    (own / "jit_other-cache").write_bytes(b"of another program of the user's")
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(own))
    compilation.use_cache(lambda line: None)
    run_program()
    assert place() == own / "hipgpt_jax"
    assert executables()
    assert sorted(os.listdir(own)) == ["hipgpt_jax", "jit_other-cache"]
    assert own.stat().st_mode & 0o7777 == 0o755
    assert not (tmp_path / "xdg").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "renamed"])
def test_a_damaged_executable_is_compiled_again_with_one_line(damage: str) -> None:
    logged: list[str] = []
    compilation.use_cache(logged.append)
    right = run_program()
    (path,) = executables()
    whole = path.read_bytes()
    if damage == "renamed":
        jax.jit(lambda x: jnp.tanh(x) * 4)(np.arange(5, dtype=np.float32))
        (other,) = {*executables()} - {path}
        other.rename(path)
    else:
        path.write_bytes(
            {"flip": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "cut": whole[:99], "empty": b""}[damage]
        )
    del logged[:]
    counted = compilation.Compilations()
    assert run_program().tobytes() == right.tobytes()
    assert counted.compiled == 1
    assert len(logged) == 1
    assert logged[0].startswith(f"recompiling: removed a damaged file from the cache, {path.name}: ")
    assert run_program().tobytes() == right.tobytes()
    assert (counted.compiled, counted.cached, len(logged)) == (1, 1, 1), "the entry is whole again"


def test_an_executable_that_xla_cannot_load_is_compiled_again_with_one_line() -> None:
    """Its digest holds, as of an entry that another version of XLA wrote under this key."""
    logged: list[str] = []
    compilation.use_cache(logged.append)
    right = run_program()
    (path,) = executables()
    cache = compilation.active()
    assert cache is not None
    cache.put(path.name, b"no executable")
    del logged[:]
    assert run_program().tobytes() == right.tobytes()
    assert [line.partition(": removed ")[2] for line in logged] == [
        f"a damaged file from the cache, {path.name}: XLA cannot load it"
    ]
    assert cache.get(path.name) not in (None, b"no executable")


def test_without_the_hook_in_jax_nothing_is_cached_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a JAX that opens its cache in another way."""
    for name in ("get_file_cache", "_initialize_cache"):
        with monkeypatch.context() as patch:
            patch.delattr(of_jax, name)
            logged: list[str] = []
            compilation.use_cache(logged.append)
            assert [line.partition(": ")[0] for line in logged] == ["compiling without a cache"]
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert compilation.active() is None
        run_program()
        assert of_jax._cache is None
    monkeypatch.setattr(of_jax, "_initialize_cache", lambda: None)  # or opens it where we do not see it
    compilation.use_cache(logged.append)
    assert jax.config.values["jax_compilation_cache_dir"] is None


def _in_a_file(base: Path) -> dict[str, str]:
    (base / "file").write_text("")
    return {"XDG_CACHE_HOME": str(base / "file")}


def _writable_parent(base: Path) -> dict[str, str]:
    (base / "open/mine").mkdir(parents=True)
    (base / "open").chmod(0o777)  # so another user can put a directory in the place of this one
    return {"XDG_CACHE_HOME": str(base / "open/mine")}


def _owned_by_another(base: Path) -> dict[str, str]:
    (base / "xdg/hipgpt_jax/compiled").mkdir(parents=True, mode=0o700)
    os.chown(base / "xdg/hipgpt_jax/compiled", 65534, 0)
    return {}


def _link_to_a_writable_one(base: Path) -> dict[str, str]:
    (base / "shared").mkdir()
    (base / "shared").chmod(0o1777)
    (base / "xdg/hipgpt_jax").mkdir(parents=True)
    (base / "xdg/hipgpt_jax/compiled").symlink_to(base / "shared")
    return {}


def _users_own_writable_one(base: Path) -> dict[str, str]:
    (base / "own").mkdir()
    (base / "own").chmod(0o775)
    os.chown(base / "own", -1, 12345)
    return {"JAX_COMPILATION_CACHE_DIR": str(base / "own")}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_in_a_file, "{base}/file is not a directory"),
        (_writable_parent, "other users can write to {base}/open and .*chmod go-w {base}/open"),
        (_owned_by_another, "{base}/xdg/hipgpt_jax/compiled belongs to user 65534"),
        (_link_to_a_writable_one, "other users can write to {base}/shared and .*chmod go-w {base}/shared"),
        (_users_own_writable_one, "other users can write to {base}/own and .*chmod go-w {base}/own"),
        (lambda base: {"JAX_COMPILATION_CACHE_DIR": "/proc/nope"}, "'/proc/nope'"),
        (lambda base: {"JAX_COMPILATION_CACHE_DIR": "/dev/null"}, "/dev/null"),
        (lambda base: {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"}, "gs://bucket/x is not a local directory"),
        (lambda base: {"XDG_CACHE_HOME": "", "HOME": "home"}, "'home' is not an absolute path"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to other users")
def test_a_directory_that_cannot_be_used_or_trusted_is_one_line_and_no_error(
    prepare: Callable[[Path], dict[str, str]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in prepare(tmp_path).items():
        monkeypatch.setenv(name, value)
    before = {path: path.lstat().st_mode for path in tmp_path.rglob("*")}
    logged: list[str] = []
    compilation.use_cache(logged.append)
    (line,) = logged
    assert line.startswith("compiling without a cache: ")
    assert re.search(message.format(base=tmp_path), line)
    assert "JAX_COMPILATION_CACHE_DIR can name another directory" in line
    assert jax.config.values["jax_compilation_cache_dir"] is None
    run_program()
    assert {path: path.lstat().st_mode for path in tmp_path.rglob("*")} == before, "nothing is made or changed"


@pytest.mark.parametrize("value", ["", "relcache", "./x", "../x"])
def test_a_relative_xdg_cache_home_is_ignored(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG base directory specification has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation.cache_directory() == tmp_path / ".cache/hipgpt_jax/compiled"


@pytest.mark.parametrize(("variable", "limit"), [(None, 10**9), ("-1", None), ("5000000", 5_000_000), ("0", 0)])
def test_the_size_limit_is_the_users_or_1_gb(
    variable: str | None, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv(compilation.SIZE_VARIABLE, variable)
        jax.config.update("jax_compilation_cache_max_size", int(variable))  # as JAX does when it is imported
    logged: list[str] = []
    compilation.use_cache(logged.append)
    cache = compilation.active()
    assert cache is not None
    assert cache.max_bytes == limit
    run_program()
    assert bool(executables()) == (limit != 0)
    assert len(logged) == 1


def test_a_disabled_cache_is_not_created(tmp_path: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation.use_cache(lambda line: pytest.fail(line))
    assert not (tmp_path / "xdg").exists()


def test_from_python_the_entries_of_jaxs_own_cache_are_checked_too(tmp_path: Path) -> None:
    """Without a cache of JAX nothing changes; one that is open already is checked."""
    compilation.check_cache(lambda line: pytest.fail(line))
    assert jax.config.values["jax_compilation_cache_dir"] is None
    own = tmp_path / "own"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(own))
    of_jax.reset_cache()
    right = run_program()
    (unchecked,) = (path for path in own.iterdir() if path.name.endswith("-cache"))
    logged: list[str] = []
    compilation.check_cache(logged.append)
    compilation.check_cache(logged.append)
    assert place() == own / "hipgpt_jax"
    unchecked.write_bytes(b"damage that JAX would run or stumble over")
    run_program()
    (path,) = executables()
    path.write_bytes(path.read_bytes()[:-1])
    assert run_program().tobytes() == right.tobytes()
    assert len(logged) == 1
    own.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", str(own))
    compilation.check_cache(logged.append)
    assert f"other users can write to {own}" in logged[1]
    assert jax.config.values["jax_compilation_cache_dir"] is None
