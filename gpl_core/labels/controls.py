"""Labels that need no language model: ours have to beat them to be worth their cost (numpy).

| control | label of an unexposed pair |
|---|---|
| constant | the mean of our labels over candidates |
| shuffled | our labels, dealt out at random, brought to the same mean over candidates |
| popularity | rank of the item by positives before the date |
| cosine | rank by the largest cosine to an item of the user's history |
| user_rate | the user's click rate before the date, shrunken to that of all users |

Ranks become logits of a logistic distribution, whose location is such that the mean label is ours. Where our labels
have the level of the user's own click rate, so have those of popularity and cosine. All rank within the user, as ours.
All have weight 1.
"""

import numpy as np
import numpy.typing as npt

from gpl_core.labels import calibration
from gpl_core.labels.calibration import FloatArray, sigmoid
from gpl_core.labels.fitting import fit_location

CONTROLS = ("constant", "shuffled", "popularity", "cosine", "user_rate")


def control_labels(
    labels: FloatArray,
    users: npt.NDArray[np.integer],
    *,
    positives: npt.ArrayLike,
    history_similarity: npt.ArrayLike,
    user_clicks: npt.ArrayLike,
    user_impressions: npt.ArrayLike,
    rate: float,
    strength: float,
    spread: float = 1.0,
    by_user: bool = False,
    days: npt.NDArray[np.integer] | None = None,
    candidates: npt.ArrayLike = 1.0,
) -> dict[str, FloatArray]:
    """Every control's labels [n] for n pairs.

    labels: ours; users: any number per user; positives: of the item; history_similarity: 0 where unknown; user_clicks,
    user_impressions: 0 where unknown; rate: the click rate of all users, strength: how many impressions it counts for
    in a user's own, as for our labels (`fitting.prior_strength`); spread: standard deviation of the ranks' logits;
    by_user: whether our labels have a level per user; days: ranks are within user and day, as ours (default: one day);
    candidates: how many each pair stands for, 1 / sampling_probability: means are over them, as for our labels.
    """
    candidates = np.broadcast_to(np.asarray(candidates, dtype=np.float64), labels.shape)
    mean = float(np.average(labels, weights=candidates))
    own = shrunken_rate(user_clicks, user_impressions, rate, strength)
    level = np.log(own / (1.0 - own)) if by_user else np.zeros(len(labels))
    by_day = users if days is None else np.stack([users, days.astype(users.dtype)])
    groups = np.unique(by_day, axis=-1, return_inverse=True)[1].reshape(-1)
    dealt = np.random.default_rng(0).permutation(labels).clip(1e-9, 1 - 1e-9)  # isotonic ones may be 0 or 1
    return {
        "constant": np.full(len(labels), mean),
        "shuffled": located(np.log(dealt / (1.0 - dealt)), mean, candidates),
        "popularity": located(level + spread * rank_logits(positives, groups), mean, candidates),
        "cosine": located(level + spread * rank_logits(history_similarity, groups), mean, candidates),
        "user_rate": located(np.log(own / (1.0 - own)), mean, candidates),
    }


def shrunken_rate(clicks: npt.ArrayLike, impressions: npt.ArrayLike, rate: float, strength: float) -> FloatArray:
    """(clicks + strength * rate) / (impressions + strength); clicks beyond the impressions count as impressions too."""
    clicks = np.asarray(clicks, dtype=np.float64)
    shown = np.maximum(np.asarray(impressions, dtype=np.float64), clicks)
    return (clicks + strength * rate) / (shown + strength)


def rank_logits(values: npt.ArrayLike, groups: npt.NDArray[np.integer]) -> FloatArray:
    """The logit [n] of each value's rank among its group's, scaled to a standard deviation of 1; equal values tie."""
    both = np.stack([groups.astype(np.float64), np.asarray(values, dtype=np.float64)], axis=1)
    _, place, counts = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    before = np.cumsum(sizes) - sizes
    rank = ((np.cumsum(counts) - counts / 2)[place.reshape(-1)] - before[group]) / sizes[group]
    return calibration.rank_logits(rank, 1.0)


def located(logits: FloatArray, mean: float, candidates: FloatArray) -> FloatArray:
    """sigmoid(location + logits) [n] with the location at which their mean over `candidates` [n] is `mean`."""
    return sigmoid(fit_location(logits, candidates, mean) + logits)
