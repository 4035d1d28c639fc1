"""Next-item quality on Amazon Industrial: ours beside SASRec, a content-only dense model, neighbors, popularity.

Candidate set: the whole catalog (3,686 items). All train on the same rows: the events of train and valid that
../shared/data holds, at most 20 a user; figures of others who trained on more rows are not comparable. Judged: every
test event with a history. The dense models are SASRec on item vectors and on these and content, each with and without
the walks that ours has, and one on content alone.

`history neighbors` is not trained: items like anything in the history, the newest events first, popular ones first.
Every model may have the same number of tries on the valid split (trained on the train split), three axes each: dropout,
learning rate and width; a SASRec's epochs come on top, from the curve. Ours: dropout, learning rate and epochs, from
what the configuration `amazon` ships; the bench says where another setting is better, but judges what ships. A setting
is final when both its neighbors on every axis were tried and are not better.

Ours is what ships: `train_interest_model` under DeepSpeed on a lakehouse that the steps before it might have left, with
the configuration `amazon`; its anchors are the ranking. The body is a small Qwen2 from random weights: this shows the
method's ingredients, not a language model's knowledge.

All of it takes hours of one core's time: with `--work FOLDER` every try and every trained model is kept there, and a
killed run goes on with the rest; `--only MODEL` measures one of them, `--untuned` skips the tries of ours. `--quick` (2
minutes): one seed, nothing tuned, a third of the users, 500 events, texts of 32 tokens, few epochs.

    python -m tests.bench.bench_interest_quality [--quick] [--work FOLDER] [--only MODEL ...] [--seeds N] [--untuned]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpl_core.config import load_config
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext
from gpl_core.graph.steps import find_step
from gpl_core.interest.content import leaf_content
from gpl_core.interest.model_files import load_bundle
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.lakehouse.artifacts import ArtifactStore
from gpl_core.prerank.bootstrap import interval, over_seeds, replicates, sums_by_user
from gpl_core.sids.collisions import duplicates, repair
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from gpl_core.sids.rqvae import RqVaeSettings
from gpl_core.sids.tokenizer import load_tokenizer
from gpu_workers import train_interest_model
from gpu_workers.inputs.interest import base_checkpoint
from gpu_workers.ranks import Ranks, start_ranks
from tests.bench.harness import Figure, at_least, at_most, device_name, report
from tests.bench.quality.data import (
    MOST_EVENTS,
    SHARED,
    HistoryNeighbors,
    Task,
    content_neighbors,
    content_vectors,
    gains,
    judge,
    load_task,
    popularity,
    ranked,
)
from tests.bench.quality.rq_kmeans import fit_rq_kmeans
from tests.bench.quality.sasrec import SasRecSettings, best_epochs, train_sasrec
from tests.bench.quality.tuning import climb
from tests.gpl_core.sids.plain_torch import fit
from tests.gpu_workers.interest_lake import DAY, Catalog, InterestLake, User

TRIES, MOST_EPOCHS = 16, 120
GOALS = {"HR@10": 0.170, "NDCG@10": 0.106, "tail HR@10": 0.055}
RIVAL = "SASRec + content + walks"
BEAMS = 20
DROPOUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
DENSE_AXES = {"dropout": DROPOUTS, "learning_rate": RATES, "width": (16, 32, 64, 128, 256)}
OUR_AXES = {"dropout": DROPOUTS, "learning_rate": RATES, "epochs": (6, 8, 12, 16, 24, 32, 48)}
NEIGHBORS = "history neighbors"
NEIGHBOR_AXES = {
    "age": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    "popularity": (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
    "again": (0.0, 0.125, 0.25, 0.5, 1.0, 2.0),
}
VARIANTS = {
    "ours": (),
    "ours, no content": ("interest.content=false",),
    "ours, no walks": ("interest.walks=0",),
}


def dense_models() -> dict[str, SasRecSettings]:
    """The dense models before tuning, by name."""
    ours = int(load_config("amazon").interest.walks)
    names = {"none": "SASRec", "added": "SASRec + content"}
    models = {
        names[content] + " + walks" * walks: SasRecSettings(content=content, walks=ours if walks else 0)
        for content, walks in product(names, (False, True))
    }
    return {**models, "content alone": SasRecSettings(content="only")}


@dataclass(frozen=True)
class Kept:
    """What a folder keeps of finished work, so that a killed run goes on; without a folder nothing is kept."""

    folder: Path | None

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned when it was called for ``name`` first."""
        if self.folder is None:
            return make()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{re.sub('[^a-zA-Z0-9.]+', '-', name)}.json"
        if not file.is_file():
            aside = file.with_suffix(".aside")
            aside.write_text(json.dumps(make()))
            aside.rename(file)
        return json.loads(file.read_text())


def make_catalog(kept: Kept, quick: bool) -> Catalog:
    """Content vectors, and SIDs with collisions repaired: of an RQ-VAE (`--quick`: residual k-means)."""
    made = kept.get("content vectors", lambda: {"rows": content_vectors(32 if quick else None).tolist()})
    vectors = np.array(made["rows"], dtype=np.float32)
    settings = RqVaeSettings()
    folder = kept.folder / "tokenizer" if kept.folder else None
    if folder and folder.is_dir():
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = fit_rq_kmeans(vectors, settings) if quick else fit(vectors, settings)
        if folder:
            tokenizer.save(folder)
    found = tokenizer.encode(vectors)
    first = duplicates(found.codes, vectors)
    sids = repair(found.codes, found.last_residual, tokenizer.codebooks.numpy()[-1], first=first).codes
    return Catalog(vectors, tokenizer, sids)


def train_ours(task: Task, made: Catalog, settings: tuple[str, ...], seed: int, ranks: Ranks) -> np.ndarray:
    """Train by the worker and rank: int64 [T x RANKED]; items that share a SID follow each other by frequency."""
    catalog = ItemCatalog(np.arange(task.items), made.sids, RqVaeSettings().codes)
    with tempfile.TemporaryDirectory() as folder:
        dates = (f"run.start_date={DAY}", f"run.end_date={DAY}", "run.history_start=null", f"run.seed={seed}")
        lake = InterestLake(
            Path(folder), made, config="amazon", settings=(*dates, *settings), length=MOST_EVENTS
        )  # fmt: skip
        users = [User(f"u{n}", row.tolist()) for n, row in enumerate(task.train)]
        lake.write_users(users)
        config = lake.config()
        planner = Planner(config)
        state = planner.state(find_step(train_interest_model.STEP), DAY)
        train_interest_model.run(StepContext(planner, train_interest_model.STEP, DAY, state, "bench"), ranks)
        store = ArtifactStore(folder)
        bundle = store.fetch(store.manifests("interest_model")[-1])
        model = load_bundle(bundle, base_checkpoint(config), sid_version=lake.version)
    content = ContentTable(made.vectors, np.arange(task.items)) if model.settings.content_width else None
    trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
    search = BeamSearch(model, trie, SearchSettings(BEAMS, MOST_EVENTS), content)
    anchors = search.search([made.sids[h] for h in task.histories], task.histories)
    leaves = catalog.trie.leaf_of(anchors.sids.reshape(-1, 3)).reshape(anchors.sids.shape[:2])
    items_of = np.split(catalog.leaf_items, catalog.leaf_offsets[1:-1])
    return ranked(leaves, items_of, task)


@dataclass(frozen=True)
class Bench:
    """The tasks, what is kept, and one method per kind of model."""

    quick: bool
    kept: Kept
    made: Catalog
    task: Task
    ranks: Ranks

    def tuned_dense(self, name: str, start: SasRecSettings) -> tuple[SasRecSettings, dict[str, float]]:
        """The best settings on the valid split, and what finding them took."""
        if self.quick:
            return replace(start, epochs=10), {}
        task = load_task("valid")
        epochs: dict[str, tuple[int, int]] = {}

        def score(setting: Mapping[str, Any]) -> float:
            wanted = SasRecSettings(**setting)
            key = f"valid {name} {[setting[axis] for axis in DENSE_AXES]}"
            curve = lambda: best_epochs(task, wanted, self.made.vectors, every=5, patience=4, most=MOST_EPOCHS)  # noqa: E731
            found = self.kept.get(key, lambda: {"best": curve()})["best"]
            epochs[key] = tuple(found[1:])
            return found[0]

        tuned = climb(asdict(start), DENSE_AXES, score, TRIES)
        best, trained = epochs[f"valid {name} {[tuned.chosen[axis] for axis in DENSE_AXES]}"]
        open_axes = len(tuned.open_axes) + (trained == MOST_EPOCHS)  # a curve that was cut might have risen again
        cost = {"tries": tuned.tries, "epochs": sum(e for _, e in epochs.values()), "axes left open": open_axes}
        return SasRecSettings(**{**tuned.chosen, "epochs": best}), cost

    def tuned_neighbors(self) -> tuple[HistoryNeighbors, dict[str, float]]:
        """The best settings on the valid split, and what finding them took."""
        task, start = load_task("valid"), HistoryNeighbors()
        if self.quick:
            return start, {}
        score = lambda s: judge(HistoryNeighbors(**s).rank(task, self.made.vectors), task)["HR@10"]  # noqa: E731
        tuned = climb(asdict(start), NEIGHBOR_AXES, score, TRIES)
        return HistoryNeighbors(**tuned.chosen), {"tries": tuned.tries, "axes left open": len(tuned.open_axes)}

    def tuned_ours(self) -> dict[str, float]:
        """Whether what ships is the best on the valid split; what finding out took."""
        if self.quick:
            return {}
        task = load_task("valid")
        shipped = load_config("amazon").interest
        start = {axis: getattr(shipped, axis) for axis in OUR_AXES}

        def score(setting: Mapping[str, Any]) -> float:
            changes = tuple(f"interest.{axis}={setting[axis]}" for axis in OUR_AXES)
            make = lambda: judge(train_ours(task, self.made, changes, 0, self.ranks), task)  # noqa: E731
            return self.kept.get(f"valid ours {changes}", make)["HR@10"]

        tuned = climb(start, OUR_AXES, score, TRIES)
        print(f"ours: best on the valid split {tuned.chosen}, shipped {start}", flush=True)
        moved = sum(tuned.chosen[axis] != start[axis] for axis in OUR_AXES)
        return {"tries": tuned.tries, "axes left open": len(tuned.open_axes) + moved}

    def rankings(
        self, name: str, seeds: range, make: Callable[[int], np.ndarray], settings: str = ""
    ) -> list[np.ndarray]:
        """Rankings of ``name`` per seed; kept under its ``settings`` too, which a longer search may change."""
        judged = "quick" if self.quick else "test"
        made = [
            self.kept.get(f"{judged} {name} {settings} {seed}", lambda seed=seed: {"ranked": make(seed).tolist()})
            for seed in seeds
        ]
        return [np.array(found["ranked"]) for found in made]


def figures_of(found: Mapping[str, list[np.ndarray]], task: Task) -> dict[str, Figure]:
    """Mean and spread over seeds of every metric, ours against the goals, and its lead over the rival."""
    figures: dict[str, Figure] = {}
    for name, rankings in found.items():
        judged = [judge(ranked, task) for ranked in rankings]
        for metric in judged[0]:
            values = [j[metric] for j in judged]
            mean = float(np.mean(values))
            goal = GOALS.get(metric) if name == "ours" else None
            figures[f"{name}: {metric}"] = at_least(mean, goal, "share") if goal else Figure(mean, "share")
            if len(values) > 1:
                figures[f"{name}: {metric}, spread over seeds"] = Figure(float(np.std(values, ddof=1)), "share")
    if {"ours", RIVAL} <= found.keys():
        drawn = {
            name: [
                {m: sums_by_user(task.users, *map(np.float64, g)) for m, g in gains(ranked, task).items()}
                for ranked in found[name]
            ]
            for name in ("ours", RIVAL)
        }
        for metric in GOALS:
            sides = [over_seeds(replicates([seed[metric] for seed in drawn[name]])) for name in ("ours", RIVAL)]
            low, _ = interval(sides[0] - sides[1])
            lead = figures[f"ours: {metric}"].value - figures[f"{RIVAL}: {metric}"].value
            figures[f"ours over {RIVAL}: {metric}"] = Figure(lead, "share")
            if low is not None:
                figures[f"ours over {RIVAL}: {metric}, lower end of 95 %"] = at_least(low, 0.0, "share")
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size")
    parser.add_argument("--work", type=Path, help="a folder that keeps finished models; of one commit, quick or full")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="measure these and print them; no result is written")
    parser.add_argument("--untuned", action="store_true", help="do not ask whether ours ships with the best settings")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per model; --quick has one")
    arguments = parser.parse_args()
    quick, kept = arguments.quick, Kept(arguments.work)
    if not SHARED.is_dir():
        raise SystemExit(f"{SHARED} is absent: set GPL_SHARED_DATA to the folder of the shared data")
    torch.set_num_threads(1)
    seeds = range(1 if quick else arguments.seeds)
    task = load_task("test", 500 if quick else None, every=3 if quick else 1)
    bench = Bench(quick, kept, make_catalog(kept, quick), task, start_ranks())
    dense = dense_models()
    names = ["popularity", "content neighbors", NEIGHBORS, *dense, *VARIANTS]
    if unknown := set(arguments.only or ()) - set(names):
        raise SystemExit(f"--only {', '.join(unknown)}: expected some of {', '.join(names)}")
    found: dict[str, list[np.ndarray]] = {}
    figures: dict[str, Figure] = {}
    chosen = {}
    for name in arguments.only or names:
        cost: dict[str, float] = {}
        if name == "popularity":
            found[name] = [popularity(task)]
        elif name == "content neighbors":
            found[name] = [content_neighbors(task, bench.made.vectors)]
        elif name == NEIGHBORS:
            chosen[name], cost = bench.tuned_neighbors()
            found[name] = [chosen[name].rank(task, bench.made.vectors)]
        elif name in dense:
            chosen[name], cost = bench.tuned_dense(name, dense[name])
            found[name] = bench.rankings(
                name,
                seeds,
                lambda seed, own=chosen[name]: train_sasrec(task, own, bench.made.vectors, seed),
                str([getattr(chosen[name], axis) for axis in (*DENSE_AXES, "epochs")]),
            )
        else:
            cost = bench.tuned_ours() if name == "ours" and not arguments.untuned else {}
            changes = (*VARIANTS[name], *(("interest.epochs=3",) if quick else ()))
            found[name] = bench.rankings(
                name, seeds, lambda seed, own=changes: train_ours(task, bench.made, own, seed, bench.ranks)
            )
        for what, value in cost.items():
            figure = at_most(value, 0, "axes") if what == "axes left open" else Figure(value, what)
            figures[f"{name}: tuning, {what}"] = figure
        means = {m: np.mean([judge(ranked, task)[m] for ranked in found[name]]).round(4) for m in GOALS}
        print(name, means, cost, chosen.get(name, ""), flush=True)
    figures |= figures_of(found, task)
    if not arguments.only:
        title = (
            f"next item, {task.items} candidates, {len(task.targets)} test events, {len(seeds)} seed(s), "
            f"{device_name()}; {chosen}"
        )
        report("interest_quality", figures, quick, title)


if __name__ == "__main__":
    main()
