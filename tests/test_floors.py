"""The floors of DESIGN.md, section 6: who may import whom."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import hipgpt_jax

PACKAGE = Path(hipgpt_jax.__file__).parent

# Each row of the table is a folder, or the files of the package's own folder that stand on one floor.
# A row imports from lower floors, and from itself without a circle.
FLOORS: dict[str, tuple[int, set[str]]] = {
    "hipgpt_jax": (0, {"config", "disk_cache", "files", "training_config", "version"}),
    "text": (1, set()),
    "model": (1, set()),
    "hipgpt_jax, devices": (1, {"compilation", "devices", "numerics", "processes"}),
    "runs": (2, set()),
    "generation": (2, set()),
    "evaluation": (2, set()),
    "records": (3, set()),
    "training": (4, set()),
    "interop": (3, set()),
    "report": (4, set()),
    "hipgpt_jax, from Python": (4, {"api", "doctor", "__init__"}),
    "cli": (5, set()),
}

# Libraries that not everyone may know, with the rows that may: text, runs and floor 0 stay without JAX,
# generation opens a run without Orbax and optax, and the command line is the programs' own business.
KNOWN_TO: dict[str, set[str]] = {
    "jax": {
        "model",
        "hipgpt_jax, devices",
        "generation",
        "evaluation",
        "records",
        "training",
        "interop",
        "hipgpt_jax, from Python",
        "cli",
    },
    "flax": {"model", "training", "interop"},
    "optax": {"training"},
    "orbax": {"training"},
    "absl": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report"},
    "tensorboardX": {"training"},
    "torch": set(),
    "transformers": set(),
    "pickle": set(),
}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(tree: ast.AST) -> set[str]:
    """Returns the full names of all that a module imports: at its top, in a function, for a type checker."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str | None:
    """Returns the module of the package that an imported name is, or stands in; None for another's."""
    while name:
        for module in (name, f"{name}.__init__"):
            if module in MODULES:
                return module
        name = name.rpartition(".")[0]
    return None


def row_of(module: str) -> str:
    """Returns the row of the table in which a module stands."""
    parts = module.split(".")[1:]
    if len(parts) > 1:
        return parts[0]
    return next((row for row, (_, members) in FLOORS.items() if parts[0] in members), parts[0])


IMPORTS = {module: imports(ast.parse(path.read_text(encoding="utf-8"))) for module, path in MODULES.items()}
OWN = {module: {own for name in names if (own := module_of(name))} for module, names in IMPORTS.items()}


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import jax.numpy as jnp
import hipgpt_jax.text.corpus
from hipgpt_jax import config, files
from hipgpt_jax.text import corpus as other
from hipgpt_jax.config import ModelConfig
if TYPE_CHECKING:
    from hipgpt_jax.generation import sampler
def late():
    import optax, orbax.checkpoint
    from hipgpt_jax import __version__
"""
    names = imports(ast.parse(source))
    assert {name.partition(".")[0] for name in names} == {"jax", "hipgpt_jax", "optax", "orbax"}
    assert {module_of(name) for name in names} == {
        None,
        "hipgpt_jax.text.corpus",
        "hipgpt_jax.config",
        "hipgpt_jax.files",
        "hipgpt_jax.generation.sampler",
        "hipgpt_jax.__init__",
    }
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stands_in_the_table(module: str) -> None:
    assert row_of(module) in FLOORS


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_floors(module: str) -> None:
    row = row_of(module)
    wrong = [own for own in OWN[module] if row_of(own) != row and FLOORS[row_of(own)][0] >= FLOORS[row][0]]
    assert wrong == [], f"{module} ({row}, floor {FLOORS[row][0]}) may not import {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_by_the_full_name(module: str) -> None:
    assert [name for name in IMPORTS[module] if name.startswith(".")] == []


def test_no_imports_run_in_a_circle() -> None:
    assert set(graphlib.TopologicalSorter(OWN).static_order()) >= set(MODULES)


@pytest.mark.parametrize("library", KNOWN_TO)
def test_a_library_is_known_only_where_it_may_be(library: str) -> None:
    knowing = {module for module, names in IMPORTS.items() if any(name.split(".")[0] == library for name in names)}
    assert {module for module in knowing if row_of(module) not in KNOWN_TO[library]} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if row_of(module) != "cli"])
def test_only_the_programs_know_the_terminal(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"print", "input", "exit"}
    streams = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys"
    } & {"stdin", "stdout", "stderr", "exit", "argv"}
    assert calls | streams == set()


def test_what_is_loaded_keeps_to_the_table_too() -> None:
    """A library could bring another along: text and runs load no JAX, generation no optax and no Orbax."""
    program = """
import sys
from hipgpt_jax import config, devices, files
from hipgpt_jax.runs import directory, weights
from hipgpt_jax.text import corpus, dataset, tokenizer
assert "jax" not in sys.modules, "jax"
from hipgpt_jax.generation import decoding, sampler, sampling
assert "jax" in sys.modules
assert not {"optax", "orbax", "absl.app"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
