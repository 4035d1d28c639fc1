"""The raw tables on their way into the lakehouse: part files as they are made, one commit per table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from types import TracebackType
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

    fingerprint: str
    rows: dict[str, int] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()

    @property
    def did_nothing(self) -> bool:
        """True when every table was already there, made with the same settings."""
        return not self.rows


class RawTables:
    """Writes a set of raw tables of one provenance; use as a context manager.

    Nothing is visible before the block ends without an error; then each table appears in one commit. A table that the
    same step already made with the same fingerprint is skipped, so that running again completes a run that was killed
    between two commits.
    """

    def __init__(
        self,
        lake: Lake,
        names: tuple[str, ...],
        *,
        step: str,
        fingerprint: str,
        provenance: str,
        details: Mapping[str, object] | None = None,
        force: bool = False,
    ):
        self._lake = lake
        self._mark = SliceMark(step, {WHOLE: fingerprint}, run_id=f"{step}-{fingerprint}", details=dict(details or {}))
        self._provenance = provenance
        self._writers: dict[tuple[str, date | None], PartWriter] = {}
        self._stack = ExitStack()
        states = {name: self._state(name) for name in names}
        foreign = [name for name, state in states.items() if state == "foreign"]
        if foreign:
            raise ContractError(
                f"table(s) {', '.join(foreign)} under {lake.root} were not made by a generator of this project: "
                "they are not overwritten; choose another lakehouse.root"
            )
        other = [name for name, state in states.items() if state == "other"]
        if other and not force:
            raise ContractError(
                f"table(s) {', '.join(other)} under {lake.root} were made with other settings than these "
                f"(fingerprint {fingerprint}); pass --force to replace them, or choose another lakehouse.root"
            )
        self.unchanged = tuple(name for name, state in states.items() if state == "same" and not force)
        self.pending = tuple(name for name in names if name not in self.unchanged)
        self.rows: dict[str, int] = {}

    def _state(self, name: str) -> str:
        """absent, same (this step and fingerprint), other (ours, made otherwise) or foreign (not ours)."""
        if not self._lake.exists(name):
            return "absent"
        snapshot = self._lake.open(name)
        found = snapshot.mark(WHOLE)
        if found is not None:
            mark = found[1]
            return "same" if mark.step == self._mark.step and mark.slices == self._mark.slices else "other"
        # Killed between creating the table and its commit: ours, and still empty.
        ours = PROVENANCE in snapshot.properties and not snapshot.files
        return "absent" if ours else "foreign"

    def write(self, table: str, dt: date | None, rows: pa.Table) -> None:
        """Add rows to a part file of the table's slice `dt`; rows that break the contract are refused."""
        if table not in self.pending or not len(rows):
            return
        key = (table, dt)
        if key not in self._writers:
            partition = {} if dt is None else {"dt": dt.isoformat()}
            writer = self._lake.writer(load_contract(table), partition, dims={}, row_group_rows=65_536)
            self._writers[key] = self._stack.enter_context(writer)
        self._writers[key].write(rows)
        self.rows[table] = self.rows.get(table, 0) + len(rows)

    def __enter__(self) -> RawTables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            for name in self.pending:
                self._commit(name)

    def _commit(self, name: str) -> None:
        contract = load_contract(name)
        snapshot = self._lake.create(contract, {PROVENANCE: self._provenance})
        if snapshot.properties.get(PROVENANCE) != self._provenance:
            DeltaTable(snapshot.uri).alter.set_table_properties({PROVENANCE: self._provenance}, False)
        parts = [p for (table, _), writer in self._writers.items() if table == name for p in writer.parts]
        self._lake.commit(contract, parts, mark=self._mark, mode="overwrite")
        self.rows.setdefault(name, 0)


def provenance(lake: Lake) -> str:
    """What the raw tables say about their origin; empty if they are a platform's own."""
    if not lake.exists("raw_impressions"):
        return ""
    return lake.open("raw_impressions").properties.get(PROVENANCE, "")
