"""The semi-synthetic log: real users, items, texts and purchases; requests, recall, exposure and clicks are simulated.

There are no true click probabilities. In their place stands what really happened: 1 for the recalled item that the
user took next after the request, 0 for all others. Clicks, which training and calibration see, are a dial: the share
`wishes` of them is drawn by how near the shown item is to what the user really took afterwards, the rest follows the
import's rates per recall channel, which say little of what users wanted.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache

import numpy as np
import pandas as pd
import pyarrow as pa

from gpl_core.labels.controls import located, rank_logits
from gpl_core.simulation.review_files import Reviews, read_reviews
from gpl_core.simulation.reviews import ImportSettings, generate
from tests.bench.quality.data import SHARED
from tests.bench.simulation.log import Log, Memory, Size, events_of, pairs_of
from tests.bench.simulation.world import World, derive, encode

_WISHES = 3  # purchases ahead that a click may follow
_NEXT = np.timedelta64(20, "m")  # the import puts a request at most so long before its purchase


def make_semi_synthetic(size: Size, seed: int, kind: str) -> World:
    """The world of the Amazon Industrial tables; `seed` decides requests and models. kind: wishes-<share>."""
    return derive(semi_synthetic_log(size, seed, float(kind.removeprefix("wishes-"))), _vectors(), size, seed)


def semi_synthetic_log(size: Size, seed: int, wishes: float = 0.0) -> Log:
    """Real purchases with requests around them; wishes: share of the impressions whose click follows them."""
    reviews = _reviews()
    settings = ImportSettings(
        lead_days=size.past_days + size.calibration_days, feed_days=size.train_days, evaluation_days=2, seed=seed,
        candidates_per_request=size.candidates, exposed_per_request=size.exposed, random_share=size.random_share,
        requests_per_user_day=0.6,
    )  # fmt: skip
    memory = Memory()
    generate(reviews, settings, memory.write)
    _follow_wishes(memory, wishes, np.random.default_rng([seed, 31]))
    items = memory.frame("raw_items")
    number = {item: n for n, item in enumerate(items["item_id"])}
    user_number = {user.user_id: n for n, user in enumerate(reviews.users)}

    def users(ids: pd.Series) -> pd.Series:
        return ids.map(user_number)

    first = settings.start_date
    return Log(
        pairs_of(_recalled(memory), memory, users, number),
        events_of(memory, users, number),
        items.assign(dt=pd.to_datetime(items["updated_at"]).dt.date),
        len(reviews.users),
        first - timedelta(days=size.calibration_days),
        first,
        first + timedelta(days=size.train_days),
    )


def _follow_wishes(memory: Memory, share: float, rng: np.random.Generator) -> None:
    """Draw the clicks of a share of the impressions by nearness to the user's next purchases; the rate stays."""
    shown = memory.frame("raw_impressions")
    taken = memory.frame("raw_interactions").sort_values("event_time")
    row_of = {item.item_id: n for n, item in enumerate(_reviews().items)}
    later = {user: (group["event_time"].to_numpy(), group["item_id"].map(row_of).to_numpy())
             for user, group in taken.groupby("user_id")}  # fmt: skip
    near = np.full(len(shown), np.nan)
    for n, (user, item, time) in enumerate(zip(shown["user_id"], shown["item_id"], shown["event_time"].to_numpy())):
        if user in later and len(wished := later[user][1][later[user][0] > time][:_WISHES]):
            near[n] = (_vectors()[wished] @ _vectors()[row_of[item]]).max()
    known = np.isfinite(near)
    probability = np.zeros(len(shown))
    wanted = rank_logits(near[known], np.zeros(known.sum(), int))
    probability[known] = located(1.5 * wanted, float(shown.loc[known, "clicked"].mean()), np.ones(known.sum()))
    drawn = known & (rng.random(len(shown)) < share)
    clicked = np.where(drawn, rng.random(len(shown)) < probability, shown["clicked"] == 1)
    table = pa.concat_tables(memory.rows["raw_impressions"])
    place = table.schema.get_field_index("clicked")
    memory.rows["raw_impressions"] = [
        table.set_column(place, table.schema.field(place), pa.array(clicked.astype(np.int32)))
    ]


def _recalled(memory: Memory) -> pd.DataFrame:
    """Distinct recalled pairs; probability: 1.0 for the item that was really taken next."""
    columns = ["request_id", "item_id", "user_id", "event_time", "dt"]
    recalled = memory.frame("raw_candidates")[columns].drop_duplicates(["request_id", "item_id"])
    taken = memory.frame("raw_interactions")[["user_id", "item_id", "event_time", "dt"]]
    both = recalled.merge(taken, on=["user_id", "item_id", "dt"], suffixes=("", "_taken"))
    wait = both["event_time_taken"] - both["event_time"]
    both = both[(wait >= np.timedelta64(0)) & (wait <= _NEXT)]
    bought = pd.MultiIndex.from_frame(both[["request_id", "item_id"]])
    here = pd.MultiIndex.from_frame(recalled[["request_id", "item_id"]])
    return recalled.assign(probability=here.isin(bought).astype(np.float64))


@cache
def _reviews() -> Reviews:
    return read_reviews(SHARED / "items.jsonl.gz", SHARED / "sequences.jsonl.gz")


@cache
def _vectors() -> np.ndarray:
    """MiniLM vectors of the items, the same for every seed of a process."""
    return encode(pd.DataFrame([vars(item) for item in _reviews().items]))
