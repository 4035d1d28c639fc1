"""`gpl optimize`: fewer, larger files, while steps and trainers read.

Rows are regrouped in commits that mark every file as changing no data, so what was built on a slice stays done. Each
table is compacted by the engine that writes it: here those of the workers and the small logs, in
`spark_jobs/optimize.py` those of Spark.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date

import pyarrow as pa

from gpl_core.commands.command import Command, run_dates, source
from gpl_core.config import Config
from gpl_core.contracts.contract import Contract
from gpl_core.errors import ConflictError
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.compaction import IN_PROGRESS, compactable
from gpl_core.graph.launch_runner import run_launches
from gpl_core.graph.launches import Launch
from gpl_core.graph.steps import OPTIMIZE
from gpl_core.grouping import grouped
from gpl_core.lakehouse.commit import Part
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.rewrite import swap
from gpl_core.lakehouse.snapshot import Snapshot

_TRIES = 5
_ROW_GROUP_ROWS = 16_384


def run(args: argparse.Namespace, config: Config) -> int:
    """Compact the tables of delta-rs in this process, then start the job for those of Spark."""
    dates, lake = run_dates(args, config), Lake.of(config.lakehouse)
    for contract in compactable(lake, "delta-rs"):
        before, after = compact(lake, contract, dates, config.lakehouse.file_mb * 2**20)
        if after < before:
            print(f"{contract.name}: {before} files before, {after} after")
    return run_launches([Launch((OPTIMIZE,), dates)], source(args), config) if compactable(lake, "spark") else 0


def compact(lake: Lake, contract: Contract, dates: Sequence[date], file_bytes: int) -> tuple[int, int]:
    """Join the small files of `dates` (all files of a table without dates) into files of up to about `file_bytes`.

    Returns how many files of the dates there were before, and after. Rows and their order within the files do not
    change. Nothing is committed if no two files fit together.
    """
    for _ in range(_TRIES):
        snapshot = lake.open(contract.name)
        wanted = {d.isoformat() for d in dates}
        files = [f for f in snapshot.files if f.partition.get("dt") in (None, *wanted)]
        movable = files
        if contract.name in IN_PROGRESS:  # per file: the row of a killed run stays forever, and must block only its own
            column, value = IN_PROGRESS[contract.name]
            movable = [f for f in files if value not in snapshot.read([f], [column]).column(0).to_pylist()]
        by_partition: dict[str, list[DataFile]] = {}
        for file in movable:
            by_partition.setdefault(json.dumps(dict(file.partition), sort_keys=True), []).append(file)
        joined = (g for part in by_partition.values() for g in grouped(part, lambda f: f.size, file_bytes))
        groups = [g for g in joined if len(g) > 1]
        if not groups:
            return len(files), len(files)
        parts = [_rewrite(lake, snapshot, group) for group in groups]
        gone = [file for group in groups for file in group]
        if swap(snapshot, gone, parts, SliceMark("optimize", {}, ""), data_change=False):
            return len(files), len(files) - len(gone) + len(parts)
    raise ConflictError(
        f"table {contract.name}: other runs wrote to it during all {_TRIES} attempts; run gpl optimize again"
    )


def _rewrite(lake: Lake, snapshot: Snapshot, group: Sequence[DataFile]) -> Part:
    """The rows of `group` in one new part file, one file at a time in memory, with row groups as workers write them."""
    contract = snapshot.contract
    partition = {k: group[0].partition[k] for k in contract.partition_by}
    held: list[pa.Table] = []
    with lake.writer(contract, partition, dims={}, row_group_rows=_ROW_GROUP_ROWS, file_rows=2**62) as writer:
        for file in group:
            held.append(snapshot.read([file]).drop_columns(list(contract.partition_by)))
            if sum(map(len, held)) >= _ROW_GROUP_ROWS or file is group[-1]:
                writer.write(pa.concat_tables(held))
                held = []
    return writer.parts[0]


COMMAND = Command(
    "optimize", "merge small files; makes nothing stale", run, add_dates, in_shadow=False,
    examples=("--config shop.yaml --start-date 2026-03-01 --end-date 2026-03-07",),
)  # fmt: skip
