"""Monitors: each planted fault raises its own alarm, warns or refuses as configured, and leaves its reason."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest

from gpl_core.api import LakehouseReader
from gpl_core.conf.sections import Monitors
from gpl_core.errors import ContractError, GateError
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from spark_jobs import training_feed
from spark_jobs.common import monitors
from spark_jobs.common.monitors import Measured, judge, stability_index
from tests.documented import ROOT
from tests.spark_jobs.label_lake import FeedLake
from tests.spark_jobs.tiny_lake import D, day

GOOD = Measured(label_drift=0.01, quarantine_share=0.001, anchors_per_user=18.0, calibration_error=0.01,
                uniform_impressions=5000)  # fmt: skip


def statuses(found: Measured, labeled: int = 90, left_out: int = 10, **settings) -> dict[str, str]:
    verdicts = judge(found, labeled, {"no anchors": left_out}, Monitors(**settings))
    return {v.monitor: v.status for v in verdicts}


def test_a_good_day_is_all_right():
    assert set(statuses(GOOD).values()) == {"ok"}
    assert set(statuses(GOOD, fail=["coverage", "label_drift"]).values()) == {"ok"}


@pytest.mark.parametrize("action", ["warn", "fail"])
@pytest.mark.parametrize(
    ("monitor", "fault", "rows"),
    [
        ("label_drift", {"label_drift": 0.21}, (90, 10)),
        ("coverage", {}, (49, 51)),
        ("quarantine_share", {"quarantine_share": 0.03}, (90, 10)),
        ("anchors_per_user", {"anchors_per_user": 1.5}, (90, 10)),
        ("calibration_error", {"calibration_error": 0.06}, (90, 10)),
    ],
)
def test_a_fault_alarms_its_own_monitor_and_no_other(monitor, fault, rows, action):
    found = statuses(Measured(**{**GOOD.__dict__, **fault}), *rows, fail=[monitor] if action == "fail" else [])
    assert found.pop(monitor) == action
    assert set(found.values()) == {"ok"}


def test_what_cannot_be_measured_says_so_and_fails_where_it_is_set_to():
    everything = ["label_drift", "coverage", "quarantine_share", "anchors_per_user", "calibration_error"]
    assert statuses(Measured(), 0, 0) == dict.fromkeys(everything, "unmeasured")
    assert statuses(Measured(), 0, 0, fail=everything) == dict.fromkeys(everything, "fail")
    few = Measured(calibration_error=0.9, uniform_impressions=999)
    (verdict,) = [v for v in judge(few, 1, {}, Monitors()) if v.monitor == "calibration_error"]
    assert (verdict.status, verdict.value) == ("unmeasured", None)
    assert verdict.reason.startswith("calibration_error could not be measured: ")
    assert "at least 1,000" in verdict.reason


def test_the_first_labels_can_be_published_although_they_drift_from_nothing():
    first = {**GOOD.__dict__, "label_drift": None, "first_labels": True}
    assert statuses(Measured(**first), fail=["label_drift"])["label_drift"] == "unmeasured"
    assert statuses(Measured(**{**first, "first_labels": False}), fail=["label_drift"])["label_drift"] == "fail"


def test_the_rows_that_came_of_a_date_that_lacks_some_are_no_coverage():
    verdicts = judge(GOOD, 90, {"no anchors": 10}, Monitors(fail=("coverage",)), ["raw_impressions has none"])
    (coverage,) = [v for v in verdicts if v.monitor == "coverage"]
    assert (coverage.status, coverage.value) == ("fail", None)
    assert "raw_impressions has none, 10 no anchors" in coverage.reason


def test_an_ignored_monitor_gives_no_row():
    assert "coverage" not in statuses(GOOD, ignore=["coverage"])


def test_stability_index_by_hand():
    same = {"a": 10.0, "b": 30.0}
    assert stability_index(same, same) == 0.0
    # all 4 rows in one cell before, in the other after; each cell gets half a row more
    p, q = 4.5 / 5, 0.5 / 5
    assert stability_index({"a": 4.0}, {"b": 4.0}) == pytest.approx(2 * (p - q) * math.log(p / q))


def test_the_index_is_the_same_to_the_last_bit_in_every_process():
    code = (
        "from spark_jobs.common.monitors import stability_index as f; "
        "print(f({str(n): 1 / (n + 3) for n in range(40)}, {str(n): 1 / (n + 7) for n in range(20, 60)}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "012"
    }
    assert len(found) == 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory, spark) -> FeedLake:
    """Every fault at once: labels moved, 1 of 3 rows labeled, a row in ten refused, one anchor, labels far off.

    u1 was shown i1 (label .9, no click) and i2 (label .1, clicked), uniformly.
    """
    made = FeedLake(tmp_path_factory.mktemp("monitors"), spark, "monitors.ignore=[]")
    made.exposed(("r1", "u1", 0, 1))
    made.unexposed(("r1", "u1", 3), ("r1", "u1", 4), ("r1", "u1", 5))
    made.shown(("u1", 1, 0), ("u1", 2, 1), *[("u2", n, 0, False) for n in range(7)])
    made.labels(("u1", 3, 0.5, 1.0), ("u1", 1, 0.9, 1.0, "uniform"), ("u1", 2, 0.1, 1.0, "uniform"))
    made.table("pseudo_labels", [
        {"user_id": f"v{n}", "item_id": "i1", "item_index": 1, "source": "unexposed", "similarity": 0.5,
         "history_similarity": 0.5, "prefix_log_prob": -1.0, "anchor_rank": 0,
         "coherence": 0.25, "consistency": 0.5, "llm_confidence": 0.75,
         "user_rate": 0.1, "user_rank": 0.5, "user_spread": 0.2, "pseudo_label": 0.01,
         "raw_weight": 0.5, "weight": 1.0, "calibrator_version": "c",
         "model_version": made.model, "sid_version": made.tokenizer}
        for n in range(9)
    ], dt=day(-1).isoformat())  # fmt: skip
    made.sids((0, 0, (1, 1, 1), 0))
    made.table("quarantine", [
        {"source_table": table, "row_hash": "a", "row_json": "{}", "occurrences": rows, "run_id": "r",
         "failed_checks": []} for table, rows in (("raw_impressions", 1), ("raw_items", 50))
    ], dt=D.isoformat())  # fmt: skip
    made.table("score_requests", [
        {"user_id": "u1", "source": "unexposed", "block": 0, "anchor_sids": [1, 1, 1, -1, -1, -1],
         "log_prob": [-1.0, -100.0], "prefixes": [1, -1, -1], "prefix_log_probs": [-0.5],
         "history": [1, -1, -1, -1], "candidates": [3, 4, 5],
         "model_version": made.model, "sid_version": made.tokenizer}
    ], dt=D.isoformat())  # fmt: skip
    return made


@pytest.fixture
def lake(planted, monkeypatch) -> FeedLake:
    monkeypatch.setattr(monitors, "LEAST_IMPRESSIONS", 2)
    return planted


@pytest.mark.spark
def test_a_monitor_that_may_refuse_keeps_the_feed_back_and_says_why(lake, capsys):
    with pytest.raises(GateError, match=r"not published, 1 monitor refused it: anchors_per_user 1 is below 2"):
        lake.run("training_feed", training_feed.run, D, "monitors.fail=[anchors_per_user]")
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["status"], row["error_class"]) == ("failed", "GateError")
    assert row["details"]["monitors"]["anchors_per_user"]["status"] == "fail"
    assert not lake.lake.exists("training_feed")
    assert ("anchors_per_user", "fail") in lake.rows("monitors", "monitor", "status", dt=D)
    assert Planner(lake.config()).state(find_step("training_feed"), D).status == "absent"


@pytest.mark.spark
def test_planted_faults_are_measured_written_and_warned_of(lake):
    assert lake.run("training_feed", training_feed.run) == "done"
    found = {r[0]: r[1:] for r in lake.rows("monitors", "monitor", "status", "value", dt=D)}
    assert {k: v[0] for k, v in found.items()} == dict.fromkeys(found, "warn")
    assert found["quarantine_share"][1] == pytest.approx(0.1)
    assert found["coverage"][1] == pytest.approx(1 / 3)
    assert found["anchors_per_user"][1] == 1.0
    assert found["calibration_error"][1] == pytest.approx(0.9)
    assert found["label_drift"][1] == pytest.approx(stability_index({"of 0.01": 9}, {"of 0.5": 1}))
    assert len(lake.context.counts.details["warnings"]) == 5
    assert lake.context.counts.details["monitors"]["coverage"]["status"] == "warn"
    feed = LakehouseReader(lake.config()).feed(D)
    assert feed.manifest["monitors"]["coverage"] == {"status": "warn", "value": pytest.approx(1 / 3)}
    assert sorted(feed.alarms) == sorted(f"{name} warns" for name in found)
    with pytest.raises(ContractError, match=r"training_feed of 2026-01-10: .*coverage warns"):
        feed.refuse_alarms()
    # The same without this package, as docs/bring-your-own-preranker.md shows it.
    (lines,) = re.findall("```python\n(alarms = .*?)```", (ROOT / "docs/bring-your-own-preranker.md").read_text(), re.S)
    assert len(lines.splitlines()) == 2
    with pytest.raises(AssertionError, match="coverage"):
        exec(lines, {"manifest": feed.manifest})
    exec(lines, {"manifest": {**feed.manifest, "monitors": {"coverage": {"status": "ok", "value": 1.0}}}})


@pytest.mark.spark
def test_what_a_monitor_refuses_may_be_published_without_unexposed_rows(lake, tmp_path):
    made = lake.copied(tmp_path)
    settings = ("monitors.fail=[anchors_per_user]", "feed.publish=exposed_only_on_failure")
    assert made.run("training_feed", training_feed.run, D, *settings, force=True) == "done"
    assert made.feed("is_exposed", "item_index") == [(True, 0)]
    details = made.mark_details("training_feed")
    assert details["completeness"]["rows"] == "exposed_only"
    assert details["completeness"]["because"].startswith("anchors_per_user 1 is below 2")
    assert details["left_out"].pop("a monitor refused") == 1
    assert sum(details["left_out"].values()) == 2
    assert made.context.counts.details["warnings"][-1].startswith("only exposed rows are published: anchors_per_user 1")
    assert ("anchors_per_user", "fail") in made.rows("monitors", "monitor", "status", dt=D)
