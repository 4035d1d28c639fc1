"""Labels that need no language model: what ours have to beat before they pay (numpy).

| control | label of an unexposed pair |
|---|---|
| constant | the mean of our labels |
| shuffled | our labels, dealt out at random |
| popularity | rank of the item by positives before the date |
| cosine | rank by the largest cosine to an item of the user's history |
| user_rate | the user's click rate before the date, shrunken to that of all users |

Ranks become labels as under `labels.calibrator.kind: quantile`. All have the mean of our labels, and weight 1.
"""

import numpy as np
import numpy.typing as npt

from gpl_core.labels.calibration import GRID_CELLS, Calibrator, FittedOn, FloatArray, apply
from gpl_core.labels.fitting import fit_quantile, grid_calibrator

CONTROLS = ("constant", "shuffled", "popularity", "cosine", "user_rate")
PRIOR_STRENGTH = 20.0
"""Impressions that the rate of all users counts for in a user's own."""


def control_labels(
    labels: FloatArray,
    *,
    positives: FloatArray,
    history_similarity: FloatArray,
    user_clicks: FloatArray,
    user_impressions: FloatArray,
    rate: float,
    spread: float = 1.0,
) -> dict[str, FloatArray]:
    """Every control's labels [n] for n pairs.

    labels: ours; positives: of the item; history_similarity: 0 where unknown; user_clicks, user_impressions: 0 where
    unknown; rate: the click rate of all users; spread: as of quantile labels.
    """
    mean = float(labels.mean())
    own = shrunken_rate(user_clicks, user_impressions, rate)
    return {
        "constant": np.full(len(labels), mean),
        "shuffled": np.random.default_rng(0).permutation(labels),
        "popularity": ranked_labels(positives, mean, spread),
        "cosine": ranked_labels(history_similarity, mean, spread),
        "user_rate": np.clip(own * (mean / own.mean()), 0.0, 1.0),
    }


def shrunken_rate(clicks: npt.ArrayLike, impressions: npt.ArrayLike, rate: float) -> FloatArray:
    """(clicks + strength * rate) / (impressions + strength); clicks beyond the impressions count as impressions too."""
    clicks = np.asarray(clicks, dtype=np.float64)
    shown = np.maximum(np.asarray(impressions, dtype=np.float64), clicks)
    return (clicks + PRIOR_STRENGTH * rate) / (shown + PRIOR_STRENGTH)


def ranked_labels(values: npt.ArrayLike, mean: float, spread: float = 1.0) -> FloatArray:
    """Labels [n] that rise with the rank of `values` [n], of the distribution of `quantile`; equal values tie."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - counts / 2)[place] / len(place)
    cell = np.minimum((rank * GRID_CELLS).astype(np.int64), GRID_CELLS - 1)
    pairs = np.bincount(cell, minlength=GRID_CELLS)
    inside = np.bincount(cell, rank * GRID_CELLS - cell, minlength=GRID_CELLS) / np.maximum(pairs, 1)
    knots = fit_quantile(pairs.astype(np.float64), mean, spread, inside)
    fitted: Calibrator = grid_calibrator("quantile", knots, FittedOn("unlabeled", len(place), 0, "", "", mean))
    return apply(fitted, {"similarity": 2.0 * rank - 1.0})
