"""Amazon Industrial as next-item prediction, and how a ranking is judged."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpl_core.config import load_config
from gpl_core.sids.encoders import EncoderPart, build_encoder
from gpl_core.sids.item_content import ItemContent

SHARED = Path(os.environ.get("GPL_SHARED_DATA", "../shared/data")) / "amazon_industrial"
MOST_EVENTS = 20
RANKED = 10


@dataclass(frozen=True)
class Task:
    """Rows to train on and events to predict, as item numbers; the candidate set is the whole catalog."""

    items: int
    train: Sequence[np.ndarray]
    """int [n >= 2] each: a user's events up to the split."""
    histories: Sequence[np.ndarray]
    """int [1 .. MOST_EVENTS] each: what precedes a target, events of the judged split included."""
    targets: np.ndarray
    """int64 [T]"""
    users: np.ndarray
    """int64 [T]: whose event it is"""
    counts: np.ndarray
    """int64 [items]: occurrences in the training rows."""

    @property
    def is_tail(self) -> np.ndarray:
        """bool [T]: targets among the 80 % of items least frequent in training."""
        rank = np.empty(self.items, dtype=np.int64)
        rank[np.argsort(-self.counts, kind="stable")] = np.arange(self.items)
        return rank[self.targets] >= self.items // 5


def load_task(judged: str, targets: int | None = None, every: int = 1) -> Task:
    """``judged``: valid (rows: train) or test (rows: train and valid). ``targets``: a random sample of that many.

    ``every``: train on every ``every``-th user only.
    """
    index = {json.loads(line)["item_id"]: n for n, line in enumerate(_lines("items"))}
    train, histories, wanted, users = [], [], [], []
    counts = np.zeros(len(index), dtype=np.int64)
    known = {"train"} if judged == "valid" else {"train", "valid"}
    for user, line in enumerate(_lines("sequences")):
        events = json.loads(line)["events"]
        items = np.array([index[e["item_id"]] for e in events])
        splits = [e["split"] for e in events]
        rows = items[[s in known for s in splits]]
        if user % every == 0:
            np.add.at(counts, rows, 1)
            if len(rows) > 1:
                train.append(rows[-MOST_EVENTS:])
        for place, split in enumerate(splits):
            if split == judged and place:
                histories.append(items[max(0, place - MOST_EVENTS) : place])
                wanted.append(items[place])
                users.append(user)
    chosen = np.arange(len(wanted))
    if targets is not None and targets < len(wanted):
        chosen = np.sort(np.random.default_rng(0).choice(len(wanted), targets, replace=False))
    targets_of, users_of = np.array(wanted)[chosen], np.array(users)[chosen]
    return Task(len(index), train, [histories[n] for n in chosen], targets_of, users_of, counts)


def content_vectors(max_tokens: int | None = None) -> np.ndarray:
    """Unit vectors of all items, float32 [items x d], by the parts of the configuration `amazon`.

    Of the tables' texts, cut to 500 characters. ``max_tokens``: of a text that MiniLM reads; None: as many as ship.
    """
    rows = [json.loads(line) for line in _lines("items")]
    contents = [ItemContent(n, f"{r['title']}. {r['brand']}. {r['description']}"[:500]) for n, r in enumerate(rows)]
    options = {"minilm": {"max_tokens": max_tokens}} if max_tokens else {}
    shipped = load_config("amazon").encoder.parts
    parts = [EncoderPart(p.name, p.weight, p.path or None, {**p.options, **options.get(p.name, {})}) for p in shipped]
    return build_encoder(parts).encode(contents).vectors


def item_ids() -> list[str]:
    """Every item's id, in the order of the item numbers."""
    return [json.loads(line)["item_id"] for line in _lines("items")]


def gains(rankings: np.ndarray, task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """HR@3, HR@10, NDCG@10, and HR@10 on tail targets: what each event contributes, and whether it counts, [T] each.

    ``rankings`` int [T x >= RANKED], -1 where nothing is.
    """
    hit = rankings[:, :RANKED] == task.targets[:, None]
    every = np.ones(len(hit))
    return {
        "HR@3": (hit[:, :3].any(axis=1), every),
        "HR@10": (hit.any(axis=1), every),
        "NDCG@10": ((hit / np.log2(np.arange(2, RANKED + 2))).sum(axis=1), every),
        "tail HR@10": (hit.any(axis=1) & task.is_tail, task.is_tail.astype(float)),
    }


def judge(rankings: np.ndarray, task: Task) -> dict[str, float]:
    """The means of `gains`."""
    return {name: float(gain.sum() / mass.sum()) for name, (gain, mass) in gains(rankings, task).items()}


def ranked(leaves: np.ndarray, items_of: Sequence[np.ndarray], task: Task) -> np.ndarray:
    """int64 [T x RANKED]: the items of each event's leaves [T x K], those of one SID by training frequency."""
    out = np.full((len(leaves), RANKED), -1)
    for line, row in enumerate(leaves):
        found = [i for leaf in row for i in sorted(items_of[leaf], key=lambda i: -task.counts[i])][:RANKED]
        out[line, : len(found)] = found
    return out


def popularity(task: Task) -> np.ndarray:
    """The most frequent items, for everyone."""
    return np.tile(np.argsort(-task.counts, kind="stable")[:RANKED], (len(task.targets), 1))


def content_neighbors(task: Task, vectors: np.ndarray) -> np.ndarray:
    """The items nearest to the last one by content, itself among them (people buy again)."""
    last = np.array([h[-1] for h in task.histories])
    return np.argsort(-(vectors[last] @ vectors.T), axis=1, kind="stable")[:, :RANKED]


@dataclass(frozen=True)
class HistoryNeighbors:
    """Items like something in the history: max over its events of (cosine - age * events since) + popularity * log(1 +
    count), less ``again`` for what was had before the newest event. Nothing is trained.
    """

    age: float = 0.2
    popularity: float = 0.08
    again: float = 0.25

    def rank(self, task: Task, vectors: np.ndarray) -> np.ndarray:
        """int64 [T x RANKED]."""
        cosine, counts = vectors @ vectors.T, np.log1p(task.counts) * self.popularity
        out = np.empty((len(task.histories), RANKED), dtype=np.int64)
        for row, history in zip(out, task.histories, strict=True):
            since = np.arange(len(history))[::-1, None]
            score = (cosine[history] - self.age * since).max(axis=0) + counts
            score[np.setdiff1d(history[:-1], history[-1:])] -= self.again
            row[:] = np.argsort(-score, kind="stable")[:RANKED]
        return out


def _lines(name: str) -> list[str]:
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rt") as lines:
        return list(lines)
