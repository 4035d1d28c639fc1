"""`import_reviews`: real purchases as raw tables, with simulated requests, recall, exposure and clicks around them.

Real: users, items, texts, which items a user took, their order, and the split. Simulated: every time, and all of
raw_impressions and raw_candidates. Tables and figures made from them are called semi-synthetic. True click
probabilities are unknown, so there is no truth table.

Dates, with S = `start_date`:

| events | dates | role |
|---|---|---|
| train | [S - 31, S - 10) | history |
| valid | [S - 10, S) | history; requests begin on S - 2, so that a calibrator can be fitted |
| test | [S, S + 4) | S, S + 1, S + 2 are feed days; S + 3 is for evaluation |

A user's k-th of n test events (k from 0) falls at S + 4 (k + h) / n days, where h in [0, 1) is a hash of the user:
order is kept, the earlier test events of each user fall in the feed days and the rest on the evaluation day, and the
events of all users spread evenly over the four days.
"""

import hashlib
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from gpl_core.contracts.raw_values import midnight
from gpl_core.errors import UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.simulation.raw_tables import Outcome, Write, generator_mark, write_raw_tables
from gpl_core.simulation.recall import (
    CHANNELS,
    LoggingPolicy,
    Observed,
    Recalled,
    add_candidates,
    expose,
    observe,
    ranker_noise,
    recall,
)
from gpl_core.simulation.review_files import SPLITS, Reviews, read_reviews
from gpl_core.simulation.rng import rounded, stream
from gpl_core.simulation.rows import DAY, Requests, examination, item_table, timestamps, write_requests
from gpl_core.simulation.simulation_settings import fingerprint_of
from gpl_core.simulation.users import HISTORY

TABLES = ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions")
PROVENANCE = (
    "semi-synthetic (real purchases and texts; synthetic times; simulated requests, recall, exposure and clicks)"
)
_TWENTY_MINUTES = 20 * 60_000_000
_ByChannel = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ImportSettings:
    """All that decides the bytes of an import, apart from the files.

    On days with requests, every real event has one shortly before it.
    """

    start_date: date = date(2026, 1, 1)  # first feed day
    train_days: int = 21  # lengths of the history windows before it
    valid_days: int = 10
    lead_days: int = 2  # the last ones before it, which have requests
    feed_days: int = 3  # and evaluation_days: what the test events are spread over
    evaluation_days: int = 1
    candidates_per_request: int = 60
    exposed_per_request: int = 10
    requests_per_user_day: float = 0.3  # without a purchase, on top: mean of a Poisson number
    random_share: float = 0.02
    bought_rate: float = 0.8  # probability that a user who looks at the item really taken next clicks it
    # The same for any other candidate, by recall channel: the highest where several found it.
    other_rates: _ByChannel = (("content", 0.05), ("collaborative", 0.05), ("popular", 0.03), ("random", 0.01))
    channel_shares: _ByChannel = (("content", 0.40), ("collaborative", 0.25), ("popular", 0.15), ("random", 0.20))
    position_decay: float = 0.15
    batch_requests: int = 1024
    seed: int = 7

    @property
    def test_days(self) -> int:
        """Days that hold the test split: feed days, then evaluation days."""
        return self.feed_days + self.evaluation_days


@dataclass(frozen=True)
class Events:
    """All E real events, by user and in their order: user, item, split (0 train, 1 valid, 2 test), time in us UTC."""

    user: np.ndarray
    item: np.ndarray
    split: np.ndarray
    time: np.ndarray


def import_reviews(
    items_path: str | Path, sequences_path: str | Path, lake: Lake, settings: ImportSettings, *, force: bool = False
) -> Outcome:
    """Write raw_items, raw_interactions, raw_impressions and raw_candidates from a review data set.

    The same files and settings give the same bytes; tables already made from them stay as they are. With `force` over a
    simulated marketplace, its truth table is emptied, because it describes other requests. Errors as of `read_reviews`
    and `write_raw_tables`.
    """
    reviews = read_reviews(items_path, sequences_path)
    if settings.candidates_per_request * 2 > len(reviews.items):
        raise UsageError(
            f"{items_path}: {len(reviews.items)} items, expected at least {2 * settings.candidates_per_request}, so "
            "that recall has a choice; import a larger set"
        )
    fingerprint = fingerprint_of({**asdict(settings), "input": reviews.digest})
    names = (*TABLES, "truth") if lake.exists("truth") else TABLES
    details = {**asdict(settings), "start_date": settings.start_date.isoformat(), "input": reviews.digest}
    make = partial(generate, reviews, settings)
    mark = generator_mark("import_reviews", fingerprint, details)
    return write_raw_tables(lake, names, make, mark, PROVENANCE, force=force)


@dataclass(frozen=True)
class Purchases:
    """What all requests share: where rows go, the input, its events in time, and what the platform knows of them."""

    write: Write
    reviews: Reviews
    settings: ImportSettings
    events: Events
    observed: Observed
    item_ids: pa.Array


def generate(reviews: Reviews, settings: ImportSettings, write: Write) -> None:
    """Make all rows and `write` them; the input is held in memory, requests are made in batches."""
    events = place_events(reviews, settings)
    item_ids = pa.array([item.item_id for item in reviews.items], pa.string())
    # All items are known from the day before the first event.
    since = midnight(settings.start_date - timedelta(days=settings.train_days + settings.valid_days + 1))
    count = len(item_ids)
    write("raw_items", None, item_table(reviews.items, np.full(count, since), [None] * count))
    purchases = Purchases(write, reviews, settings, events, observe_purchases(reviews, settings, events), item_ids)
    _write_interactions(purchases)
    for day in range(-settings.lead_days, settings.test_days):
        user, time, bought = day_of_requests(reviews, settings, events, day)
        for low in range(0, len(user), settings.batch_requests):
            part = slice(low, low + settings.batch_requests)
            _write_requests(purchases, day, low, user[part], time[part], bought[part])


def place_events(reviews: Reviews, settings: ImportSettings) -> Events:
    """Give every real event its synthetic time: strictly increasing within a user, each split in its window."""
    start, width = midnight(settings.start_date), settings.test_days * DAY
    rng = stream(settings.seed, "event_times")
    split = [np.array([SPLITS.index(s) for s in u.splits], np.int64) for u in reviews.users]
    times = []
    valid = start - settings.valid_days * DAY
    windows = ((valid - settings.train_days * DAY, valid), (valid, start))
    for reviewer, splits in zip(reviews.users, split):
        parts = [_distinct(rng, *windows[s], int((splits == s).sum())) for s in (0, 1)]
        count = int((splits == 2).sum())
        offset = _unit_hash(settings.seed, reviewer.user_id)
        parts.append(start + ((np.arange(count) + offset) / max(count, 1) * width).astype(np.int64))
        times.append(np.concatenate(parts))
    user = np.repeat(np.arange(len(reviews.users)), [len(u.items) for u in reviews.users])
    item = np.array([i for u in reviews.users for i in u.items], np.int64)
    return Events(user, item, np.concatenate(split), np.concatenate(times))


def observe_purchases(reviews: Reviews, settings: ImportSettings, events: Events) -> Observed:
    """What the platform knows when requests begin: title words, and counts of the events before."""
    past = events.time < midnight(settings.start_date - timedelta(days=settings.lead_days))
    titles = [item.title for item in reviews.items]
    return observe(titles, np.zeros(len(titles), np.int64), events.user[past], events.item[past])


def day_of_requests(
    reviews: Reviews, settings: ImportSettings, events: Events, day: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The requests of day `day` (0 is the first feed day) by time: user, time, item taken next, each [R].

    Item -1: a request without a purchase. A request with one is up to twenty minutes before it, on the same day and
    after the user's previous event.
    """
    start = midnight(settings.start_date + timedelta(days=day))
    rng = stream(settings.seed, "requests", day)
    here = np.flatnonzero((events.time >= start) & (events.time < start + DAY))
    follows = (here > 0) & (events.user[here - 1] == events.user[here])
    earliest = np.where(follows, np.maximum(events.time[here - 1] + 1, start), start)
    room = np.minimum(events.time[here] - earliest, _TWENTY_MINUTES)
    before = (rng.random(len(here)) * np.maximum(room, 0)).astype(np.int64)
    count = rng.poisson(settings.requests_per_user_day, len(reviews.users))
    idle = np.repeat(np.arange(len(reviews.users)), count)
    user = np.concatenate([events.user[here], idle])
    at = (DAY * rounded(rng.beta(3, 2, len(idle)))).astype(np.int64)
    time = np.concatenate([events.time[here] - before, start + at])
    bought = np.concatenate([events.item[here], np.full(len(idle), -1)])
    order = np.lexsort((bought, user, time))
    return user[order], time[order], bought[order]


def histories(events: Events, user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """int64 [R x 50]: real positives of `user` before `time`, newest last, -1 padded on the left."""
    # Events are sorted by (user, time): a request's history is a run that ends where its time would be inserted.
    first, end = (np.searchsorted(events.user, user, side) for side in ("left", "right"))
    last = np.array([f + np.searchsorted(events.time[f:e], t) for f, e, t in zip(first, end, time)], np.int64)
    at = last[:, None] - HISTORY + np.arange(HISTORY)
    return np.where(at >= first[:, None], events.item[np.maximum(at, 0)], -1)


def _write_requests(
    purchases: Purchases, day: int, first: int, user: np.ndarray, time: np.ndarray, bought: np.ndarray
) -> None:
    reviews, settings, observed = purchases.reviews, purchases.settings, purchases.observed
    rng = stream(settings.seed, "exposure", day, first)
    dt = settings.start_date + timedelta(days=day)
    history = histories(purchases.events, user, time)
    shares = dict(settings.channel_shares)
    found = recall(history, observed, len(reviews.items), shares, settings.candidates_per_request, rng)
    # The channel of an added item must not reveal it: it is drawn by the channels' shares.
    channel = rng.choice(len(CHANNELS), len(user), p=np.array(list(shares.values())) / sum(shares.values()))
    found = add_candidates(found, bought, channel, history, observed)
    policy = LoggingPolicy(0.6, 1.0, 0.8, settings.exposed_per_request, settings.random_share)
    noise = ranker_noise(settings.seed, user, np.maximum(found.item, 0))
    shown = expose(policy, found.item, history, observed, noise, rng)
    rate = _click_rates(settings, found)[shown.row, shown.column]
    rate = np.where(shown.item == bought[shown.row], settings.bought_rate, rate)
    clicked = rng.random(len(rate)) < rate * examination(shown.position, settings.position_decay)
    requests = Requests(
        dt,
        pa.array([f"r{dt:%Y%m%d}-{first + n:07d}" for n in range(len(user))], pa.string()),
        pa.array([reviews.users[u].user_id for u in user.tolist()], pa.string()),
        time,
    )
    write_requests(purchases.write, requests, purchases.item_ids, found, shown, clicked)


def _click_rates(settings: ImportSettings, found: Recalled) -> np.ndarray:
    """[R x K]: the best rate among the channels that found each candidate; 0 where there is none."""
    rates = np.array([rate for _, rate in settings.other_rates])
    column = (found.item[found.row] == found.hit_item[:, None]).argmax(axis=1)
    best = np.zeros(found.item.shape)
    np.maximum.at(best, (found.row, column), rates[found.hit_channel])
    return best


def _write_interactions(purchases: Purchases) -> None:
    settings, events = purchases.settings, purchases.events
    user_ids = pa.array([u.user_id for u in purchases.reviews.users], pa.string())
    start = midnight(settings.start_date)
    day = (events.time - start) // DAY
    order = np.lexsort((events.user, events.time))
    for wanted in np.unique(day).tolist():
        at = order[day[order] == wanted]
        rows = {
            "user_id": user_ids.take(pa.array(events.user[at])),
            "item_id": purchases.item_ids.take(pa.array(events.item[at])),
            "event_time": timestamps(events.time[at]),
            "kind": pa.array(["purchase"] * len(at), pa.string()),
        }
        purchases.write("raw_interactions", settings.start_date + timedelta(days=wanted), pa.table(rows))


def _distinct(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """`count` distinct whole numbers of [low, high), ascending."""
    drawn = np.unique(rng.integers(low, high, count))
    while len(drawn) < count:
        drawn = np.unique(np.concatenate([drawn, rng.integers(low, high, count - len(drawn))]))
    return drawn


def _unit_hash(seed: int, text: str) -> float:
    digest = hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
