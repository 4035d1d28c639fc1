"""Controls: the mean of our labels, the order of what each is made of, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.labels.controls import CONTROLS, control_labels, located, rank_logits, shrunken_rate


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=60))
def test_ranks_are_counted_within_the_group_and_ties_share_theirs(rows) -> None:
    groups, values = (np.array(column) for column in zip(*rows))
    found = rank_logits(values, groups)
    for n, (group, value) in enumerate(rows):
        mine = [v for g, v in rows if g == group]
        rank = (sum(v < value for v in mine) + sum(v == value for v in mine) / 2) / len(mine)
        assert found[n] == pytest.approx(np.sqrt(3) / np.pi * np.log(rank / (1 - rank)))


def test_the_logits_of_many_ranks_have_a_standard_deviation_of_one() -> None:
    logits = rank_logits(np.random.default_rng(0).normal(size=20_000), np.zeros(20_000, int))
    assert logits.std() == pytest.approx(1.0, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=50), st.floats(0.001, 0.9))
def test_the_location_meets_the_mean(logits, mean) -> None:
    candidates = 1.0 + np.arange(len(logits)) % 3
    labels = located(np.array(logits), mean, candidates)
    assert np.average(labels, weights=candidates) == pytest.approx(mean, abs=1e-9)
    assert (np.diff(labels[np.argsort(logits)]) >= 0).all()


@pytest.mark.parametrize("by_user", [False, True])
def test_every_control_keeps_our_mean_and_its_own_order(by_user: bool) -> None:
    rng = np.random.default_rng(1)
    n = 4000
    users = rng.integers(50, size=n)
    labels, positives = rng.beta(1, 20, n), rng.poisson(3.0, n).astype(float)
    similarity, shown = rng.random(n), rng.integers(20, 80, 50).astype(float)[users]
    clicks = np.floor(shown * (users / 100))
    days = rng.integers(3, size=n) if by_user else None
    candidates = rng.integers(1, 5, n)
    made = control_labels(
        labels, users, positives=positives, history_similarity=similarity, user_clicks=clicks, user_impressions=shown,
        rate=0.1, strength=20.0, by_user=by_user, days=days, candidates=candidates,
    )  # fmt: skip
    mean = np.average(labels, weights=candidates)
    assert tuple(made) == CONTROLS
    for name, control in made.items():
        assert np.average(control, weights=candidates) == pytest.approx(mean, abs=1e-9), name
    assert np.ptp(made["constant"]) == 0
    logits = [np.sort(np.log(x / (1 - x))) for x in (made["shuffled"], labels)]
    assert np.ptp(logits[0] - logits[1]) < 1e-6, "our labels, all moved alike"
    assert abs(np.corrcoef(made["shuffled"], labels)[0, 1]) < 0.06
    rates = shrunken_rate(clicks, shown, 0.1, 20.0)
    assert (np.diff(made["user_rate"][np.argsort(rates, kind="stable")]) >= 0).all()
    for name, by in (("popularity", positives), ("cosine", similarity)):
        for user, day in itertools.product(range(50), range(3)):
            rows = (users == user) & (days == day if by_user else True)
            assert (np.diff(made[name][rows][np.argsort(by[rows], kind="stable")]) >= 0).all(), name
        level = np.array([made[name][users == user].mean() for user in range(50)])
        followed = np.corrcoef(level, [rates[users == user].mean() for user in range(50)])[0, 1]
        assert (followed > 0.9) == by_user, name


def test_a_rate_of_few_impressions_is_that_of_all_users() -> None:
    assert shrunken_rate([0, 1, 2000, 5], [0, 1, 20_000, 3], 0.05, 20.0) == pytest.approx(
        [0.05, 2 / 21, 2001 / 20_020, 6 / 25]
    )
