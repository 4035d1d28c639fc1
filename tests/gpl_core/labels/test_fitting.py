"""Fits of the calibrators: the exact mean over rows, how far rates are shrunken, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.errors import GateError
from gpl_core.labels import calibration, fitting


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-12, 12), st.integers(1, 50)), min_size=1, max_size=60),
    st.sampled_from([0.005, 0.05, 0.5, 0.9]),
)
def test_labels_average_the_target_rate_over_rows(found: list[tuple[float, int]], target: float) -> None:
    logits, rows = (np.array(values) for values in zip(*found, strict=True))
    location = fitting.fit_location(logits, rows, target)
    each = np.repeat(calibration.sigmoid(location + logits), rows)
    assert each.mean() == pytest.approx(target, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.25, 0.9]), st.floats(0.01, 100.0))
def test_order_with_a_share_of_prefix_log_prob_is_that_of_both_at_one_scale(
    seed: int, share: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    score, prefix = scale * rng.standard_normal(40), 3.0 * rng.standard_normal(40)
    found = score + fitting.prefix_weight(share, score.var(), prefix.var()) * prefix
    wanted = (1 - share) * score / score.std() + share * prefix / prefix.std()
    assert np.array_equal(np.argsort(found), np.argsort(wanted))


def test_prefix_weight_without_a_share_or_where_one_side_orders_nothing() -> None:
    assert fitting.prefix_weight(0.0, 2.0, 3.0) == 0.0
    assert fitting.prefix_weight(0.25, 2.0, 0.0) == fitting.prefix_weight(0.25, 2.0, 1e-14) == 0.0
    assert fitting.prefix_weight(0.25, 0.0, 3.0) == 1.0, "clicks order nothing: the language model does"


@pytest.mark.parametrize(("strength", "users"), [(10.0, 20_000), (200.0, 60_000)])
def test_prior_strength_is_that_of_the_beta_distribution_of_rates(strength: float, users: int) -> None:
    rng = np.random.default_rng(3)
    n = rng.integers(0, 60, users)
    k = rng.binomial(n, rng.beta(0.1 * strength, 0.9 * strength, users))
    assert _strength(n, k) == pytest.approx(strength, rel=0.15)


def test_prior_strength_where_users_do_not_differ_or_are_unknown() -> None:
    n = np.full(1000, 50)
    assert _strength(n, np.full(1000, 5)) == fitting.MOST_STRENGTH  # they differ less than chance alone would make them
    assert _strength(n, np.where(np.arange(1000) % 2, 50, 0)) == fitting.LEAST_STRENGTH
    for n, k in (([], []), ([3], [1]), ([1, 1], [0, 1]), ([5, 5], [0, 0])):
        assert _strength(np.array(n), np.array(k)) == fitting.MOST_STRENGTH


def _strength(n: np.ndarray, k: np.ndarray) -> float:
    p = k.sum() / max(n.sum(), 1)
    return fitting.prior_strength(len(n), n.sum(), k.sum(), (n * (n - 1)).sum(), ((k - n * p) ** 2).sum())


def test_one_heavy_user_does_not_decide_about_all() -> None:
    rng = np.random.default_rng(3)
    n = np.ceil(rng.lognormal(3, 1, 20_000))
    counts = np.stack([rng.binomial(n.astype(int), rng.beta(5, 95, len(n))), n], axis=1).astype(float)
    rate, strength = fitting.click_prior([counts])
    assert (rate, strength) == (pytest.approx(0.05, rel=0.03), pytest.approx(100, rel=0.2))
    with_one = fitting.click_prior([counts, np.array([[0.0, 100_000.0]])])
    assert with_one == (pytest.approx(rate, rel=0.01), pytest.approx(strength, rel=0.2))
    assert fitting.click_prior([]) == (1e-6, fitting.MOST_STRENGTH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitting.check_fitting_rows(312, 20, 1000, "widen"), "312 rows, where at least 1,000"),
        (lambda: fitting.check_fitting_rows(5000, 0, 1000, "widen"), "5,000 rows, 0 of them clicked"),
        (
            lambda: fitting.check_fitting_rows(5000, 49, 1000, "widen"),
            "49 of them clicked, where 50 of either",
        ),
        (lambda: fitting.check_fitting_rows(1000, 960, 1000, "widen"), "960 of them clicked, where 50 of"),
    ],
)
def test_a_fit_that_cannot_be_honest_is_refused(call, message: str) -> None:
    with pytest.raises(GateError, match=message):
        call()


def test_base_rate_change_is_a_ratio_both_ways() -> None:
    assert fitting.base_rate_change(0.05, 0.14) is None
    assert "factor of 4.00" in fitting.base_rate_change(0.05, 0.20)
    assert "factor of 4.00" in fitting.base_rate_change(0.20, 0.05)
