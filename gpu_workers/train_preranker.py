"""Train and evaluate the reference pre-ranker: training_feed -> artifact preranker, evaluations.

deepspeed --num_accelerators 2 gpu_workers/train_preranker.py --config quickstart --run-date 2026-01-03

Variants: `exposed_only`, `gpl`, and one `gpl@VALUE` per value of `prerank.lambda_sweep`; how they train:
`gpu_workers/prerank_training.py`. All are evaluated on the day after the run date, once its impressions exist.
"""

from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np

from gpl_core.conf.sections import Prerank
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.artifacts import Manifest, artifact_version
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.prerank import metrics
from gpl_core.prerank.export import export_bundle, load_variant
from gpl_core.prerank.metrics import Figure
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.embeddings import item_vectors
from gpu_workers.inputs.item_tables import end_of, sid_table, sids_in_force
from gpu_workers.inputs.prerank import (
    FeedCounts,
    FeedRows,
    Impressions,
    TowerInputs,
    load_profiles,
    passed_through,
    score_impressions,
)
from gpu_workers.outputs import commit_rows
from gpu_workers.prerank_training import Trained, Variant, train_variants
from gpu_workers.ranks import Ranks, one_thread
from gpu_workers.worker import worker_main

EXPOSED_ONLY, GPL = "exposed_only", "gpl"
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


def variants_of(settings: Prerank) -> tuple[Variant, ...]:
    """What is trained."""
    return (
        Variant(EXPOSED_ONLY, 0.0),
        Variant(GPL, settings.lambda_),
        *(Variant(f"{GPL}@{v:g}", v) for v in settings.lambda_sweep),
    )


def bundle_name(variant: str, seed: int) -> str:
    """Name of one trained model in the bundle."""
    return f"{variant}-seed{seed}"


def _train_and_publish(
    context: StepContext, ranks: Ranks, inputs: TowerInputs, tokenizer: Manifest, codes: int
) -> Manifest:
    settings = context.config.prerank
    trained: dict[str, Trained] = {}
    with scratch_folder() as folder:
        with ranks.together():
            rows = FeedRows(context, inputs, tokenizer.version, folder)
        for seed in settings.seeds:
            found = train_variants(variants_of(settings), rows, inputs, ranks, codes, seed)
            trained |= {bundle_name(name, seed): one for name, one in found.items()}
    text = ""
    with ranks.together():
        if ranks.is_main:
            text = _publish(context, inputs, tokenizer, trained, rows.counts).version
    version = ranks.broadcast_text(text)
    manifest = context.artifacts.find("preranker", version)
    assert manifest is not None  # rank 0 has just published it
    return manifest


def _publish(
    context: StepContext,
    inputs: TowerInputs,
    tokenizer: Manifest,
    trained: dict[str, Trained],
    facts: FeedCounts,
) -> Manifest:
    lineage = {
        "sid_version": tokenizer.version, "encoder_version": tokenizer.lineage["encoder_version"],
        "model_version": ",".join(sorted(facts.model_versions)),
        "calibrator_version": ",".join(sorted(facts.calibrator_versions)),
    }  # fmt: skip
    measured = {
        "exposed_rows": facts.exposed, "unexposed_rows": facts.unexposed,
        "rows_of_other_sid_version": facts.other_sid_version,
        "last_mean_loss": {name: one.loss for name, one in trained.items()},
    }  # fmt: skip
    context.counts.details |= measured
    with scratch_folder() as folder:
        through, lambda_ = context.run_date.isoformat(), context.config.prerank.lambda_
        about = {"lineage": lineage, "lambda": lambda_, "trained_through": through}
        models = {name: one.model for name, one in trained.items()}
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
    names = {bundle_name(v.name, s): (v.name, s) for v in variants_of(settings) for s in settings.seeds}
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
