"""What is read to decide what is done does not grow with the lakehouse's age. Times: tests/bench/bench_years.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from tests.support import DAY, ONE, run_of, small_config
from tests.years import aged, opened


def test_deciding_opens_as_much_after_years_as_after_days(tmp_path):
    found = {}
    for commits in (10, 70):
        config = small_config(tmp_path / f"of-{commits}")
        aged(config, commits)
        root = tmp_path / f"of-{commits}" / "lake"
        with opened(root) as status:
            planner = Planner(config)
            for day in (DAY, DAY + ONE):
                for step in STEPS:
                    planner.state(step, day)
            assert planner.state(STEPS[-1], DAY).status == "done"
        with opened(root) as check:
            assert run_of(config, "samples", DAY, lambda context: None) == "noop"
        found[commits] = (_places(status, root), _places(check, root))
    assert found[70] == found[10]
    assert sum(found[10][0].values()) > 100, "the kernel has told"


def _places(files: list[str], root: Path) -> Counter[str]:
    """How often files of each table's folder, of its log, and of each kind of artifact were opened."""
    return Counter("/".join(Path(file).relative_to(root).parts[: 3 if "_delta_log" in file else 2]) for file in files)
