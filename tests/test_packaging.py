"""The files around the package agree: pyproject.toml, uv.lock, constraints.txt and CITATION.cff."""

import re
import tomllib
from pathlib import Path

from packaging import requirements, specifiers, utils

from hipgpt_jax import version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


def _key(name: str, extras: list[str], specifier: str, extra: str | None) -> tuple[str, tuple[str, ...], str, str]:
    return utils.canonicalize_name(name), tuple(sorted(extras)), str(specifiers.SpecifierSet(specifier)), extra or ""


def test_the_lock_file_is_up_to_date() -> None:
    (locked,) = (package for package in LOCK["package"] if package["name"] == "hipgpt-jax")
    found = {
        _key(
            entry["name"],
            entry.get("extras", []),
            entry.get("specifier", ""),
            (re.findall(r"extra == '(.*?)'", entry.get("marker", "")) or [None])[0],
        )
        for entry in locked["metadata"]["requires-dist"]
    }
    extras = {None: PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    declared = [(requirements.Requirement(line), extra) for extra, lines in extras.items() for line in lines]
    wanted = {_key(one.name, list(one.extras), str(one.specifier), extra) for one, extra in declared}
    assert found == wanted, "pyproject.toml has changed: run `uv lock`, and the command in constraints.txt"


def test_constraints_are_the_versions_of_the_lock_file() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [requirements.Requirement(line) for line in lines if not line.startswith("#")]
    locked = {(package["name"], package.get("version", "")) for package in LOCK["package"]}
    assert {(one.name, str(one.specifier).removeprefix("==")) for one in constraints} <= locked
    required = {utils.canonicalize_name(requirements.Requirement(line).name) for line in PROJECT["dependencies"]}
    assert required <= {one.name for one in constraints}


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"version: {version.__version__}\n" in citation
    assert f"version = {{{version.__version__}}}" in readme
    (author,) = PROJECT["authors"]
    assert f"name: {author['name']}\n" in citation
