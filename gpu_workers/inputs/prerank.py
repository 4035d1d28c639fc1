"""Inputs of the pre-ranker's towers: batches of the training feed, impressions, users' profiles."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import torch
import torch.distributed as dist

from gpl_core.conf.sections import Prerank
from gpl_core.contracts.contract import Column
from gpl_core.errors import LineageError
from gpl_core.graph.step_run import StepContext
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.prerank.early_stopping import held_out
from gpl_core.prerank.features import TowerBatch, UserProfiles, item_buckets, user_buckets
from gpl_core.prerank.two_tower import TwoTower
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.embeddings import digests
from gpu_workers.inputs.feed import assign_files, read_batches, rebatch
from gpu_workers.ranks import Ranks

FEED_COLUMNS = (
    "request_id", "user_id", "item_index", "is_exposed", "target", "sample_weight", "sid_version", "model_version",
    "calibrator_version", "dt_copy",
)  # fmt: skip
_MOST_HELD_OUT = 20_000
_ROWS = 8192  # scored at a time
_IMPRESSION_COLUMNS = ("request_id", "user_id", "item_index", "clicked", "is_random")


@dataclass(frozen=True)
class TowerInputs:
    """Lookups of the towers' inputs for (user, item) pairs."""

    items: ContentTable
    sids: np.ndarray  # int32 [N x L] by item_index, -1 where an item has none
    profiles: UserProfiles
    settings: Prerank
    device: torch.device

    def batch(self, user_ids: Sequence[str] | np.ndarray, item_index: np.ndarray, pair: np.ndarray) -> TowerBatch:
        """Model inputs of n pairs; unknown items have neither content nor SID. pair: see `pair_of`."""
        bucket = user_buckets(user_ids, self.settings.buckets)
        index = item_index.astype(np.int64)
        known = index < len(self.sids)
        sid = np.where(known[:, None], self.sids[np.where(known, index, 0)], -1).astype(np.int64)
        items = item_buckets(index, self.settings.buckets)
        columns = (bucket, self.profiles.of(bucket), items, self.items.content(index), sid, pair)
        return TowerBatch(*(torch.from_numpy(np.ascontiguousarray(c)).to(self.device) for c in columns))


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


def feed_batches(
    snapshot: Snapshot, files: Sequence[DataFile], rows: int, settings: Prerank, *, seed: int, epoch: int
) -> Iterator[dict[str, np.ndarray]]:
    """The feed in batches of `rows` rows (the last one shorter), in an order that (seed, epoch) decide.

    Every rank reads all of it and takes its part of each batch: the batches, and so the model, do not depend on the
    number of ranks.
    """
    order = assign_files(files, 1, seed=seed, epoch=epoch)[0].files
    columns = (*FEED_COLUMNS, *settings.pair_features)
    yield from rebatch(read_batches(snapshot, order, columns, seed=seed * 10_007 + epoch), rows)


@dataclass
class FeedCounts:
    """Counts of the feed rows seen in the first epoch."""

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
                f"training_feed dt={run_date}: {int(today.sum())} row(s) carry sid_version "
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
    """Profiles from user_sequences as of the first training day, from every slice since the last snapshot of all users.

    Later slices are not read: they contain the very clicks that label the training rows. Each rank reads its share of a
    date, and the ranks' sums are added. Without the table all profiles are 0.
    """
    profiles = UserProfiles(context.config.prerank.buckets, items.vectors.shape[1])
    if not context.has("user_sequences"):
        return profiles
    snapshot = context.snapshot("user_sequences")
    last = context.run_date - timedelta(days=context.config.prerank.train_days - 1)
    first = last - timedelta(days=context.config.sequences.snapshot_every - 1)
    for day in [d for d in snapshot.slices() if first <= d <= last]:
        with ranks.together():
            share = assign_files(snapshot.select(start=day, end=day), ranks.size)[ranks.rank]
            for batch in read_batches(snapshot, share.files, ["user_id", "item_index"]):
                profiles.add(batch["user_id"], items.rows(batch["item_index"]), items.vectors)
        profiles.close_slice(lambda part: _added(part, ranks))
    return profiles


class HeldOut:
    """Exposed feed rows of the held-out requests, for early stopping; about 20,000 of them.

    Every rank reads the whole feed, so that all ranks have the same rows and decide alike without communication.
    """

    def __init__(self, inputs: TowerInputs, feed: Iterable[dict[str, np.ndarray]]) -> None:
        """Read batches of the feed until there are enough rows."""
        self._inputs = inputs
        parts, rows = [], 0
        for batch in feed:
            chosen = held_out(batch["request_id"].tolist()) & batch["is_exposed"]
            parts.append({name: values[chosen] for name, values in batch.items()})
            rows += int(chosen.sum())
            if rows >= _MOST_HELD_OUT:
                break
        self._rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]} if parts else {}

    @property
    def clicks(self) -> np.ndarray:
        """float32 [n]."""
        return self._rows["target"]

    def score(self, model: torch.nn.Module) -> np.ndarray:
        """Logits float32 [n] of the collected rows."""
        users, items = self._rows["user_id"], self._rows["item_index"]
        pairs = pair_of(self._rows, self._inputs.settings)
        parts = [np.empty(0, np.float32)]
        with torch.no_grad():
            for start in range(0, len(items), _ROWS):
                some = slice(start, start + _ROWS)
                batch = self._inputs.batch(users[some], items[some], pairs[some])
                parts.append(model(batch).float().cpu().numpy())
        return np.concatenate(parts)


def without_held_out(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of `batch` to train on."""
    out = held_out(batch["request_id"].tolist())
    return {name: values[~out] for name, values in batch.items()}


@dataclass(frozen=True)
class Impressions:
    """One day's impressions in the form the metrics take; users and requests as 64-bit digests."""

    user: np.ndarray
    request: np.ndarray
    item_index: np.ndarray
    clicked: np.ndarray
    is_random: np.ndarray
    propensity: np.ndarray  # float64: the logged probability of being shown; NaN where the platform does not log it
    scores: dict[str, np.ndarray]  # variant -> logits float32 [n]


def score_impressions(
    snapshot: Snapshot, files: Sequence[DataFile], inputs: TowerInputs, variants: Mapping[str, TwoTower]
) -> Impressions:
    """Scores of every variant for every impression in `files`."""
    kinds = {
        "user": np.uint64, "request": np.uint64, "item_index": np.int64, "clicked": np.float32, "is_random": bool,
        "propensity": np.float64,
    }  # fmt: skip
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in kinds.items()}
    scores: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] for name in variants}
    given = inputs.settings.propensity
    columns = dict.fromkeys([*_IMPRESSION_COLUMNS, *inputs.settings.pair_features, *([given] if given else [])])
    for batch in rebatch(read_batches(snapshot, files, list(columns)), _ROWS):
        for name in ("user", "request"):
            parts[name].append(digests(batch[f"{name}_id"]))
        for name in ("item_index", "clicked", "is_random"):
            parts[name].append(batch[name].astype(kinds[name]))
        parts["propensity"].append(batch[given].astype(np.float64) if given else np.full(len(batch["clicked"]), np.nan))
        tower = inputs.batch(batch["user_id"], batch["item_index"], pair_of(batch, inputs.settings))
        with torch.no_grad():
            for name, model in variants.items():
                scores[name].append(model(tower).float().cpu().numpy())
    joined = {name: np.concatenate(held) for name, held in parts.items()}
    return Impressions(**joined, scores={name: np.concatenate(held) for name, held in scores.items()})


def _added(values: np.ndarray, ranks: Ranks) -> np.ndarray:
    if ranks.size == 1:
        return values
    tensor = torch.from_numpy(values.copy()).to(ranks.device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()
