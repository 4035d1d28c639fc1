"""Fitting the calibrator: the right rows, the right formula, and a refusal with a remedy where there is too little."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from gpl_core.errors import GateError, LineageError, MissingInputError
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from gpl_core.labels.calibration import FEATURES, apply, feature_values, grid_position
from spark_jobs import fit_calibrator
from tests.bench.simulation.logistic import fit_logistic
from tests.spark_jobs.label_lake import LabelLake, score
from tests.spark_jobs.tiny_lake import D, day

pytestmark = pytest.mark.spark


@pytest.fixture
def lake(tmp_path, spark) -> LabelLake:
    """
    | date | uniform impressions       | other impressions |
    |------|---------------------------|-------------------|
    | D-2  | 6, of which 2 clicked     | 3, all clicked    |
    | D-1  | 4, of which 1 clicked     |                   |
    | D    | 2, both clicked: not seen |                   |
    """
    made = LabelLake(tmp_path, spark)
    made.shown(*[("u1", i, int(i < 2), True) for i in range(6)], *[("u2", i, 1, False) for i in range(3)], dt=day(-2))
    made.shown(*[("u1", i, int(i < 1), True) for i in range(4)], dt=day(-1))
    made.shown(("u1", 0, 1, True), ("u1", 1, 1, True), dt=D)
    made.scores(
        *[score("u1", i, -0.3 + 0.1 * i) for i in range(9)],
        *[score("u1", i, 0.99, source="exposed") for i in range(20, 29)],
    )
    return made


def fitted(lake: LabelLake):
    """The calibrator that the last run published for D, its manifest beside it."""
    manifest = Planner(lake.config()).artifacts.in_force("calibrator", D)
    return lake.load(manifest.version), manifest


def test_quantile_labels_average_the_uniform_click_rate_before_the_date(lake):
    assert lake.run("fit_calibrator", fit_calibrator.run) == "done"
    calibrator, manifest = fitted(lake)
    similarity = [-0.3 + 0.1 * i for i in range(9)]
    labels = apply(calibrator, {"similarity": similarity})
    assert labels.mean() == pytest.approx(3 / 10, abs=1e-9)
    assert (np.diff(labels) > 0).all()
    assert manifest.trained_through == day(-1)
    assert dict(manifest.lineage) == {"model_version": lake.model, "sid_version": lake.tokenizer}
    assert (manifest.metrics["uniform_rows"], manifest.metrics["uniform_clicks"]) == (10, 3)
    assert manifest.metrics["rows"] == calibrator.fitted_on.rows == 9
    assert lake.run("fit_calibrator", fit_calibrator.run) == "noop"

    # Nothing at or after D matters.
    lake.shown(*[("u1", i, 1, True) for i in range(9)], dt=D)
    lake.shown(*[("u1", i, 1, True) for i in range(9)], dt=day(1))
    lake.scores(*[score("u1", i, 0.9) for i in range(9)], dt=day(1))
    assert lake.run("fit_calibrator", fit_calibrator.run) == "noop"
    lake.run("fit_calibrator", fit_calibrator.run, force=True)
    assert fitted(lake)[0] == calibrator


def test_quantile_of_the_prefix_log_prob_ranks_by_it(lake):
    """Similarity rises with the item, the prefix_log_prob falls (but item 7's is item 0's again)."""
    assert lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.score=prefix_log_prob") == "done"
    calibrator, _ = fitted(lake)
    assert calibrator.features == ("prefix_log_prob",)
    labels = apply(calibrator, {"prefix_log_prob": [-1.0 - i % 7 for i in range(9)]})
    assert labels.mean() == pytest.approx(3 / 10, abs=1e-9)
    assert (np.diff(labels[:7]) < 0).all()
    assert labels[7] == labels[0]


def test_configured_rate_needs_no_clicks_and_a_window_bounds_what_is_seen(lake):
    lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.target_rate=0.07")
    assert fitted(lake)[0].fitted_on.base_rate == pytest.approx(0.07, abs=1e-9)
    lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.window_days=1")
    assert fitted(lake)[0].fitted_on.base_rate == pytest.approx(1 / 4, abs=1e-9)


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("labels.calibrator.min_rows=11", GateError, "10 rows; at least 11 .*labels.calibrator.target_rate"),
        ("labels.calibrator.kind=platt", MissingInputError, "there are none; run score_candidates for earlier dates"),
    ],
)
def test_too_little_is_refused_with_the_remedy(lake, override, error, says):
    with pytest.raises(error, match=says):
        lake.run("fit_calibrator", fit_calibrator.run, D, override)
    assert Planner(lake.config()).artifacts.in_force_or_none("calibrator", D) is None


def test_no_clicks_among_the_uniform_rows(lake):
    lake.shown(*[("u1", i, 0, True) for i in range(6)], dt=day(-2))
    lake.shown(*[("u1", i, 0, True) for i in range(6)], dt=day(-1))
    with pytest.raises(GateError, match=r"0 clicks in the 12 rows.*labels\.calibrator\.target_rate"):
        lake.run("fit_calibrator", fit_calibrator.run)


def test_scores_of_another_model_are_refused(lake):
    lake.scores(score("u1", 0, 0.5, model="2025-12-31-other"))
    with pytest.raises(LineageError, match=f"2025-12-31-other.*{lake.model}"):
        lake.run("fit_calibrator", fit_calibrator.run)


def test_empty_day_gives_a_constant(lake):
    lake.scores()
    assert lake.run("fit_calibrator", fit_calibrator.run) == "done"
    assert apply(fitted(lake)[0], {"similarity": [-1.0, 0.2, 1.0]}) == pytest.approx(0.3)


def test_rate_that_jumps_is_told_or_refused(lake):
    """Calibrators of D-1 and D: .05 and .3, a factor of 6."""
    older = lake.bundle("tokenizer", {}, "{}", through=day(-3))
    older = lake.bundle("interest_model", {"sid_version": older}, "{}", through=day(-3))
    lake.scores(score("u1", 0, 0.5, model=older), dt=day(-1))
    lake.run("fit_calibrator", fit_calibrator.run, day(-1), "labels.calibrator.target_rate=0.05")
    with pytest.raises(GateError, match=r"base rate 0\.3000 against 0\.0500.*factor of 6\.00.*on_rate_change"):
        lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.on_rate_change=refuse")
    assert fitted(lake)[1].trained_through == day(-2)
    lake.run("fit_calibrator", fit_calibrator.run, D)
    assert "factor of 6.00" in fitted(lake)[1].metrics["rate_warning"]
    # what a change leads to does not make a finished calibrator stale
    assert lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.on_rate_change=refuse") == "noop"


def planted(lake: LabelLake) -> dict[str, np.ndarray]:
    """400 scored and shown uniform pairs on D-2 and D-1; clicks follow similarity and the item's count."""
    rng = np.random.default_rng(1)
    n = 400
    similarity, user = rng.uniform(-0.8, 0.9, n), rng.integers(0, 5, n)
    shown = rng.integers(1, 200, n)
    clicks = rng.binomial(shown, 0.2)
    rate = (clicks + 4) / (shown + 20)
    clicked = (rng.random(n) < 1 / (1 + np.exp(-(2.5 * similarity + np.log(rate / (1 - rate)) + 1)))).astype(int)
    for offset, part in ((-2, range(n // 2)), (-1, range(n // 2, n))):
        dt = day(offset)
        lake.scores(*[score(f"u{user[i]}", i, similarity[i], source="uniform") for i in part], dt=dt)
        # the same items also stand among the exposed, with the opposite click: not to be mixed in
        lake.shown(
            *[(f"u{user[i]}", i, int(clicked[i]), True) for i in part],
            *[(f"u{user[i]}", i, 1 - int(clicked[i]), False) for i in part],
            dt=dt,
        )
        items = [(int(i), int(shown[i]), int(clicks[i]), int(clicks[i])) for i in part]
        lake.stats(items=items, users=[(f"u{u}", 100, 10 + u, 5) for u in range(5)], dt=dt)
    lake.stats()
    counts = {
        "item_impressions": shown, "item_clicks": clicks, "item_positives": clicks,
        "user_impressions": np.full(n, 100), "user_clicks": 10 + user,
    }  # fmt: skip
    scores = {
        "similarity": similarity,
        "history_similarity": similarity / 2,
        "prefix_log_prob": -1.0 - np.arange(n) % 7,
    }
    return {**scores, "clicked": clicked, **counts}


def test_kinds_fitted_on_clicks_agree_with_other_libraries(lake):
    rows = planted(lake)
    for kind in ("platt", "isotonic", "logistic"):
        assert lake.run("fit_calibrator", fit_calibrator.run, D, f"labels.calibrator.kind={kind}") == "done"
        calibrator, manifest = fitted(lake)
        labels = apply(calibrator, rows)
        assert calibrator.kind == kind
        assert (calibrator.fitted_on.source, calibrator.fitted_on.rows) == ("uniform", 400)
        assert calibrator.fitted_on.clicks == rows["clicked"].sum()
        if kind == "isotonic":
            cell, fraction = grid_position(rows["similarity"])
            counts, clicks, inside = (np.bincount(cell, w, 1024) for w in (None, rows["clicked"], fraction))
            used = np.flatnonzero(counts)
            rates = IsotonicRegression().fit(used, clicks[used] / counts[used], counts[used]).predict(used)
            knots = np.interp(np.arange(1025), used + inside[used] / counts[used], rates)
            assert np.abs(np.array(calibrator.knots) - knots).max() < 1e-9
        else:
            wanted = fit_logistic(feature_values(calibrator, rows), rows["clicked"])
            assert calibrator.weights == pytest.approx(wanted.weights, abs=2e-2)
            assert labels.mean() == pytest.approx(rows["clicked"].mean(), abs=1e-4)
        assert calibrator.content_only == (kind != "logistic")
        assert (calibrator.features == FEATURES) == (kind == "logistic")
        assert manifest.metrics["scored_by"] == [lake.model]
        assert manifest.metrics["ece"] == calibrator.fitted_on.ece < 0.1
        assert sum(b.rows for b in calibrator.fitted_on.reliability) == 400


def test_exposed_clicks_fit_nothing(lake):
    lake.shown(*[("u9", i, i % 2, False) for i in range(8)], dt=day(-1))
    lake.scores(*[score("u9", i, 0.1 * i, source="exposed") for i in range(8)], dt=day(-1))
    with pytest.raises(GateError, match="uniform slice has 0 rows"):
        lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.kind=platt")


def test_earlier_scores_make_it_stale_only_where_it_is_fitted_on_them(lake):
    step = find_step("fit_calibrator")
    lake.scores(score("u1", 0, 0.5, source="uniform"), dt=day(-1))
    before = {k: _fingerprint(lake, step, k) for k in ("quantile", "platt")}
    lake.scores(score("u1", 0, 0.7, source="uniform"), dt=day(-1))
    after = {k: _fingerprint(lake, step, k) for k in ("quantile", "platt")}
    assert before["quantile"] == after["quantile"]
    assert before["platt"] != after["platt"]


def _fingerprint(lake: LabelLake, step, kind: str) -> str:
    return Planner(lake.config(f"labels.calibrator.kind={kind}")).state(step, D).artifact_fingerprint
