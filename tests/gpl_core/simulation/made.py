"""Worlds made once for the tests of this folder, kept as plain arrow tables."""

from collections import defaultdict
from datetime import date
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from gpl_core.simulation.marketplace import generate
from gpl_core.simulation.simulation_settings import SimulationSettings


class Collected:
    """A sink that keeps every chunk it is given."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[tuple[date | None, pa.Table]]] = defaultdict(list)

    def write(self, table: str, dt: date | None, rows: pa.Table) -> None:
        self.chunks[table].append((dt, rows))

    def table(self, name: str) -> pa.Table:
        """All rows of `name`, with a dt column where there is one."""
        parts = []
        for dt, rows in self.chunks[name]:
            parts.append(rows if dt is None else rows.append_column("dt", pa.array([dt] * len(rows), pa.date32())))
        return pa.concat_tables(parts)


SMALL = SimulationSettings(
    users=400,
    items=400,
    days=2,
    new_items_per_day=5,
    candidates_per_request=40,
    exposed_per_request=8,
    random_share=0.1,
)


@cache
def world(name: str = "plain", users: int = 600) -> Collected:
    """The quickstart's marketplace with fewer users, without pictures."""
    made = Collected()
    generate(SimulationSettings(users=users, world=name, pictures=False), made.write)
    return made


@cache
def small() -> Collected:
    """`SMALL`, with pictures."""
    made = Collected()
    generate(SMALL, made.write)
    return made


def auc(score: pa.Array, positive: pa.Array) -> float:
    """Area under the ROC curve by ranks, ties averaged."""
    from scipy.stats import rankdata

    ranks = rankdata(score)
    wins = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / (positive.sum() * (~positive).sum()))


def count_distinct(column: pa.ChunkedArray) -> int:
    return int(pc.count_distinct(column).as_py())
