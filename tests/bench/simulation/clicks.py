"""The product's `quantile` labels in the study, by `exposed_clicks` or one score.

Made as the pipeline makes them, but once for all training days, and from rows: a pair counts as often as it was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gpl_core.conf.sections import CalibratorSettings
from gpl_core.labels import calibration, fitting
from gpl_core.labels.calibration import Calibrator, FittedOn
from tests.bench.simulation.logistic import fit_logistic
from tests.bench.simulation.world import L, Scores, World


def quantile_labels(
    world: World,
    rate: float,
    features: Sequence[str] = calibration.FEATURES,
    across_users: str = "user_rate",
    prefix_share: float = CalibratorSettings().prefix_share,
) -> np.ndarray:
    """Labels [len(world.train)] of mean `rate` over the unexposed candidates; NaN where the user has no anchors.

    One feature ranks by itself; what several say together a regression on exposed clicks decides, unexposed pairs
    beside them, and prefix_log_prob, where it is one of them, has its share in the order.
    """
    counts, train, past, shown = world.known.counts, world.train, world.past, world.past_scores
    rate_of_all, user_strength = user_prior(world)
    start = Calibrator(
        "quantile", FittedOn("exposed", 0, 0, "", "", rate), features=tuple(features), weights=(0.0,) * len(features),
        spread=CalibratorSettings().spread, across_users=across_users,
        prior_rate=rate_of_all, user_strength=user_strength, item_strength=_prior(counts, "item")[1],
    )  # fmt: skip
    weights: Sequence[float] = (1.0,)
    if len(features) > 1:
        x, seen = calibration.feature_values(start, columns_of(world, shown))[shown.known], past.is_exposed[shown.known]
        mass = np.where(seen, 1.0, fitting.UNEXPOSED_SHARE * seen.sum() / max(1, (~seen).sum()))
        weights = fit_logistic(x, past.clicked[shown.known], weights=mass).weights
    columns = columns_of(world, world.train_scores)
    rows = np.flatnonzero(~train.is_exposed & world.train_scores.known)
    score = (calibration.feature_values(start, columns) @ np.array(weights))[rows]
    day = np.unique(train.dt[rows], return_inverse=True)[1]
    user_day = train.user[rows] * (day.max() + 1) + day
    if len(features) > 1 and "prefix_log_prob" in features:
        prefix = columns["prefix_log_prob"][rows]
        variances = (variance_within(user_day, values) for values in (score, prefix))
        score = score + fitting.prefix_weight(prefix_share, *variances) * prefix
    ranks = ranks_within(user_day, score)
    parts = {"user_rate": calibration.user_rate(start, columns)[rows], "user_rank": ranks}
    logits = calibration.user_logit(start, **parts)
    location = fitting.fit_location(logits, 1.0 / world.sampling_probability[rows], rate)
    labels = np.full(len(train), np.nan)
    labels[rows] = calibration.apply(replace(start, location=location), parts)
    return labels


def variance_within(user: np.ndarray, values: np.ndarray) -> float:
    """Variance of values [n] around the mean of each one's user."""
    group = np.unique(user, return_inverse=True)[1]
    mean = np.bincount(group, values) / np.bincount(group)
    return float(np.mean((values - mean[group]) ** 2))


def ranks_within(user: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(below + ties / 2 + 1/2) / (others + 1) of every pair among the other pairs of its user, [n]."""
    order = np.lexsort((score, user))
    u, s = user[order], score[order]
    first = np.concatenate([[True], u[1:] != u[:-1]])
    tied = np.cumsum(first | np.concatenate([[True], s[1:] != s[:-1]])) - 1
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, len(u)))
    place = np.arange(len(u)) - np.repeat(starts, sizes)
    mean_place = np.bincount(tied, place) / np.bincount(tied)
    out = np.empty(len(u))
    out[order] = (mean_place[tied] + 0.5) / np.repeat(sizes, sizes)
    return out


def columns_of(world: World, scores: Scores) -> Mapping[str, np.ndarray]:
    """What a calibrator's features are made of."""
    nothing_known = -np.log(len(np.unique(world.sids[~world.is_new], axis=0)))
    prefix = L * np.log(scores.anchor_likelihood)
    columns = {name: getattr(scores, name) for name in (*calibration.SCORES[:2], *calibration.COUNT_COLUMNS)}
    return columns | {"prefix_log_prob": np.where(np.isfinite(prefix), prefix, nothing_known)}


def user_prior(world: World) -> tuple[float, float]:
    """The click rate of all users, and how many impressions it counts for in a user's own."""
    return _prior(world.known.counts, "user")


def _prior(counts: Mapping[str, np.ndarray], owner: str) -> tuple[float, float]:
    shown = (counts[f"{owner}_{what}"].astype(np.float64) for what in ("clicks", "impressions"))
    return fitting.click_prior([np.stack([*shown], axis=1)])
