"""`simulate`: a marketplace whose true click probabilities are known, written as raw tables.

Users come in batches of fixed size, each moved through all days before the next begins, so that memory does not grow
with the number of users. Every random number comes from a stream keyed by (seed, purpose, day, batch).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import pyarrow as pa

from gpl_core.contracts.raw_values import midnight
from gpl_core.grouping import ranges
from gpl_core.labels.calibration import sigmoid
from gpl_core.lakehouse.lake import Lake
from gpl_core.simulation.item_world import ItemWorld, Taste, item_id, item_text, make_items, make_taste
from gpl_core.simulation.raw_tables import Outcome, Write, generator_mark, write_raw_tables
from gpl_core.simulation.recall import LoggingPolicy, Observed, expose, observe, ranker_noise, recall, standardized
from gpl_core.simulation.rendering import render
from gpl_core.simulation.rng import rounded, stream
from gpl_core.simulation.rows import DAY, Requests, examination, item_table, timestamps, write_requests
from gpl_core.simulation.simulation_settings import SimulationSettings
from gpl_core.simulation.topics import topics
from gpl_core.simulation.users import Shoppers, click_logits, drift, find_intercept, make_shoppers, organic, user_id

TABLES = ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions", "truth")
_PANEL_BATCHES = 8  # batches whose warm-up gives the platform's counts: bounds memory
_CONVERSION = 0.08  # share of clicks that end in a purchase
_KINDS = np.array(["click", "cart", "purchase"])


@dataclass(frozen=True)
class Market:
    """What all batches share: where rows go, the settings, the simulated world and what the platform knows of it."""

    write: Write
    settings: SimulationSettings
    world: ItemWorld
    taste: Taste
    observed: Observed
    intercept: float  # of the true click logits
    item_ids: pa.Array


def simulate(settings: SimulationSettings, lake: Lake, *, force: bool = False) -> Outcome:
    """Write raw_items, raw_impressions, raw_candidates, raw_interactions and truth; same settings, same bytes.

    Tables already made with these settings stay as they are (`Outcome.unchanged`). Errors as of `write_raw_tables`.
    """
    details = {**asdict(settings), "behavior": asdict(settings.rules), "start_date": settings.start_date.isoformat()}
    mark = generator_mark("simulate", settings.fingerprint(), details)
    return write_raw_tables(lake, TABLES, partial(generate, settings), mark, "simulated", force=force)


def generate(settings: SimulationSettings, write: Write) -> None:
    """Make all rows of the simulated tables and `write` them, batch by batch."""
    taste = make_taste(settings.seed)
    world = make_items(settings, taste)
    for rows in item_rows(settings, world):
        write("raw_items", None, rows)
    market = Market(
        write=write,
        settings=settings,
        world=world,
        taste=taste,
        observed=observe_panel(settings, world, taste),
        intercept=find_intercept(make_shoppers(settings, taste, 0), world, settings),
        item_ids=pa.array([item_id(i) for i in range(world.size)], pa.string()),
    )
    for batch in range(batches(settings)):
        shoppers = make_shoppers(settings, taste, batch)
        for day in range(-settings.warmup_days, settings.days):
            _one_day(market, shoppers, day, batch)


def batches(settings: SimulationSettings) -> int:
    """Number of user batches."""
    return -(-settings.users // settings.batch_users)


def observe_panel(settings: SimulationSettings, world: ItemWorld, taste: Taste) -> Observed:
    """What the platform knows when the request days begin: words, and counts from the warm-up of a panel.

    The panel is the first eight user batches, which bounds memory. New items have no counts.
    """
    users, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for batch in range(min(batches(settings), _PANEL_BATCHES)):
        shoppers = make_shoppers(settings, taste, batch)
        for day in range(-settings.warmup_days, 0):
            drift(shoppers, settings.rules, taste, stream(settings.seed, "drift", day, batch))
            user, item = organic(shoppers, world, taste, settings, day, stream(settings.seed, "organic", day, batch))
            shoppers.remember(user, item)
            users.append(user + shoppers.first)
            items.append(item)
    texts = (item_text(world, n) for n in range(world.size))
    titles = [f"{text.title} {text.category}" for text in texts]
    departments = np.array([t.department for t in topics()])[world.topic]
    return observe(titles, departments, np.concatenate(users), np.concatenate(items))


def _one_day(market: Market, shoppers: Shoppers, day: int, batch: int) -> None:
    """One night's drift, then the day's requests, then what users did elsewhere that day."""
    settings, world, taste = market.settings, market.world, market.taste
    dt = settings.start_date + timedelta(days=day)
    drift(shoppers, settings.rules, taste, stream(settings.seed, "drift", day, batch))
    bought = list(_requests(market, shoppers, day, batch)) if day >= 0 else []
    user, item = organic(shoppers, world, taste, settings, day, stream(settings.seed, "organic", day, batch))
    rng = stream(settings.seed, "times", day, batch)
    times = rng.integers(0, DAY, len(user))
    times = midnight(dt) + times[np.lexsort((times, user))]  # within a user, the order of events is the order of time
    bought.append((user, item, times, _KINDS[rng.choice(3, len(user), p=[0.5, 0.2, 0.3])]))
    user, item, times, kind = (np.concatenate(column) for column in zip(*bought))
    shoppers.remember(bought[-1][0], bought[-1][1])
    rows = {
        "user_id": pa.array([user_id(shoppers.first + u) for u in user.tolist()], pa.string()),
        "item_id": market.item_ids.take(pa.array(item)),
        "event_time": timestamps(times),
        "kind": pa.array(kind.tolist(), pa.string()),
    }
    market.write("raw_interactions", dt, pa.table(rows))


def _requests(
    market: Market, shoppers: Shoppers, day: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Write the day's requests; yields the purchases (user, item, time, kind) that clicks ended in.

    A user's requests of a day are served one after the other, so that a click is history for the next request.
    """
    settings, world, observed = market.settings, market.world, market.observed
    rules, rng = settings.rules, stream(settings.seed, "requests", day, batch)
    dt = settings.start_date + timedelta(days=day)
    start = midnight(dt)
    policy = LoggingPolicy(
        rules.policy_popularity, rules.policy_history, rules.policy_noise, settings.exposed_per_request,
        settings.random_share,
    )  # fmt: skip
    count = rng.poisson(np.minimum(settings.requests_per_user_day * shoppers.activity, 30.0))
    owner = np.repeat(np.arange(shoppers.size), count)
    slot = ranges(count)
    times = (DAY * rounded(rng.beta(3, 2, len(owner)))).astype(np.int64)
    times = start + times[np.lexsort((times, owner))]
    for step in range(int(count.max(initial=0))):
        chosen = np.flatnonzero(slot == step)
        user, when = owner[chosen], times[chosen]
        history = shoppers.history[user]
        found = recall(
            history, observed, world.released(day), settings.channel_shares, settings.candidates_per_request, rng
        )
        logits = click_logits(shoppers, user, found.item, world, rules)
        probability = rounded(sigmoid(logits + market.intercept), 24)
        noise = ranker_noise(settings.seed, user + shoppers.first, np.maximum(found.item, 0))
        if knows := rules.policy_insight:
            noise = np.sqrt(1 - knows**2) * noise + knows * standardized(logits, found.item >= 0)
        shown = expose(policy, found.item, history, observed, noise, rng)

        looked_at = examination(shown.position, rules.position_decay)
        clicked = rng.random(len(shown.row)) < probability[shown.row, shown.column] * looked_at
        requests = Requests(
            dt,
            pa.array([f"r{dt:%Y%m%d}-{shoppers.first + u:07d}-{step:02d}" for u in user.tolist()], pa.string()),
            pa.array([user_id(shoppers.first + u) for u in user.tolist()], pa.string()),
            when,
        )
        write_requests(market.write, requests, market.item_ids, found, shown, clicked)
        exposed = np.zeros(found.item.shape, bool)
        exposed[shown.row, shown.column] = True
        r, c = np.nonzero(found.item >= 0)
        truth = {
            **requests.keys(r, found.item[r, c], market.item_ids, time=False),
            "true_probability": pa.array(probability[r, c]),
            "is_exposed": pa.array(exposed[r, c]),
        }
        market.write("truth", dt, pa.table(truth))

        hit = np.flatnonzero(clicked)  # by request, then position: the order in which a user reads the list
        shoppers.remember(user[shown.row[hit]], shown.item[hit])
        hit = hit[rng.random(len(hit)) < _CONVERSION]
        buyer = shown.row[hit]
        later = when[buyer] + rng.integers(60_000_000, 1_800_000_000, len(hit))
        # A purchase belongs to the day of its click, so it is at midnight at the latest.
        later = np.minimum(later, start + DAY - 1 - np.arange(len(hit)))
        yield user[buyer], shown.item[hit], later, np.full(len(hit), "purchase")


def item_rows(settings: SimulationSettings, world: ItemWorld) -> Iterator[pa.Table]:
    """raw_items in chunks: the initial catalog, then per request day the new and the reworded items.

    New items and new wordings of day D are dated to the last two hours of D - 1.
    """
    rng = stream(settings.seed, "item_times")
    # Before the first event of the warm-up.
    first_event = midnight(settings.start_date - timedelta(days=settings.warmup_days))
    for low in range(0, world.initial, 4096):
        numbers = np.arange(low, min(low + 4096, world.initial))
        yield _item_table(settings, world, numbers, first_event - rng.integers(1, 365 * DAY, len(numbers)), False)
    for day in range(settings.days):
        evening = midnight(settings.start_date + timedelta(days=day))
        new = np.arange(world.released(day - 1), world.released(day))
        if len(new):
            yield _item_table(settings, world, new, evening - rng.integers(1, DAY // 12, len(new)), False)
        if day:
            wanted = min(settings.updated_items_per_day, world.initial)
            reworded = np.sort(rng.choice(world.initial, wanted, replace=False))
            yield _item_table(settings, world, reworded, evening - rng.integers(1, DAY // 12, wanted), True)


def _item_table(
    settings: SimulationSettings, world: ItemWorld, numbers: np.ndarray, updated: np.ndarray, revised: bool
) -> pa.Table:
    def picture(n: int) -> bytes | None:
        topic, rng = int(world.topic[n]), stream(settings.seed, "picture", 0, n)
        looks = topics()[topic].department, topic, int(world.product[n]), int(world.material[n])
        return render(*looks, rng, settings.picture_pixels) if settings.pictures else None

    own = numbers.tolist()
    return item_table([item_text(world, n, revised) for n in own], updated, [picture(n) for n in own])
