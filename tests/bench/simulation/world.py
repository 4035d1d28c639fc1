"""A simulated marketplace in memory, as the pipeline would see it on one run date, and its truth.

    days:      warm-up … | past (counts, uniform clicks) | training window | test day
    history, counts, tokeniser, interest model, calibrators: only what lies before the training window.

Made by `gpl_core.simulation` itself (the same rows as `gpl simulate`), encoded by MiniLM, tokenised, searched and
scored by the library code that the workers call.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from gpl_core.interest.checkpoint import TinySettings, make_tiny_checkpoint
from gpl_core.interest.model import ModelSettings, build_interest_model
from gpl_core.interest.objective import interest_loss, target_log_probs
from gpl_core.interest.packing import History, training_packs
from gpl_core.interest.scoring import DeviceTrie
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.targets import keep_probability
from gpl_core.labels.scoring import score_block
from gpl_core.sids.catalogue import Catalogue
from gpl_core.sids.encoders import EncoderPart, ItemContent, build_encoder
from gpl_core.sids.rqvae import RqVaeSettings, fit_rq_kmeans
from gpl_core.simulation.settings import SimulationSettings
from gpl_core.simulation.simulate import generate

H, L, K = 20, 3, 20


@dataclass(frozen=True)
class Size:
    """How large a world is, and how long its models train.

    steps: of every pre-ranker; chosen where exposed-only training was at its best on a world of seed 301.
    """

    users: int = 1500
    items: int = 1200
    past_days: int = 3
    train_days: int = 2
    candidates: int = 60
    exposed: int = 10
    random_share: float = 0.05
    codes: int = 64
    unexposed_per_request: int = 20
    interest_epochs: int = 8
    steps: int = 300


QUICK = Size(users=500, items=400, candidates=40, exposed=8, codes=32, interest_epochs=3, steps=120, random_share=0.1)


class Memory:
    """A RowSink that keeps the rows."""

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

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: np.ndarray) -> Pairs:
        """The rows that `chosen` (mask or numbers) names."""
        return Pairs(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Scores:
    """Per pair: what score_candidates gives; NaN where the user has no anchors."""

    similarity: np.ndarray
    history_similarity: np.ndarray
    coherence: np.ndarray
    consistency: np.ndarray
    llm_confidence: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """bool [n]: the user has anchors."""
        return np.isfinite(self.similarity)


@dataclass(frozen=True)
class World:
    """One world and everything derived from its past."""

    size: Size
    vectors: np.ndarray
    """float32 [N x d], MiniLM."""
    sids: np.ndarray
    history: dict[int, np.ndarray]
    """user -> item numbers before the training window, oldest first, at most H."""
    train: Pairs
    """The training window: exposed pairs, and a sample of the unexposed ones."""
    uniform: Pairs
    """Uniformly exposed pairs of the past."""
    test: Pairs
    """Every recalled pair of the test day."""
    train_scores: Scores
    uniform_scores: Scores
    counts: dict[str, np.ndarray]
    """item_impressions, item_clicks, item_positives [N]; user_impressions, user_clicks [U]: before the window."""
    is_new: np.ndarray
    """bool [N]: released within the training window or on the test day."""
    sampling_probability: np.ndarray
    """[len(train)]: 1 for exposed pairs."""


def make_world(size: Size, seed: int, kind: str = "plain") -> World:
    """Simulate, encode, tokenise, train, search and score; `seed` decides everything."""
    settings = SimulationSettings(
        users=size.users, items=size.items, days=size.past_days + size.train_days + 1, seed=seed, world=kind,
        candidates_per_request=size.candidates, exposed_per_request=size.exposed, random_share=size.random_share,
        pictures=False,
    )  # fmt: skip
    memory = Memory()
    generate(settings, memory)
    window = settings.start_date + timedelta(days=size.past_days)
    test_day = window + timedelta(days=size.train_days)
    items = memory.frame("raw_items").drop_duplicates("item_id", keep="first").sort_values("item_id")
    number = {item: n for n, item in enumerate(items["item_id"])}
    pairs = _pairs(memory, number)
    day = pairs.pop("dt").to_numpy()
    past, train, test = (
        _as_pairs(pairs[mask]) for mask in (day < window, (day >= window) & (day < test_day), day == test_day)
    )
    vectors = _encode(items)
    released = items["dt"].isna().to_numpy() & (pd.to_datetime(items["updated_at"]).dt.date < window).to_numpy()
    history, positives = _histories(memory, number, window, len(items))
    tokenizer = fit_rq_kmeans(vectors[released], RqVaeSettings(levels=L, codes=size.codes, seed=seed))
    sids, _ = tokenizer.encode(vectors)
    catalogue = Catalogue(np.flatnonzero(released), sids[released], size.codes)
    anchors = _anchors(size, seed, catalogue, tokenizer.codebooks.cpu().numpy(), history, positives)

    rng = np.random.default_rng([seed, 1])
    chosen, probability = _sample(train, size.unexposed_per_request, rng)
    train = train.take(chosen)
    uniform = past.take(past.is_random & past.is_exposed)
    exposed = past.take(past.is_exposed)
    counts = {
        "item_impressions": np.bincount(exposed.item, minlength=len(items)),
        "item_clicks": np.bincount(exposed.item, exposed.clicked, minlength=len(items)),
        "item_positives": positives,
        "user_impressions": np.bincount(exposed.user, minlength=size.users),
        "user_clicks": np.bincount(exposed.user, exposed.clicked, minlength=size.users),
    }
    scored = [_score(p, catalogue, vectors, history, anchors) for p in (train, uniform)]
    return World(
        size,
        vectors,
        sids,
        history,
        train,
        uniform,
        test,
        scored[0],
        scored[1],
        counts,
        ~released,
        probability,
    )


def _pairs(memory: Memory, number: dict[str, int]) -> pd.DataFrame:
    truth = memory.frame("truth")
    shown = memory.frame("raw_impressions")[["request_id", "item_id", "position", "clicked", "is_random"]]
    joined = truth.merge(shown, on=["request_id", "item_id"], how="left", validate="one_to_one")
    assert (joined["clicked"].notna() == joined["is_exposed"]).all()
    random_requests = set(shown.loc[shown["is_random"], "request_id"])
    return pd.DataFrame(
        {
            "request": joined["request_id"].astype("category").cat.codes.astype(np.int64),
            "user": joined["user_id"].str[1:].astype(np.int64),
            "item": joined["item_id"].map(number).astype(np.int64),
            "probability": joined["true_probability"],
            "is_exposed": joined["is_exposed"],
            "is_random": joined["request_id"].isin(random_requests),
            "clicked": joined["clicked"].fillna(0).astype(np.float64),
            "position": joined["position"].fillna(-1).astype(np.int64),
            "dt": joined["dt"],
        }
    )


def _as_pairs(frame: pd.DataFrame) -> Pairs:
    return Pairs(**{name: frame[name].to_numpy() for name in Pairs.__dataclass_fields__})


def _encode(items: pd.DataFrame) -> np.ndarray:
    encoder = build_encoder([EncoderPart("minilm")], batch_size=64)
    texts = (items["title"] + ". " + items["category"] + ". " + items["description"]).tolist()
    return encoder.encode([ItemContent(n, text) for n, text in enumerate(texts)]).vectors


def _histories(
    memory: Memory, number: dict[str, int], window: date, items: int
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    events = memory.frame("raw_interactions")[["user_id", "item_id", "event_time", "dt"]]
    clicks = memory.frame("raw_impressions")
    clicks = clicks.loc[clicks["clicked"] == 1, ["user_id", "item_id", "event_time", "dt"]]
    events = pd.concat([events, clicks])
    events = events[events["dt"] < window].drop_duplicates(["user_id", "item_id", "event_time"])
    events = events.sort_values(["user_id", "event_time", "item_id"])
    item = events["item_id"].map(number).to_numpy()
    users = events["user_id"].str[1:].astype(np.int64).to_numpy()
    cuts = np.flatnonzero(np.diff(users)) + 1
    starts = np.concatenate([[0], cuts]) if len(users) else np.empty(0, np.int64)
    history = {int(users[start]): part[-H:] for start, part in zip(starts, np.split(item, cuts))}
    return history, np.bincount(item, minlength=items)


def _sample(pairs: Pairs, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers kept, their probability): all exposed rows, at most `most` unexposed ones per request."""
    order = np.lexsort((rng.random(len(pairs)), pairs.is_exposed, pairs.request))
    new = np.concatenate([[True], np.diff(pairs.request[order]) != 0])
    start = np.flatnonzero(new)[np.cumsum(new) - 1]
    place = np.arange(len(pairs)) - start
    request = pairs.request[order]
    unexposed = np.bincount(request, ~pairs.is_exposed[order], minlength=int(request.max()) + 1)[request]
    keep = pairs.is_exposed[order] | (place < most)
    probability = np.where(pairs.is_exposed[order], 1.0, np.minimum(1.0, most / np.maximum(unexposed, 1)))
    return order[keep], probability[keep]


@dataclass(frozen=True)
class UserAnchors:
    """Anchors of the users that have a history: row of a user, leaves int [R x K], log_prob [R x K]."""

    row: dict[int, int]
    leaf: np.ndarray
    log_prob: np.ndarray


def _anchors(
    size: Size,
    seed: int,
    catalogue: Catalogue,
    codebooks: np.ndarray,
    history: dict[int, np.ndarray],
    positives: np.ndarray,
) -> UserAnchors:
    """A small Qwen2-architecture model on the histories' SIDs, then K beams per user."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    keep = keep_probability(positives.astype(np.float64), 0.85)
    sequences = {}
    for user, items in history.items():
        known = items[catalogue.leaf_of_item(items) >= 0]
        if len(known):
            sequences[user] = (catalogue.sids_of(known), rng.random(len(known)) < keep[known])
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(Path(folder), TinySettings(seed=seed))
        settings = ModelSettings(L, catalogue.codes, lora_rank=32, lora_alpha=64, seed=seed)
        model = build_interest_model(folder, settings, codebooks)
    trie = DeviceTrie(catalogue.trie)
    histories = [History(sids, target) for sids, target in sequences.values()]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    model.train()
    for epoch in range(size.interest_epochs):
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(histories))
        for pack in training_packs(model.vocabulary, [histories[n] for n in order], H, 4096):
            optimiser.zero_grad()
            interest_loss(target_log_probs(model, trie, pack)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    model.eval()
    with torch.no_grad():
        found = BeamSearch(model, trie, SearchSettings(K, H)).search([sids for sids, _ in sequences.values()])
    users = list(sequences)
    leaf = catalogue.trie.leaf_of(found.sids.reshape(-1, L)).reshape(len(users), K)
    return UserAnchors({user: n for n, user in enumerate(users)}, leaf, found.log_prob)


def _score(
    pairs: Pairs, catalogue: Catalogue, vectors: np.ndarray, history: dict[int, np.ndarray], anchors: UserAnchors
) -> Scores:
    table = catalogue.anchor_embeddings(vectors)
    items = torch.from_numpy(vectors)
    there = torch.ones(len(vectors), dtype=torch.bool)
    out = {name: np.full(len(pairs), np.nan) for name in Scores.__dataclass_fields__}
    order = np.argsort(pairs.user, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(pairs.user[order])) + 1):
        user = int(pairs.user[rows[0]]) if len(rows) else -1
        if user not in anchors.row:
            continue
        leaf = anchors.leaf[anchors.row[user]]
        mask = leaf >= 0
        found = score_block(
            torch.from_numpy(np.where(mask[:, None], table[leaf], 0))[None],
            torch.from_numpy(mask)[None],
            torch.from_numpy(anchors.log_prob[anchors.row[user]])[None],
            torch.from_numpy(history[user])[None],
            torch.from_numpy(pairs.item[rows])[None],
            items,
            there,
            L,
        )
        for name in ("similarity", "history_similarity", "llm_confidence"):
            out[name][rows] = getattr(found, name)[0].numpy()
        for name in ("coherence", "consistency"):
            out[name][rows] = getattr(found, name)[0].item()
    return Scores(**out)
