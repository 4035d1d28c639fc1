"""What docs/notebooks.md shows, run as it stands on a table of ours: the data frames hold the rows of the table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpl_core.analyst_lake import AnalystLake
from tests.support import DAY

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-notebooks" / "bin" / "python"
PAGE = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
TELL = """
import json
told = {name: (sorted(frame.columns), len(frame)) for name, frame in globals().copy().items() if name.startswith("in_")}
print(json.dumps(told))
"""


def shown(python: str, place: int, lake: AnalystLake) -> dict[str, list]:
    """Columns and number of rows of every data frame that the page's block `place` makes under `python`."""
    block = re.findall(r"```python\n(.*?)```", PAGE, re.S)[place]
    code = block.replace("lakehouse/quickstart", lake.config.lakehouse.root).replace("2026-01-03", DAY.isoformat())
    code = code.replace("date(2026, 1, 3)", f"date({DAY.year}, {DAY.month}, {DAY.day})")
    done = subprocess.run([python, "-c", code + TELL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> AnalystLake:
    return AnalystLake(tmp_path_factory.mktemp("notebooks"))


def expected(lake: AnalystLake) -> list:
    rows = lake.lake.open("pseudo_labels").read()
    return [sorted(rows.column_names), len(rows)]


def test_data_frames_in_the_projects_own_environment(lake):
    assert shown(sys.executable, 1, lake) == {"in_pandas": expected(lake)}


@pytest.mark.slow
def test_data_frames_in_an_environment_of_ones_own(lake):
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there: make .venv-notebooks")
    sources = len({label["source"] for label in lake.labels})
    assert shown(str(PYTHON), 0, lake) == {
        "in_pandas": expected(lake), "in_polars": expected(lake), "in_duckdb": [["labels", "mean", "source"], sources],
    }  # fmt: skip
