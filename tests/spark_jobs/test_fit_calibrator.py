"""Fitting the calibrator: the right rows, the right formula, and a refusal with a remedy where there is too little."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from gpl_core.errors import GateError, LineageError, MissingInputError
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from gpl_core.labels.calibration import (
    COUNT_COLUMNS,
    FEATURES,
    SCORES,
    USER_PARTS,
    Calibrator,
    apply,
    feature_values,
    grid_position,
    user_rate,
)
from spark_jobs import fit_calibrator, pseudo_labels
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
    # Item i of u1 stands in i + 1 requests: labels average the rate over these rows.
    made.unexposed(*[(f"q{n}", "u1", i) for i in range(9) for n in range(i + 1)])
    made.stats()
    return made


def labels_of(calibrator, ranks):
    """Labels at these ranks of a user without counts, the rate of all users."""
    rate = user_rate(calibrator, {"user_clicks": [0], "user_impressions": [0]})
    return apply(calibrator, {"user_rate": np.repeat(rate, len(ranks)), "user_rank": np.array(ranks)})


def fitted(lake: LabelLake):
    """The calibrator that the last run published for D, its manifest beside it."""
    manifest = Planner(lake.config()).artifacts.in_force("calibrator", D)
    return lake.load(manifest.version), manifest


def test_quantile_labels_average_the_uniform_click_rate_before_the_date(lake):
    assert lake.run("fit_calibrator", fit_calibrator.run) == "done"
    calibrator, manifest = fitted(lake)
    labels = labels_of(calibrator, (np.arange(9) + 0.5) / 9)
    assert np.average(labels, weights=np.arange(1, 10)) == pytest.approx(3 / 10, abs=1e-6)
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


def test_the_two_parts_against_brute_force(lake):
    """Three users, ties, counts: levels by their shrunken rates, places by a loop over the user's other pairs."""
    rng = np.random.default_rng(2)
    pairs = [(u, i, float(rng.integers(-3, 4)) / 10) for u, n in (("u1", 12), ("u2", 5), ("u3", 1)) for i in range(n)]
    shown = [("u1", 40, 0.1, "exposed"), ("u3", 41, -0.2, "uniform"), ("u4", 42, 0.0, "exposed")]
    lake.scores(*[score(*p) for p in pairs], *[score(u, i, s, source=source) for u, i, s, source in shown])
    drawn = {(u, i): rng.choice([0.5, 0.25, 0.125], rng.integers(1, 4)) for u, i, _ in pairs}
    lake.unexposed(*[(f"q{n}", *pair, float(p)) for pair, chances in drawn.items() for n, p in enumerate(chances)])
    lake.stats(users=[("u1", 100, 30, 1), ("u2", 60, 2, 1), ("u5", 90, 9, 1)], items=[])
    lake.items_table(*[f"i{n}" for n in range(43)])
    lake.run("fit_calibrator", fit_calibrator.run)
    lake.run("pseudo_labels", pseudo_labels.run)
    calibrator, _ = fitted(lake)
    assert calibrator.prior_rate == pytest.approx(41 / 250)
    s, p = calibrator.user_strength, calibrator.prior_rate
    assert 1 < s < 100
    columns = ("user_id", "item_index", "source", *USER_PARTS, "pseudo_label", "user_spread")
    found = {row[:3]: row[3:] for row in lake.rows("pseudo_labels", *columns, dt=D)}
    assert len(found) == len(pairs) + 3
    for user, item, similarity, source in [*((u, i, x, "unexposed") for u, i, x in pairs), *shown]:
        others = [x for u, i, x in pairs if u == user and not (source == "unexposed" and i == item)]
        below, ties = sum(x < similarity for x in others), sum(x == similarity for x in others)
        rank = (below + ties / 2 + 0.5) / (len(others) + 1)
        own = [x for u, _, x in pairs if u == user]
        spread = np.std(own) if own else 0.0
        clicks, impressions = {"u1": (30, 100), "u2": (2, 60)}.get(user, (0, 0))
        rate = (clicks + s * p) / (impressions + s)
        odds = np.exp(calibrator.location) * rate / (1 - rate) * (rank / (1 - rank)) ** (0.75 * np.sqrt(3) / np.pi)
        assert found[user, item, source] == pytest.approx((rate, rank, odds / (1 + odds), spread), abs=1e-9)
    labels = [found[u, i, "unexposed"][2] for (u, i), chances in drawn.items() for _ in chances]
    assert np.average(labels, weights=1 / np.concatenate(list(drawn.values()))) == pytest.approx(3 / 10, abs=1e-6)


def test_ranks_follow_the_chosen_score_and_one_level_may_serve_all(lake):
    """Similarity rises with the item, the prefix_log_prob falls (but item 7's is item 0's again)."""
    lake.items_table(*[f"i{n}" for n in range(29)])
    lake.stats(users=[("u1", 100, 80, 1), ("u2", 100, 0, 1)])
    chosen = ("labels.calibrator.score=prefix_log_prob", "labels.calibrator.across_users=global")
    assert lake.run("fit_calibrator", fit_calibrator.run, D, *chosen) == "done"
    calibrator, _ = fitted(lake)
    assert (calibrator.features, calibrator.across_users) == (("prefix_log_prob",), "global")
    lake.run("pseudo_labels", pseudo_labels.run, D, *chosen)
    found = lake.rows("pseudo_labels", "item_index", "source", "user_rank", "pseudo_label", dt=D)
    labels = {item: (rank, label) for item, source, rank, label in found if source == "unexposed"}
    assert (np.diff([labels[i] for i in range(7)], axis=0) < 0).all()
    assert labels[7] == labels[0]
    assert not calibrator.uses_clicks


def test_pairs_are_ranked_by_exposed_clicks_of_earlier_dates(lake):
    rows = planted(lake, source="exposed", unexposed=50)
    settings = ("labels.calibrator.score=exposed_clicks", "labels.calibrator.target_rate=auto")
    no_share = "labels.calibrator.prefix_share=0"
    assert lake.run("fit_calibrator", fit_calibrator.run, D, *settings, no_share) == "done"
    calibrator, manifest = fitted(lake)
    seen = np.arange(400) % 200 < 150
    # 100 unexposed pairs would each weigh 1.5 to weigh half of the 300 exposed ones: none weighs more than those.
    wanted = fit_logistic(feature_values(calibrator, rows), rows["clicked"], weights=np.ones(400))
    assert calibrator.weights == pytest.approx(wanted.weights, abs=2e-2)
    rows = {name: values[seen] for name, values in rows.items()}
    on = calibrator.fitted_on
    assert (calibrator.kind, on.source, on.rows, on.clicks) == ("quantile", "exposed", 300, rows["clicked"].sum())
    assert calibrator.uses_clicks
    assert manifest.metrics["uses_clicks"]
    # The clicks of the uniform impressions of the same pairs are the opposite ones; the rate is measured on them.
    assert on.base_rate == manifest.metrics["target_rate"] == pytest.approx(1 - rows["clicked"].mean())
    regression = calibrator
    check_prefix_share(lake, settings, regression)
    lake.run("fit_calibrator", fit_calibrator.run, D, *settings, "labels.calibrator.min_rows=301")
    calibrator, manifest = fitted(lake)
    assert calibrator.features == ("prefix_log_prob",)  # too few rows, both for the order and for the rate
    assert "ranked by prefix_log_prob, as is usual on a first date: the exposed pairs" in manifest.metrics["warning"]
    assert "warnings" not in lake.context.counts.details, "no alarm"
    assert manifest.metrics["target_rate"] == pytest.approx(rows["clicked"].mean())
    lake.scores()
    lake.run("fit_calibrator", fit_calibrator.run, D, *settings)
    weights = fitted(lake)[0].weights
    # Spark sums rows in the order in which they arrive: two fits agree but for their last bits.
    assert weights == pytest.approx(regression.weights, rel=1e-6), "a day without pairs leaves the regression as it is"


def check_prefix_share(lake: LabelLake, settings: tuple[str, ...], regression: Calibrator) -> None:
    """By a loop over D's users: a quarter of the order goes to prefix_log_prob, and nothing else changes."""
    rng = np.random.default_rng(5)
    pairs = {user: [score(user, i, rng.uniform(-0.8, 0.9)) for i in range(n)] for user, n in (("u1", 30), ("u2", 7))}
    lake.scores(*pairs["u1"], *pairs["u2"], score("u1", 40, 0.9, source="exposed"))
    lake.unexposed(*[("q1", pair["user_id"], pair["item_index"]) for found in pairs.values() for pair in found])
    lake.run("fit_calibrator", fit_calibrator.run, D, *settings)
    calibrator, manifest = fitted(lake)
    of_clicks, of_prefix = [], []
    for found in pairs.values():
        columns = {name: np.array([pair[name] for pair in found]) for name in SCORES}
        nothing_seen = dict.fromkeys(COUNT_COLUMNS, np.zeros(len(found)))
        by_clicks = feature_values(regression, columns | nothing_seen) @ np.array(regression.weights)
        of_clicks.extend(by_clicks - by_clicks.mean())
        of_prefix.extend(columns["prefix_log_prob"] - columns["prefix_log_prob"].mean())
    wanted = dict(zip(regression.features, regression.weights, strict=True))
    added = np.std(of_clicks) / np.std(of_prefix) / 3
    wanted["prefix_log_prob"] += added
    assert manifest.metrics["prefix_weight"] == pytest.approx(added, rel=1e-5)
    assert dict(zip(calibrator.features, calibrator.weights, strict=True)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("rows", "kept", "weight"), [(200, (150, 250), 0.5), (4_000, (1_000, 1_000), 1.0)])
def test_unexposed_pairs_weigh_half_of_the_exposed_ones_and_none_more_than_one_of_them(spark, rows, kept, weight):
    scores = spark.range(1_000).selectExpr(
        "concat('u', id % 7) AS user_id", "CAST(id AS INT) AS item_index", "DATE'2026-01-01' AS dt",
        "'unexposed' AS source",
    )  # fmt: skip
    found = fit_calibrator.unexposed_pairs(scores, rows).collect()
    assert kept[0] <= len(found) <= kept[1]
    assert all(row["clicked"] == 0 for row in found)
    assert [row["weight"] for row in found] == pytest.approx([weight] * len(found), rel=1e-3)


def test_configured_rate_needs_no_clicks_and_a_window_bounds_what_is_seen(lake):
    lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.target_rate=0.07")
    assert fitted(lake)[0].fitted_on.base_rate == pytest.approx(0.07, abs=1e-9)
    lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.window_days=1")
    assert fitted(lake)[0].fitted_on.base_rate == pytest.approx(1 / 4, abs=1e-9)


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        (
            "labels.calibrator.min_rows=11",
            GateError,
            "10 rows, where at least 11 are .*labels.calibrator.target_rate",
        ),
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
    with pytest.raises(GateError, match=r"12 rows, 0 of them clicked.*labels\.calibrator\.target_rate"):
        lake.run("fit_calibrator", fit_calibrator.run)


def test_scores_of_another_model_are_refused(lake):
    lake.scores(score("u1", 0, 0.5, model="2025-12-31-other"))
    with pytest.raises(LineageError, match=f"2025-12-31-other.*{lake.model}"):
        lake.run("fit_calibrator", fit_calibrator.run)


def test_empty_day_labels_nothing(lake):
    lake.scores()
    assert lake.run("fit_calibrator", fit_calibrator.run) == "done"
    assert labels_of(fitted(lake)[0], [0.5]) == pytest.approx(0.3, abs=1e-6)


def test_rate_that_jumps_is_told_or_refused(lake):
    """Calibrators of D-1 and D: .05 and .3, a factor of 6."""
    older = lake.bundle("tokenizer", {}, "{}", through=day(-3))
    older = lake.bundle("interest_model", {"sid_version": older}, "{}", through=day(-3))
    lake.scores(score("u1", 0, 0.5, model=older), dt=day(-1))
    lake.unexposed(("q1", "u1", 0), dt=day(-1))
    lake.stats(dt=day(-1))
    lake.run("fit_calibrator", fit_calibrator.run, day(-1), "labels.calibrator.target_rate=0.05")
    with pytest.raises(GateError, match=r"base rate 0\.3000 against 0\.0500.*factor of 6\.00.*on_rate_change"):
        lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.on_rate_change=refuse")
    assert fitted(lake)[1].trained_through == day(-2)
    lake.run("fit_calibrator", fit_calibrator.run, D)
    assert "factor of 6.00" in fitted(lake)[1].metrics["rate_warning"]
    # what a change leads to does not make a finished calibrator stale
    assert lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.on_rate_change=refuse") == "noop"


def planted(lake: LabelLake, source: str = "uniform", unexposed: int = 0) -> dict[str, np.ndarray]:
    """400 scored pairs of `source` on D-2 and D-1, shown both ways; clicks follow similarity and the item's count.

    The last `unexposed` ones of each date were not shown.
    """
    rng = np.random.default_rng(1)
    n = 400
    similarity, user = rng.uniform(-0.8, 0.9, n), rng.integers(0, 5, n)
    shown = rng.integers(1, 200, n)
    clicks = rng.binomial(shown, 0.2)
    rate = (clicks + 4) / (shown + 20)
    clicked = (rng.random(n) < 1 / (1 + np.exp(-(2.5 * similarity + np.log(rate / (1 - rate)) + 1)))).astype(int)
    for offset, part in ((-2, range(n // 2)), (-1, range(n // 2, n))):
        dt = day(offset)
        seen = part[: len(part) - unexposed]
        lake.scores(
            *[score(f"u{user[i]}", i, similarity[i], source=source) for i in seen],
            *[score(f"u{user[i]}", i, similarity[i], source="unexposed") for i in part[len(seen) :]],
            dt=dt,
        )
        clicked[part[len(seen) :]] = 0
        # the same items were also shown the other way, with the opposite click: not to be mixed in
        lake.shown(
            *[(f"u{user[i]}", i, int(clicked[i]), source == "uniform") for i in seen],
            *[(f"u{user[i]}", i, 1 - int(clicked[i]), source != "uniform") for i in seen],
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
        assert calibrator.uses_clicks
        assert (calibrator.features == FEATURES) == (kind == "logistic")
        assert manifest.metrics["scored_by"] == [lake.model]
        assert manifest.metrics["ece"] == calibrator.fitted_on.ece < 0.1
        assert sum(b.rows for b in calibrator.fitted_on.reliability) == 400


def test_exposed_clicks_fit_no_probability(lake):
    lake.shown(*[("u9", i, i % 2, False) for i in range(8)], dt=day(-1))
    lake.scores(*[score("u9", i, 0.1 * i, source="exposed") for i in range(8)], dt=day(-1))
    with pytest.raises(MissingInputError, match=r"fitted on uniformly exposed pairs .* there are none"):
        lake.run("fit_calibrator", fit_calibrator.run, D, "labels.calibrator.kind=platt")


def test_earlier_scores_make_it_stale_only_where_they_become_labels(lake):
    """Not where they only rank: late candidates of a date would have every later date labeled again."""
    step = find_step("fit_calibrator")
    lake.scores(score("u1", 0, 0.5, source="uniform"), dt=day(-1))
    kinds = ("kind=quantile", "kind=platt", "score=exposed_clicks")
    before = {k: _fingerprint(lake, step, k) for k in kinds}
    lake.scores(score("u1", 0, 0.7, source="uniform"), dt=day(-1))
    assert [before[k] == _fingerprint(lake, step, k) for k in kinds] == [True, False, True]


def _fingerprint(lake: LabelLake, step, setting: str) -> str:
    return Planner(lake.config(f"labels.calibrator.{setting}")).state(step, D).artifact_fingerprint
