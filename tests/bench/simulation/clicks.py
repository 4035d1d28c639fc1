"""The product's default labels in the study: `quantile` by `exposed_clicks`, made as the pipeline makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gpl_core.conf.sections import CalibratorSettings
from gpl_core.labels import calibration, fitting
from gpl_core.labels.calibration import Calibrator, FittedOn
from tests.bench.simulation.logistic import fit_logistic
from tests.bench.simulation.world import Known, L, Pairs, Scores, World


def click_labels(world: World, rate: float, features: Sequence[str] = calibration.FEATURES) -> np.ndarray:
    """Labels [len(world.train)] of mean `rate` over the unexposed rows; NaN where the user has no anchors."""
    counts, train = world.known.counts, world.train
    start = Calibrator(
        "quantile", FittedOn("exposed", 0, 0, "", "", rate), features=tuple(features), weights=(0.0,) * len(features),
        spread=CalibratorSettings().spread,
        prior_rate=float(counts["user_clicks"].sum() / counts["user_impressions"].sum()),
        user_strength=_strength(counts, "user"), item_strength=_strength(counts, "item"),
    )  # fmt: skip
    x = calibration.feature_values(start, _columns(world, world.exposed, world.exposed_scores, world.known_earlier))
    usable = world.exposed_scores.known
    fit = fit_logistic(x[usable], world.exposed.clicked[usable])
    columns = _columns(world, train, world.train_scores, world.known)
    score = calibration.feature_values(start, columns) @ np.array(fit.weights)
    rows = np.flatnonzero(~train.is_exposed & world.train_scores.known)
    ranks = ranks_within(train.user[rows], score[rows])
    parts = {"user_rate": calibration.user_rate(start, columns)[rows], "user_rank": ranks}
    logits = calibration.user_logit(start, **parts)
    location = fitting.fit_location(logits, np.ones(len(rows)), rate)
    labels = np.full(len(train), np.nan)
    labels[rows] = calibration.apply(replace(start, location=location), parts)
    return labels


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


def _columns(world: World, pairs: Pairs, scores: Scores, known: Known) -> Mapping[str, np.ndarray]:
    counts = {n: v[pairs.item if n.startswith("item") else pairs.user] for n, v in known.counts.items()}
    nothing_known = -np.log(len(np.unique(world.sids[~world.is_new], axis=0)))
    prefix = L * np.log(scores.anchor_likelihood)
    return {
        **counts, "similarity": scores.similarity, "history_similarity": scores.history_similarity,
        "prefix_log_prob": np.where(np.isfinite(prefix), prefix, nothing_known),
    }  # fmt: skip


def _strength(counts: Mapping[str, np.ndarray], owner: str) -> float:
    n, k = (counts[f"{owner}_{what}"].astype(np.float64) for what in ("impressions", "clicks"))
    n, k = n[n > 0], k[n > 0]
    squares = float(((k - n * (k.sum() / n.sum())) ** 2).sum())
    return fitting.prior_strength(len(n), float(n.sum()), float(k.sum()), float((n * (n - 1)).sum()), squares)
