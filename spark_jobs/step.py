"""A step on the Spark side: pinned reads, and one atomic write per slice."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ConflictError, ContractError
from gpl_core.graph.step_run import StepContext
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Commit
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot, in_span
from gpl_core.lakehouse.statements import quoted
from spark_jobs.catalog import check_registered, spark_path

Save = Callable[[str, int, str, str], None]
"""Writes to the table at a place: (app_id, txn_version, mark, uri)."""


def column_named(name: str) -> Column:
    """The column of that very name, whatever characters it has."""
    return F.col("`" + name.replace("`", "``") + "`")


def spark_schema(contract: Contract) -> StructType:
    """The contract's schema as Spark's StructType."""
    return StructType.fromJson(json.loads(contract.spark_json()))


class SparkStep:
    """A step's context on the Spark side: reads pinned versions, writes one slice per table and date."""

    def __init__(self, spark: SparkSession, context: StepContext):
        self.spark = spark
        self.context = context
        self.config = context.config
        self.run_date = context.run_date
        context.save_mark = self._save_mark  # Spark alone writes the logs of its tables

    def read(self, table: str, contract: Contract | None = None) -> DataFrame:
        """The whole input table at its pinned version, its columns under our names; opening it checks the contract.

        An optional table that does not exist has no rows.
        """
        if not self.context.has(table) and any(r.table == table and r.optional for r in self.context.step.reads):
            return self.empty(table)
        snapshot = self.context.snapshot(table)
        if contract is not None:
            self.context.lake.open(table, snapshot.version, contract=contract)
        check_registered(self.spark, self.context.lake, table)
        frame = self.read_version(table, snapshot.version)
        ours = {our: snapshot.columns.get(our, our) for our in snapshot.types}
        # A column of the platform that has our name but another meaning is left out.
        taken = {name.lower() for name in (*ours, *ours.values())}
        more = {name: name for name in frame.columns if name.lower() not in taken}
        return frame.select(*[column_named(theirs).alias(our) for our, theirs in {**ours, **more}.items()])

    def read_version(self, table: str, version: int) -> DataFrame:
        """`table` at `version`, unchecked: for what this step has just written."""
        uri = spark_path(self.context.lake.uri(table))
        return self.spark.read.format("delta").option("versionAsOf", version).load(uri)

    def empty(self, table: str) -> DataFrame:
        """No rows in the schema of `table`, for an optional input that does not exist."""
        # Not createDataFrame([]): that starts Python workers on the executors.
        schema = spark_schema(load_contract(table))
        return self.spark.range(0).select(*[F.lit(None).cast(f.dataType).alias(f.name) for f in schema])

    def read_dates(self, table: str, start: date, end: date, contract: Contract | None = None) -> DataFrame:
        """The partitions `start <= dt <= end` of an input table at its pinned version."""
        return self.read(table, contract).where(F.col("dt").between(F.lit(start), F.lit(end)))

    def read_slice(self, table: str, contract: Contract | None = None) -> DataFrame:
        """The run date's partition of an input table at its pinned version."""
        return self.read_dates(table, self.run_date, self.run_date, contract)

    def slice_rows(self, table: str, rows: DataFrame | None = None) -> int:
        """Rows of the slice of an input table (all dates of a bulk run); 0 where the (optional) table does not exist.

        By the log's statistics where each file is of these dates alone, by counting (`rows`, when given) where not.
        """
        if not self.context.has(table):
            return 0
        start, end = self.context.dates[0], self.context.dates[-1]
        files = self.context.snapshot(table).select(start=start, end=end, undated=True)
        if any(f.rows < 0 or not f.is_within(start, end) for f in files):
            in_slice = F.col("dt").between(F.lit(start), F.lit(end))
            return (self.read(table).where(in_slice) if rows is None else rows).count()
        return rows_in(files)

    def spread(self, frame: DataFrame, *columns: str) -> DataFrame:
        """`frame` in as many files as there are shuffle partitions, so that every rank of a worker gets some."""
        return frame.repartition(int(str(self.spark.conf.get("spark.sql.shuffle.partitions"))), *columns)

    def write_slice(
        self, table: str, frame: DataFrame, *, contract: Contract | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Commit:  # fmt: skip
        """Replace the run date's slice of `table` (all dates of a bulk run) by `frame` in one commit.

        `frame` must have exactly the contract's columns, in any order; rows of other dates are refused by Delta.
        Rows are counted from the commit's own metrics.
        """
        contract = contract or load_contract(table)
        wanted = spark_schema(contract)
        missing = [f.name for f in wanted if f.name not in frame.columns]
        if missing or len(frame.columns) != len(wanted):
            extra = [c for c in frame.columns if c not in wanted.names]
            raise ContractError(f"table {contract.name}: the frame lacks {missing} and has the unknown columns {extra}")
        rows = frame.select(*[F.col(f.name).cast(f.dataType).alias(f.name) for f in wanted])
        start, end = self.context.dates[0], self.context.dates[-1]

        def save(app_id: str, version: int, mark: str, uri: str) -> None:
            options = {
                "replaceWhere": f"dt >= DATE '{start}' AND dt <= DATE '{end}'",
                "txnAppId": app_id, "txnVersion": str(version), "userMetadata": mark,
            }  # fmt: skip
            rows.write.format("delta").mode("overwrite").options(**options).save(uri)

        return self._commit(contract, save, details)

    def create_table(self, contract: Contract) -> None:
        """Create the table of `contract`, or add its new nullable columns."""
        have = self.context.lake.create(contract).column_names
        new = [c for c in contract.columns if c.name not in have]
        if new:  # passthrough columns; `open` has refused anything else
            uri = spark_path(self.context.lake.uri(contract.name))
            listing = ", ".join(f"{c.name} {c.type} COMMENT {quoted(c.comment, 'spark')}" for c in new)
            with conflicts_told(contract, "was given new columns"):
                self.spark.sql(f"ALTER TABLE delta.`{uri}` ADD COLUMNS ({listing})")

    def merge(self, contract: Contract, execute: Callable[[DeltaTable], object], since: int) -> Commit:
        """Run `execute` (a Delta MERGE) on the table of `contract` as one marked commit.

        ConflictError when another run of this step wrote the table after version `since`, which the rows build on.
        """

        def save(app_id: str, version: int, mark: str, uri: str) -> None:
            settings = {
                "spark.databricks.delta.write.txnAppId": app_id,
                "spark.databricks.delta.write.txnVersion": str(version),
                "spark.databricks.delta.commitInfo.userMetadata": mark,
            }
            with settings_for(self.spark, settings):
                execute(DeltaTable.forPath(self.spark, uri))

        return self._commit(contract, save, None, since)

    def _commit(
        self, contract: Contract, save: Save, details: Mapping[str, Any] | None, since: int | None = None
    ) -> Commit:
        """One marked commit through `save`, and what it added by the table's log.

        It follows the version `since`, by default the one that the run was decided on. Of two runs that follow one
        version, Delta skips the transaction of the second.
        """
        self.create_table(contract)
        since = self.context.state.outputs.get(contract.name) if since is None else since
        pinned = None if since is None else max(since, 0)  # version 0 creates the table
        before = self.context.lake.open(contract.name, pinned, contract=contract)
        mark = self.context.mark(contract.name, details)
        app_id = self._app_id(contract.name, mark)
        version = before.transaction_version(app_id) + 1
        taken = ConflictError(
            f"table {contract.name}: another run committed {app_id} with transaction {version} first; "
            "run the step again"
        )
        # Delta would skip the write silently, and an Observation of it would never return.
        newest = self.context.lake.open(contract.name, contract=contract)
        if newest.transaction_version(app_id) >= version:
            raise taken
        meanwhile = f"slice {sorted(mark.slices)} was written"
        if in_span(newest.changes_since(before.version), min(self.context.dates), max(self.context.dates)):
            raise ConflictError(changed_meanwhile(contract, meanwhile))  # by a run of other dates, or a gpl command
        with conflicts_told(contract, meanwhile):
            save(app_id, version, mark.to_json(), spark_path(before.uri))
        after = self.context.lake.open(contract.name, contract=contract)
        after.index()
        found = next((v for v, m in after.marks() if v > before.version and m == mark), None)
        if found is None:
            raise taken
        if found > before.version + 1:  # after commits to other slices
            before = self.context.lake.open(contract.name, found - 1, contract=contract)
        known, after = {f.path for f in before.files}, self.context.lake.open(contract.name, found, contract=contract)
        fresh = [f for f in after.files if f.path not in known]
        commit = Commit(before.version, found, rows_in(fresh), sum(f.size for f in fresh))
        self.context.committed(contract.name, commit)
        return commit

    def _save_mark(self, newest: Snapshot, mark: SliceMark) -> None:
        """Commit `mark` and no row; nothing when another run has written these very slices since `newest`."""
        app_id = self._app_id(newest.contract.name, mark)
        options = {
            "txnAppId": app_id, "txnVersion": str(newest.transaction_version(app_id) + 1),
            "userMetadata": mark.to_json(),
        }  # fmt: skip
        nothing = self.empty(newest.contract.name)
        nothing.write.format("delta").mode("append").options(**options).save(spark_path(newest.uri))

    def _app_id(self, table: str, mark: SliceMark) -> str:
        return f"{mark.step}:{table}:{min(mark.slices)}:{max(mark.slices)}"


@contextmanager
def settings_for(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """The session's `settings` inside the block: MERGE and OPTIMIZE take no writer options."""
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key in settings:
            spark.conf.unset(key)


_CONFLICTS = ("DELTA_CONCURRENT", "DELTA_PROTOCOL_CHANGED", "DELTA_METADATA_CHANGED")


@contextmanager
def conflicts_told(contract: Contract, what: str, again: str = "the step") -> Iterator[None]:
    """ConflictError in place of Delta's own errors when another commit to the table came in between."""
    try:
        yield
    except Exception as error:
        if any(code in str(error) for code in _CONFLICTS):
            raise ConflictError(changed_meanwhile(contract, what, again)) from error
        raise


def changed_meanwhile(contract: Contract, what: str, again: str = "the step") -> str:
    """What a run that another one has overtaken says."""
    return f"table {contract.name}: {what} by another run in the meantime; nothing was changed: run {again} again"
