"""Inputs of the pre-ranker's towers: batches of the training feed, impressions, users' profiles."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import torch

from gpl_core.conf.sections import Prerank
from gpl_core.contracts.contract import Column
from gpl_core.errors import LineageError, MissingInputError, counted
from gpl_core.graph.step_run import StepContext
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.prerank.early_stopping import held_out
from gpl_core.prerank.features import TowerBatch, UserProfiles, item_buckets, user_buckets
from gpl_core.prerank.two_tower import TwoTower
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.embeddings import digests
from gpu_workers.inputs.feed import assign_files, read_batches, rebatch
from gpu_workers.inputs.item_tables import content_table, sids_in_force
from gpu_workers.inputs.shuffled_rows import Rows, ShuffledRows, places
from gpu_workers.ranks import Ranks

FEED_COLUMNS = (
    "request_id", "user_id", "item_index", "is_exposed", "target", "sample_weight", "sampling_probability",
    "sid_version", "model_version", "calibrator_version", "dt_copy", "shuffle_key",
)  # fmt: skip
# A row of the feed in training; `user`: the bucket of the user id.
_ROW = (
    ("shuffle_key", "<i8"), ("user", "<i8"), ("item_index", "<i4"), ("target", "<f4"), ("sample_weight", "<f4"),
    ("sampling_probability", "<f4"),
)  # fmt: skip
_MOST_HELD_OUT = 20_000
_ROWS = 8192  # scored at a time
_MOST_SHARED = 0.1  # of the users may share a row of the user table unsaid
_IMPRESSION_COLUMNS = ("request_id", "user_id", "item_index", "clicked", "is_random")


@dataclass(frozen=True)
class TowerInputs:
    """Lookups of the towers' inputs for (user, item) pairs."""

    items: ContentTable
    sids: np.ndarray  # int32 [N x L] by item_index, -1 where an item has none
    profiles: UserProfiles
    settings: Prerank
    device: torch.device

    def batch(self, bucket: np.ndarray, item_index: np.ndarray, pair: np.ndarray) -> TowerBatch:
        """Model inputs of n pairs; unknown items have neither content nor SID.

        bucket: int64 [n], `user_buckets` of the users; pair: see `pair_of`.
        """
        index = item_index.astype(np.int64)
        known = index < len(self.sids)
        sid = np.where(known[:, None], self.sids[np.where(known, index, 0)], -1).astype(np.int64)
        items = item_buckets(index, self.settings.buckets)
        columns = (bucket, self.profiles.of(bucket), items, self.items.content(index), sid, pair)
        return TowerBatch(*(torch.from_numpy(np.ascontiguousarray(c)).to(self.device) for c in columns))


@contextmanager
def tower_inputs(context: StepContext, ranks: Ranks) -> Iterator[TowerInputs]:
    """The towers' inputs for the run date; item vectors lie on the local disk while the context lasts."""
    with content_table(context, ranks) as items:
        with ranks.together():
            index, sids = sids_in_force(context.snapshot("item_sids"), context.artifact("tokenizer").version)
        profiles = load_profiles(context, ranks, items)
        table = np.full((len(items.row_of), sids.shape[1]), -1, dtype=np.int32)
        known = index < len(table)
        table[index[known]] = sids[known]
        yield TowerInputs(items, table, profiles, context.config.prerank, ranks.device)


def pair_of(batch: dict[str, np.ndarray], settings: Prerank) -> np.ndarray:
    """The pairs' own features float32 [n x F] of a batch of feed rows or impressions, by `prerank.pair_features`."""
    if not settings.pair_features:
        return np.zeros((len(batch["item_index"]), 0), dtype=np.float32)
    return np.stack([batch[name].astype(np.float32) for name in settings.pair_features], axis=1)


def passed_through(context: StepContext, table: str, names: Iterable[str]) -> Snapshot:
    """`table` at its pinned version, with the columns `names` of `feed.passthrough`."""
    kinds = context.config.feed.passthrough
    extra = tuple(Column(n, kinds[n], nullable=True, comment="feed.passthrough") for n in dict.fromkeys(names) if n)
    contract = context.contract(table).with_columns(extra)
    return context.lake.open(table, context.state.version(table), contract=contract)


class FeedRows:
    """The feed's rows of a window, read once for all variants and seeds.

    Every rank reads all of it and takes its part of each batch: the batches, and so the model, do not depend on the
    number of ranks. folder: an empty one on the local disk, for some 30 bytes per row. MissingInputError when there are
    no rows; LineageError: see `FeedCounts.add`.
    """

    def __init__(self, context: StepContext, inputs: TowerInputs, sid_version: str, folder: Path) -> None:
        self._settings = settings = inputs.settings
        feed = passed_through(context, "training_feed", settings.pair_features)
        first = context.run_date - timedelta(days=settings.train_days - 1)
        files = feed.select(start=first, end=context.run_date)
        kind = np.dtype([*_ROW, ("pair", "<f4", (len(settings.pair_features),))])
        self.counts = FeedCounts(np.zeros(len(inputs.sids), dtype=np.int64))
        self.held_out = np.empty(0, kind)
        """Exposed rows of the held-out requests; at most 20,000, chosen by hash."""
        # The column alone, first: how exposed rows are dealt out must not depend on how many others there are.
        exposed = sum(int(batch["is_exposed"].sum()) for batch in read_batches(feed, files, ["is_exposed"]))
        self.exposed = ShuffledRows(folder / "exposed", kind, exposed)
        self.unexposed = ShuffledRows(folder / "unexposed", kind, rows_in(files) - exposed)
        for batch in read_batches(feed, files, (*FEED_COLUMNS, *settings.pair_features)):
            self.counts.add(batch, sid_version, context.run_date)
            rows = np.empty(len(batch["target"]), kind)
            for name in ("shuffle_key", "item_index", "target", "sample_weight", "sampling_probability"):
                rows[name] = batch[name]
            rows["user"] = user_buckets(batch["user_id"], settings.buckets)
            rows["pair"] = pair_of(batch, settings)
            held, shown = held_out(batch["request_id"].tolist()), batch["is_exposed"]
            self.exposed.add(rows[~held & shown])
            self.unexposed.add(rows[~held & ~shown])
            apart = np.concatenate([self.held_out, rows[held & shown]])
            order = np.argsort(places(apart["shuffle_key"], 0, 0), kind="stable")
            self.held_out = apart[order[:_MOST_HELD_OUT]]
        if not self.exposed.rows + self.unexposed.rows:
            raise MissingInputError(
                f"table training_feed@{feed.version}: no rows in the {counted(settings.train_days, 'day')} up to "
                f"{context.run_date}; run training_feed, or check that the dates had requests"
            )

    @property
    def prior(self) -> float:
        """Click rate of exposed rows (mean target of unexposed ones when none is exposed), kept away from 0 and 1."""
        rows = (self.exposed if self.exposed.rows else self.unexposed).bucket(0)
        return float(np.clip(rows["target"].mean(dtype=np.float64), 1e-3, 0.5))

    def batches(self, seed: int) -> Iterator[tuple[Rows, Rows]]:
        """Without end: a batch of exposed rows, which nothing unexposed decides, and as many unexposed rows."""
        size = self._settings.batch_size
        return zip(self.exposed.batches(size, seed), self.unexposed.batches(size, seed))


@dataclass
class FeedCounts:
    """Counts of the feed rows of the window."""

    exposures: np.ndarray  # int64 [N]: exposed rows by item_index
    exposed: int = 0
    unexposed: int = 0
    other_sid_version: int = 0
    model_versions: frozenset[str] = frozenset()
    calibrator_versions: frozenset[str] = frozenset()

    def add(self, batch: dict[str, np.ndarray], sid_version: str, run_date: date) -> None:
        """Count a batch. Raises LineageError when rows of `run_date` itself carry another sid_version."""
        other = batch["sid_version"] != sid_version
        today = other & (batch["dt_copy"] == run_date.isoformat())
        if today.any():
            raise LineageError(
                f"training_feed dt={run_date}: {counted(int(today.sum()), 'row')} with sid_version "
                f"{batch['sid_version'][today][0]}, in force is {sid_version}; run training_feed again for this date"
            )
        # Older slices may be of an older tokenizer: SIDs are looked up by item, so their rows stay usable.
        self.other_sid_version += int(other.sum())
        exposed = batch["is_exposed"]
        index = batch["item_index"][exposed]
        self.exposures += np.bincount(index[index < len(self.exposures)], minlength=len(self.exposures))
        self.exposed += int(exposed.sum())
        self.unexposed += int((~exposed).sum())
        self.model_versions |= frozenset(batch["model_version"][~exposed].tolist())
        self.calibrator_versions |= frozenset(batch["calibrator_version"][~exposed].tolist())


def load_profiles(context: StepContext, ranks: Ranks, items: ContentTable) -> UserProfiles:
    """Profiles from user_sequences as of the first day with training rows, from its last slice of all users on.

    Later slices are not read: they contain the very clicks that label the training rows. Each rank reads its share of a
    date, and the ranks' sums are added. Without the table all profiles are 0.
    """
    config = context.config
    profiles = UserProfiles(config.prerank.buckets, items.vectors.shape[1])
    if not context.has("user_sequences"):
        return profiles
    snapshot, feed = context.snapshot("user_sequences"), context.snapshot("training_feed")
    window = context.run_date - timedelta(days=config.prerank.train_days - 1)
    last = min((d for d in feed.slices() if window <= d <= context.run_date), default=window)
    first = last - timedelta(days=config.sequences.snapshot_every - 1)
    shared = 0.0
    for day in [d for d in snapshot.slices() if first <= d <= last]:
        with ranks.together():
            share = assign_files(snapshot.select(start=day, end=day), ranks.size)[ranks.rank]
            for batch in read_batches(snapshot, share, ["user_id", "item_index"]):
                profiles.add(batch["user_id"], items.rows(batch["item_index"]), items.vectors)
        shared = max(shared, profiles.close_slice(ranks.summed))
    if shared > _MOST_SHARED:
        context.warn(
            f"{shared:.0%} of the users share a row of the user table with others, and so one profile: set "
            f"prerank.buckets ({config.prerank.buckets:,}) to about four times the number of users"
        )
    return profiles


def score_rows(model: torch.nn.Module, inputs: TowerInputs, rows: Rows) -> np.ndarray:
    """Logits float32 [n] of feed rows."""
    parts = [np.empty(0, np.float32)]
    with torch.no_grad():
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            parts.append(model(inputs.batch(some["user"], some["item_index"], some["pair"])).float().cpu().numpy())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Impressions:
    """One day's impressions in the form the metrics take; users and requests as 64-bit digests."""

    user: np.ndarray
    request: np.ndarray
    item_index: np.ndarray
    clicked: np.ndarray
    is_random: np.ndarray
    propensity: np.ndarray  # float64: the logged probability of being shown; NaN where the platform does not log it
    scores: dict[tuple[str, int], np.ndarray]  # (variant, seed) -> logits float32 [n]


def score_impressions(
    snapshot: Snapshot, files: Sequence[DataFile], inputs: TowerInputs, models: Mapping[tuple[str, int], TwoTower]
) -> Impressions:
    """Scores of every model for every impression in `files`."""
    kinds = {
        "user": np.uint64, "request": np.uint64, "item_index": np.int64, "clicked": np.float32, "is_random": bool,
        "propensity": np.float64,
    }  # fmt: skip
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in kinds.items()}
    scores: dict[tuple[str, int], list[np.ndarray]] = {key: [np.empty(0, np.float32)] for key in models}
    given = inputs.settings.propensity
    columns = dict.fromkeys([*_IMPRESSION_COLUMNS, *inputs.settings.pair_features, *([given] if given else [])])
    for batch in rebatch(read_batches(snapshot, files, list(columns)), _ROWS):
        for name in ("user", "request"):
            parts[name].append(digests(batch[f"{name}_id"]))
        for name in ("item_index", "clicked", "is_random"):
            parts[name].append(batch[name].astype(kinds[name]))
        parts["propensity"].append(batch[given].astype(np.float64) if given else np.full(len(batch["clicked"]), np.nan))
        bucket = user_buckets(batch["user_id"], inputs.settings.buckets)
        tower = inputs.batch(bucket, batch["item_index"], pair_of(batch, inputs.settings))
        with torch.no_grad():
            for key, model in models.items():
                scores[key].append(model(tower).float().cpu().numpy())
    joined = {name: np.concatenate(held) for name, held in parts.items()}
    return Impressions(**joined, scores={key: np.concatenate(held) for key, held in scores.items()})
