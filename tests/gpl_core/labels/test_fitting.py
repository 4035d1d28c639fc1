"""Fits of the calibrators: exact mean, monotone, brute-force isotonic, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.errors import ContractError, GateError
from gpl_core.labels import calibration, fitting
from gpl_core.labels.calibration import GRID_CELLS, Calibrator, FittedOn

FITTED = FittedOn("unlabelled", 1, 0, "2026-01-01", "2026-01-01", 0.05)


def _fractions(similarity: np.ndarray) -> np.ndarray:
    _, fraction = calibration.grid_position(similarity)
    return fitting.histogram(similarity, fraction) / np.maximum(fitting.histogram(similarity), 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=60),
    st.sampled_from([0.005, 0.05, 0.5, 0.9]),
    st.sampled_from([("logit_normal", 0.3), ("logit_normal", 2.0), ("beta", 0.05), ("beta", 1.0)]),
)
def test_quantile_labels_average_the_target_rate_and_keep_the_order(values, target, family) -> None:
    similarity = np.array(values)
    knots = fitting.fit_quantile(fitting.histogram(similarity), target, *family, fractions=_fractions(similarity))
    assert np.diff(knots).min() >= 0
    labels = calibration.apply(fitting.grid_calibrator("quantile", knots, FITTED), {"similarity": similarity})
    assert labels.mean() == pytest.approx(target, abs=1e-8)
    assert labels.min() >= 0
    assert labels.max() <= 1
    order = np.argsort(similarity)
    assert (np.diff(labels[order]) >= -1e-12).all()


@pytest.mark.parametrize(("family", "spread"), [("logit_normal", 1.2), ("beta", 0.1), ("beta", 1.0)])
def test_quantile_labels_follow_the_named_distribution(family: str, spread: float) -> None:
    similarity = np.random.default_rng(0).uniform(-1, 1, 200_000)
    labels = calibration.apply(
        fitting.grid_calibrator(
            "quantile", fitting.fit_quantile(fitting.histogram(similarity), 0.1, family, spread), FITTED
        ),
        {"similarity": similarity},
    )
    if family == "logit_normal":
        logits = np.log(labels / (1 - labels))
        assert logits.std() == pytest.approx(spread, rel=0.02)
        assert np.median(logits) == pytest.approx(logits.mean(), abs=0.02)
    else:
        from scipy import stats

        exact = stats.beta(0.1 / spread, 0.9 / spread)
        assert labels.std() == pytest.approx(exact.std(), rel=0.01)
        for rank in (0.1, 0.5, 0.9, 0.99):
            assert np.quantile(labels, rank) == pytest.approx(exact.ppf(rank), rel=0.03, abs=1e-4)


def test_all_pairs_alike_get_the_target_rate() -> None:
    similarity = np.full(1000, 0.3)
    knots = fitting.fit_quantile(fitting.histogram(similarity), 0.04, fractions=_fractions(similarity))
    labels = calibration.apply(fitting.grid_calibrator("quantile", knots, FITTED), {"similarity": similarity})
    assert labels == pytest.approx(np.full(1000, 0.04), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_pool_adjacent_violators_equals_the_min_max_formula(cells) -> None:
    values = np.array([min(c, n) / n for c, n in cells])
    weights = np.array([n for _, n in cells], dtype=float)

    def mean(a: int, b: int) -> float:
        return float(np.average(values[a : b + 1], weights=weights[a : b + 1]))

    n = len(values)
    oracle = [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    assert fitting.pool_adjacent_violators(values, weights) == pytest.approx(oracle)


def test_isotonic_is_monotone_and_flat_beyond_its_data() -> None:
    rows, clicks = np.zeros(GRID_CELLS), np.zeros(GRID_CELLS)
    rows[[600, 700, 800]] = [100, 100, 100]
    clicks[[600, 700, 800]] = [20, 10, 60]
    knots = fitting.fit_isotonic(rows, clicks)
    assert np.diff(knots).min() >= 0
    assert knots[0] == pytest.approx(0.15)
    assert knots[-1] == pytest.approx(0.6)
    assert fitting.grid_mean(knots, rows) == pytest.approx(0.3, abs=2e-3)


def test_logistic_fit_finds_the_weights_and_scikit_learns_optimum() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 2.0]
    y = (rng.random(4000) < calibration.sigmoid(x @ [1.0, -0.2, 5.0] - 9.5)).astype(float)
    fit = fitting.fit_logistic(x, y, l2=0.0)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    assert fit.weights == pytest.approx(peer.coef_[0], rel=1e-3)
    assert fit.intercept == pytest.approx(peer.intercept_[0], rel=1e-3)
    p = calibration.sigmoid(x @ np.array(fit.weights) + fit.intercept)
    assert p.mean() == pytest.approx(y.mean(), abs=1e-8)


def test_reliability_of_perfect_labels_has_no_error() -> None:
    rows, clicks = np.zeros(GRID_CELLS), np.zeros(GRID_CELLS)
    rows[[100, 900]], clicks[[100, 900]] = 200, [20, 100]
    knots = np.interp(np.arange(GRID_CELLS + 1), [100.5, 900.5], [0.1, 0.5])
    knots[[100, 101]], knots[[900, 901]] = 0.1, 0.5
    bins, error = fitting.grid_reliability(knots, rows, clicks)
    assert sum(row.rows for row in bins) == 400
    assert error == pytest.approx(0.0, abs=1e-12)
    shifted, error = fitting.grid_reliability(knots + 0.1, rows, clicks)
    assert error == pytest.approx(0.1)
    assert shifted[0].click_rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitting.fit_quantile(np.zeros(GRID_CELLS), 0.1), "no scored unexposed pair"),
        (lambda: fitting.fit_isotonic(np.ones(GRID_CELLS), np.zeros(GRID_CELLS)), "0 clicks in 1024 rows"),
        (lambda: fitting.resolve_target_rate(None, 312, 20), "312 rows; at least 1000"),
        (lambda: fitting.resolve_target_rate(None, 5000, 0), "0 clicks in the 5000 rows"),
        (lambda: fitting.check_fitting_rows("exposed", 10_000, 500), "labels.calibrator.allow_exposed"),
        (lambda: fitting.fit_logistic([[1.0], [2.0]], [1, 1]), "only one class"),
    ],
)
def test_a_fit_that_cannot_be_honest_is_refused(call, message: str) -> None:
    with pytest.raises(GateError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_rate": 0.0}, "target_rate is 0.0"),
        ({"target_rate": 0.1, "family": "gamma"}, "gamma"),
        ({"target_rate": 0.1, "family": "beta", "spread": float("inf")}, "spread is inf"),
        ({"target_rate": 0.1, "spread": 0.0}, "spread is 0.0"),
    ],
)
def test_settings_out_of_range_name_the_key(arguments: dict, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        fitting.fit_quantile(np.ones(GRID_CELLS), **arguments)


def test_target_rate_sources() -> None:
    assert fitting.resolve_target_rate(0.02, 0, 0) == 0.02
    assert fitting.resolve_target_rate(None, 2000, 50) == 0.025
    fitting.check_fitting_rows("exposed", 10_000, 500, allow_exposed=True)


def test_base_rate_change_is_a_ratio_both_ways() -> None:
    assert fitting.base_rate_change(0.05, 0.06, 1.5) is None
    assert "factor of 2.00" in fitting.base_rate_change(0.05, 0.10, 1.5)
    assert "factor of 2.00" in fitting.base_rate_change(0.10, 0.05, 1.5)


def test_a_fitted_calibrator_survives_its_json() -> None:
    knots = fitting.fit_quantile(np.ones(GRID_CELLS), 0.07)
    made = fitting.grid_calibrator("quantile", knots, FITTED)
    assert Calibrator.from_json(made.to_json()) == made
