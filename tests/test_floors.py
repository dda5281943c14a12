"""The floors of DESIGN.md, section 6: who may import whom."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import hipgpt_jax

PACKAGE = Path(hipgpt_jax.__file__).parent

# Each row of the table is a folder, or the files of the package's own folder that stand on one floor.
# A row imports from lower floors, and from itself without a circle.
FLOORS: dict[str, tuple[int, set[str]]] = {
    "hipgpt_jax": (0, {"compression", "config", "disk_cache", "files", "json_files", "training_config", "version"}),
    "text": (1, set()),
    "model": (1, set()),
    "hipgpt_jax, devices": (1, {"compilation", "devices", "numerics", "processes"}),
    "runs": (2, set()),
    "generation": (2, set()),
    "evaluation": (2, set()),
    "records": (3, set()),
    "training": (3, set()),
    "report": (4, set()),
    "hipgpt_jax, from Python": (5, {"api", "doctor", "notebook"}),
    "cli": (6, set()),
    "hipgpt_jax, names": (7, {"__init__"}),
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
        "hipgpt_jax, from Python",
        "cli",
    },
    "flax": {"model", "training"},
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
    from hipgpt_jax.generation import scheduler
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
        "hipgpt_jax.generation.scheduler",
        "hipgpt_jax.__init__",
    }
    assert len(MODULES) > 20


def test_every_module_is_in_the_table() -> None:
    assert [module for module in MODULES if row_of(module) not in FLOORS] == []
    assert [row for row in FLOORS if row not in set(map(row_of, MODULES))] == [], "rows without modules"


def test_modules_import_from_lower_floors_alone() -> None:
    wrong = []
    for module, imported in OWN.items():
        row = row_of(module)
        wrong += [
            f"{module} ({row}, floor {FLOORS[row][0]}) imports {own}"
            for own in imported
            if row_of(own) != row and FLOORS[row_of(own)][0] >= FLOORS[row][0]
        ]
    assert wrong == []


def test_no_imports_run_in_a_circle() -> None:
    assert set(graphlib.TopologicalSorter(OWN).static_order()) >= set(MODULES)


def test_libraries_are_known_only_where_they_may_be() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names
        if row_of(module) not in KNOWN_TO.get(name.split(".")[0], {row_of(module)})
    ]
    assert wrong == []


def test_only_the_programs_know_the_terminal() -> None:
    words = {"print", "input", "exit", "sys.stdin", "sys.stdout", "sys.stderr", "sys.exit", "sys.argv"}
    wrong = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module, path in MODULES.items()
        if row_of(module) != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in words
    ]
    assert wrong == []


def test_what_is_loaded_keeps_to_the_table_too() -> None:
    """A library could bring another along: text and runs load no JAX, generation no optax and no Orbax."""
    program = """
import sys
from hipgpt_jax import config, devices, files
from hipgpt_jax.runs import directory, weights
from hipgpt_jax.text import corpus, dataset, tokenizer
assert "jax" not in sys.modules, "jax"
from hipgpt_jax.generation import decoding, sampling, scheduler
assert "jax" in sys.modules
assert not {"optax", "orbax", "absl.app"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
