"""Controls: the mean of our labels, the order of what each is made of, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.labels.controls import CONTROLS, control_labels, ranked_labels, shrunken_rate


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=300), st.floats(0.01, 0.5), st.floats(0.2, 2.0))
def test_ranked_labels_have_the_mean_rise_with_the_values_and_tie_with_them(values, mean, spread) -> None:
    labels = ranked_labels(values, mean, spread)
    assert labels.mean() == pytest.approx(mean, abs=1e-9)
    by_value = [np.unique(labels[np.array(values) == v]) for v in sorted(set(values))]
    assert all(len(each) == 1 for each in by_value)
    assert (np.diff(np.concatenate(by_value)) > 0).all()


def test_only_the_ranks_count() -> None:
    values = np.random.default_rng(0).normal(size=500)
    assert ranked_labels(values, 0.05) == pytest.approx(ranked_labels(np.exp(3 * values), 0.05))


def test_every_control_keeps_our_mean_and_its_own_order() -> None:
    rng = np.random.default_rng(1)
    n = 4000
    labels, positives = rng.beta(1, 20, n), rng.poisson(3.0, n).astype(float)
    similarity, shown = rng.random(n), rng.integers(0, 80, n).astype(float)
    clicks = np.floor(shown * rng.random(n) * 0.3)
    made = control_labels(
        labels, positives=positives, history_similarity=similarity, user_clicks=clicks, user_impressions=shown, rate=0.1
    )
    assert tuple(made) == CONTROLS
    for name, control in made.items():
        assert control.mean() == pytest.approx(labels.mean(), abs=1e-9), name
        assert (control >= 0).all(), name
        assert (control <= 1).all(), name
    assert np.ptp(made["constant"]) == 0
    assert sorted(made["shuffled"]) == sorted(labels)
    assert abs(np.corrcoef(made["shuffled"], labels)[0, 1]) < 0.06
    for name, by in (
        ("popularity", positives),
        ("cosine", similarity),
        ("user_rate", shrunken_rate(clicks, shown, 0.1)),
    ):
        assert (np.diff(made[name][np.argsort(by, kind="stable")]) >= 0).all(), name


def test_a_rate_of_few_impressions_is_that_of_all_users() -> None:
    assert shrunken_rate([0, 1, 2000, 5], [0, 1, 20_000, 3], 0.05) == pytest.approx(
        [0.05, 2 / 21, 2001 / 20_020, 6 / 25]
    )
