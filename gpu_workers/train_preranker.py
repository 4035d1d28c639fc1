"""Train and evaluate the reference pre-ranker: training_feed -> artifact preranker, evaluations.

deepspeed --num_accelerators 2 gpu_workers/train_preranker.py --config quickstart --run-date 2026-01-03

Variants: `exposed_only`, `gpl`, and one `gpl@VALUE` per value of `prerank.lambda_sweep`; how they train:
`gpu_workers/prerank_training.py`. All are evaluated on the day after the run date, once its impressions exist.
"""

from typing import Any

import numpy as np

from gpl_core.conf.sections import Prerank
from gpl_core.errors import MissingInputError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.prerank.comparison import BASELINE, OURS
from gpl_core.prerank.export import export_bundle, load_variant
from gpu_workers.inputs.prerank import FeedCounts, FeedRows, TowerInputs, tower_inputs
from gpu_workers.outputs import commit_rows
from gpu_workers.prerank_evaluation import evaluation_rows, impressions_after
from gpu_workers.prerank_training import Trained, Variant, train_seeds
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main


def run(context: StepContext, ranks: Ranks) -> None:
    """Train and publish unless this very artifact exists, then evaluate on the day after."""
    with tower_inputs(context, ranks) as inputs:
        if context.artifacts.find("preranker", context.artifact_version) is None:
            _train_and_publish(context, ranks, inputs)
        elif ranks.is_main:
            log.info("train_preranker: %s exists, evaluating only", context.artifact_version)
        rows: list[dict[str, Any]] = []
        with ranks.together():
            if ranks.is_main:  # the model is light: one rank scores a day's impressions in one pass
                rows = _evaluate(context, inputs)
    commit_rows(context, ranks, "evaluations", rows)


def variants_of(settings: Prerank) -> tuple[Variant, ...]:
    """What is trained."""
    return (
        Variant(BASELINE, 0.0),
        Variant(OURS, settings.lambda_),
        *(Variant(f"{OURS}@{v:g}", v) for v in settings.lambda_sweep),
    )


def _train_and_publish(context: StepContext, ranks: Ranks, inputs: TowerInputs) -> None:
    tokenizer, settings = context.artifact("tokenizer"), context.config.prerank
    with scratch_folder() as folder:
        with ranks.together():
            rows = FeedRows(context, inputs, tokenizer.version, folder)
        found = train_seeds(context, variants_of(settings), rows, inputs, ranks)
    trained = {f"{name}-seed{seed}": one for (name, seed), one in found.items()}
    with ranks.together():
        if ranks.is_main:
            _publish(context, inputs, tokenizer, trained, rows.counts)


def _publish(
    context: StepContext, inputs: TowerInputs, tokenizer: Manifest, trained: dict[str, Trained], facts: FeedCounts
) -> None:
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


def _evaluate(context: StepContext, inputs: TowerInputs) -> list[dict[str, Any]]:
    """Rows of `evaluations`; none without impressions of the day after."""
    settings, manifest = context.config.prerank, context.artifacts.find("preranker", context.artifact_version)
    if manifest is None:
        raise MissingInputError(
            f"artifact preranker {context.artifact_version}: gone since it was published; run again"
        )
    if not impressions_after(context):
        return []
    folder = context.artifacts.fetch(manifest)
    models = {
        (v.name, seed): load_variant(folder, f"{v.name}-seed{seed}").to(inputs.device)
        for v in variants_of(settings)
        for seed in settings.seeds
    }
    exposures = np.load(folder / "exposures.npy", allow_pickle=False)
    pairs = [(v.name, BASELINE) for v in variants_of(settings)[1:]]
    return evaluation_rows(context, inputs, models, exposures, pairs)


if __name__ == "__main__":
    worker_main("train_preranker", run)
