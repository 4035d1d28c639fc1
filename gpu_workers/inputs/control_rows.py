"""Control labels for a sample of the feed's unexposed rows, looked up in the tables that a platform has anyway."""

from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from gpl_core.graph.step_run import StepContext
from gpl_core.labels.controls import CONTROLS, control_labels
from gpl_core.labels.fitting import click_prior
from gpu_workers.inputs.embeddings import digests
from gpu_workers.inputs.feed import read_batches
from gpu_workers.inputs.shuffled_rows import Rows, ShuffledRows, mixed

EVEN = "even"
"""The field of rows that holds the weight of every control label: 1."""
_PAIR = np.dtype([("shuffle_key", "<i8"), ("user", "<u8"), ("item_index", "<i8"), ("day", "<i8")])

Keyed = Iterable[tuple[np.ndarray, np.ndarray]]
"""(keys uint64 [m], values [m x k]) part by part."""


def with_controls(context: StepContext, unexposed: ShuffledRows, folder: Path) -> ShuffledRows:
    """Rows with a field per control beside their own label: all of them, or a random sample that fits into memory.

    folder: where to keep them, not there yet.
    """
    rows = unexposed.bucket(0)
    kind = np.dtype([*unexposed.kind.descr, *((name, "<f4") for name in (*CONTROLS, EVEN))])
    out = np.zeros(len(rows), kind)
    for name in rows.dtype.names or ():
        out[name] = rows[name]
    out[EVEN] = 1.0
    for name, labels in _labels(context, rows).items():
        out[name] = labels
    made = ShuffledRows(folder, kind, len(rows), max(1, len(rows)))
    made.add(out)
    return made


def _labels(context: StepContext, rows: Rows) -> dict[str, np.ndarray]:
    pairs = _pairs_of(context, rows["shuffle_key"])
    found = np.zeros((len(rows), 4))  # positives, history_similarity, user's clicks and impressions
    for day in _window(context):
        mine = pairs["day"] == day.toordinal()
        users, index = pairs["user"][mine], pairs["item_index"][mine]
        found[mine, :1] = look_up(index.view(np.uint64), _positives(context, day), 1)
        found[mine, 1:2] = look_up(_key(users, index), _similarities(context, day), 1)
        found[mine, 2:] = look_up(users, _user_counts(context, day), 2)
    rate, strength = click_prior(counts for _, counts in _user_counts(context, context.run_date))
    positives, similarity, user_clicks, user_impressions = found.T
    calibrator = context.config.labels.calibrator
    return control_labels(
        rows["target"].astype(np.float64), pairs["user"], positives=positives, history_similarity=similarity,
        user_clicks=user_clicks, user_impressions=user_impressions, rate=rate, strength=strength, days=pairs["day"],
        candidates=1.0 / rows["sampling_probability"].astype(np.float64),
        spread=calibrator.spread, by_user=calibrator.kind == "quantile" and calibrator.across_users == "user_rate",
    )  # fmt: skip


def look_up(wanted: np.ndarray, parts: Keyed, width: int) -> np.ndarray:
    """Values [n x width] of the keys `wanted` (uint64 [n], repeated or not); 0 where a key is not found."""
    keys, place = np.unique(wanted, return_inverse=True)
    out = np.zeros((len(keys), width))
    for found, values in parts:
        at = np.searchsorted(keys, found)
        there = at < len(keys)
        there[there] = keys[at[there]] == found[there]
        out[at[there]] = values[there]
    return out[place]


def _window(context: StepContext) -> list[date]:
    days = context.config.prerank.train_days
    return [context.run_date - timedelta(days=n) for n in range(days)]


def _pairs_of(context: StepContext, shuffle_key: np.ndarray) -> Rows:
    """User digest, item and day of the feed's rows with these keys, in their order."""
    order = np.argsort(shuffle_key)
    keys, out = shuffle_key[order], np.zeros(len(shuffle_key), _PAIR)
    for day in _window(context):
        for batch in _slice(context, "training_feed", day, "shuffle_key", "user_id", "item_index", "is_exposed"):
            at = np.searchsorted(keys, batch["shuffle_key"]).clip(max=max(0, len(keys) - 1))
            there = ~batch["is_exposed"] & (keys[at] == batch["shuffle_key"]) if len(keys) else np.zeros(len(at), bool)
            to = order[at[there]]
            out["user"][to] = digests(batch["user_id"][there])
            out["item_index"][to], out["day"][to] = batch["item_index"][there], day.toordinal()
    return out


def _positives(context: StepContext, day: date) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in _slice(context, "item_stats", day, "item_index", "positives"):
        yield batch["item_index"].astype(np.uint64), batch["positives"][:, None].astype(np.float64)


def _similarities(context: StepContext, day: date) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    columns = ("user_id", "item_index", "source", "history_similarity")
    for batch in _slice(context, "pseudo_labels", day, *columns):
        ours = batch["source"] == "unexposed"
        keys = _key(digests(batch["user_id"][ours]), batch["item_index"][ours])
        yield keys, batch["history_similarity"][ours][:, None]


def _user_counts(context: StepContext, day: date) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in _slice(context, "user_stats", day, "user_id", "clicks", "impressions"):
        yield digests(batch["user_id"]), np.stack([batch["clicks"], batch["impressions"]], axis=1).astype(np.float64)


def _key(users: np.ndarray, index: np.ndarray) -> np.ndarray:
    return mixed(users ^ mixed(index.astype(np.uint64)))


def _slice(context: StepContext, table: str, day: date, *columns: str) -> Iterator[dict[str, np.ndarray]]:
    snapshot = context.snapshot(table)
    yield from read_batches(snapshot, snapshot.select(start=day, end=day), columns)
