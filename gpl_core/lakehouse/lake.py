"""The tables of a lakehouse without a JVM: where they are, how they are made, and atomic commits through delta-rs.

Layout under `lakehouse.root`: `tables/<name>` (Delta), `artifacts/<kind>/<version>` (see `artifacts.py`),
`reports/`, `work/` (checkpoints of running workers; never read by another step).

Every commit of a step carries a `SliceMark`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError

from gpl_core.conf.sections import CATALOG, Lakehouse
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ConflictError, ContractError, GplError, MissingInputError, plain
from gpl_core.lakehouse.commit import Part, remove_action, transact
from gpl_core.lakehouse.log import read_log
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem, read_text
from gpl_core.lakehouse.writer import PartWriter

LOCATIONS = "catalog.json"  # under the root
_COMMIT_TRIES = 15

SaveMark = Callable[[Snapshot, SliceMark], None]
"""Commits a mark alone on top of a snapshot; CommitFailedError, or no commit, when another one came in between."""


@dataclass(frozen=True)
class Commit:
    """A finished commit: table version before and after, rows and bytes it added."""

    version_before: int
    version_after: int
    rows: int
    size: int


class Lake:
    """All tables under one root.

    `overrides` maps a table to a location of its own, or a raw table to its name in Spark's catalog; `columns` to the
    platform's names of its columns (raw tables).
    """

    def __init__(
        self, root: str, overrides: Mapping[str, str] | None = None,
        columns: Mapping[str, Mapping[str, str]] | None = None,
    ):  # fmt: skip
        self.root = root.rstrip("/")
        self.overrides = dict(overrides or {})
        self.columns = {table: dict(names) for table, names in (columns or {}).items()}

    @classmethod
    def of(cls, settings: Lakehouse) -> Self:
        """The lake that the configuration's section `lakehouse` describes."""
        shadow = settings.shadow
        borrowed = {t: f"{shadow.of}/tables/{t}" for t in shadow.tables}
        return cls(settings.root, {**borrowed, **settings.tables}, settings.columns)

    def uri(self, table: str) -> str:
        """Location of `table`; MissingInputError when Spark's catalog knows it and `gpl register` has not asked."""
        location = self.overrides.get(table, f"{self.root}/tables/{table}").rstrip("/")
        if not location.startswith(CATALOG):
            return location
        if location not in self._located:
            raise MissingInputError(
                f"table {table}: {self.path(LOCATIONS)} does not have the location of {location}; run gpl register, "
                "which asks Spark's catalog"
            )
        return self._located[location]

    @cached_property
    def _located(self) -> dict[str, str]:
        """catalog://name -> location, as `gpl register` found them: the workers have no catalog to ask."""
        path = self.path(LOCATIONS)
        try:
            return {str(name): str(place) for name, place in json.loads(read_text(path) or "{}").items()}
        except (ValueError, AttributeError) as error:
            raise ContractError(f"{path} is damaged ({error}); run gpl register, which writes it again") from None

    def path(self, *parts: str) -> str:
        """A location under the root that is not a table."""
        return "/".join((self.root, *parts))

    def exists(self, table: str) -> bool:
        """Whether `table` is a Delta table."""
        return DeltaTable.is_deltatable(self.uri(table))

    def open(self, table: str, version: int | None = None, *, contract: Contract | None = None) -> Snapshot:
        """Pin `table` (its newest version unless given).

        MissingInputError without such a table, ContractError for one that was made under another contract.
        """
        snapshot = Snapshot(self.uri(table), contract or load_contract(table), version, self.columns.get(table))
        snapshot.check_contract()
        return snapshot

    def find(self, table: str) -> Snapshot | None:
        """Like `open`, None without such a table; to ask `exists` first would list its log twice."""
        try:
            return self.open(table)
        except MissingInputError:
            if self.exists(table):
                raise
            return None

    def has_version(self, table: str, version: int) -> bool:
        """Whether `table` can be read as it was at `version`: the log may be cleaned of it, its files vacuumed."""
        try:
            then, live = self.open(table, version), {f.path for f in self.open(table).files}
        except GplError:
            return False
        locations = map(filesystem, then.uris([f for f in then.files if f.path not in live]))
        return all(fs.exists(path) for fs, path in locations)

    def create(self, contract: Contract, properties: Mapping[str, str] | None = None) -> Snapshot:
        """Create the table of `contract`, with its comments and constraints, when it does not exist; open it."""
        try:
            if not self.exists(contract.name):
                DeltaTable.create(
                    self.uri(contract.name),
                    DeltaSchema.from_json(contract.spark_json()),
                    mode="ignore",
                    partition_by=list(contract.partition_by),
                    name=contract.name,
                    description=contract.description,
                    # CHECK constraints need writer version 3, which delta-rs does not raise by itself.
                    configuration={**contract.table_properties(), **(properties or {}), "delta.minWriterVersion": "3"},
                    raise_if_key_not_exists=False,
                    commit_properties=CommitProperties(max_commit_retries=0),  # a second creation is no commit
                )
        except CommitFailedError:
            if not self.exists(contract.name):  # else another run has created it meanwhile
                raise
        except DeltaError as error:  # the place stands in one line, what is wrong with the disk in the next
            raise type(error)(" ".join(plain(error).split())) from None
        return self.open(contract.name, contract=contract)

    def writer(
        self, contract: Contract, partition: Mapping[str, str], *, dims: Mapping[str, int], **options: Any
    ) -> PartWriter:
        """A writer of part files for one partition; see `PartWriter`."""
        return PartWriter(self.uri(contract.name), contract, partition, dims, **options)

    def refuse(self, table: str, run_id: str, version: int, why: str, save: SaveMark | None = None) -> None:
        """Marks the slices that the run `run_id` has committed, up to `version`, as refused.

        Their fingerprints become empty, so that the next run makes them again. Slices that another commit has written
        since are left out. save: how a mark gets into a log that delta-rs does not write.
        """
        for _ in range(_COMMIT_TRIES):
            newest = self.open(table)
            at, mark = next((v, m) for v, m in newest.marks() if v <= version and m.run_id == run_id)
            standing = {name: found[0] for name in mark.slices if (found := newest.mark(name))}
            slices = {name: "" for name, last in standing.items() if last == at}
            if not slices:
                return
            refused = replace(mark, slices=slices, details={**mark.details, "refused": why})
            with suppress(CommitFailedError):  # another commit came in between
                (save or _save_mark)(newest, refused)
                self.open(table).index()
                return
        raise ConflictError(f"table {table}: {_COMMIT_TRIES} other commits came before the mark of a refused slice")

    def commit(
        self,
        contract: Contract,
        parts: Sequence[Part],
        *,
        mark: SliceMark,
        mode: str,
        partition: Mapping[str, str] | None = None,
        since: int | None = None,
        app_id: str = "",
        last: int | None = None,
        replaces: Sequence[Part] = (),
    ) -> Commit:
        """Commit part files written by `PartWriter` (of all ranks) in one transaction.

        Args:
            mode: `"overwrite"` replaces exactly the partition `partition`, or without one the whole table, which the
                mark must then name (`*`); `"append"` adds.
            partition: partition values that every part must have.
            since: version of the table that the caller has decided on, -1 when there was none: what another run has
                committed to the slice after it is a conflict. Default: the newest.
            app_id: application transaction to count up; made of step, table and slices when not given. Appends share
                one over all slices: what they add depends on all that the table holds.
            last: version of that transaction on which the caller has built; that of `since` when not given.
            replaces: parts of an earlier commit that this one removes.

        ConflictError when another run wrote the same slice (for an append: the same `app_id`) in the meantime.
        """
        partition = dict(partition or {})
        for part in parts:
            strays = {k: v for k, v in partition.items() if part["partition"].get(k) != v}
            if strays:
                raise ContractError(f"table {contract.name}: part {part['path']} is not of the slice {partition}")
        if mode == "overwrite" and not partition and contract.partition_by and WHOLE not in mark.slices:
            raise ContractError(
                f"table {contract.name}: overwriting without a partition replaces the whole table, but the mark names "
                f"only {sorted(mark.slices)}; give the partition, or mark the slice '{WHOLE}'"
            )
        before = self.create(contract)
        if since is not None:
            before = self.open(contract.name, max(since, 0), contract=contract)  # version 0 creates it
        slices = ",".join(sorted(mark.slices)) if mode == "overwrite" else WHOLE
        app_id = app_id or f"{mark.step}:{contract.name}:{slices}"
        last = before.transaction_version(app_id) if last is None else last
        removals = [remove_action(p["path"], p["partition"], p["size"]) for p in replaces]
        for attempt in range(_COMMIT_TRIES):
            try:
                if before.transaction_version(app_id) != last:
                    raise CommitFailedError(f"{app_id} is at {before.transaction_version(app_id)}, not {last}")
                transact(
                    before._table, mark, parts, removals, mode=mode, partition=partition,
                    transaction=Transaction(app_id, last + 1), retries=0 if mode == "overwrite" else _COMMIT_TRIES,
                )  # fmt: skip
                break
            except CommitFailedError as error:
                # To delta-rs any commit that removed a file is a conflict, even one of another slice. If our slice did
                # not change, the same parts are offered again on top of the newer version.
                newer = self.open(contract.name, contract=contract)
                moved = newer.transaction_version(app_id) != last
                if mode == "overwrite":
                    commits = read_log(newer.uri, newer.version, before.version)
                    moved = moved or any(entry.changes(partition) for entry in commits)
                if moved or attempt + 1 == _COMMIT_TRIES:
                    raise ConflictError(
                        f"table {contract.name}: slice {', '.join(sorted(mark.slices))} was written by another run in "
                        f"the meantime ({error}); nothing was changed: run the step again"
                    ) from error
                before = newer
        after = self.open(contract.name, contract=contract)
        if mark.slices:  # else nobody asks for it
            after.index()
        return Commit(before.version, after.version, sum(p["rows"] for p in parts), sum(p["size"] for p in parts))


def _save_mark(newest: Snapshot, mark: SliceMark) -> None:
    transact(newest._table, mark, [])
