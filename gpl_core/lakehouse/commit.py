"""One transaction of delta-rs: files added, files removed, and our mark in its `userMetadata`."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.transaction import AddAction, RemoveAction

from gpl_core.lakehouse.marks import SliceMark

Part = Mapping[str, Any]
"""A data file that is not committed yet: path, partition, rows, size, modified (milliseconds); survives JSON."""


def now_ms() -> int:
    """This moment in milliseconds, as Delta's log has times."""
    return int(datetime.now(UTC).timestamp() * 1000)


def remove_action(path: str, partition: Mapping[str, str], size: int, data_change: bool = True) -> RemoveAction:
    """The removal of a file, as a commit records it."""
    return RemoveAction(path, data_change, now_ms(), size, dict(partition))


def transact(
    table: DeltaTable,
    mark: SliceMark,
    parts: Iterable[Part],
    removals: Iterable[RemoveAction] = (),
    *,
    mode: str = "append",
    partition: Mapping[str, str] | None = None,
    schema: DeltaSchema | None = None,
    transaction: Transaction | None = None,
    data_change: bool = True,
    retries: int = 0,
) -> None:
    """Commit on top of the loaded version of `table`; CommitFailedError when another commit came in between.

    The partition columns stay.

    Args:
        mode: "overwrite" replaces the partition with the values `partition`, or without one the whole table.
        data_change: False says that the rows are the same, only grouped differently.
        retries: how often delta-rs may try again on top of commits that came in between.
    """
    actions: list[AddAction | RemoveAction] = []
    for part in parts:
        statistics = json.dumps({"numRecords": part["rows"]})
        partition_values = dict(part["partition"])
        actions.append(
            AddAction(part["path"], part["size"], partition_values, part["modified"], data_change, statistics)
        )
    table.create_write_transaction(
        [*actions, *removals],
        mode,
        schema or table.schema(),
        table.metadata().partition_columns or None,
        [(k, "=", v) for k, v in partition.items()] if mode == "overwrite" and partition else None,
        commit_properties=CommitProperties(
            custom_metadata={"userMetadata": mark.to_json()},
            app_transactions=[transaction] if transaction else None,
            max_commit_retries=retries,
        ),
    )
