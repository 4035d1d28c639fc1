"""Next-item quality on Amazon Industrial: ours beside SASRec, SASRec with content, content neighbors and popularity.

Candidate set: the whole catalog (3,686 items). All train on the same rows: the events of train and valid that
../shared/data holds, at most 20 a user; figures of others who trained on more rows are not comparable. Judged: every
test event with a history. SASRec's dropout and epochs are chosen on the valid split, trained on the train split; so
were our rank, dropout, epochs and token budget (decision 018). Ours: a two-layer Qwen2 of width 128 from random weights
(no pre-trained language model is at hand): this shows the method's ingredients, not a language model's knowledge.
Ingredients are taken away, or added, one at a time.

Three seeds take about 70 minutes of one core's time (SASRec's tuning 12, SASRec 11, ours and each variant 8); with
`--work FOLDER` every finished model is kept there, and a killed run goes on with the rest. `--quick` (2 minutes of one
core's time): one seed, a third of the users, 500 events, texts of 32 tokens, few epochs.

    python -m tests.bench.bench_interest_quality [--quick] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpl_core.interest.alignment import Titles, alignment_losses
from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.content import NeighborGraph
from gpl_core.interest.interest_model import ModelSettings, build_interest_model
from gpl_core.interest.objective import interest_loss, target_log_probs
from gpl_core.interest.packing import UserHistory, training_packs
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.collisions import duplicates, repair
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from gpl_core.sids.rqvae import RqVaeSettings
from tests.bench.harness import Figure, at_least, device_name, report
from tests.bench.quality.data import (
    MOST_EVENTS,
    RANKED,
    SHARED,
    Task,
    content_neighbors,
    content_vectors,
    judge,
    load_task,
    popularity,
    titles,
)
from tests.bench.quality.rq_kmeans import fit_rq_kmeans
from tests.bench.quality.sasrec import SasRecSettings, rankings_after, train_sasrec
from tests.gpl_core.sids.plain_torch import fit


@dataclass(frozen=True)
class Ours:
    """One variant of our model."""

    codebook: bool = True
    content: bool = True
    walks: int = 1
    title_to_sid: float = 0.0
    sid_to_title: float = 0.0
    epochs: int = 16
    learning_rate: float = 2e-3
    token_budget: int = 1_024
    lora_rank: int = 128
    lora_dropout: float = 0.3
    beams: int = 20


@dataclass(frozen=True)
class Items:
    """The catalog as the tokenizer left it."""

    vectors: np.ndarray
    catalog: ItemCatalog
    codebooks: np.ndarray


def tokenize(vectors: np.ndarray, quick: bool) -> Items:
    """SIDs with collisions repaired: an RQ-VAE (`--quick`: residual k-means)."""
    settings = RqVaeSettings()
    tokenizer = fit_rq_kmeans(vectors, settings) if quick else fit(vectors, settings)
    found = tokenizer.encode(vectors)
    books = tokenizer.codebooks.numpy()
    sids = repair(found.codes, found.last_residual, books[-1], first=duplicates(found.codes, vectors)).codes
    return Items(vectors, ItemCatalog(np.arange(len(vectors)), sids, settings.codes), books)


def train_ours(task: Task, items: Items, variant: Ours, seed: int) -> np.ndarray:
    """Train and rank: int64 [T x RANKED]; items that share a SID follow each other by training frequency."""
    torch.manual_seed(seed)
    table = ContentTable(items.vectors, np.arange(task.items)) if variant.content else None
    settings = ModelSettings(
        3,
        items.catalog.codes,
        lora_rank=variant.lora_rank,
        lora_alpha=2 * variant.lora_rank,
        lora_dropout=variant.lora_dropout,
        seed=seed,
        content_width=table.width if table else 0,
    )
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(folder, TinySettings(seed=seed))
        model = build_interest_model(folder, settings, items.codebooks if variant.codebook else None).train()
    trie = DeviceTrie(items.catalog.trie)
    graph = NeighborGraph.build(ContentTable(items.vectors, np.arange(task.items)), np.arange(task.items), seed=seed)
    random = np.random.default_rng(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, variant.learning_rate, weight_decay=0.0)

    def rows(epoch: int) -> list[UserHistory]:
        walks = graph.walks(variant.walks * len(task.train), seed=[seed, epoch])
        both = [*task.train, *walks]
        return [_history(items, both[n]) for n in random.permutation(len(both))]

    names = Titles.of(model, titles(), items.catalog.sids_of(np.arange(task.items)))
    name_packs = names.packs(variant.token_budget // 4, seed=[seed])
    weights = (variant.title_to_sid, variant.sid_to_title)
    packs = len(list(training_packs(model.vocabulary, rows(0), MOST_EVENTS, variant.token_budget)))
    total, step = packs * variant.epochs, 0
    for epoch in range(variant.epochs):
        for pack in training_packs(model.vocabulary, rows(epoch), MOST_EVENTS, variant.token_budget):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = variant.learning_rate * min(1.0, step / (0.05 * total)) * max(0.0, 1 - step / (total + 1))
            optimizer.zero_grad()
            loss = interest_loss(target_log_probs(model, trie, pack, table))
            if any(weights):
                aligned = alignment_losses(model, trie, next(name_packs))
                loss = loss + sum(w * x for w, x in zip(weights, aligned, strict=True))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    search = BeamSearch(model.eval(), trie, SearchSettings(variant.beams, MOST_EVENTS), table)
    anchors = search.search([items.catalog.sids_of(h) for h in task.histories], task.histories)
    leaves = items.catalog.trie.leaf_of(anchors.sids.reshape(-1, 3)).reshape(anchors.sids.shape[:2])
    items_of = np.split(items.catalog.leaf_items, items.catalog.leaf_offsets[1:-1])
    out = np.full((len(task.targets), RANKED), -1)
    for line, row in enumerate(leaves):
        ranked = [i for a in row for i in sorted(items_of[a], key=lambda i: -task.counts[i])]
        out[line, : len(ranked[:RANKED])] = ranked[:RANKED]
    return out


def tune_sasrec(vectors: np.ndarray | None, quick: bool) -> SasRecSettings:
    """Dropout and epochs with the best HR@10 on the valid split."""
    task = load_task("valid", 500 if quick else 1_500, every=3 if quick else 1)
    options = {}
    for dropout in (0.4,) if quick else (0.2, 0.4, 0.6):
        settings = SasRecSettings(dropout=dropout)
        found = rankings_after(task, settings, vectors, 0, (5, 10) if quick else (15, 30, 60))
        for epochs, rankings in found.items():
            options[replace(settings, epochs=epochs)] = judge(rankings, task)["HR@10"]
    return max(options, key=lambda s: options[s])


@dataclass(frozen=True)
class Kept:
    """What a folder keeps of finished work, so that a killed run goes on; without a folder nothing is kept."""

    folder: Path | None

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned when it was called for ``name`` first."""
        if self.folder is None:
            return make()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{re.sub('[^a-zA-Z0-9]+', '-', name)}.json"
        if not file.is_file():
            aside = file.with_suffix(".aside")
            aside.write_text(json.dumps(make()))
            aside.rename(file)
        return json.loads(file.read_text())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size")
    parser.add_argument("--work", type=Path, help="a folder that keeps finished models; of one commit, quick or full")
    arguments = parser.parse_args()
    quick, kept = arguments.quick, Kept(arguments.work)
    if not SHARED.is_dir():
        raise SystemExit(f"{SHARED} is absent: set GPL_SHARED_DATA to the folder of the shared data")
    torch.set_num_threads(1 if quick else 2)
    seeds = (0,) if quick else (0, 1, 2)
    task = load_task("test", 500 if quick else None, every=3 if quick else 1)
    made = kept.get("content vectors", lambda: {"rows": content_vectors(32 if quick else 96).tolist()})
    vectors = np.array(made["rows"], dtype=np.float32)
    items = tokenize(vectors, quick)
    plain, with_content = (
        SasRecSettings(**kept.get(f"tuned {name}", lambda given=given: asdict(tune_sasrec(given, quick))))
        for name, given in (("plain", None), ("content", vectors))
    )
    ours = Ours(epochs=3) if quick else Ours()
    models: dict[str, Callable[[int], np.ndarray]] = {
        "popularity": lambda _: popularity(task),
        "content neighbors": lambda _: content_neighbors(task, vectors),
        "SASRec": lambda seed: train_sasrec(task, plain, None, seed),
        "SASRec + content": lambda seed: train_sasrec(task, with_content, vectors, seed),
        "ours": lambda seed: train_ours(task, items, ours, seed),
    }
    for name, variant in {
        "ours, mean start": replace(ours, codebook=False),
        "ours, no content": replace(ours, content=False),
        "ours, no walks": replace(ours, walks=0),
        "ours, and title -> SID": replace(ours, title_to_sid=0.5),
        "ours, and SID -> title": replace(ours, sid_to_title=0.1),
    }.items():
        models[name] = lambda seed, variant=variant: train_ours(task, items, variant, seed)
    found: dict[str, dict[str, list[float]]] = {}
    for name, model in models.items():
        for seed in seeds[:1] if name in ("popularity", "content neighbors") else seeds:
            judged = kept.get(f"{name} {seed}", lambda model=model, seed=seed: judge(model(seed), task))
            for metric, value in judged.items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
        print(name, {m: round(statistics.mean(v), 4) for m, v in found[name].items()}, flush=True)
    figures: dict[str, Figure] = {}
    for name, metrics in found.items():
        for metric, values in metrics.items():
            mean = statistics.mean(values)
            if name == "ours" and metric in ("HR@10", "NDCG@10"):
                rival = statistics.mean(found["SASRec + content"][metric])
                figures[f"{name}: {metric}"] = at_least(mean, round(rival, 4), "share")
            else:
                figures[f"{name}: {metric}"] = Figure(mean, "share")
            if (name, metric) == ("ours", "HR@10"):
                figures["ours: HR@10, the stretch"] = at_least(mean, 0.17, "share")
            if len(values) > 1:
                figures[f"{name}: {metric}, spread over seeds"] = Figure(statistics.stdev(values), "share")
    title = (
        f"next item, {task.items} candidates, {len(task.targets)} test events, {len(seeds)} seed(s), {device_name()}; "
        f"SASRec {plain}, with content {with_content}"
    )
    report("interest_quality", figures, quick, title)


def _history(items: Items, row: np.ndarray) -> UserHistory:
    return UserHistory(items.catalog.sids_of(row), np.ones(len(row), dtype=bool), row)


if __name__ == "__main__":
    main()
