"""Pseudo-labels: what stands in the table follows from the scores, the calibrator and the items by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gpl_core.errors import ContractError, LineageError
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from gpl_core.labels.calibration import FEATURES, Calibrator, FittedOn, apply
from spark_jobs import pseudo_labels
from tests.spark_jobs.label_lake import LabelLake, score
from tests.spark_jobs.tiny_lake import D, day

pytestmark = pytest.mark.spark


@pytest.fixture
def lake(tmp_path, spark) -> LabelLake:
    """
    | user | item | source    | similarity | R, h, q       |
    |------|------|-----------|------------|---------------|
    | u1   | 0    | unexposed | .9         | .8, .5, .2    |
    | u1   | 1    | unexposed | .1         | .8, .5, .1    |
    | u2   | 1    | uniform   | -.4        | .6, .0, .3    |
    | u2   | 2    | exposed   | .4         | .6, .9, .3    |
    """
    made = LabelLake(tmp_path, spark)
    made.items_table("a", "b", "c")
    made.scores(
        score("u1", 0, 0.9, factors=(0.8, 0.5, 0.2)),
        score("u1", 1, 0.1, factors=(0.8, 0.5, 0.1)),
        score("u2", 1, -0.4, source="uniform", factors=(0.6, 0.0, 0.3)),
        score("u2", 2, 0.4, source="exposed", factors=(0.6, 0.9, 0.3)),
    )
    made.stats()
    made.platt()
    return made


FACTORS = "labels.weight=factors"


def by_pair(lake: LabelLake, *columns: str) -> dict:
    """(user, item, source) -> the columns."""
    return {row[:3]: row[3:] for row in lake.rows("pseudo_labels", "user_id", "item_id", "source", *columns, dt=D)}


def test_labels_and_weights_by_hand(lake):
    assert lake.run("pseudo_labels", pseudo_labels.run) == "done"
    assert {w for (w,) in by_pair(lake, "weight").values()} == {1.0}
    assert lake.run("pseudo_labels", pseudo_labels.run, D, FACTORS) == "done"
    found = by_pair(lake, "pseudo_label", "raw_weight", "weight")
    assert len(found) == 4
    for key, similarity, factors in (
        (("u1", "a", "unexposed"), 0.9, (0.8, 0.5, 0.2)),
        (("u1", "b", "unexposed"), 0.1, (0.8, 0.5, 0.1)),
        (("u2", "b", "uniform"), -0.4, (0.6, 0.0, 0.3)),
        (("u2", "c", "exposed"), 0.4, (0.6, 0.9, 0.3)),
    ):
        assert found[key][0] == pytest.approx(1 / (1 + np.exp(-(3.0 * similarity - 2.0))), abs=1e-12)
        assert found[key][1] == pytest.approx(np.prod(factors) ** (1 / 3), abs=1e-12)
    # scaled by the mean over the two unexposed pairs, for all sources
    mean = (found[("u1", "a", "unexposed")][1] + found[("u1", "b", "unexposed")][1]) / 2
    for _, raw, weight in found.values():
        assert weight == pytest.approx(raw / mean, abs=1e-12)
    unexposed = [row[2] for key, row in found.items() if key[2] == "unexposed"]
    assert np.mean(unexposed) == pytest.approx(1.0)


def test_rerun_is_a_noop_a_forced_one_gives_the_same_rows_and_a_later_calibrator_is_not_used(lake):
    early = Planner(lake.config()).artifacts.in_force("calibrator", D).version
    lake.platt(weights=(9.0,), through=D)
    lake.run("pseudo_labels", pseudo_labels.run)
    assert {v for (v,) in by_pair(lake, "calibrator_version").values()} == {early}
    before, version = lake.rows("pseudo_labels"), lake.version("pseudo_labels")
    assert lake.run("pseudo_labels", pseudo_labels.run) == "noop"
    assert lake.version("pseudo_labels") == version
    assert lake.run("pseudo_labels", pseudo_labels.run, force=True) == "done"
    assert lake.rows("pseudo_labels") == before


def test_all_weights_zero_stay_zero(lake):
    lake.scores(score("u1", 0, 0.9, factors=(0.8, 0.0, 0.2)), score("u1", 1, 0.1, factors=(0.8, 0.0, 0.1)))
    lake.run("pseudo_labels", pseudo_labels.run, D, FACTORS)
    assert [w for (w,) in by_pair(lake, "weight").values()] == [0.0, 0.0]


def test_empty_day_writes_an_empty_slice(lake):
    lake.scores()
    assert lake.run("pseudo_labels", pseudo_labels.run) == "done"
    assert lake.rows("pseudo_labels", dt=D) == []
    assert lake.run("pseudo_labels", pseudo_labels.run) == "noop"


def test_scores_of_another_model_are_refused_before_writing(lake):
    lake.scores(score("u1", 0, 0.9), score("u1", 1, 0.1, model="2026-01-01-other"))
    with pytest.raises(LineageError, match=rf"2026-01-01-other.*{lake.model}"):
        lake.run("pseudo_labels", pseudo_labels.run)
    assert not lake.lake.exists("pseudo_labels")


def test_calibrator_of_another_model_is_refused(lake):
    lake.platt(lineage={"model_version": "2025-12-01-old", "sid_version": lake.tokenizer})
    with pytest.raises(LineageError, match=rf"2025-12-01-old.*{lake.model}"):
        lake.run("pseudo_labels", pseudo_labels.run)


def test_item_that_is_not_in_items_is_named(lake):
    lake.scores(score("u1", 0, 0.9), score("u1", 77, 0.1))
    with pytest.raises(ContractError, match="item_index 77 is missing from table items"):
        lake.run("pseudo_labels", pseudo_labels.run)
    assert lake.rows("pseudo_labels") == []


def logistic() -> Calibrator:
    return Calibrator(
        kind="logistic", fitted_on=FittedOn("uniform", 10, 1, "", "", 0.1), features=FEATURES,
        weights=(1.0, 0.5, 0.1, 0.7, 0.3, -0.2), intercept=-1.0, prior_rate=0.1,
    )  # fmt: skip


def test_logistic_meets_the_counts_of_its_date(lake):
    """u1 and item 0 have counts, u2 and item 2 none; item_stats of the day after must not be looked at."""
    lake.stats(items=[(0, 100, 30, 12), (1, 10, 0, 1)], users=[("u1", 40, 8, 3)])
    lake.stats(items=[(0, 9000, 1, 1)], users=[("u1", 9000, 9000, 9)], dt=day(1))
    calibrator = logistic()
    lake.calibrator(calibrator)
    lake.run("pseudo_labels", pseudo_labels.run)
    found = by_pair(lake, "pseudo_label", "history_similarity", "prefix_log_prob")
    counts = {
        ("u1", "a", "unexposed"): (0.9, 100, 30, 12, 40, 8), ("u1", "b", "unexposed"): (0.1, 10, 0, 1, 40, 8),
        ("u2", "c", "exposed"): (0.4, 0, 0, 0, 0, 0), ("u2", "b", "uniform"): (-0.4, 10, 0, 1, 0, 0),
    }  # fmt: skip
    for key, (similarity, shown, clicks, positives, user_shown, user_clicks) in counts.items():
        expected = apply(
            calibrator,
            {
                "similarity": [similarity], "history_similarity": [found[key][1]], "prefix_log_prob": [found[key][2]],
                "item_impressions": [shown],
                "item_clicks": [clicks], "item_positives": [positives], "user_impressions": [user_shown],
                "user_clicks": [user_clicks],
            },
        )  # fmt: skip
        assert found[key][0] == pytest.approx(float(expected[0]), abs=1e-9)


def test_an_item_that_is_counted_twice_is_refused_whenever_it_is_tried_and_no_step_reads_the_labels(lake):
    lake.stats(items=[(0, 100, 30, 12), (0, 10, 0, 1)], users=[])
    lake.calibrator(logistic())
    for _ in range(2):
        with pytest.raises(ContractError, match=rf"5 rows from 4 of pair_scores; .* in item_stats dt={D}, .*dt={D}$"):
            lake.run("pseudo_labels", pseudo_labels.run)
        table = lake.lake.open("pseudo_labels")
        _, mark = table.mark(D.isoformat())
        assert (dict(mark.slices), mark.details["refused"]) == ({D.isoformat(): ""}, "ContractError")
        assert mark.details["unexposed_pairs"] == 2, "what the run said of the slice is kept"
        assert "Apache-Spark" in table._table.history(1)[0]["engineInfo"], "no other engine writes this log"
    planner = Planner(lake.config())
    state = planner.state(find_step("pseudo_labels"), D)
    assert state.status == "stale"
    assert state.reason.endswith("was refused by run test-run (ContractError): see job_runs")
    lake.table("exposed_samples", [], dt=D.isoformat())
    lake.table("unexposed_samples", [], dt=D.isoformat())
    feed = planner.state(find_step("training_feed"), D)
    assert feed.status == "blocked"
    assert "of pseudo_labels, which the run of step pseudo_labels that wrote it has refused; run" in feed.reason
    late = Planner(lake.config("feed.publish=exposed_only_on_failure")).state(find_step("training_feed"), D)
    assert late.reason.startswith("step training_feed needs table item_sids"), "as if there were no labels"
    lake.stats(items=[(0, 100, 30, 12)], users=[])
    assert lake.run("pseudo_labels", pseudo_labels.run) == "done"
    assert len(by_pair(lake)) == 4
    assert lake.run("pseudo_labels", pseudo_labels.run) == "noop"
