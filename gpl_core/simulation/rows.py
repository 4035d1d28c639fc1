"""Rows of the raw tables from arrays, shared by the simulation and the import."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from gpl_core.contracts.contract import load_contract
from gpl_core.simulation.raw_tables import Write
from gpl_core.simulation.recall import CHANNELS, Exposed, Recalled

DAY = 86_400_000_000  # microseconds
NotEmpty = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class CatalogItem:
    """What one item shows in words; texts may be empty."""

    item_id: NotEmpty
    title: NotEmpty
    description: str
    brand: str
    category: str


@dataclass(frozen=True)
class Requests:
    """R requests of one day: request and user ids (string arrays [R]), time int64 [R] in microseconds UTC."""

    dt: date
    request: pa.Array
    user: pa.Array
    time: np.ndarray

    def keys(self, row: np.ndarray, item: np.ndarray, item_ids: pa.Array, *, time: bool = True) -> dict[str, pa.Array]:
        """The key columns of rows that belong to requests `row` and item numbers `item`."""
        taken = pa.array(row, pa.int64())
        columns = {
            "request_id": self.request.take(taken),
            "item_id": item_ids.take(pa.array(item, pa.int64())),
            "user_id": self.user.take(taken),
        }
        return {**columns, "event_time": timestamps(self.time).take(taken)} if time else columns


def examination(position: np.ndarray, decay: float) -> np.ndarray:
    """Probability that a user looks at a result at `position` (from 0): (position + 1) ** -decay."""
    return (position + 1.0) ** -decay


def write_requests(
    write: Write, requests: Requests, item_ids: pa.Array, found: Recalled, shown: Exposed, clicked: np.ndarray
) -> None:
    """Hand the impressions (`clicked` [E] beside `shown`) and candidates of `requests` to `write`."""
    impressions = {
        **requests.keys(shown.row, shown.item, item_ids),
        "position": pa.array(shown.position, pa.int32()),
        "clicked": pa.array(clicked.astype(np.int32)),
        "is_random": pa.array(shown.is_random[shown.row]),
    }
    write("raw_impressions", requests.dt, pa.table(impressions))
    candidates = {
        **requests.keys(found.row, found.hit_item, item_ids),
        "channel": pa.array(CHANNELS, pa.string()).take(pa.array(found.hit_channel, pa.int64())),
        "recall_score": pa.array(found.hit_score, pa.float64(), from_pandas=True),
    }
    write("raw_candidates", requests.dt, pa.table(candidates))


def item_table(items: Sequence[CatalogItem], updated: np.ndarray, image: Sequence[bytes | None]) -> pa.Table:
    """Rows of raw_items, without image_uri, embedding or withdrawal; an empty text is null. updated: microseconds."""
    rows = {"updated_at": timestamps(updated), "image": pa.array(image, pa.binary())}
    for name in ("item_id", "title", "description", "category", "brand"):
        rows[name] = pa.array([getattr(item, name) or None for item in items], pa.string())
    schema = load_contract("raw_items").arrow_schema()
    return pa.table([rows.get(f.name, pa.nulls(len(items), f.type)) for f in schema], schema=schema)


def timestamps(microseconds: np.ndarray) -> pa.Array:
    """Microseconds since 1970 -> UTC timestamps."""
    return pa.array(microseconds.astype(np.int64)).cast(pa.timestamp("us", tz="UTC"))
