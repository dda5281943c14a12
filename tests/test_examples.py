"""``docs/examples``: they run, the notebook is the script, and the README's picture is of their record."""

import json
import re
import subprocess
import sys
from pathlib import Path

import draw_page
import programs
import pytest

from hipgpt_jax.records import record

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def test_the_notebook_has_the_cells_of_the_script() -> None:
    script = re.split(r"^# %%", (EXAMPLES / "quickstart.py").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert len(notebook["cells"]) == len(script) > 10
    for cell, part in zip(notebook["cells"], script, strict=True):
        heading, _, body = part.partition("\n")
        text = "".join(cell["source"])
        assert cell["cell_type"] == ("markdown" if "markdown" in heading else "code")
        if cell["cell_type"] == "markdown":
            text = "\n".join(f"# {line}".rstrip() for line in text.splitlines())
        else:
            text = re.sub(r"^(\w+)\Z", r"print(\1)", text, flags=re.MULTILINE)  # a notebook shows the last value
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert text == body.strip("\n")


def _run(name: str, here: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        command, cwd=here, env=programs.environment(), capture_output=True, text=True, check=True, timeout=900
    )
    return done.stdout


@pytest.mark.slow
def test_the_first_tour_runs(tmp_path: Path) -> None:
    out = _run("quickstart.py", tmp_path)
    assert out.startswith("<Run name shakespeare, step 2000, ")
    first, *others = record.read(tmp_path / "quickstart.jsonl")
    assert len(others) == 3
    for scheme in ("light", "dark"):
        picture = (EXAMPLES.parent / f"page-{scheme}.svg").read_text(encoding="utf-8")
        assert draw_page.draw(first, is_dark=scheme == "dark") == picture


@pytest.mark.slow
def test_the_experiment_runs_and_its_records_replay(tmp_path: Path) -> None:
    out = _run("experiment.py", tmp_path)
    assert out.endswith("replayed 24 of 24 records identically\n")
    (low,) = re.findall(r"^  0\.6  [\d.]+  ([+-][\d.]+) ± ([\d.]+)$", out.partition("distinct")[0], re.MULTILINE)
    assert float(low[0]) < -3 * float(low[1])  # a lower temperature gives likelier text
    assert len(list((tmp_path / "experiment").glob("*.jsonl"))) == 3
