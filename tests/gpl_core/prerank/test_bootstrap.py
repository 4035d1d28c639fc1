"""Replicates against recomputing the figure on drawn users; intervals that cover; seeds count as well as users."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from gpl_core.prerank import bootstrap, metrics
from gpl_core.prerank.bootstrap import interval, over_seeds, replicates
from gpl_core.prerank.metrics import Figure


def _rows(users: int, per_user: int, rng: np.random.Generator, between: float = 0.5):
    """(scores, clicks, users): users differ in how often they click, and scores know it in part."""
    user = np.repeat(np.arange(users), per_user)
    taste, own = rng.normal(size=users * per_user), between * rng.normal(size=users)[user]
    clicks = (rng.random(len(user)) < norm.cdf(taste + own - 0.5)).astype(float)
    return taste + own + rng.normal(size=len(user)), clicks, user


def _repeated(user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Row numbers, those of a user as often as its weight says."""
    return np.repeat(np.arange(len(user)), weights[user].astype(int))


FIGURES: dict[str, Callable[..., Figure]] = {
    "auc": metrics.auc,
    "soft auc": lambda s, y, u: metrics.auc(s, 0.1 + 0.7 * y, u),
    "snips_auc": lambda s, y, u: metrics.snips_auc(s, y, 0.2 + 0.1 * (u % 5), u),
    "gauc": metrics.gauc,
    "ndcg@3": lambda s, y, u: metrics.ranked("ndcg", s, y, u, np.arange(len(s)), 3, u),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_replicate_is_the_figure_of_the_drawn_users(name: str) -> None:
    """Exact where the figure is a mean over users; to first order where it pairs rows of different users."""
    rng = np.random.default_rng(0)
    scores, clicks, user = _rows(200, 8, rng)
    sums = FIGURES[name](scores, clicks, user).sums
    assert sums is not None
    drawn, exact = [], []
    for _ in range(60):
        weights = rng.poisson(1.0, 200)
        counted = weights[np.unique(user[clicks == 1])] if name == "ndcg@3" else weights  # a list needs a positive
        drawn.append((counted @ sums.parts) / (counted @ sums.mass))
        if name in ("gauc", "ndcg@3"):  # a user who is drawn twice is two users, two lists
            again = FIGURES[name](scores, clicks, user)
            values = [FIGURES[name](scores[user == u], clicks[user == u], user[user == u]) for u in range(200)]
            kept = [
                (w, f.value, f.rows if name == "gauc" else 1) for w, f in zip(weights, values) if f.value is not None
            ]
            exact.append(sum(w * n * v for w, v, n in kept) / sum(w * n for w, v, n in kept))
            assert again.value is not None
        else:
            rows = _repeated(user, weights)
            exact.append(FIGURES[name](scores[rows], clicks[rows], user[rows]).value)
    if name in ("gauc", "ndcg@3"):
        assert drawn == pytest.approx(exact)
    else:
        assert np.std(np.array(drawn) - exact) < 0.1 * np.std(exact)
        assert np.mean(drawn) == pytest.approx(np.mean(exact), abs=0.2 * np.std(exact))


def test_intervals_over_users_cover_where_intervals_over_rows_are_too_narrow() -> None:
    rng = np.random.default_rng(1)
    truth = metrics.auc(*_rows(200_000, 5, rng, between=3.0)[:2]).value
    covered = alike = 0
    for _ in range(150):
        scores, clicks, user = _rows(80, 12, rng, between=3.0)
        for rows, of in ((True, np.arange(len(user))), (False, user)):
            sums = metrics.auc(scores, clicks, of).sums
            low, high = interval(over_seeds(replicates([sums], 300)))
            if rows:
                alike += low <= truth <= high
            else:
                covered += low <= truth <= high
    assert 0.88 <= covered / 150 <= 0.99
    assert alike < covered - 15


def test_seeds_widen_the_interval_and_pairs_narrow_it() -> None:
    """Two models that share users and seeds: their difference is known better than each of them."""
    rng = np.random.default_rng(2)
    scores, clicks, user = _rows(300, 10, rng)
    shaken = [np.random.default_rng(seed).normal(size=len(user)) for seed in range(4)]
    models = {
        name: [metrics.auc(scores + lift * clicks + noise * each, clicks, user) for each in shaken]
        for name, lift, noise in (("steady", 0.0, 0.0), ("noisy", 0.0, 1.0), ("lifted", 0.05, 1.0))
    }
    drawn = {name: replicates([f.sums for f in figures]) for name, figures in models.items()}
    width = {name: np.ptp(interval(over_seeds(d))) for name, d in drawn.items()}
    difference = interval(over_seeds(drawn["lifted"] - drawn["noisy"]))
    assert np.ptp(difference) < 0.5 * width["noisy"]
    assert difference[0] > 0
    one_seed = np.ptp(interval(over_seeds(drawn["steady"][:, :1])))
    assert width["steady"] == pytest.approx(one_seed, rel=0.1), "equal seeds add nothing"
    apart = drawn["steady"][:, [0]] + np.array([-0.05, 0.05, -0.05, 0.05])
    assert np.ptp(interval(over_seeds(apart))) > 1.5 * one_seed


def test_the_variance_over_seeds_is_that_of_a_mean() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.9, 0.5])
    drawn = over_seeds(np.repeat(values[None], 40_000, axis=0))
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 5, rel=0.05)


def test_many_users_are_drawn_in_groups(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    scores, clicks, user = _rows(4000, 3, rng)
    whole = metrics.gauc(scores, clicks, user)
    monkeypatch.setattr(bootstrap, "MOST_GROUPS", 500)
    grouped = metrics.gauc(scores, clicks, user)
    assert len(whole.sums.parts) == 4000
    assert len(grouped.sums.parts) == 500
    assert grouped.value == pytest.approx(whole.value)
    widths = [np.ptp(interval(replicates([f.sums])[:, 0])) for f in (whole, grouped)]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)


def test_one_user_has_no_interval() -> None:
    figure = metrics.gauc([0.1, 0.2, 0.3], [0.0, 1.0, 0.0], ["a"] * 3)
    assert interval(replicates([figure.sums])[:, 0]) == (None, None)
