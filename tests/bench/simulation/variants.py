"""What each variant trains on: the same exposed rows, and what it believes about unexposed pairs.

| variant | unexposed rows |
|---|---|
| exposed_only, exposed_only_id | none; the latter without content, profile and SIDs |
| ipw | none; exposed rows weighted by 1 / estimated exposure propensity |
| random_negatives | random released items, label 0 |
| constant, shuffled, popularity, cosine, user_rate | the pairs of gpl_clicks with the product's control labels |
| distilled | the labels of a teacher trained on exposed pairs |
| gpl_clicks | the product's default: rank by exposed clicks, prefix_log_prob with a share; the user's rate as level |
| clicks_no_share | gpl_clicks, but prefix_log_prob has no share of its own in the order: a feature like the others |
| clicks_no_anchors | gpl_clicks without the language model |
| gpl_weighted | gpl_clicks with the paper's confidence as weight |
| gpl_prefix | the rank is by prefix_log_prob alone |
| gpl_content | the same, one level for all users: the content-only labels of docs/method.md |
| gpl_logistic, logistic_no_anchors | the `logistic` calibrator on uniform rows; without the language model |
| any@f | target rate fixed beforehand to f x the exposed click rate: no uniform rows needed |
| any@f/l | so, and with lambda l |
| oracle_hard, oracle_probability | clicks drawn from the true probabilities; the probabilities themselves |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpl_core.conf.sections import CalibratorSettings
from gpl_core.labels import calibration, controls, fitting
from gpl_core.labels.calibration import Calibrator, FittedOn
from gpl_core.labels.confidence import combined_weight
from tests.bench.simulation.clicks import columns_of, quantile_labels, user_prior
from tests.bench.simulation.logistic import fit_logistic
from tests.bench.simulation.world import Scores, World

CONTROLS = ("exposed_only", "exposed_only_id", "ipw", "random_negatives", *controls.CONTROLS, "distilled")
NO_UNIFORM_ROWS = ("gpl_content@1", "gpl_prefix@1", "gpl_clicks@0.5/2", "gpl_clicks@1")
UNIFORM_ROWS = ("gpl_clicks", "logistic_no_anchors", "gpl_logistic")
GPL = (*NO_UNIFORM_ROWS, "clicks_no_share@1", "clicks_no_anchors@1", "gpl_weighted@1", *UNIFORM_ROWS)
ORACLES = ("oracle_hard", "oracle_probability")
ALL = (*CONTROLS, *GPL, *ORACLES)
QUICK = (
    "exposed_only", "random_negatives", *controls.CONTROLS, "gpl_clicks@1", "clicks_no_anchors@1", "gpl_prefix@1",
    "logistic_no_anchors", "gpl_logistic", "oracle_hard",
)  # fmt: skip

_NO_ANCHORS = tuple(f for f in calibration.FEATURES if f not in ("similarity", "prefix_log_prob"))
_QUANTILE: dict[str, dict[str, Any]] = {
    "clicks_no_share": {"prefix_share": 0.0},
    "clicks_no_anchors": {"features": _NO_ANCHORS},
    "gpl_prefix": {"features": ("prefix_log_prob",)},
    "gpl_content": {"features": ("prefix_log_prob",), "across_users": "global"},
}
"""Variants whose quantile labels differ from the product's -> what `quantile_labels` is told."""
_LOGISTIC = {"gpl_logistic": calibration.FEATURES, "logistic_no_anchors": _NO_ANCHORS}
LAMBDA = 4.0  # the product's default


@dataclass(frozen=True)
class Rows:
    """Training rows of one variant, arrays of one length.

    sampling_probability: 1 for exposed rows. with_content: False takes content, profile and SIDs away from the towers.
    """

    user: np.ndarray
    item: np.ndarray
    is_exposed: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    lambda_: float
    request: np.ndarray
    sampling_probability: np.ndarray
    with_content: bool = True


def rows_of(name: str, world: World, seed: int, teacher: np.ndarray | None = None) -> Rows:
    """Rows of variant `name`; teacher: predicted click probabilities [len(world.train)], for `distilled`."""
    train = world.train
    lambda_ = float(name.split("/")[1]) if "/" in name else LAMBDA
    exposed = train.is_exposed
    rng = np.random.default_rng([seed, 17])
    if name in ("exposed_only", "exposed_only_id"):
        return _joined(world, ~exposed, np.zeros(len(train)), None, 0.0, name == "exposed_only")
    if name == "ipw":
        weight = _inverse_propensity(world)
        shown = train.take(exposed)
        nothing = np.zeros(len(shown), dtype=bool)
        ones = np.ones(len(shown))
        return Rows(shown.user, shown.item, nothing, shown.clicked, weight[exposed], 1.0, shown.request, ones)
    labels, weight = _labels(name, world, rng, teacher)
    usable = ~exposed & np.isfinite(labels)
    made = _joined(world, usable, np.nan_to_num(labels), weight, lambda_, True)
    if name == "random_negatives":
        released = np.flatnonzero(~world.is_new)
        item = np.where(made.is_exposed, made.item, rng.choice(released, len(made.item)))
        return replace(made, item=item)
    return made


def _joined(
    world: World, unexposed: np.ndarray, labels: np.ndarray, weight: np.ndarray | None, lambda_: float, content: bool
) -> Rows:
    """Exposed rows and the chosen unexposed ones; weights of the latter scaled to a mean of 1."""
    train = world.train
    chosen = train.is_exposed | unexposed
    scaled = np.ones(len(train)) if weight is None else weight / weight[unexposed].mean()
    target = np.where(train.is_exposed, train.clicked, labels)
    return Rows(
        train.user[chosen], train.item[chosen], train.is_exposed[chosen], target[chosen],
        np.where(train.is_exposed, 1.0, scaled)[chosen], lambda_, train.request[chosen],
        world.sampling_probability[chosen], content,
    )  # fmt: skip


def _labels(
    name: str, world: World, rng: np.random.Generator, teacher: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(labels [n], NaN where the variant has none, weights or None for all alike)."""
    train, scores = world.train, world.train_scores
    if name == "random_negatives":
        return np.zeros(len(train)), None
    if name == "oracle_hard":
        return (rng.random(len(train)) < train.probability).astype(np.float64), None
    if name == "oracle_probability":
        return train.probability, None
    if name == "distilled":
        assert teacher is not None, "distilled needs the teacher's predictions"
        return teacher, None
    name, _, fixed = name.partition("@")
    if name in _LOGISTIC:
        return _logistic(world, _LOGISTIC[name]), None
    rate = float(fixed.split("/")[0]) * float(train.clicked[train.is_exposed].mean()) if fixed else uniform_rate(world)
    labels = quantile_labels(world, rate, **_QUANTILE.get(name, {}))
    if name in controls.CONTROLS:
        known = np.flatnonzero(np.isfinite(labels))
        rate_of_all, strength = user_prior(world)
        made = controls.control_labels(
            labels[known], train.user[known], positives=scores.item_positives[known],
            history_similarity=scores.history_similarity[known], user_clicks=scores.user_clicks[known],
            user_impressions=scores.user_impressions[known], spread=CalibratorSettings().spread, by_user=True,
            rate=rate_of_all, strength=strength, days=np.unique(train.dt, return_inverse=True)[1][known],
            candidates=1.0 / world.sampling_probability[known],
        )  # fmt: skip
        labels[known] = made[name]
    return labels, _confidence(scores) if name == "gpl_weighted" else None


def uniform_rate(world: World) -> float:
    """Click rate of the past's uniformly exposed pairs; NaN without any."""
    return float(world.uniform.clicked.mean()) if len(world.uniform) else float("nan")


def _logistic(world: World, features: tuple[str, ...]) -> np.ndarray:
    """Labels of the `logistic` calibrator fitted on the uniform pairs."""
    base = uniform_rate(world)
    shape = Calibrator(
        "logistic", FittedOn("uniform", 0, 0, "", "", base), features=features, weights=(0.0,) * len(features),
        prior_rate=base,
    )  # fmt: skip
    usable, clicked = world.uniform_scores.known, world.uniform.clicked
    fitting.check_fitting_rows(int(usable.sum()), int(clicked[usable].sum()), 200, "simulate more uniform traffic")
    x = calibration.feature_values(shape, columns_of(world, world.uniform_scores))
    fit = fit_logistic(x[usable], clicked[usable])
    labels = calibration.apply(
        replace(shape, weights=fit.weights, intercept=fit.intercept), columns_of(world, world.train_scores)
    )
    return np.where(world.train_scores.known, labels, np.nan)


def _confidence(scores: Scores) -> np.ndarray:
    factors = (np.nan_to_num(f) for f in (scores.coherence, scores.consistency, scores.llm_confidence))
    return combined_weight(*factors)


def _inverse_propensity(world: World) -> np.ndarray:
    """1 / P(exposed | recalled), estimated by a logistic regression on log popularity and cosine to history; <= 10."""
    train = world.train
    popularity = np.log1p(world.train_scores.item_positives)
    x = np.stack([popularity, np.nan_to_num(world.train_scores.history_similarity)], axis=1)
    population = 1.0 / world.sampling_probability  # unexposed rows are a sample
    fit = fit_logistic(x, train.is_exposed.astype(np.float64), weights=population)
    weight = np.minimum(1.0 / calibration.sigmoid(x @ np.array(fit.weights) + fit.intercept), 10.0)
    return weight / weight[train.is_exposed].mean()
