"""What each variant trains on: the same exposed rows, and what it believes about unexposed pairs.

| variant | unexposed rows |
|---|---|
| exposed_only, exposed_only_id | none; the latter without content, profile and SIDs |
| ipw | none; exposed rows weighted by 1 / estimated exposure propensity |
| random_negatives | random released items, label 0 |
| constant, shuffled, popularity, cosine, user_rate | the pairs of gpl_clicks with the product's control labels |
| distilled | the labels of a teacher trained on exposed pairs |
| gpl_quantile, gpl_unweighted | anchor similarity; with confidence weights, or all alike |
| gpl_quantile@f | the same, target rate fixed beforehand to f x the exposed click rate: no uniform rows needed |
| any@f/l | so for every label, and with lambda l |
| gpl_clicks, gpl_clicks@f | the product's default: ranks within the user by exposed clicks, the user's rate as level |
| clicks_no_anchors | the same without the language model |
| gpl_logistic, logistic_no_anchors | all features; all but the anchors' |
| gpl_softmax | gpl_quantile with softmax pooling instead of the maximum |
| gpl_prefix, gpl_prefix@f | gpl_quantile of the prefix_log_prob (`labels.calibrator.score`) instead of the similarity |
| gpl_own, gpl_logistic_own | the candidate's own SID likelihood: instead of the similarity; as one more feature |
| gpl_logistic_level1, gpl_logistic_prefix | the same from level 1 alone; from what the cache holds (the product) |
| gpl_learned, gpl_logistic_unweighted | the weights are learned from the uniform slice; all weights alike |
| oracle_hard, oracle_probability | clicks drawn from the true probabilities; the probabilities themselves |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gpl_core.conf.sections import CalibratorSettings
from gpl_core.labels import calibration, controls, fitting
from gpl_core.labels.calibration import Calibrator, FittedOn
from gpl_core.labels.confidence import combined_weight
from tests.bench.simulation.clicks import quantile_labels
from tests.bench.simulation.logistic import fit_logistic
from tests.bench.simulation.world import Scores, World

CONTROLS = (
    "exposed_only", "exposed_only_id", "ipw", "random_negatives", *controls.CONTROLS, "distilled",
    "logistic_no_anchors",
)  # fmt: skip
FIXED = (0.25, 0.5, 1.0)
NO_UNIFORM_ROWS = tuple(f"gpl_{score}@{f:g}" for score in ("quantile", "prefix", "clicks") for f in FIXED)
GPL = ("gpl_quantile", "gpl_unweighted", *NO_UNIFORM_ROWS, "gpl_clicks", "clicks_no_anchors", "gpl_logistic")
EXTRAS = {
    "gpl_prefix": "gpl_quantile", "gpl_softmax": "gpl_quantile", "gpl_own": "gpl_quantile",
    "gpl_learned": "gpl_quantile",
    "gpl_logistic_own": "gpl_logistic", "gpl_logistic_level1": "gpl_logistic", "gpl_logistic_prefix": "gpl_logistic",
    "gpl_logistic_unweighted": "gpl_logistic",
}  # fmt: skip
"""What was tried beyond METHOD -> what it has to beat."""
_LIKELIHOODS = {
    "gpl_logistic_own": "own_likelihood", "gpl_logistic_level1": "level1_likelihood",
    "gpl_logistic_prefix": "anchor_likelihood",
}  # fmt: skip
ORACLES = ("oracle_hard", "oracle_probability")
ALL = (*CONTROLS, *GPL, *EXTRAS, *ORACLES)
QUICK = (
    "exposed_only", "random_negatives", *controls.CONTROLS, "logistic_no_anchors", "gpl_quantile",
    "gpl_prefix", "gpl_logistic", "gpl_logistic_prefix", "oracle_hard",
)  # fmt: skip

FEATURES = ("similarity", "history_similarity", "item_click_logit", "user_click_logit", "log_popularity")
"""METHOD's features of the logistic calibrator."""
_COLUMNS = ("similarity", "history_similarity", *calibration.COUNT_COLUMNS)
_PRODUCT: dict[str, tuple[tuple[str, ...], ...] | tuple[tuple[str, ...], str]] = {
    "gpl_clicks": (), "gpl_weighted": (), "gpl_prefix": (("prefix_log_prob",),),
    "gpl_content": (("similarity",), "global"),
    "clicks_no_anchors": (tuple(f for f in calibration.FEATURES if f not in ("similarity", "prefix_log_prob")),),
}  # fmt: skip
"""Variants with labels that the product makes -> features, and what level they have."""
LAMBDA = 2.0
LAMBDAS: dict[str, float] = {}
"""Variants whose lambda is not LAMBDA."""


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


def rows_of(
    name: str, world: World, seed: int, teacher: np.ndarray | None = None, lambda_: float | None = None
) -> Rows:
    """Rows of variant `name`; teacher: predicted click probabilities [len(world.train)], for `distilled`.

    lambda_: instead of the one in `LAMBDAS`.
    """
    train = world.train
    if lambda_ is None:
        lambda_ = float(name.split("/")[1]) if "/" in name else LAMBDAS.get(name, LAMBDA)
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
    if "logistic" in name:
        features = FEATURES[1:] if name == "logistic_no_anchors" else FEATURES
        labels = _logistic(world, features, _LIKELIHOODS.get(name))
        return labels, None if name in ("logistic_no_anchors", "gpl_logistic_unweighted") else _confidence(scores)
    name, _, fixed = name.partition("@")
    rate = float(fixed.split("/")[0]) * float(train.clicked[train.is_exposed].mean()) if fixed else uniform_rate(world)
    if name in _PRODUCT or name in controls.CONTROLS:
        labels = quantile_labels(world, rate, *_PRODUCT.get(name, ()))
        if name in controls.CONTROLS:
            known = np.flatnonzero(np.isfinite(labels))
            counts = world.known.counts
            made = controls.control_labels(
                labels[known], train.user[known], positives=scores.item_positives[known],
                history_similarity=scores.history_similarity[known], user_clicks=scores.user_clicks[known],
                user_impressions=scores.user_impressions[known], spread=CalibratorSettings().spread, by_user=True,
                rate=float(counts["user_clicks"].sum() / max(1, counts["user_impressions"].sum())),
            )  # fmt: skip
            labels[known] = made[name]
        return labels, _confidence(scores) if name == "gpl_weighted" else None
    ranked = {"gpl_softmax": scores.soft_similarity, "gpl_own": scores.own_likelihood}.get(name, scores.similarity)
    labels = _quantile(ranked, ~train.is_exposed & np.isfinite(ranked), rate)
    if name == "gpl_learned":
        return labels, _learned_confidence(world, rate)
    return labels, None if name == "gpl_unweighted" else _confidence(scores)


def uniform_rate(world: World) -> float:
    """Click rate of the past's uniformly exposed pairs; NaN without any."""
    return float(world.uniform.clicked.mean()) if len(world.uniform) else float("nan")


def _quantile(similarity: np.ndarray, chosen: np.ndarray, rate: float) -> np.ndarray:
    """Labels of the `quantile` calibrator fitted on the chosen pairs; NaN where the similarity is."""
    return _rank_labels(similarity[chosen], rate)(similarity)


def _rank_labels(fitted_on: np.ndarray, rate: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function of scores: labels by their rank among `fitted_on`, across users, of mean `rate` there; NaN for NaN."""
    ordered = np.sort(fitted_on)

    def logits(scores: np.ndarray) -> np.ndarray:
        low, high = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
        return calibration.rank_logits((low + (high - low) / 2 + 0.5) / (len(ordered) + 1), 1.0)

    location = fitting.fit_location(logits(fitted_on), np.ones(len(fitted_on)), rate)
    return lambda scores: np.where(np.isfinite(scores), calibration.sigmoid(location + logits(scores)), np.nan)


def _logistic(world: World, features: tuple[str, ...], likelihood: str | None = None) -> np.ndarray:
    """Labels of the `logistic` calibrator fitted on the uniform pairs; likelihood: its logarithm is a feature too."""
    base = uniform_rate(world)
    shape = Calibrator(
        "logistic", FittedOn("uniform", 0, 0, "", "", base), features=features, weights=(0.0,) * len(features),
        prior_rate=base,
    )  # fmt: skip

    def matrix(scores: Scores) -> np.ndarray:
        x = calibration.feature_values(shape, {name: getattr(scores, name) for name in _COLUMNS})
        return np.column_stack([x, np.log(getattr(scores, likelihood))]) if likelihood else x

    x, clicked = matrix(world.uniform_scores), world.uniform.clicked
    usable = np.isfinite(x).all(axis=1)
    fitting.check_fitting_rows(int(usable.sum()), int(clicked[usable].sum()), 200, "simulate more uniform traffic")
    fit = fit_logistic(x[usable], clicked[usable])
    x = matrix(world.train_scores)
    return calibration.sigmoid(x @ np.array(fit.weights) + fit.intercept)


def _confidence(scores: Scores) -> np.ndarray:
    factors = (np.nan_to_num(f) for f in (scores.coherence, scores.consistency, scores.llm_confidence))
    return combined_weight(*factors)


def _learned_confidence(world: World, rate: float) -> np.ndarray:
    """1 / predicted |error| of the label (ours): least squares on the uniform pairs from the factors and the spread.

    The label itself is among the predictors, else the fit would find that small labels have small errors.
    """
    similarity = world.uniform_scores.similarity
    usable = np.isfinite(similarity)
    unexposed = ~world.train.is_exposed & world.train_scores.known
    labels_of = _rank_labels(world.train_scores.similarity[unexposed], rate)

    def matrix(scores: Scores) -> np.ndarray:
        factors = (scores.coherence, scores.consistency, scores.llm_confidence, scores.spread)
        return np.column_stack([np.ones(len(scores.spread)), labels_of(scores.similarity), *factors])

    x = matrix(world.uniform_scores)[usable]
    error = np.abs(world.uniform.clicked[usable] - x[:, 1])
    coefficients = np.linalg.lstsq(x, error, rcond=None)[0]
    # What the label's own size adds to its error is no lack of confidence: it is held at its mean.
    other = matrix(world.train_scores)
    other[:, 1] = x[:, 1].mean()
    predicted = np.nan_to_num(other @ coefficients, nan=1.0)
    return 1.0 / np.clip(predicted, 0.25 * error.mean(), None)


def _inverse_propensity(world: World) -> np.ndarray:
    """1 / P(exposed | recalled), estimated by a logistic regression on log popularity and cosine to history; <= 10."""
    train = world.train
    popularity = np.log1p(world.train_scores.item_positives)
    x = np.stack([popularity, np.nan_to_num(world.train_scores.history_similarity)], axis=1)
    population = 1.0 / world.sampling_probability  # unexposed rows are a sample
    fit = fit_logistic(x, train.is_exposed.astype(np.float64), weights=population)
    weight = np.minimum(1.0 / calibration.sigmoid(x @ np.array(fit.weights) + fit.intercept), 10.0)
    return weight / weight[train.is_exposed].mean()
