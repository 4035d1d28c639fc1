"""`gpl evaluate`: exposed-only against GPL on the day after a run date, on the least biased slice there is."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from gpl_core.config import Config
from gpl_core.errors import MissingInputError
from gpl_core.lakehouse.lake import Lake

BASELINE, OURS = "exposed_only", "gpl"
_EXPOSED_CAVEAT = (
    "Caveat: that day has no uniformly exposed traffic that can be judged ({why}). The figures below are of exposed "
    "pairs only, which the serving policy chose: they say nothing of unexposed ones, which pseudo-labels are for."
)
# Two-sided 95 % points of Student's t by degrees of freedom (1 to 9), the normal one beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Rows = Sequence[dict[str, Any]]


def print_comparison(config: Config, run_date: date, console: Console | None = None) -> None:
    """Print what table evaluations holds for `run_date`.

    Raises:
        MissingInputError: it holds nothing, as when the impressions of the day after are not there.
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    following = run_date + timedelta(days=1)
    lake = Lake.of(config.lakehouse)
    rows: Rows = []
    if lake.exists("evaluations"):
        snapshot = lake.open("evaluations")
        rows = snapshot.read(snapshot.select(start=run_date, end=run_date)).to_pylist()
    if not rows:
        raise MissingInputError(
            f"table evaluations: nothing for {run_date}; it is judged on the impressions of {following}: ingest them, "
            f"then run gpl evaluate --run-date {run_date} again"
        )
    chosen, caveat = judged_slice(rows)
    console.print(f"pre-ranker trained through {run_date}, judged on {following}, slice {chosen}")
    if caveat:
        console.print(caveat)
    mine = [row for row in rows if row["slice"] == chosen]
    seeds = sorted({row["seed"] for row in mine})
    if len(seeds) == 1:
        console.print(
            f"One training seed ({seeds[0]}): the difference has no interval over seeds; set prerank.seeds to several."
        )
    console.print(comparison_table(mine))
    for other in sorted({row["model"] for row in mine} - {BASELINE, OURS}):
        console.print(comparison_table(mine, other))
    if not any(row["metric"] == "snips_auc" for row in rows):
        console.print("No off-policy estimate: no logged propensities are given (prerank.propensity).")


def judged_slice(rows: Rows) -> tuple[str, str]:
    """(slice, caveat): `uniform` without a caveat where its AUC is defined, else `exposed` with the reason."""
    uniform = [row for row in rows if (row["slice"], row["metric"]) == ("uniform", "auc")]
    if any(row["value"] is not None for row in uniform):
        return "uniform", ""
    return "exposed", _EXPOSED_CAVEAT.format(why=uniform[0]["note"] if uniform else "no such slice")


def comparison_table(rows: Rows, ours: str = OURS) -> Table:
    """One line per metric: both variants' means over seeds and their paired difference; absent figures say why."""
    table = Table("metric", BASELINE, ours, f"{ours} - {BASELINE}", "candidates", "rows")
    for column in table.columns[1:]:
        column.justify = "right"
    for metric in dict.fromkeys(row["metric"] for row in rows):
        by_model: dict[str, dict[int, float]] = {BASELINE: {}, ours: {}}
        mine = [row for row in rows if row["metric"] == metric]
        for row in mine:
            if row["model"] in by_model and row["value"] is not None:
                by_model[row["model"]][row["seed"]] = row["value"]
        cells = [
            f"{statistics.fmean(v.values()):.4f}" if v else f"absent: {mine[0]['note']}" for v in by_model.values()
        ]
        both = sorted(by_model[BASELINE].keys() & by_model[ours].keys())
        text = paired_difference([by_model[ours][s] - by_model[BASELINE][s] for s in both])
        size = mine[0]["candidate_set_size"]
        table.add_row(metric, *cells, text, "-" if size is None else f"{size:.1f}", f"{mine[0]['rows']:,}")
    return table


def paired_difference(differences: Sequence[float]) -> str:
    """Mean of paired differences, with the half width of its 95 % interval where there are several."""
    n = len(differences)
    if not n:
        return "-"
    mean = statistics.fmean(differences)
    if n == 1:
        return f"{mean:+.4f}"
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return f"{mean:+.4f} ± {t * statistics.stdev(differences) / math.sqrt(n):.4f}"
