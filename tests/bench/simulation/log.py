"""What a platform has logged: simulated, or made of real events by `movielens` and `purchases`.

Simulated by `gpl_core.simulation` itself: the same rows as `gpl simulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa

from gpl_core.simulation.marketplace import generate
from gpl_core.simulation.simulation_settings import SimulationSettings


@dataclass(frozen=True)
class Size:
    """How large a world is, and how long its models train.

    uniform_rows, exposed_rows: at most so many uniformly or ordinarily exposed pairs of the calibration days are used,
    whatever the traffic, and as many unexposed ones as the latter.
    interest_content: the interest model reads and scores content, and learns from walks; False: SIDs alone.
    steps: of every pre-ranker; the shipped setting.
    """

    users: int = 3500
    items: int = 1200
    past_days: int = 2
    calibration_days: int = 3
    train_days: int = 2
    candidates: int = 60
    exposed: int = 10
    random_share: float = 0.05
    uniform_rows: int = 5000
    exposed_rows: int = 20_000
    codes: int = 64
    unexposed_per_request: int = 20
    interest_epochs: int = 4
    interest_content: bool = True
    steps: int = 400


QUICK = Size(users=800, items=400, candidates=40, exposed=8, codes=32, interest_epochs=2, steps=100, random_share=0.1)


class Memory:
    """Keeps the rows that are written."""

    def __init__(self) -> None:
        self.rows: dict[str, list[pa.Table]] = {}

    def write(self, table: str, dt: date | None, rows: pa.Table) -> None:
        """Keep `rows` of `table`, its date beside them."""
        day = pa.array([dt] * len(rows), pa.date32())
        self.rows.setdefault(table, []).append(rows.append_column("dt", day))

    def frame(self, table: str) -> pd.DataFrame:
        """All rows of `table`, in the order of their writing."""
        return pa.concat_tables(self.rows[table]).to_pandas(date_as_object=True)


@dataclass(frozen=True)
class Pairs:
    """Recalled pairs of some days, arrays of one length."""

    request: np.ndarray
    user: np.ndarray
    item: np.ndarray
    probability: np.ndarray
    """True click probability, for the oracle and the judge alone."""
    is_exposed: np.ndarray
    is_random: np.ndarray
    clicked: np.ndarray
    """float: the click of an exposed pair, 0 else."""
    position: np.ndarray
    """From 0; -1 when unexposed."""
    dt: np.ndarray
    """The request's date."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: np.ndarray) -> Pairs:
        """The rows that `chosen` (mask or numbers) names."""
        return Pairs(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Log:
    """What a platform has logged, as one frame each, and when the parts of the study begin.

    pairs: recalled pairs, the columns of `Pairs` and `dt`. events: positives (user, item, dt) by user and time. items:
    texts and `dt` of release, in the order of item numbers.
    """

    pairs: pd.DataFrame
    events: pd.DataFrame
    items: pd.DataFrame
    users: int
    calibration: date
    window: date
    test: date
    daily: bool = False
    """Pairs are scored by what is known before their own date, as the pipeline does, not before the window or the
    calibration days, and those of the window by a model that has seen the calibration days."""


Numbers = Callable[[pd.Series], pd.Series]
"""User ids -> user numbers."""


def simulated_log(size: Size, seed: int, kind: str) -> Log:
    """The log of a simulated marketplace, true click probabilities beside it."""
    before = size.past_days + size.calibration_days
    settings = SimulationSettings(
        users=size.users, items=size.items, days=before + size.train_days + 1, seed=seed, world=kind,
        candidates_per_request=size.candidates, exposed_per_request=size.exposed, random_share=size.random_share,
        pictures=False,
    )  # fmt: skip
    memory = Memory()
    generate(settings, memory.write)
    items = memory.frame("raw_items").drop_duplicates("item_id", keep="first").sort_values("item_id")
    number = {item: n for n, item in enumerate(items["item_id"])}
    truth = memory.frame("truth").rename(columns={"true_probability": "probability"})
    first = settings.start_date
    return Log(
        pairs_of(truth, memory, lambda user: user.str[1:].astype(np.int64), number),
        events_of(memory, lambda user: user.str[1:].astype(np.int64), number),
        items.assign(dt=pd.to_datetime(items["updated_at"]).dt.date),
        size.users,
        first + timedelta(days=size.past_days),
        first + timedelta(days=before),
        first + timedelta(days=before + size.train_days),
    )


def pairs_of(recalled: pd.DataFrame, memory: Memory, users: Numbers, number: dict[str, int]) -> pd.DataFrame:
    """Recalled pairs (request_id, user_id, item_id, probability, dt) with what was shown and clicked."""
    shown = memory.frame("raw_impressions")[["request_id", "item_id", "position", "clicked", "is_random"]]
    joined = recalled.merge(shown, on=["request_id", "item_id"], how="left", validate="one_to_one")
    random_requests = set(shown.loc[shown["is_random"], "request_id"])
    return pd.DataFrame(
        {
            "request": joined["request_id"].astype("category").cat.codes.astype(np.int64),
            "user": users(joined["user_id"]),
            "item": joined["item_id"].map(number).astype(np.int64),
            "probability": joined["probability"],
            "is_exposed": joined["clicked"].notna(),
            "is_random": joined["request_id"].isin(random_requests),
            "clicked": joined["clicked"].fillna(0).astype(np.float64),
            "position": joined["position"].fillna(-1).astype(np.int64),
            "dt": joined["dt"],
        }
    )


def events_of(memory: Memory, users: Numbers, number: dict[str, int]) -> pd.DataFrame:
    """Positives: interactions and clicks, each event once, by user and time."""
    columns = ["user_id", "item_id", "event_time", "dt"]
    clicks = memory.frame("raw_impressions")
    events = pd.concat([memory.frame("raw_interactions")[columns], clicks.loc[clicks["clicked"] == 1, columns]])
    events = events.drop_duplicates(["user_id", "item_id", "event_time"])
    events = events.sort_values(["user_id", "event_time", "item_id"])
    return pd.DataFrame({"user": users(events["user_id"]), "item": events["item_id"].map(number), "dt": events["dt"]})
