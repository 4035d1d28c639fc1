"""What each variant trains on: the same exposed rows, and what it believes about unexposed pairs.

| variant | unexposed rows |
|---|---|
| exposed_only, exposed_only_id | none; the latter without content, profile and SIDs |
| ipw | none; exposed rows weighted by 1 / estimated exposure propensity |
| random_negatives | random released items, label 0 |
| constant, shuffled | the pairs of gpl_quantile with the target rate, or with its labels permuted |
| distilled | the labels of a teacher trained on exposed pairs |
| cosine_quantile | max cosine to history instead of anchors: no language model |
| gpl_quantile, gpl_unweighted | anchor similarity; with confidence weights, or all alike |
| gpl_quantile@f | the same, target rate fixed beforehand to f x the exposed click rate: no uniform rows needed |
| gpl_logistic, logistic_no_anchors | all features; all but the anchors' |
| oracle_hard, oracle_probability | clicks drawn from the true probabilities; the probabilities themselves |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpl_core.labels import calibration, fitting
from gpl_core.labels.calibration import FEATURES, Calibrator, FittedOn
from gpl_core.labels.confidence import Exponents, combined_weight
from tests.bench.simulation.world import Pairs, Scores, World

CONTROLS = (
    "exposed_only", "exposed_only_id", "ipw", "random_negatives", "constant", "shuffled", "distilled",
    "cosine_quantile", "logistic_no_anchors",
)  # fmt: skip
FIXED = (0.25, 0.5, 1.0)
GPL = ("gpl_quantile", "gpl_unweighted", *(f"gpl_quantile@{f:g}" for f in FIXED), "gpl_logistic")
ORACLES = ("oracle_hard", "oracle_probability")
ALL = (*CONTROLS, *GPL, *ORACLES)
QUICK = (
    "exposed_only", "random_negatives", "constant", "cosine_quantile", "logistic_no_anchors", "gpl_quantile",
    "gpl_logistic", "oracle_hard",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Training rows of one variant, arrays of one length.

    with_content: False takes content, profile and SIDs away from the towers.
    """

    user: np.ndarray
    item: np.ndarray
    is_exposed: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    lambda_: float
    with_content: bool = True


def rows_of(name: str, world: World, seed: int, lambda_: float, teacher: np.ndarray | None = None) -> Rows:
    """Rows of variant `name`; teacher: predicted click probabilities [len(world.train)], for `distilled`."""
    train = world.train
    exposed = train.is_exposed
    rng = np.random.default_rng([seed, 17])
    if name in ("exposed_only", "exposed_only_id"):
        return _joined(train, ~exposed, np.zeros(len(train)), None, 0.0, name == "exposed_only")
    if name == "ipw":
        weight = _inverse_propensity(world)
        shown = train.take(exposed)
        nothing = np.zeros(len(shown), dtype=bool)
        return Rows(shown.user, shown.item, nothing, shown.clicked, weight[exposed], 1.0)
    labels, weight = _labels(name, world, rng, teacher)
    usable = ~exposed & np.isfinite(labels)
    made = _joined(train, usable, np.nan_to_num(labels), weight, lambda_, True)
    if name == "random_negatives":
        released = np.flatnonzero(~world.is_new)
        item = np.where(made.is_exposed, made.item, rng.choice(released, len(made.item)))
        return Rows(made.user, item, made.is_exposed, made.target, made.weight, lambda_)
    return made


def _joined(
    train: Pairs, unexposed: np.ndarray, labels: np.ndarray, weight: np.ndarray | None, lambda_: float, content: bool
) -> Rows:
    """Exposed rows and the chosen unexposed ones; weights of the latter scaled to a mean of 1."""
    chosen = train.is_exposed | unexposed
    scaled = np.ones(len(train)) if weight is None else weight / weight[unexposed].mean()
    target = np.where(train.is_exposed, train.clicked, labels)
    return Rows(
        train.user[chosen], train.item[chosen], train.is_exposed[chosen], target[chosen],
        np.where(train.is_exposed, 1.0, scaled)[chosen], lambda_, content,
    )  # fmt: skip


def _labels(
    name: str, world: World, rng: np.random.Generator, teacher: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(labels [n], NaN where the variant has none, weights or None for all alike)."""
    train, scores = world.train, world.train_scores
    base = uniform_rate(world)
    if name == "random_negatives":
        return np.zeros(len(train)), None
    if name == "oracle_hard":
        return (rng.random(len(train)) < train.probability).astype(np.float64), None
    if name == "oracle_probability":
        return train.probability, None
    if name == "distilled":
        assert teacher is not None, "distilled needs the teacher's predictions"
        return teacher, None
    if name == "cosine_quantile":
        return _quantile(scores.history_similarity, ~train.is_exposed & scores.known, base), None
    if name in ("gpl_logistic", "logistic_no_anchors"):
        features = FEATURES if name == "gpl_logistic" else FEATURES[1:]
        labels = _logistic(world, features)
        return labels, _confidence(scores) if name == "gpl_logistic" else None
    rate = base
    if "@" in name:
        rate = float(name.split("@")[1]) * float(train.clicked[train.is_exposed].mean())
    labels = _quantile(scores.similarity, ~train.is_exposed & scores.known, rate)
    if name == "constant":
        return np.where(np.isfinite(labels), base, np.nan), None
    if name == "shuffled":
        known = np.flatnonzero(np.isfinite(labels) & ~train.is_exposed)
        labels[known] = labels[rng.permutation(known)]
        return labels, None
    return labels, None if name == "gpl_unweighted" else _confidence(scores)


def uniform_rate(world: World) -> float:
    """Click rate of the past's uniformly exposed pairs."""
    return float(world.uniform.clicked.mean())


def _quantile(similarity: np.ndarray, chosen: np.ndarray, rate: float) -> np.ndarray:
    """Labels of the `quantile` calibrator fitted on the chosen pairs; NaN where the similarity is."""
    cell, fraction = calibration.grid_position(similarity[chosen])
    counts = np.bincount(cell, minlength=calibration.GRID_CELLS).astype(np.float64)
    inside = np.bincount(cell, fraction, minlength=calibration.GRID_CELLS) / np.maximum(counts, 1)
    knots = fitting.fit_quantile(counts, rate, fractions=inside)
    fitted = fitting.grid_calibrator("quantile", knots, FittedOn("unlabelled", int(counts.sum()), 0, "", "", rate))
    labels = np.full(len(similarity), np.nan)
    known = np.isfinite(similarity)
    labels[known] = calibration.apply(fitted, {"similarity": similarity[known]})
    return labels


def _logistic(world: World, features: tuple[str, ...]) -> np.ndarray:
    """Labels of the `logistic` calibrator fitted on the past's uniform pairs."""
    base = uniform_rate(world)
    shape = Calibrator(
        "logistic", FittedOn("uniform", 0, 0, "", "", base), features=features, weights=(0.0,) * len(features),
        prior_rate=base,
    )  # fmt: skip
    known = world.uniform_scores.known
    fitting.check_fitting_rows("uniform", int(known.sum()), int(world.uniform.clicked[known].sum()), 200)
    x = calibration.feature_values(shape, _columns(world, world.uniform.take(known), world.uniform_scores, known))
    fit = fitting.fit_logistic(x, world.uniform.clicked[known])
    fitted = Calibrator(
        "logistic", shape.fitted_on, features=features, weights=fit.weights, intercept=fit.intercept, prior_rate=base
    )  # fmt: skip
    there = world.train_scores.known
    labels = np.full(len(world.train), np.nan)
    labels[there] = calibration.apply(fitted, _columns(world, world.train.take(there), world.train_scores, there))
    return labels


def _columns(world: World, pairs: Pairs, scores: Scores, chosen: np.ndarray) -> dict[str, np.ndarray]:
    counts = {
        name: values[pairs.item if name.startswith("item") else pairs.user] for name, values in world.counts.items()
    }
    return {
        "similarity": scores.similarity[chosen], "history_similarity": scores.history_similarity[chosen], **counts
    }  # fmt: skip


def _confidence(scores: Scores) -> np.ndarray:
    factors = (np.nan_to_num(f) for f in (scores.coherence, scores.consistency, scores.llm_confidence))
    return combined_weight(*factors, Exponents())


def _inverse_propensity(world: World) -> np.ndarray:
    """1 / P(exposed | recalled), estimated by a logistic regression on log popularity and cosine to history; <= 10."""
    train = world.train
    x = np.stack(
        [np.log1p(world.counts["item_positives"][train.item]), np.nan_to_num(world.train_scores.history_similarity)],
        axis=1,
    )
    population = 1.0 / world.sampling_probability  # unexposed rows are a sample
    fit = fitting.fit_logistic(x, train.is_exposed.astype(np.float64), weights=population)
    weight = np.minimum(1.0 / calibration.sigmoid(x @ np.array(fit.weights) + fit.intercept), 10.0)
    return weight / weight[train.is_exposed].mean()
