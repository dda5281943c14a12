"""The scripts, in a small repository of their own, with a Python that only notes what it is asked to do."""

import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Makes an "environment" that holds a copy of itself. A file `broken` makes its pip fail, `slow` makes it slow. `uv`
# below does the same if it is installed.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
"-m venv")
  echo venv >>"$NOTES"
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$3" >"$3/bin/activate"
  ;;
"-m pip")
  echo "pip ${*: -1}" >>"$NOTES"
  [[ ! -e slow ]] || sleep 1
  [[ ! -e broken ]] || { echo "ERROR: no network"; exit 1; }
  ;;
"-c "*fcntl*) exec "$REAL" "$@" ;;
"-c "*realpath*) echo "$0" ;;
esac
"""


UV = """#!/usr/bin/env bash
case "$1 $2" in
"venv --seed")
  echo "uv venv" >>"$NOTES"
  mkdir -p "${*: -1}/bin" && cp "$PYTHON" "${*: -1}/bin/python" && echo "${*: -1}" >"${*: -1}/bin/activate"
  ;;
"pip install")
  echo "uv pip ${*: -1}" >>"$NOTES"
  ;;
--version*) ;;
*) exit 2 ;;
esac
"""


class Repository:
    """A copy of the scripts, and what their Python was asked to do."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        self.write("pyproject.toml", "[project]\n")
        self.write("notes", "")
        self.write("python", PYTHON)
        self.write("path/uv", "#!/usr/bin/env bash\nexit 127\n")  # hides one that is installed here

    def write(self, name: str, text: str) -> None:
        """Writes an executable file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, command: str) -> "subprocess.Popen[str]":
        """Starts a command of bash in the root."""
        words = ["bash", "-c", f"set -euo pipefail; {command}"]
        names = {"PYTHON": str(self.root / "python"), "NOTES": str(self.root / "notes"), "REAL": sys.executable}
        names["PATH"] = f"{self.root / 'path'}{os.pathsep}{os.environ['PATH']}"
        pipe, env = subprocess.PIPE, os.environ | names
        return subprocess.Popen(
            words, cwd=self.root, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, command: str) -> tuple[int, str, str]:
        """Returns a command's exit code, stdout and stderr."""
        process = self.start(command)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def environment(self, arguments: str = ".venv") -> list[str]:
        """Has an environment made, and returns what that took."""
        self.write("notes", "")
        code, out, err = self.run(f"source scripts/environment.sh; environment {arguments}")
        assert (code, out) == (0, ""), err
        return self.notes()

    def notes(self) -> list[str]:
        """Returns what Python was asked to do."""
        return (self.root / "notes").read_text().splitlines()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A repository without an environment; the blank in its path is there to be quoted."""
    return Repository(tmp_path / "a clone")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_is_bash(script: Path):
    """Each parses; each can be called, but for the one that is sourced."""
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert bool(script.stat().st_mode & stat.S_IXUSR) == (script.name != "environment.sh")


def test_installs_once(repository: Repository):
    """A second start asks Python for nothing."""
    assert repository.environment() == ["venv", "pip ."]
    assert repository.environment() == []


def test_starts_no_python_where_there_is_nothing_to_do(repository: Repository):
    """A start of Python takes longer than all that the scripts do."""
    repository.environment()
    for name in ("python", ".venv/bin/python"):
        repository.write(name, "#!/usr/bin/env bash\nexit 9\n")
    repository.write(".venv/bin/hipgpt-generate", "#!/usr/bin/env bash\n")
    assert repository.run("./scripts/run_generate.sh") == (0, "", "")


def test_more_extras_satisfy_fewer(repository: Repository):
    """Generation uses the environment of the tests, which is kept when the project changes."""
    assert repository.environment() == ["venv", "pip ."]
    assert repository.environment(".venv dev") == ["pip .[dev]"]
    assert repository.environment() == []
    assert repository.environment(".venv dev,plots") == ["pip .[dev,plots]"]
    repository.write("pyproject.toml", "[project] # changed\n")
    assert repository.environment(".venv plots") == ["pip .[plots,dev]"]
    assert repository.environment(".venv dev") == []


def test_uses_uv_where_it_is_installed(repository: Repository):
    """An environment of pip's is kept, and one of uv's needs no pip."""
    assert repository.environment() == ["venv", "pip ."]
    repository.write("path/uv", UV)
    assert repository.environment() == []
    assert repository.environment(".venv dev") == ["uv pip .[dev]"]
    assert repository.environment(".venv-new") == ["uv venv", "uv pip ."]
    assert repository.environment(".venv-new") == []


@pytest.mark.skipif(not shutil.which("script"), reason="there is no terminal without util-linux")
def test_shows_progress_on_a_terminal(repository: Repository):
    """The time and the end of the log are on one line, which the last one replaces."""
    repository.write("slow", "")
    command = "bash -c 'source scripts/environment.sh; environment .venv'"
    _, out, _ = repository.run(f'script -qec "{command}" /dev/null')
    lines = [line.removesuffix("\033[K") for line in out.splitlines() if line not in ("", "\033[K")]
    assert re.fullmatch(r".*environment: creating .venv with .* and pip: downloads JAX .*", lines[0])
    assert re.fullmatch(r" +\d s  .*", lines[1])
    assert re.fullmatch(r".*environment: .venv is ready after \d s", lines[-1])


def test_sees_a_changed_project(repository: Repository):
    """It is brought up to date in place."""
    repository.environment()
    repository.write("pyproject.toml", "[project] # changed\n")
    assert repository.environment() == ["pip ."]
    assert repository.environment() == []


def test_sees_a_moved_repository(repository: Repository):
    """Absolute paths in it no longer hold."""
    repository.environment()
    repository.root = repository.root.rename(repository.root.with_name("moved"))
    assert repository.environment() == ["venv", "pip ."]


def test_is_current_through_a_link(repository: Repository):
    """Another name for the same place is not a move."""
    repository.environment()
    repository.root.with_name("link").symlink_to(repository.root)
    assert repository.run("cd ../link; source scripts/environment.sh; environment .venv") == (0, "", "")


def test_sees_that_its_python_is_gone(repository: Repository):
    """As after an upgrade of the system."""
    repository.environment()
    (repository.root / ".venv/bin/python").unlink()
    assert repository.environment() == ["venv", "pip ."]


def test_makes_a_killed_installation_anew(repository: Repository):
    """Half a package looks installed to pip, so nothing of it is kept."""
    repository.write("slow", "")
    process = repository.start("source scripts/environment.sh; environment .venv")
    while not repository.notes()[1:]:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (repository.root / "slow").unlink()
    (repository.root / ".venv/half").touch()
    assert repository.environment() == ["venv", "pip ."]
    assert not (repository.root / ".venv/half").exists()


def test_keeps_an_environment_made_by_hand(repository: Repository):
    """It may hold what somebody chose."""
    repository.environment()
    (repository.root / ".venv/hipgpt-stamp").unlink()
    (repository.root / ".venv/mine").touch()
    assert repository.environment() == ["pip ."]
    assert (repository.root / ".venv/mine").exists()


def test_says_why_it_cannot_install(repository: Repository):
    """A failure without a network leaves what there was, and the next start tries again."""
    repository.environment(".venv dev")
    repository.write("broken", "")
    repository.write("pyproject.toml", "[project] # changed\n")
    code, out, err = repository.run("./scripts/run_generate.sh")
    assert (code, out) == (1, "")
    assert "ERROR: no network\nenvironment: error: cannot install into .venv" in err
    (repository.root / "broken").unlink()
    assert repository.environment() == ["pip .[dev]"]


def test_says_that_there_is_no_python(repository: Repository):
    """A shim with nothing behind it is no Python."""
    repository.write("python", "#!/usr/bin/env bash\nexit 127\n")
    code, out, err = repository.run("./scripts/run_generate.sh")
    assert (code, out) == (1, "")
    assert err.startswith("environment: error: no Python 3.11 or later")
    assert err.count("\n") == 1


def test_two_at_once_install_once(repository: Repository):
    """The second waits for the first."""
    repository.write("slow", "")
    both = [repository.start("source scripts/environment.sh; environment .venv") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert repository.notes() == ["venv", "pip ."]
    assert sum("waiting for another installation" in err for err in errors) == 1


@pytest.mark.parametrize("name", ["generate", "train"])
def test_passes_arguments_on_from_anywhere(repository: Repository, name: str):
    """The program runs in the root, with its arguments as they were."""
    repository.environment()
    repository.write(f".venv/bin/hipgpt-{name}", '#!/usr/bin/env bash\npwd\nprintf "<%s>" "$@"\nexit 3\n')
    code, out, err = repository.run(f"cd /; '{repository.root}/scripts/run_{name}.sh' --prompt 'a  b' ''")
    assert (code, out, err) == (3, f"{repository.root}\n<--prompt><a  b><>", "")


NO_GPU = "gpu_check: error: no GPU here: nvidia-smi lists none, and there is no /dev/kfd of AMD's driver. "


@pytest.mark.skipif(Path("/dev/kfd").exists(), reason="an AMD GPU is here")
@pytest.mark.parametrize(
    ("lists", "installed"),
    [("exit 9", None), ("echo No devices", None), ("echo 'GPU 0: NVIDIA H200'", "pip .[dev,cuda]")],
)
def test_gpu_check_needs_a_gpu_and_installs_what_it_needs(repository: Repository, lists: str, installed: str | None):
    """Without one it is said in a line before anything is installed."""
    repository.write("bin/nvidia-smi", f"#!/usr/bin/env bash\n{lists}\n")
    code, out, err = repository.run("PATH=$PWD/bin:$PATH; ./scripts/gpu_check.sh --rounds 1")
    if installed:
        assert repository.notes() == ["venv", installed]
        assert code == 0, err
    else:
        assert (code, out, repository.notes()) == (1, "", [])
        assert err.startswith(NO_GPU)
        assert err.count("\n") == 1


@pytest.fixture
def text(repository: Repository) -> Path:
    """A text that the repository's download_data.sh takes for tiny Shakespeare."""
    source = repository.root / "input.txt"
    source.write_text("First Citizen:\n")
    script = (repository.root / "scripts/download_data.sh").read_text()
    assert SHAKESPEARE in script
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    repository.write("scripts/download_data.sh", script.replace(SHAKESPEARE, digest))
    return source


def download(repository: Repository, source: Path) -> tuple[int, str]:
    """Runs download_data.sh on a file, and returns its exit code and stderr."""
    code, out, err = repository.run(f"cd /; DATA_URL='{source.as_uri()}' '{repository.root}/scripts/download_data.sh'")
    assert out == ""
    return code, err


@pytest.mark.skipif(not shutil.which("curl"), reason="wget knows no file://")
def test_download(repository: Repository, text: Path):
    """The text arrives whole under its name, once."""
    code, err = download(repository, text)
    assert code == 0, err
    assert [path.name for path in (repository.root / "data").iterdir()] == ["data.txt"]
    assert (repository.root / "data/data.txt").read_text() == "First Citizen:\n"
    assert download(repository, Path("/nonexistent")) == (0, "")


@pytest.mark.skipif(not shutil.which("curl"), reason="wget knows no file://")
@pytest.mark.parametrize(("content", "message"), [("Second Citizen:\n", "gave sha256 "), (None, "no answer from ")])
def test_download_that_fails(repository: Repository, text: Path, content: str | None, message: str):
    """Another text, or none, leaves nothing, and one line that says what to do."""
    text.unlink() if content is None else text.write_text(content)
    code, err = download(repository, text)
    assert code == 1
    assert err.startswith("download_data: error: ")
    assert err.endswith("at data/data.txt by hand\n")
    assert err.count("\n") == 1
    assert message in err
    assert list((repository.root / "data").iterdir()) == []


def test_download_spares_a_text_of_ones_own(repository: Repository, text: Path):
    """data/data.txt is also where training looks for the user's text."""
    repository.write("data/data.txt", "my own text")
    code, err = download(repository, text)
    assert code == 1
    assert "data/data.txt holds another text" in err
    assert (repository.root / "data/data.txt").read_text() == "my own text"


@pytest.mark.parametrize("broken", ["run_tests", "check_versions", None])
def test_ci_runs_all_and_reports(repository: Repository, broken: str | None):
    """A failure of any is the failure of the whole, and hides no other."""
    names = ["run_tests -m not(peers) --hypothesis-profile=thorough", "check", "check_versions", "run_peers"]
    for name in {name.split()[0] for name in names}:
        repository.write(f"scripts/{name}.sh", f"#!/usr/bin/env bash\nexit {7 if name == broken else 0}\n")
    repository.write(".ci/run", (ROOT / ".ci/run").read_text())
    code, out, _ = repository.run(f"cd /; exec '{repository.root}/.ci/run'")
    assert code == (0 if broken is None else 1)
    summary = out.split("== .ci/run\n")[1].splitlines()
    verdicts = ["FAILED (7)" if name.split()[0] == broken else "ok" for name in names]
    assert [line.split(",")[0].strip() for line in summary] == [
        f"{name}: {verdict}" for name, verdict in zip(names, verdicts, strict=True)
    ]
