"""Evaluate pre-ranker variants on a simulated marketplace, against true click probabilities -> truth_metrics.

deepspeed --num_accelerators 1 gpu_workers/evaluate_truth.py --config quickstart --run-date 2026-01-04

Not a step of the graph: nothing reads what it writes. The run date is the day after the pre-ranker's last training day;
all its recalled pairs are judged, exposed or not, by expected AUC: a pair counts p as a click and 1 - p as no click.
`bayes` scores each pair by its true probability, which no model can beat in expectation.
"""

from typing import Any

import numpy as np

from gpl_core.errors import MissingInputError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.prerank import metrics
from gpl_core.prerank.comparison import ALL_SEEDS, BASELINE, compared, difference_text, figure_text
from gpl_core.prerank.serving import ServedModel
from gpu_workers.inputs.embeddings import digests
from gpu_workers.inputs.feed import read_batches, rebatch
from gpu_workers.outputs import commit_rows
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main

BAYES = "bayes"
_TRUTH_COLUMNS = ("item_id", "user_id", "true_probability", "is_exposed")


def run(context: StepContext, ranks: Ranks) -> None:
    """Judge every variant of the pre-ranker in force, on one rank: a bundle only needs NumPy."""
    rows: list[dict[str, Any]] = []
    with ranks.together():
        manifest = context.artifact("preranker")
        if ranks.is_main:
            rows = judge(context, manifest)
    commit_rows(context, ranks, "truth_metrics", rows)


def judge(context: StepContext, manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of truth_metrics; logs each figure."""
    folder = context.artifacts.fetch(manifest)
    models = {}
    for name in ServedModel.describe(folder)["variants"]:
        variant, _, seed = name.rpartition("-seed")
        models[variant, int(seed)] = ServedModel(folder, name)
    users, probability, is_exposed, scores_of = _score(context, models)
    scores_of |= {(BAYES, seed): probability for seed in sorted({seed for _, seed in models})}
    pairs = [(model, BASELINE) for model in dict.fromkeys(m for m, _ in models) if model != BASELINE]
    rows = []
    for part, chosen in {"exposed": is_exposed, "unexposed": ~is_exposed}.items():
        p, of = probability[chosen], users[chosen]
        found = {key: [metrics.auc(s[chosen], p, of), metrics.gauc(s[chosen], p, of)] for key, s in scores_of.items()}
        for row in compared(found, pairs):
            rows.append({"slice": part, "preranker_version": manifest.version, **row})
            if row["seed"] == ALL_SEEDS:
                text = difference_text(row) if row["against"] else figure_text(row)
                versus = f" - {row['against']}" if row["against"] else ""
                log.info("evaluate_truth: %s%s, %s, expected %s: %s", row["model"], versus, part, row["metric"], text)
    return rows


def _score(
    context: StepContext, models: dict[tuple[str, int], ServedModel]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[tuple[str, int], np.ndarray]]:
    """(users as 64-bit digests, true probability, is_exposed, scores by model) of the pairs that all models know."""
    names = context.snapshot("items").read(columns=["item_id", "item_index"]).to_pandas()
    numbers = names.set_index("item_id")["item_index"]
    truth = context.snapshot("truth")
    files = truth.select(start=context.run_date, end=context.run_date)
    items = min(len(model.items) for model in models.values())
    users, probabilities, exposed = [], [], []
    scores: dict[tuple[str, int], list[np.ndarray]] = {key: [] for key in models}
    context.counts.rows_in = 0
    for batch in rebatch(read_batches(truth, files, _TRUTH_COLUMNS), 65_536):
        index = numbers.reindex(batch["item_id"], fill_value=-1).to_numpy()
        known = (index >= 0) & (index < items)  # an item that came after the training day has no vector yet
        context.counts.rows_in += len(known)
        context.counts.rows_dropped += int((~known).sum())
        users.append(digests(batch["user_id"][known]))
        probabilities.append(batch["true_probability"][known])
        exposed.append(batch["is_exposed"][known].astype(bool))
        for key, model in models.items():
            scores[key].append(model.score_pairs(batch["user_id"][known].tolist(), index[known]))
    if not users:
        raise MissingInputError(f"table truth@{truth.version}: no rows of {context.run_date}; run gpl simulate for it")
    joined = {key: np.concatenate(held) for key, held in scores.items()}
    return np.concatenate(users), np.concatenate(probabilities), np.concatenate(exposed), joined


if __name__ == "__main__":
    worker_main("evaluate_truth", run)
