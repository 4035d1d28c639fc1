"""What the pipeline makes of a log on one run date, in memory, and the truth beside it.

    days:  warm-up … | past | calibration | training window | test day

Tokenizer and interest model see what lies before the calibration days. Histories and counts of a pair are those before
the calibration days for uniformly exposed pairs (which the calibrators are fitted on), else those before the training
window: no click stands among its own features.

A log (`tests.bench.simulation.log`) is encoded by MiniLM, tokenized by the RQ-VAE and its repair, searched and scored
by the library code that the workers call. The interest model is a small Qwen2 body from random weights, with the
product's defaults: content vectors at its input, synthetic walks beside the users.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from gpl_core.conf.sections import Interest
from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.content import NeighborGraph, leaf_content
from gpl_core.interest.down_sampling import keep_probability
from gpl_core.interest.interest_model import ModelSettings, build_interest_model
from gpl_core.interest.packing import UserHistory, training_packs
from gpl_core.interest.search import Anchors, BeamSearch, SearchSettings
from gpl_core.interest.training import target_log_probs
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.labels.pair_scoring import PairBlock, score_block
from gpl_core.labels.prefix_scoring import PrefixKeys, prefix_log_prob
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.encoders import EncoderPart, build_encoder
from gpl_core.sids.issuing import issue
from gpl_core.sids.item_catalog import ItemCatalog
from gpl_core.sids.item_content import ItemContent
from gpl_core.sids.rqvae import RqVaeSettings, epochs_for, fit
from gpl_core.sids.tokenizer import Tokenizer
from tests.bench.simulation.log import Log, Pairs, Size, simulated_log
from tests.gpl_core.interest.oracle import interest_loss
from tests.gpl_core.sids.plain_torch import LocalEngine

H, L, K = 20, 3, 20
PREFIXES = 256


@dataclass(frozen=True)
class Scores:
    """Per pair: what score_candidates gives, NaN where the user has no anchors, and the counts of its item and user."""

    similarity: np.ndarray
    history_similarity: np.ndarray
    coherence: np.ndarray
    consistency: np.ndarray
    llm_confidence: np.ndarray
    anchor_likelihood: np.ndarray
    """exp(prefix_log_prob / L), from the anchors and the `PREFIXES` likeliest scored prefixes, as in the product."""
    item_impressions: np.ndarray
    item_clicks: np.ndarray
    item_positives: np.ndarray
    user_impressions: np.ndarray
    user_clicks: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """bool [n]: the user has anchors."""
        return np.isfinite(self.similarity)


@dataclass(frozen=True)
class Known:
    """What is known of users and items before a day."""

    history: dict[int, np.ndarray]
    """user -> item numbers, oldest first, at most H."""
    counts: dict[str, np.ndarray]
    """item_impressions, item_clicks, item_positives [N]; user_impressions, user_clicks [U]."""


@dataclass(frozen=True)
class World:
    """One world and everything derived from its past."""

    size: Size
    users: int
    vectors: np.ndarray
    """float32 [N x d], MiniLM."""
    sids: np.ndarray
    known: Known
    """Before the training window."""
    train: Pairs
    """The training window: exposed pairs, and a sample of the unexposed ones."""
    uniform: Pairs
    """Uniformly exposed pairs of the calibration days."""
    test: Pairs
    """Every recalled pair after the training window."""
    train_scores: Scores
    uniform_scores: Scores
    is_new: np.ndarray
    """bool [N]: released after tokenizer and interest model were trained: no SID of its own, no history."""
    sampling_probability: np.ndarray
    """[len(train)]: 1 for exposed pairs."""
    past: Pairs
    """A share of the ordinarily exposed pairs of the calibration days, and as many unexposed ones."""
    past_scores: Scores


def make_world(size: Size, seed: int, kind: str = "plain") -> World:
    """Simulate, encode, tokenize, train, search and score; `seed` decides everything."""
    log = simulated_log(size, seed, kind)
    return derive(log, encode(log.items), size, seed)


def derive(log: Log, vectors: np.ndarray, size: Size, seed: int) -> World:
    """Everything that the pipeline makes of a log. vectors: float32 [N x d], `encode`."""
    day = log.pairs["dt"].to_numpy()

    def of(mask: np.ndarray) -> Pairs:
        return Pairs(**{name: log.pairs.loc[mask, name].to_numpy() for name in Pairs.__dataclass_fields__})

    def known(until: date) -> Known:
        return _known(log, of(day < until), until)

    def scored(pairs: Pairs, before: Known, search: BeamSearch) -> Scores:
        if not log.daily:
            return _score(pairs, catalog, vectors, before, search)
        return _by_date(pairs, lambda part, until: _score(part, catalog, vectors, known(until), search))

    earlier, latest = known(log.calibration), known(log.window)
    released = (log.items["dt"] < log.calibration).to_numpy()
    tokenizer, sids = _tokenized(vectors, released, size.codes, seed)
    catalog = ItemCatalog(np.flatnonzero(released), sids[released], size.codes)
    searching = partial(_interest_search, size, seed, catalog, tokenizer.codebooks.cpu().numpy(), vectors)
    search = searching(earlier)

    rng = np.random.default_rng([seed, 1])
    recalled, past = (of((day >= a) & (day < b)) for a, b in ((log.window, log.test), (log.calibration, log.window)))
    chosen, probability = _sample(recalled, size.unexposed_per_request, rng)
    train = recalled.take(chosen)
    uniform, ordinary, unexposed = (
        np.sort(rng.permutation(np.flatnonzero(kind))[:most])
        for kind, most in (
            (past.is_exposed & past.is_random, size.uniform_rows),
            (past.is_exposed & ~past.is_random, size.exposed_rows),
            (~past.is_exposed, size.exposed_rows),
        )
    )
    uniform, shown = past.take(uniform), past.take(np.concatenate([ordinary, unexposed]))
    return World(
        size, log.users, vectors, sids, latest, train, uniform, of(day >= log.test),
        scored(train, latest, searching(latest) if log.daily else search), scored(uniform, earlier, search), ~released,
        probability, shown, scored(shown, earlier, search),
    )  # fmt: skip


def encode(items: pd.DataFrame) -> np.ndarray:
    """MiniLM vectors of the items' texts."""
    encoder = build_encoder([EncoderPart("minilm")], batch_size=64)
    texts = (items["title"] + ". " + items["category"] + ". " + items["description"]).tolist()
    return encoder.encode([ItemContent(n, text) for n, text in enumerate(texts)]).vectors


def _known(log: Log, past: Pairs, until: date) -> Known:
    """Histories and counts from events before `until`; past: the recalled pairs of those days."""
    events = log.events[(log.events["dt"] < until).to_numpy()]
    user, item = events["user"].to_numpy(), events["item"].to_numpy()
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    history = {int(user[start]): part[-H:] for start, part in zip(starts, np.split(item, starts[1:]))}
    shown = past.take(past.is_exposed)
    items = len(log.items)
    counts = {
        "item_impressions": np.bincount(shown.item, minlength=items),
        "item_clicks": np.bincount(shown.item, shown.clicked, minlength=items),
        "item_positives": np.bincount(item, minlength=items),
        "user_impressions": np.bincount(shown.user, minlength=log.users),
        "user_clicks": np.bincount(shown.user, shown.clicked, minlength=log.users),
    }
    return Known(history, counts)


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
    """Anchors of the users that have a history.

    row of a user; found: R users' anchors; leaves int [R x K].
    """

    row: dict[int, int]
    found: Anchors
    leaf: np.ndarray


def _interest_search(
    size: Size, seed: int, catalog: ItemCatalog, codebooks: np.ndarray, vectors: np.ndarray, known: Known
) -> BeamSearch:
    """A search over a small Qwen2-architecture model, trained on the histories' SIDs."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    keep = keep_probability(known.counts["item_positives"].astype(np.float64), 0.85)
    content = ContentTable(vectors, np.arange(len(vectors))) if size.interest_content else None
    sequences = _with_sids(catalog, known.history)
    graph = NeighborGraph.build(content, catalog.item_index, list(sequences.values()), seed=seed) if content else None
    real = [UserHistory(catalog.sids_of(i), rng.random(len(i)) < keep[i], i) for i in sequences.values()]
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(Path(folder), TinySettings(seed=seed))
        width = content.width if content else 0
        settings = ModelSettings(L, catalog.codes, lora_rank=0, seed=seed, content_width=width)
        model = build_interest_model(folder, settings, codebooks)
    trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 - epoch / size.interest_epochs)
    model.train()
    for epoch in range(size.interest_epochs):
        walks = graph.walks(int(Interest().walks * len(real)), seed=[seed, epoch]) if graph else ()
        mixed = real + [UserHistory(catalog.sids_of(w), np.ones(len(w), dtype=bool), w) for w in walks]
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(mixed))
        for pack in training_packs(model.vocabulary, [mixed[n] for n in order], H, 4096):
            optimizer.zero_grad()
            interest_loss(target_log_probs(model, trie, pack, content)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        falling.step()
    model.eval()
    return BeamSearch(model, trie, SearchSettings(K, H, prefixes=PREFIXES), content)


def _with_sids(catalog: ItemCatalog, history: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Histories of the items that have a SID; users without any are left out."""
    kept = {user: items[catalog.leaf_of_item(items) >= 0] for user, items in history.items()}
    return {user: items for user, items in kept.items() if len(items)}


def _anchors(search: BeamSearch, catalog: ItemCatalog, history: dict[int, np.ndarray]) -> UserAnchors:
    sequences = _with_sids(catalog, history)
    items = list(sequences.values())
    found = search.search([catalog.sids_of(i) for i in items], items)
    leaf = catalog.trie.leaf_of(found.sids.reshape(-1, L)).reshape(len(items), K)
    return UserAnchors({user: n for n, user in enumerate(sequences)}, found, leaf)


def _tokenized(vectors: np.ndarray, released: np.ndarray, codes: int, seed: int) -> tuple[Tokenizer, np.ndarray]:
    """The product's tokenizer, trained on the released items, and SIDs [N x L]: theirs as `assign_sids` issues them."""
    epochs = epochs_for(len(vectors))
    settings = RqVaeSettings(
        levels=L, codes=codes, epochs=epochs, warmup_epochs=min(20, epochs // 5), relational=0.3, seed=seed
    )
    tokenizer = fit(vectors[released], settings, engine=LocalEngine(torch.device("cpu")))
    sids = tokenizer.encode(vectors).codes
    none, last = np.empty((0, L), np.int32), tokenizer.codebooks[-1].cpu().numpy()
    encoded = tokenizer.encode(vectors[released])
    sids[released] = issue(encoded, vectors[released], last, none, vectors[:0]).sids
    return tokenizer, sids


def _by_date(pairs: Pairs, score: Callable[[Pairs, date], Scores]) -> Scores:
    """Scores of pairs date by date; NaN where no user of a date has a history."""
    out = {name: np.full(len(pairs), np.nan) for name in Scores.__dataclass_fields__}
    for until in sorted(set(pairs.dt)):
        rows = np.flatnonzero(pairs.dt == until)
        found = score(pairs.take(rows), until)
        for name, values in out.items():
            values[rows] = getattr(found, name)
    return Scores(**out)


def _score(pairs: Pairs, catalog: ItemCatalog, vectors: np.ndarray, known: Known, search: BeamSearch) -> Scores:
    history = known.history
    nothing = {name: np.full(len(pairs), np.nan) for name in Scores.__dataclass_fields__}
    nothing |= {name: n[pairs.item if name.startswith("item") else pairs.user] for name, n in known.counts.items()}
    asked = _with_sids(catalog, {u: history[u] for u in np.unique(pairs.user).tolist() if u in history})
    if not asked:
        return Scores(**nothing)
    anchors = _anchors(search, catalog, asked)
    table = catalog.anchor_embeddings(vectors)
    items = torch.from_numpy(vectors)
    leaf_of, keys = catalog.leaf_of_item(np.arange(len(vectors))), PrefixKeys(catalog.trie)
    out = nothing
    order = np.argsort(pairs.user, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(pairs.user[order])) + 1):
        user = int(pairs.user[rows[0]]) if len(rows) else -1
        if user not in anchors.row:
            continue
        row = anchors.row[user]
        leaf = anchors.leaf[row]
        mask = leaf >= 0
        block = PairBlock(
            torch.from_numpy(np.where(mask[:, None], table[leaf], 0))[None],
            torch.from_numpy(mask)[None],
            torch.from_numpy(anchors.found.log_prob[row])[None],
            torch.from_numpy(history[user])[None],
            torch.from_numpy(pairs.item[rows])[None],
        )
        found = score_block(block, items, L)
        for name in ("similarity", "history_similarity", "llm_confidence"):
            out[name][rows] = getattr(found, name)[0].numpy()
        for name in ("coherence", "consistency"):
            out[name][rows] = getattr(found, name)[0].item()
        own = leaf_of[pairs.item[rows]]
        sids, log_prob, prefixes, prefix_log_probs = (torch.from_numpy(a[row])[None] for a in anchors.found)
        alone = prefix_log_prob(
            sids, torch.from_numpy(mask)[None], log_prob, prefixes, prefix_log_probs,
            torch.from_numpy(catalog.sids_of(pairs.item[rows]))[None], keys,
        )[0].numpy()  # fmt: skip
        # An item that came after the SIDs has no likelihood: the pair is left out where it counts.
        out["anchor_likelihood"][rows] = np.where(own >= 0, np.exp(alone / L), np.nan)
    return Scores(**out)
