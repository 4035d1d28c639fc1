"""Hostile values in every column of every raw table, through the real launchers: ingest, samples and encode_items.

Each row of the raw tables is good but for one value (tests/spark_jobs/hostile.py): text of 10 MB, control characters,
bytes that are no UTF-8, numbers and times at the ends of their types, broken pictures; in a second lakehouse words
where numbers and times belong. A wrong end is a run that does not end with 0; a row is lost when it is neither written
nor quarantined, misjudged when it was refused or let through against the contract, or refused for another column.

    python -m tests.bench.mutation_campaign
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gpl_core.cli import main as gpl
from tests.bench.harness import Figure, at_least, at_most, report
from tests.spark_jobs.hostile import (
    EMBEDDING,
    PASSTHROUGH,
    mutants,
    refused_columns,
    unaccounted,
    write_hostile,
    written_rows,
)
from tests.spark_jobs.tiny_lake import SETTINGS, D, TinyLake

_HUGE = 10_000_000
_STEPS = ("ingest", "encode_items", "samples")


def outcome(root: Path, as_text: bool) -> Counter[str]:
    """What became of the mutants of one lakehouse."""
    session: Any = None  # the launchers start their own
    lake = TinyLake(root, session, PASSTHROUGH, EMBEDDING)
    made = list(mutants(lake.config(), _HUGE, as_text))
    write_hostile(lake, made, as_text)
    overrides = [f"lakehouse.root={root}", *SETTINGS, *lake.overrides]
    chosen = [a for step in _STEPS for a in ("--only", step)] + [a for o in overrides for a in ("--set", o)]
    code = gpl(["run", "--config", "quickstart", "--run-date", D.isoformat(), *chosen])
    found = Counter({"rows tried": len(made), "wrong ends": int(code != 0)})
    if code:
        return found
    found["rows lost"] = unaccounted(lake, made)
    found["rows refused"] = refused_columns(lake).total()
    if not as_text:
        made = [m for m in made if m.table != "raw_opt_outs"]
        wrong = refused_columns(lake)
        wrong.subtract(Counter((m.table, (m.column.name,)) for m in made if m.fate == "refused"))
        missing = written_rows(lake)
        missing.subtract(Counter(m.table for m in made if m.fate == "written"))
        found["rows misjudged"] = sum(map(abs, [*wrong.values(), *missing.values()]))
    return found


def main() -> None:
    """Run both lakehouses, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(Path(folder, "values"), False) + outcome(Path(folder, "words"), True)
    figures = {
        "rows tried": at_least(found["rows tried"], 600, "rows"),
        "wrong ends": at_most(found["wrong ends"], 0, "runs"),
        "rows lost": at_most(found["rows lost"], 0, "rows"),
        "rows misjudged": at_most(found["rows misjudged"], 0, "rows"),
        "rows refused": Figure(found["rows refused"], "rows"),
    }
    title = f"one hostile value per row, through {', '.join(_STEPS)}"
    report("mutation_campaign", figures, False, title, module="mutation_campaign")


if __name__ == "__main__":
    main()
