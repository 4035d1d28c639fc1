"""The raw tables on their way into the lakehouse: part files as they are made, one commit per table at the end."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from typing import Protocol

import pyarrow as pa
from deltalake import DeltaTable

from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.writer import PartWriter

PROVENANCE = "gpl.provenance"


class RowSink(Protocol):
    """Where a generator puts its rows."""

    def write(self, table: str, dt: date | None, rows: pa.Table) -> None:
        """Take `rows` (data columns, without dt) of `table`; `dt` is None for tables without partitions."""


@dataclass(frozen=True)
class Outcome:
    """What a generator did: rows per table, and which of them it left alone because they were already there."""

    rows: dict[str, int]
    unchanged: tuple[str, ...]


class _PartFiles:
    """A sink with a part file per table and date; rows of other tables than `names` are left out."""

    def __init__(self, lake: Lake, names: Collection[str], stack: ExitStack):
        self._lake, self._stack = lake, stack
        self.rows = Counter(dict.fromkeys(names, 0))
        self.writers: dict[tuple[str, date | None], PartWriter] = {}

    def write(self, table: str, dt: date | None, rows: pa.Table) -> None:
        if table not in self.rows or not len(rows):
            return
        key = (table, dt)
        if key not in self.writers:
            partition = {} if dt is None else {"dt": dt.isoformat()}
            writer = self._lake.writer(load_contract(table), partition, dims={}, row_group_rows=65_536)
            self.writers[key] = self._stack.enter_context(writer)
        self.writers[key].write(rows)
        self.rows[table] += len(rows)


def write_raw_tables(
    lake: Lake,
    names: Sequence[str],
    generate: Callable[[RowSink], None],
    step: str,
    fingerprint: str,
    provenance: str,
    details: dict[str, object],
    *,
    force: bool,
) -> Outcome:
    """Write what `generate` makes of the raw tables `names`, each in one commit after all rows are made.

    A table that the same step already made with the same fingerprint is skipped (unless `force`), so that running again
    completes a run that was killed between two commits. ContractError for a table that was made with other settings
    (without `force`), or is not ours.
    """
    mark = SliceMark(step, {WHOLE: fingerprint}, run_id=f"{step}-{fingerprint}", details=details)
    states = {name: _state(lake, name, mark) for name in names}
    if foreign := [name for name, state in states.items() if state == "foreign"]:
        raise ContractError(
            f"{lake.root} has tables that no generator of this project made ({', '.join(foreign)}): they are not "
            "overwritten; choose another lakehouse.root"
        )
    if not force and (other := [name for name, state in states.items() if state == "other"]):
        raise ContractError(
            f"{lake.root} has tables that were made with other settings than these ({', '.join(other)}) "
            f"(fingerprint {fingerprint}); pass --force to replace them, or choose another lakehouse.root"
        )
    unchanged = tuple(name for name, state in states.items() if state == "same" and not force)
    pending = [name for name in names if name not in unchanged]
    if not pending:
        return Outcome({}, unchanged)
    with ExitStack() as stack:
        sink = _PartFiles(lake, pending, stack)
        generate(sink)
    for name in pending:
        contract = load_contract(name)
        snapshot = lake.create(contract, {PROVENANCE: provenance})
        if snapshot.properties.get(PROVENANCE) != provenance:
            DeltaTable(snapshot.uri).alter.set_table_properties({PROVENANCE: provenance}, False)
        parts = [p for (table, _), writer in sink.writers.items() if table == name for p in writer.parts]
        lake.commit(contract, parts, mark=mark, mode="overwrite")
    return Outcome(dict(sink.rows), unchanged)


def _state(lake: Lake, name: str, mark: SliceMark) -> str:
    """absent, same (step and fingerprint of `mark`), other (ours, with other settings) or foreign (not ours)."""
    if not lake.exists(name):
        return "absent"
    snapshot = lake.open(name)
    if (found := snapshot.mark(WHOLE)) is not None:
        return "same" if (found[1].step, found[1].slices) == (mark.step, mark.slices) else "other"
    # Killed between creating the table and its commit: ours, and still empty.
    ours = PROVENANCE in snapshot.properties and not snapshot.files
    return "absent" if ours else "foreign"


def provenance(lake: Lake) -> str:
    """What the raw tables say about their origin; empty if they are a platform's own."""
    return lake.open("raw_impressions").properties.get(PROVENANCE, "") if lake.exists("raw_impressions") else ""
