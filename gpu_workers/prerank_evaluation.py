"""Figures of trained pre-rankers on the impressions of the day after the run date."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.files import DataFile
from gpl_core.prerank import metrics
from gpl_core.prerank.comparison import ALL_SEEDS, compared
from gpl_core.prerank.metrics import Figure
from gpl_core.prerank.two_tower import TwoTower
from gpu_workers.inputs.prerank import Impressions, TowerInputs, passed_through, score_impressions

TAIL_SHARE = 0.8  # tail items: all but the most exposed fifth of the items


def impressions_after(context: StepContext) -> tuple[DataFile, ...]:
    """The files of the day after the run date; none while they are not there."""
    day = context.run_date + timedelta(days=1)
    files = context.snapshot("impressions").select(start=day, end=day) if context.has("impressions") else ()
    if not files:
        log.info("%s: no impressions of %s yet, nothing to evaluate on", context.step.name, day)
    return files


def evaluation_rows(
    context: StepContext,
    inputs: TowerInputs,
    models: Mapping[tuple[str, int], TwoTower],
    exposures: np.ndarray,
    pairs: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """Rows of `evaluations`; logs what matters most.

    models: by (variant, seed); exposures: exposed training rows by item_index; pairs: variants to compare.
    """
    settings = context.config.prerank
    snapshot = passed_through(context, "impressions", [*settings.pair_features, settings.propensity])
    found = score_impressions(snapshot, impressions_after(context), inputs, models)
    rows = []
    for part, chosen in slices_of(found, exposures).items():
        for row in compared({key: figures_of(found, s, chosen) for key, s in found.scores.items()}, pairs):
            rows.append({"run_id": context.run_id, "slice": part, **row})
            if row["seed"] == ALL_SEEDS and row["metric"] in ("auc", "gauc") and row["value"] is not None:
                against = f" - {row['against']}" if row["against"] else ""
                log.info("%s%s, %s %s = %.4f", row["model"], against, part, row["metric"], row["value"])
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
    s, y, users = scores[chosen], found.clicked[chosen], found.user[chosen]
    lists, keys = found.request[chosen], (found.item_index[chosen] * 2_654_435_761) % 2**32
    propensity = found.propensity[chosen]
    return [
        *([metrics.snips_auc(s, y, propensity, users)] if np.isfinite(propensity).any() else []),
        metrics.auc(s, y, users),
        metrics.gauc(s, y, users),
        *(metrics.ranked(kind, s, y, lists, keys, k, users) for kind in ("hr", "ndcg") for k in (3, 10)),
    ]
