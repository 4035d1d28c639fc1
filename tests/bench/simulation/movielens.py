"""MovieLens 100k as a log: real ratings, of which rating >= 4 is a click; requests and unexposed candidates are
simulated.

What makes it worth having: unexposed candidates that the same user rates >= 4 later. `probability` is that, or the
click of an exposed pair. The raw tables are made by `../shared/data/ml_100k/prepare.py` (see
../shared/data/README.md); research only.

    days:  histories … | a month to calibrate on | 60 days of training | judged to the end
"""

from __future__ import annotations

from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from tests.bench.simulation.log import Log, Size
from tests.bench.simulation.world import World, derive, encode

CALIBRATION, WINDOW, TEST = date(2025, 8, 15), date(2025, 9, 15), date(2025, 11, 15)


def make_movielens(folder: Path, size: Size, seed: int, kind: str) -> World:
    """The log in `folder` for every seed, which decides samples, tokenizer, models and batches. kind: unused."""
    return derive(movielens_log(folder), _vectors(folder), size, seed)


@cache
def _vectors(folder: Path) -> np.ndarray:
    return encode(movielens_log(folder).items)


@cache
def movielens_log(folder: Path) -> Log:
    """Requests, exposure and clicks, and beside them what the user rated >= 4 after the request."""
    shown, recalled, items = (
        pd.read_parquet(folder / f"raw_{n}.parquet") for n in ("impressions", "candidates", "items")
    )
    items = items.sort_values("item_id").fillna({"category": "", "description": ""})
    number = {item: n for n, item in enumerate(items["item_id"])}
    users = {user: n for n, user in enumerate(sorted(shown["user_id"].unique()))}
    liked = shown[shown["clicked"] == 1].groupby(["user_id", "item_id"])["event_time"].max().rename("liked_at")
    pairs = recalled.merge(
        shown[["request_id", "item_id", "position", "clicked"]], on=["request_id", "item_id"], how="left"
    )
    pairs = pairs.merge(liked.reset_index(), on=["user_id", "item_id"], how="left")
    exposed = pairs["clicked"].notna()
    later = (pairs["liked_at"] > pairs["event_time"]).astype(np.float64)
    frame = pd.DataFrame({
        "request": pairs["request_id"].astype("category").cat.codes.astype(np.int64),
        "user": pairs["user_id"].map(users), "item": pairs["item_id"].map(number),
        "probability": later.mask(exposed, pairs["clicked"]), "is_exposed": exposed, "is_random": False,
        "clicked": pairs["clicked"].fillna(0.0).astype(np.float64),
        "position": pairs["position"].fillna(-1).astype(np.int64), "dt": pairs["event_time"].dt.date,
    })  # fmt: skip
    events = shown[shown["clicked"] == 1].sort_values(["user_id", "event_time", "item_id"], kind="stable")
    events = pd.DataFrame({
        "user": events["user_id"].map(users), "item": events["item_id"].map(number), "dt": events["event_time"].dt.date,
    }).sort_values("user", kind="stable")  # fmt: skip
    released = items.assign(dt=items["updated_at"].dt.date)
    return Log(frame, events, released, len(users), CALIBRATION, WINDOW, TEST, daily=True)
