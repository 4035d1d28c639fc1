"""What a notebook or a trainer imports: `import gpl_core as gpl`. The command line runs the same code.

lake = gpl.open_lakehouse("shop.yaml")
lake.sql("SELECT * FROM coverage").to_pandas()
feed = lake.feed("2026-03-04")
feed.refuse_alarms()
for batch in feed.batches(1024, ["item_index", "target", "is_exposed", "sample_weight"]):
    ...
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa

from gpl_core.commands.explain import explain
from gpl_core.commands.score import served_model
from gpl_core.config import Config, load_config, with_passthrough
from gpl_core.contracts.contract import Contract, all_contracts
from gpl_core.errors import ContractError, MissingInputError, UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.storage import read_text
from gpl_core.prerank.serving import ServedModel

Day = date | str  # a date, or YYYY-MM-DD
_PASSED_THROUGH = ("impressions", "candidates", "exposed_samples", "unexposed_samples", "training_feed")


def open_lakehouse(config: str, overrides: Sequence[str] = ()) -> "LakehouseReader":
    """The lakehouse of a configuration, read only.

    Args:
        config: name of a shipped configuration, or a YAML file, as for `--config`.
        overrides: `section.key=value`, as for `--set`.
    """
    return LakehouseReader(load_config(config, overrides))


class LakehouseReader:
    """Reads one lakehouse; `open_lakehouse` makes it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._lake = Lake.of(config.lakehouse)

    @property
    def versions(self) -> dict[str, int]:
        """Every table that is there, and its newest version."""
        ours = (name for name, contract in all_contracts().items() if contract.enforced)
        return {name: found.version for name in ours if (found := self._lake.find(name))}

    def table(
        self, name: str, start: Day | None = None, end: Day | None = None, *,
        columns: Sequence[str] | None = None, version: int | None = None,
    ) -> pa.Table:  # fmt: skip
        """Rows of one of our tables: of the dates `start` to `end` (by default `start` alone), or all.

        Raises:
            UsageError: there is no such table, or it has no dates.
            MissingInputError: it has not been written.
            ContractError: it has no such column.
        """
        if name not in all_contracts() or not all_contracts()[name].enforced:
            raise UsageError(f"no table '{name}'; `versions` lists those that can be read")
        contract = with_passthrough(name, self.config) if name in _PASSED_THROUGH else None
        snapshot = self._lake.open(name, version, contract=contract)
        first, last = (_day(d) if d is not None else None for d in (start, start if end is None else end))
        if (first or last) and "dt" not in snapshot.contract.partition_by:
            raise UsageError(f"table {name} has no dates: leave out start and end")
        files = snapshot.select(start=first, end=last) if first or last else None
        return snapshot.read(files, list(columns) if columns is not None else None)

    def sql(self, statement: str, versions: Mapping[str, int] | None = None) -> pa.Table:
        """The result of one SELECT over tables and views; `versions` pins tables. Errors as of `gpl sql`."""
        result = Query(self._lake, versions).run(statement)
        columns = list(zip(*result.rows)) or [()] * len(result.columns)
        return pa.table([pa.array(values) for values in columns], names=list(result.columns))

    def feed(self, run_date: Day) -> "FeedReader":
        """The published training feed of a run date; MissingInputError before it is published."""
        return FeedReader(self._lake, _day(run_date), with_passthrough("training_feed", self.config))

    def explain(self, user: str, item: str, run_date: Day) -> dict[str, Any]:
        """Why a pair has its label, recomputed, as `gpl explain --json`."""
        return explain(self.config, user, item, _day(run_date))

    def preranker(self, run_date: Day, variant: str = "gpl") -> ServedModel:
        """The reference pre-ranker that is in force once `run_date` is done, for scoring with numpy.

        variant: as in table evaluations, for the first of its training seeds, or with the seed: `gpl-seed0`.
        """
        return served_model(self.config, _day(run_date), variant)[0]


class FeedReader:
    """One date of `training_feed` at the version that its manifest pins: later commits change nothing."""

    def __init__(self, lake: Lake, run_date: date, contract: Contract) -> None:
        path = lake.path("manifests", "training_feed", f"{run_date}.json")
        text = read_text(path)
        if text is None:
            raise MissingInputError(f"no feed of {run_date}: {path} is not there; gpl run publishes it")
        self.run_date = run_date
        try:
            self.manifest: dict[str, Any] = json.loads(text)
        except ValueError as error:
            remedy = f"gpl run --run-date {run_date} --only report --force writes it again"
            raise ContractError(f"{path} is damaged ({error}); {remedy}") from None
        self._lake, self._contract = lake, contract

    @property
    def alarms(self) -> list[str]:
        """What the monitors warned of when the slice was published, and why it is not complete; [] on a good day."""
        found = [f"{n} warns" for n, m in self.manifest.get("monitors", {}).items() if m["status"] == "warn"]
        because = self.manifest.get("completeness", {}).get("because")
        return [*found, *([because] if because else [])]

    def refuse_alarms(self) -> None:
        """ContractError when there are `alarms`: for a trainer that would rather keep yesterday's model."""
        if self.alarms:
            raise ContractError(f"training_feed of {self.run_date}: {'; '.join(self.alarms)}")

    @cached_property
    def _pinned(self) -> Any:
        snapshot = self._lake.open("training_feed", self.manifest["table_version"], contract=self._contract)
        return snapshot, snapshot.select(start=self.run_date, end=self.run_date)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, in stored (random) order."""
        snapshot, files = self._pinned
        return snapshot.read(files, list(columns) if columns is not None else None)

    def batches(self, size: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Column -> tensor, or list of texts or lists, of at most `size` rows; one row group is in memory at a time.

        ContractError for a column that the feed does not have.
        """
        import torch  # heavy, and not everybody's

        snapshot, files = self._pinned
        for name in columns:
            snapshot.contract.column(name)
        for group in snapshot.row_groups(files, list(columns)):
            for start in range(0, group.num_rows, size):
                part = group.slice(start, size)
                yield {
                    name: torch.tensor(part[name].to_numpy()) if _is_plain(part[name].type) else part[name].to_pylist()
                    for name in columns
                }


def _is_plain(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _day(given: Day) -> date:
    if isinstance(given, datetime):
        return given.date()
    if isinstance(given, date):
        return given
    try:
        return date.fromisoformat(given)
    except ValueError:
        raise UsageError(f"'{given}' is not a date; expected YYYY-MM-DD") from None
