"""The plan of ``docs/scale.md``: its tables are those that ``scripts/plan.py`` computes."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_tables_of_the_plan_are_recomputed() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "plan.py"))
    page = (ROOT / "docs" / "scale.md").read_text()
    for table in ("memory", "traffic"):
        assert "\n".join(script[table]()) in page
