"""The raw tables on their way into the lakehouse: part files as they are made, one commit per table at the end."""

import resource
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date

import pyarrow as pa
from deltalake import DeltaTable

from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.writer import PartWriter

PROVENANCE = "gpl.provenance"


Write = Callable[[str, date | None, pa.Table], None]
"""Takes rows (data columns, without dt) of a table; the date is None for tables without partitions."""


@dataclass(frozen=True)
class Outcome:
    """What a generator did: rows per table, and which of them it left alone because they were already there."""

    rows: dict[str, int]
    unchanged: tuple[str, ...]


def generator_mark(step: str, fingerprint: str, details: Mapping[str, object]) -> SliceMark:
    """The mark of the tables that a generator makes from settings with `fingerprint`."""
    return SliceMark(step, {WHOLE: fingerprint}, run_id=f"{step}-{fingerprint}", details=details)


def write_raw_tables(
    lake: Lake, names: Sequence[str], generate: Callable[[Write], None], mark: SliceMark, origin: str, *, force: bool
) -> Outcome:
    """Write what `generate` makes of the raw tables `names`, each in one commit after all rows are made.

    origin: what `provenance` then says of them. A table that already carries `mark` is skipped (unless `force`), so
    that running again completes a run that was killed between two commits. ContractError for a table that was made with
    other settings (without `force`), or is not ours.
    """
    states = {name: _state(lake, name, mark) for name in names}
    if foreign := [name for name, state in states.items() if state == "foreign"]:
        raise ContractError(
            f"{lake.root} has tables that no generator of this project made ({', '.join(foreign)}): they are not "
            "overwritten; choose another lakehouse.root"
        )
    if not force and (other := [name for name, state in states.items() if state == "other"]):
        raise ContractError(
            f"{lake.root} has tables that were made with other settings than these ({', '.join(other)}) "
            f"(fingerprint {mark.slices[WHOLE]}); pass --force to replace them, or choose another lakehouse.root"
        )
    unchanged = tuple(name for name, state in states.items() if state == "same" and not force)
    pending = [name for name in names if name not in unchanged]
    if not pending:
        return Outcome({}, unchanged)
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a file per table and date stays open
    rows = Counter(dict.fromkeys(pending, 0))
    writers: dict[tuple[str, date | None], PartWriter] = {}
    with ExitStack() as stack:

        def write(table: str, dt: date | None, made: pa.Table) -> None:
            if table not in rows or not len(made):
                return
            if (table, dt) not in writers:
                partition = {} if dt is None else {"dt": dt.isoformat()}
                writer = lake.writer(load_contract(table), partition, dims={}, row_group_rows=65_536)
                writers[table, dt] = stack.enter_context(writer)
            writers[table, dt].write(made)
            rows[table] += len(made)

        generate(write)
    for name in pending:
        contract = load_contract(name)
        snapshot = lake.create(contract, {PROVENANCE: origin})
        if snapshot.properties.get(PROVENANCE) != origin:
            DeltaTable(snapshot.uri).alter.set_table_properties({PROVENANCE: origin}, False)
        parts = [p for (table, _), writer in writers.items() if table == name for p in writer.parts]
        lake.commit(contract, parts, mark=mark, mode="overwrite")
    return Outcome(dict(rows), unchanged)


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
