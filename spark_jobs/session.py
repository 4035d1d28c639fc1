"""The Spark session, pinned reads, one atomic write per slice, and the life cycle of a Spark job."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from typing import Any

from delta.tables import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructType

from gpl_core.conf.sections import CATALOG
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ConflictError, ContractError, MissingInputError, UsageError
from gpl_core.graph.arguments import StepArguments, parse_arguments
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, exit_with, run_step, run_steps, setup_logging
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Commit, Lake

# What this project relies on. Each is set only when the launcher left it open.
_DEFAULTS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Row groups small enough that every rank of a trainer gets some; Delta's writer ignores the per-write option.
    "spark.hadoop.parquet.block.size": str(64 * 2**20),
    "spark.databricks.delta.replaceWhere.constraintCheck.enabled": "true",
    # A bar in a log file is noise.
    "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
    "spark.log.level": "ERROR",
    # Else PySpark walks the stack and calls the JVM twice more for each column expression: a fifth of a short job.
    "spark.python.sql.dataFrameDebugging.enabled": "false",
}
# On one machine Delta's default of 50 log partitions, and 200 shuffle partitions, are most of the run time.
_LOCAL_DEFAULTS = {
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.shuffle.partitions": "4",
    "spark.ui.enabled": "false",
}


def start_session(name: str) -> SparkSession:
    """The Spark session: launcher settings stand, master and packages are never set here.

    Raises:
        UsageError: Delta's jars are not on the class path.
    """
    builder = SparkSession.builder.appName(f"gpl-{name}")
    given = _launcher_settings()
    local = given.get("spark.master", "").startswith("local")
    for key, value in {**_DEFAULTS, **(_LOCAL_DEFAULTS if local else {}), **_object_store()}.items():
        if key not in given:
            builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel(given.get("spark.log.level", _DEFAULTS["spark.log.level"]))
    jvm: Any = spark._jvm
    loader = jvm.java.lang.Thread.currentThread().getContextClassLoader()
    try:
        jvm.java.lang.Class.forName("io.delta.sql.DeltaSparkSessionExtension", False, loader)
    except Exception:
        spark.stop()
        raise UsageError(
            "Delta's jars are not on the class path: start with "
            "spark-submit --packages io.delta:delta-spark_4.0_2.13:4.2.0, or --jars with delta-spark and delta-storage"
        ) from None
    return spark


def _object_store() -> dict[str, str]:
    """What s3a needs beside the endpoint and the credentials, which Spark takes from the environment by itself."""
    found = {}
    if "AWS_ENDPOINT_URL" in os.environ:  # a store of one's own: its buckets are seldom names in DNS
        found["spark.hadoop.fs.s3a.path.style.access"] = "true"
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        found["spark.hadoop.fs.s3a.endpoint.region"] = region
    return found


def _launcher_settings() -> dict[str, str]:
    """What spark-submit (or an existing session) has set."""
    active = SparkSession.getActiveSession()
    if active is not None:
        return dict(active.sparkContext.getConf().getAll())
    from pyspark import SparkConf

    # SparkConf reads the launcher's properties only once a JVM runs; under spark-submit PySpark has started it.
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        from pyspark import SparkContext

        SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def spark_schema(contract: Contract) -> StructType:
    """The contract's schema as Spark's StructType."""
    return StructType.fromJson(json.loads(contract.spark_json()))


def create_table(spark: SparkSession, location: str, contract: Contract) -> None:
    """Create the Delta table of `contract` at `location` unless it exists, with its comments and constraints."""
    table = DeltaTable.createIfNotExists(spark).location(location).addColumns(spark_schema(contract))
    table = table.comment(contract.description).partitionedBy(*contract.partition_by)
    for name, value in contract.table_properties().items():
        table = table.property(name, value)
    table.execute()


class SparkStep:
    """A step's context on the Spark side: reads pinned versions, writes one slice per table and date."""

    def __init__(self, spark: SparkSession, context: StepContext):
        self.spark = spark
        self.context = context
        self.config = context.config
        self.run_date = context.run_date

    def read(self, table: str, contract: Contract | None = None) -> DataFrame:
        """The whole input table at its pinned version, after its contract was compared."""
        return self._checked(self.read_unchecked(table), contract or load_contract(table))

    def read_unchecked(self, table: str) -> DataFrame:
        """The whole input table at its pinned version, its columns under our names: ingest checks platform rows."""
        snapshot = self.context.snapshot(table)
        check_registered(self.spark, self.context.lake, table)
        frame = self.read_version(table, snapshot.version)
        if not snapshot.columns:
            return frame
        # A column of the platform's that has our name but stands for something else gives way.
        ours = {theirs: our for our, theirs in snapshot.columns.items()}
        kept = [c for c in frame.columns if c in ours or c not in snapshot.columns]
        return frame.select(*[F.col(f"`{c}`").alias(ours.get(c, c)) for c in kept])

    def read_version(self, table: str, version: int) -> DataFrame:
        """`table` at `version`, unchecked: for what this step has just written itself."""
        uri = spark_path(self.context.lake.uri(table))
        return self.spark.read.format("delta").option("versionAsOf", version).load(uri)

    def empty(self, table: str) -> DataFrame:
        """No rows in the schema of `table`: stands in for an optional input that does not exist."""
        # Not createDataFrame([]): that starts Python workers on the executors.
        schema = spark_schema(load_contract(table))
        return self.spark.range(0).select(*[F.lit(None).cast(f.dataType).alias(f.name) for f in schema])

    def read_dates(self, table: str, start: date, end: date, contract: Contract | None = None) -> DataFrame:
        """The partitions `start <= dt <= end` of an input table at its pinned version."""
        frame = self.read(table, contract)
        return frame.where(F.col("dt").between(F.lit(start), F.lit(end)))

    def read_slice(self, table: str, contract: Contract | None = None) -> DataFrame:
        """The run date's partition of an input table at its pinned version."""
        return self.read_dates(table, self.run_date, self.run_date, contract)

    def slice_rows(self, table: str) -> int:
        """Rows of the run date's slice of an input table by its log; 0 where the (optional) table does not exist."""
        if not self.context.has(table):
            return 0
        snapshot = self.context.snapshot(table)
        return rows_in(snapshot.select(start=self.run_date, end=self.run_date))

    def spread(self, frame: DataFrame, *columns: str) -> DataFrame:
        """`frame` in as many files as there are shuffle partitions, so that every rank of a worker gets some."""
        return frame.repartition(int(str(self.spark.conf.get("spark.sql.shuffle.partitions"))), *columns)

    def _checked(self, frame: DataFrame, contract: Contract) -> DataFrame:
        problems = schema_drift(contract, frame.schema)
        if problems:
            raise ContractError(
                f"table {contract.name}: its schema drifted from contract version {contract.version}:\n  "
                + "\n  ".join(problems)
            )
        return frame

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
        """Create the table of `contract` with its comments and constraints, or add its new nullable columns."""
        uri = spark_path(self.context.lake.uri(contract.name))
        if not self.context.lake.exists(contract.name):
            create_table(self.spark, uri, contract)
            return
        if contract.columns == load_contract(contract.name).columns:
            return
        have = DeltaTable.forPath(self.spark, uri).toDF().columns
        new = [c for c in contract.columns if c.name not in have]
        if new:  # passthrough columns; `open` has refused anything else
            listing = ", ".join(f"{c.name} {c.type} COMMENT '{c.comment}'" for c in new)
            self.spark.sql(f"ALTER TABLE delta.`{uri}` ADD COLUMNS ({listing})")

    def merge(self, contract: Contract, execute: Callable[[DeltaTable], object], since: int) -> Commit:
        """Run `execute` (a Delta MERGE) on the table of `contract` as one marked commit.

        Raises:
            ConflictError: this step has written the table after version `since`, from which the rows were made.
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
        self,
        contract: Contract,
        save: Callable[[str, int, str, str], None],
        details: Mapping[str, Any] | None,
        since: int | None = None,
    ) -> Commit:
        """One marked commit through `save(app_id, txn_version, mark, uri)`, and what it added by the table's log.

        Of two runs that count on from one table version, Delta skips the second one's transaction.
        """
        self.create_table(contract)
        before = self.context.lake.open(contract.name, since, contract=contract)
        mark = self.context.mark(contract.name, details)
        app_id = f"{mark.step}:{contract.name}:{min(mark.slices)}:{max(mark.slices)}"
        version = before.transaction_version(app_id) + 1
        try:
            save(app_id, version, mark.to_json(), spark_path(before.uri))
        except Exception as error:
            if is_conflict(error):
                raise ConflictError(
                    f"table {contract.name}: slice {sorted(mark.slices)} was written by another run at the same "
                    "time; nothing was changed, run the step again"
                ) from error
            raise
        after = self.context.lake.open(contract.name, contract=contract)
        found = next((v for v, m in after.marks() if v > before.version and m == mark), None)
        if found is None:
            raise ConflictError(
                f"table {contract.name}: another run committed {app_id} with transaction {version} first; "
                "run the step again"
            )
        rows, size = added(self.context.lake.open(contract.name, found, contract=contract), before)
        commit = Commit(before.version, found, rows, size)
        self.context.committed(contract.name, commit)
        return commit


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


def is_conflict(error: Exception) -> bool:
    """Whether Delta refused a commit because another one came between."""
    return "Concurrent" in type(error).__name__ or "DELTA_CONCURRENT" in str(error)


def added(after: Any, before: Any) -> tuple[int, int]:
    """Rows and bytes of the files that are live in `after` and were not in `before`."""
    known = {f.path for f in before.files}
    fresh = [f for f in after.files if f.path not in known]
    return sum(f.rows for f in fresh), sum(f.size for f in fresh)


def located(spark: SparkSession, name: str) -> str:
    """Where the catalog's table `name` lies, as delta-rs names the place.

    Raises:
        MissingInputError: the catalog has no such table.
        ContractError: it is no Delta table.
    """
    if not spark.catalog.tableExists(name):
        raise MissingInputError(
            f"Spark's catalog has no table {name}; correct lakehouse.tables, or the launcher's catalog"
        )
    try:
        found = spark.sql(f"DESCRIBE DETAIL {name}").first()
    except AnalysisException:
        found = None
    if found is None or found["format"] != "delta":
        raise ContractError(f"{name} is no Delta table; write it as one, or give another under lakehouse.tables")
    return re.sub("^file:/*", "/", re.sub("^s3a:", "s3:", found["location"])).rstrip("/")


def check_registered(spark: SparkSession, lake: Lake, table: str) -> None:
    """Refuse a raw table that the catalog has moved since `gpl register`: workers would go on with the old one.

    Raises:
        ContractError: naming both places.
    """
    name = lake.overrides.get(table, "")
    if name.startswith(CATALOG) and (now := located(spark, name.removeprefix(CATALOG))) != lake.uri(table):
        raise ContractError(
            f"table {table}: {name} lies at {now} by Spark's catalog, gpl register found it at {lake.uri(table)}; "
            "run gpl register again"
        )


def spark_path(uri: str) -> str:
    """`uri` as Spark's file systems name it."""
    return "s3a://" + uri.removeprefix("s3://") if uri.startswith("s3://") else uri


def schema_drift(
    contract: Contract, found: StructType, castable: Callable[[DataType, DataType], bool] = lambda have, wanted: False
) -> list[str]:
    """Column-by-column differences between a contract and a table; additional and `castable` columns are none."""
    problems = []
    for name, wanted in ((f.name, f.dataType) for f in spark_schema(contract)):
        have = found[name].dataType if name in found.names else None
        if have is None and not contract.column(name).nullable:
            problems.append(f"column '{name}' ({wanted.simpleString()}) is missing")
        elif have and have.simpleString() != wanted.simpleString() and not castable(have, wanted):
            problems.append(f"column '{name}' is {have.simpleString()}, expected {wanted.simpleString()}")
    return problems


Job = Callable[[SparkStep], None]


def job_main(name: str, job: Job, argv: Sequence[str] | None = None) -> None:
    """Entry point of one Spark job; leaves the process with its exit code."""
    run_jobs(name, lambda args: {name: job}, lambda: parse_arguments(f"{name}.py", argv))


def run_jobs(
    program: str, choose: Callable[[StepArguments], Mapping[str, Job]], parse: Callable[[], StepArguments]
) -> None:
    """Run the chosen jobs in order over the dates, in one session; exits the process with the exit code."""
    setup_logging()
    spark: SparkSession | None = None
    try:
        args = parse()
        jobs = choose(args)
        spark = None if args.dry_run else start_session(program)

        def run_one(name: str, dates: Sequence[date]) -> None:
            def body(context: StepContext) -> None:
                assert spark is not None  # a dry run runs no body
                run_body(spark, context, jobs[name])

            # A new planner per step and date: it sees what the step before has written.
            run_step(Planner(args.config), name, dates, args, body)

        code = run_steps(tuple(jobs), args, run_one)
    except Exception as error:
        code = exit_with(error)
    finally:
        if spark is not None:
            spark.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


@dataclass(frozen=True)
class Work:
    """What an application's executors have done so far, lost ones included: task time in seconds, bytes, tasks."""

    seconds: float
    bytes_in: int
    shuffled: int
    tasks: int

    @staticmethod
    def of(spark: SparkSession) -> Work:
        """Spark's own count, after every event up to now was counted, or ten seconds have passed."""
        context = spark.sparkContext._jsc.sc()
        with suppress(Exception):  # a driver that is behind with its events must not fail the step
            context.listenerBus().waitUntilEmpty()
        executors = context.statusStore().executorList(False)
        each = [executors.apply(i) for i in range(executors.size())]
        return Work(
            sum(e.totalDuration() for e in each) / 1000, sum(e.totalInputBytes() for e in each),
            sum(e.totalShuffleWrite() for e in each), sum(e.totalTasks() for e in each),
        )  # fmt: skip


def run_body(spark: SparkSession, context: StepContext, job: Job) -> None:
    """Run `job` in the session, and count what it cost."""
    before = Work.of(spark)
    try:
        job(SparkStep(spark, context))
    finally:
        after = Work.of(spark)
        counts = context.counts
        counts.core_seconds = max(0.0, after.seconds - before.seconds)
        counts.bytes_in = max(0, after.bytes_in - before.bytes_in)
        counts.details["spark"] = {
            "shuffled_bytes": after.shuffled - before.shuffled, "tasks": after.tasks - before.tasks
        }  # fmt: skip
        spark.catalog.clearCache()  # the next step of the session needs the memory
