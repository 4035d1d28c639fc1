"""Train and evaluate the reference pre-ranker: training_feed -> artifact preranker, evaluations.

deepspeed --num_accelerators 2 gpu_workers/train_preranker.py --config quickstart --run-date 2026-01-03

Variants train side by side on the same batches, from the same initial weights, for the same number of steps:
`exposed_only` (lambda = 0), `gpl`, and one `gpl@VALUE` per value of `prerank.lambda_sweep`. Each keeps the weights of
the step with the best AUC on held-out exposed requests. All are evaluated on the day after the run date, once its
impressions exist.
"""

from dataclasses import asdict
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from gpl_core.conf.sections import Prerank
from gpl_core.errors import MissingInputError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.artifacts import Manifest, artifact_version
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.prerank import metrics
from gpl_core.prerank.early_stopping import BestWeights
from gpl_core.prerank.export import export_bundle, load_variant
from gpl_core.prerank.loss import RowMass, dual_label_loss, row_mass
from gpl_core.prerank.metrics import Figure
from gpl_core.prerank.two_tower import TowerConfig, TwoTower, build_model, content_basis, parameter_groups
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.embeddings import item_vectors
from gpu_workers.inputs.item_tables import end_of, sample_vectors, sid_table, sids_in_force
from gpu_workers.inputs.prerank import (
    FeedCounts,
    HeldOut,
    Impressions,
    TowerInputs,
    feed_batches,
    load_profiles,
    pair_of,
    passed_through,
    score_impressions,
    without_held_out,
)
from gpu_workers.outputs import commit_rows
from gpu_workers.ranks import Ranks, one_thread
from gpu_workers.worker import worker_main

EXPOSED_ONLY, GPL = "exposed_only", "gpl"
_HIDDEN = 64  # width of each tower's hidden layer
_WEIGHT_DECAY = 1e-4
LOOKS = 8  # evaluations on held-out rows during training
TAIL_SHARE = 0.8  # tail items: all but the most exposed fifth of the items


def run(context: StepContext, ranks: Ranks) -> None:
    """Train and publish unless this very artifact exists, then evaluate on the day after."""
    with ranks.together():
        tokenizer = context.artifact("tokenizer")
        embeddings = context.snapshot("item_embeddings")
    encoder_version = tokenizer.lineage["encoder_version"]
    with item_vectors(embeddings, encoder_version, ranks, before=end_of(context.run_date)) as vectors:
        with ranks.together():
            items = ContentTable.of(vectors.item_index, vectors.vectors)
            index, sids = sids_in_force(context.snapshot("item_sids"), tokenizer.version)
        profiles = load_profiles(context, ranks, items)
        table = sid_table(index, sids, len(items.row_of))
        inputs = TowerInputs(items, table, profiles, context.config.prerank, ranks.device)
        version = artifact_version(context.run_date, context.artifact_fingerprint)
        manifest = context.artifacts.find("preranker", version)
        if manifest is None:
            with one_thread():
                manifest = _train_and_publish(context, ranks, inputs, tokenizer, int(sids.max()) + 1)
        elif ranks.is_main:
            log.info("train_preranker: %s exists, evaluating only", manifest.version)
        rows: list[dict[str, Any]] = []
        with ranks.together():
            if ranks.is_main:  # the model is light: one rank scores a day's impressions in one pass
                rows = _evaluate(context, inputs, manifest)
    commit_rows(context, ranks, "evaluations", rows)


def variants_of(settings: Prerank) -> dict[str, float]:
    """Variant -> lambda."""
    return {EXPOSED_ONLY: 0.0, GPL: settings.lambda_, **{f"{GPL}@{v:g}": v for v in settings.lambda_sweep}}


def bundle_name(variant: str, seed: int) -> str:
    """Name of one trained model in the bundle."""
    return f"{variant}-seed{seed}"


def _train_and_publish(
    context: StepContext, ranks: Ranks, inputs: TowerInputs, tokenizer: Manifest, codes: int
) -> Manifest:
    settings = context.config.prerank
    models: dict[str, TwoTower] = {}
    losses: dict[str, float] = {}
    counts: list[FeedCounts] = []  # per seed, all alike
    for seed in settings.seeds:
        trained, seen = _train(context, ranks, inputs, tokenizer.version, codes, seed)
        counts.append(seen)
        for name, (model, loss) in trained.items():
            models[bundle_name(name, seed)] = model
            losses[bundle_name(name, seed)] = loss
    text = ""
    with ranks.together():
        if ranks.is_main:
            text = _publish(context, inputs, tokenizer, models, losses, counts[0]).version
    version = ranks.broadcast_text(text)
    manifest = context.artifacts.find("preranker", version)
    assert manifest is not None  # rank 0 has just published it
    return manifest


def _train(
    context: StepContext, ranks: Ranks, inputs: TowerInputs, sid_version: str, codes: int, seed: int
) -> tuple[dict[str, tuple[TwoTower, float]], FeedCounts]:
    """Every variant's model and its mean loss over the last 100 steps, and the counts of the first epoch."""
    settings = context.config.prerank
    feed = passed_through(context, "training_feed", settings.pair_features)
    files = feed.select(start=context.run_date - timedelta(days=settings.train_days - 1), end=context.run_date)
    facts = FeedCounts(np.zeros(len(inputs.sids), dtype=np.int64))
    engines: dict[str, Any] = {}
    lambdas = variants_of(settings)
    recent: dict[str, list[float]] = {name: [] for name in lambdas}
    best = {name: BestWeights() for name in lambdas}
    apart = HeldOut(inputs, feed_batches(feed, files, 8192, settings, seed=seed, epoch=0))
    every = max(1, settings.steps // LOOKS)
    step, epoch = 0, 0
    while step < settings.steps:
        before = step
        for batch in feed_batches(feed, files, settings.batch_size, settings, seed=seed, epoch=epoch):
            if epoch == 0:
                facts.add(batch, sid_version, context.run_date)
            batch = without_held_out(batch)
            if not len(batch["target"]):
                continue
            if not engines:
                engines = _engines(context, ranks, inputs, codes, seed, _prior(batch))
            _step(batch, ranks, inputs, engines, lambdas, recent)
            step += 1
            if step % every == 0 or step == settings.steps:
                for name, engine in engines.items():
                    best[name].offer(step, engine.module, apart.score(engine.module), apart.clicks)
            if ranks.is_main and step % 100 == 0:
                means = ", ".join(f"{name} {np.mean(values[-100:]):.4f}" for name, values in recent.items())
                log.info("train_preranker: step %d of %d, mean loss: %s", step, settings.steps, means)
            if step >= settings.steps:
                break
        if step == before:
            raise MissingInputError(
                f"table training_feed@{feed.version}: no rows in the {settings.train_days} day(s) up to "
                f"{context.run_date}; run training_feed, or check that the dates had requests"
            )
        epoch += 1
    if not facts.exposed or not facts.unexposed:
        log.warning("train_preranker: %d exposed and %d unexposed rows", facts.exposed, facts.unexposed)
    trained = {}
    for name, engine in engines.items():
        best[name].restore(engine.module)
        if ranks.is_main:
            log.info("train_preranker: %s keeps step %d, held-out AUC %s", name, best[name].step, best[name].value)
        trained[name] = (engine.module, float(np.mean(recent[name][-100:])))
    return trained, facts


def _engines(
    context: StepContext, ranks: Ranks, inputs: TowerInputs, codes: int, seed: int, prior: float
) -> dict[str, Any]:
    """One DeepSpeed engine per variant, all from the same initial weights."""
    settings = context.config.prerank
    sizes = TowerConfig(
        user_buckets=settings.buckets, item_buckets=settings.buckets, dimension=settings.dimension,
        hidden=_HIDDEN, content_width=inputs.items.vectors.shape[1], levels=inputs.sids.shape[1], codes=codes,
        prior_rate=prior, pair_features=settings.pair_features,
    )  # fmt: skip
    own = {
        "train_micro_batch_size_per_gpu": max(1, settings.batch_size // ranks.size),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},  # the model is small compared with its batches
        "steps_per_print": 1_000_000,
    }
    basis = content_basis(torch.from_numpy(sample_vectors(inputs.items)), settings.dimension)
    engines = {}
    for name in variants_of(settings):
        model = build_model(sizes, seed, basis).to(ranks.device)
        groups = parameter_groups(model, settings.learning_rate)
        optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
        engines[name], *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(own))
    return engines


def _step(
    batch: dict[str, np.ndarray],
    ranks: Ranks,
    inputs: TowerInputs,
    engines: dict[str, Any],
    lambdas: dict[str, float],
    recent: dict[str, list[float]],
) -> None:
    mine = {name: values[ranks.rank :: ranks.size] for name, values in batch.items()}
    tower = inputs.batch(mine["user_id"], mine["item_index"], pair_of(mine, inputs.settings))
    target, exposed, weight = (
        torch.from_numpy(np.ascontiguousarray(mine[name])).to(ranks.device)
        for name in ("target", "is_exposed", "sample_weight")
    )
    mass: RowMass | None = None
    if ranks.size > 1:  # means are over the whole batch, not over each rank's part of it
        both = torch.stack(row_mass(exposed)) / ranks.size
        dist.all_reduce(both)
        mass = RowMass(*torch.unbind(both))
    for name, engine in engines.items():
        loss = dual_label_loss(engine(tower), target, exposed, weight, lambdas[name], mass=mass)
        engine.backward(loss)
        engine.step()
        recent[name].append(loss.item())


def _prior(batch: dict[str, np.ndarray]) -> float:
    """Click rate of the first batch's exposed rows (all rows when none is exposed), kept away from 0 and 1."""
    rows = batch["is_exposed"] if batch["is_exposed"].any() else np.ones(len(batch["target"]), dtype=bool)
    return float(np.clip(batch["target"][rows].mean(), 1e-3, 0.5))


def _publish(
    context: StepContext,
    inputs: TowerInputs,
    tokenizer: Manifest,
    models: dict[str, TwoTower],
    losses: dict[str, float],
    facts: FeedCounts,
) -> Manifest:
    lineage = {
        "sid_version": tokenizer.version, "encoder_version": tokenizer.lineage["encoder_version"],
        "model_version": ",".join(sorted(facts.model_versions)),
        "calibrator_version": ",".join(sorted(facts.calibrator_versions)),
    }  # fmt: skip
    measured = {
        "exposed_rows": facts.exposed, "unexposed_rows": facts.unexposed,
        "rows_of_other_sid_version": facts.other_sid_version, "last_mean_loss": losses,
    }  # fmt: skip
    context.counts.details |= measured
    with scratch_folder() as folder:
        through, lambda_ = context.run_date.isoformat(), context.config.prerank.lambda_
        about = {"lineage": lineage, "lambda": lambda_, "trained_through": through}
        export_bundle(folder, models, inputs.profiles.table, inputs.sids, inputs.items.content, about)
        np.save(folder / "exposures.npy", facts.exposures)
        manifest = context.publish(folder, lineage, measured)
    log.info("train_preranker: published preranker %s", manifest.version)
    return manifest


def _evaluate(context: StepContext, inputs: TowerInputs, manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of `evaluations` from the impressions of the day after; none without them."""
    day, settings = context.run_date + timedelta(days=1), context.config.prerank
    if not context.has("impressions"):
        return []
    snapshot = passed_through(context, "impressions", [*settings.pair_features, settings.propensity])
    files = snapshot.select(start=day, end=day)
    if not files:
        log.info("train_preranker: no impressions of %s yet, nothing to evaluate on", day)
        return []
    folder = context.artifacts.fetch(manifest)
    names = {bundle_name(v, s): (v, s) for v in variants_of(settings) for s in settings.seeds}
    models = {name: load_variant(folder, name).to(inputs.device) for name in names}
    found = score_impressions(snapshot, files, inputs, models)
    exposures = np.load(folder / "exposures.npy", allow_pickle=False)
    rows = []
    for name, (variant, seed) in names.items():
        for part, chosen in slices_of(found, exposures).items():
            for figure in figures_of(found, found.scores[name], chosen):
                about = {"run_id": context.run_id, "model": variant, "seed": seed, "slice": part}
                rows.append(about | asdict(figure))
                if figure.metric in ("auc", "gauc") and figure.value is not None:
                    log.info("train_preranker: %s %s %s = %.4f", name, part, figure.metric, figure.value)
    return rows


def slices_of(found: Impressions, exposures: np.ndarray) -> dict[str, np.ndarray]:
    """Slice -> bool [n]. uniform: exploration traffic, unbiased; tail: items outside the most exposed fifth."""
    order = np.argsort(-exposures, kind="stable")
    head = np.zeros(len(exposures), dtype=bool)
    head[order[: round((1 - TAIL_SHARE) * len(exposures))]] = True
    head &= exposures > 0
    is_head = (found.item_index < len(head)) & head[np.minimum(found.item_index, len(head) - 1)]
    return {"exposed": ~found.is_random, "uniform": found.is_random, "tail": ~is_head}


def figures_of(found: Impressions, scores: np.ndarray, chosen: np.ndarray) -> list[Figure]:
    """AUC, GAUC, HR and NDCG of one variant on one slice; the off-policy AUC where propensities are given."""
    s, y = scores[chosen], found.clicked[chosen]
    lists, keys = found.request[chosen], (found.item_index[chosen] * 2_654_435_761) % 2**32
    propensity = found.propensity[chosen]
    return [
        *([metrics.snips_auc(s, y, propensity)] if np.isfinite(propensity).any() else []),
        metrics.auc(s, y),
        metrics.gauc(s, y, found.user[chosen]),
        *(metrics.ranked(kind, s, y, lists, keys, k) for kind in ("hr", "ndcg") for k in (3, 10)),
    ]


if __name__ == "__main__":
    worker_main("train_preranker", run)
