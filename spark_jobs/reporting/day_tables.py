"""The report's inputs for one run date: its tables at pinned versions, and what earlier runs recorded."""

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from pyspark.sql import DataFrame

from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.views import all_views
from spark_jobs.common.histories import slice_marks
from spark_jobs.step import SparkStep


class Day:
    """One run date of the lakehouse.

    Attributes:
        feeds: run date -> details of the newest commit of its slice of training_feed.
        manifest: those of this date.
    """

    def __init__(self, step: SparkStep):
        self.step = step
        self.context = step.context
        self.date = step.run_date
        marks = slice_marks(self.context.snapshot("training_feed"))
        self.feeds: dict[date, Mapping[str, Any]] = {d: m.details for d, m in marks.items()}
        self.manifest = self.feeds.get(self.date, {})

    def rows(self, table: str, day: date) -> int | None:
        """Rows of one slice by the table's log; None when there is no such table or slice."""
        if not self.context.has(table):
            return None
        snapshot = self.context.snapshot(table)
        files = snapshot.select(start=day, end=day)
        if not files and snapshot.mark(day.isoformat()) is None:
            return None
        return rows_in(files)

    def view(self, name: str) -> DataFrame | None:
        """The view of `schemas/views/` over the date's slices; None when a table that it reads does not exist."""
        frames = {}
        for read in all_views()[name].reads:
            if read in all_views():
                frame = self.view(read)
            elif not self.context.has(read):
                frame = None
            else:
                frame = self.step.read_slice(read) if "dt" in load_contract(read).partition_by else self.step.read(read)
            if frame is None:
                return None
            frames[read] = frame
        spark = self.step.spark
        for read, frame in frames.items():
            frame.createOrReplaceTempView(read)
        found = spark.sql(all_views()[name].sql)
        for read in frames:  # they would stand before tables of the catalog
            spark.catalog.dropTempView(read)
        return found

    def records(self, table: str, start: date, end: date | None = None) -> list[dict[str, Any]]:
        """All rows of one slice, or of those through `end`, of a small (optional) table."""
        if not self.context.has(table):
            return []
        snapshot = self.context.snapshot(table)
        found: list[dict[str, Any]] = snapshot.read(snapshot.select(start=start, end=end or start)).to_pylist()
        return found

    def encoder_version(self, sid_version: str) -> str | None:
        """The encoder on which a tokenizer was trained."""
        tokenizer = self.context.artifacts.find("tokenizer", sid_version) if sid_version else None
        return tokenizer.lineage.get("encoder_version") if tokenizer else None

    def preranker_version(self, day: date) -> str | None:
        """The pre-ranker trained on the feed of `day`."""
        found = self.context.artifacts.in_force_or_none("preranker", day + timedelta(days=1))
        return found.version if found and found.trained_through == day else None
