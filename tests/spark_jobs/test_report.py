"""The report of a date, from tables that the jobs before it wrote."""

from __future__ import annotations

import random
import re

import pytest

from gpl_core.contracts.contract import load_contract
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from gpl_core.lakehouse.marks import SliceMark
from spark_jobs import pseudo_labels, report, training_feed
from spark_jobs.common.manifests import manifest_path
from spark_jobs.reporting import site
from spark_jobs.reporting.examples import best_pairs
from spark_jobs.reporting.semantic_ids import buckets
from tests.spark_jobs.label_lake import FeedLake, score
from tests.spark_jobs.tiny_lake import D, day

pytestmark = pytest.mark.spark
EVIL = "<script>alert('x')</script>"
EVIL_TEXT = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"


@pytest.fixture
def lake(tmp_path, spark) -> FeedLake:
    """Two users, exposed and uniform impressions, quarantined rows; channel and message try to be markup."""
    made = FeedLake(tmp_path, spark)
    made.lake.create(load_contract("raw_impressions"), {"gpl.provenance": "semi-synthetic (real purchases)"})
    made.items_table("i0", "i1", "i2", "i3", titles={"i2": EVIL})
    made.stats(items=[(0, 10, 2, 1), (1, 10, 4, 3), (2, 90, 30, 40)])
    made.platt()
    made.sids((0, 0, (1, 1, 1), 0), (1, 0, (3, 1, 1), 5), (1, 1, (1, 1, 1), 0), (2, 0, (2, 2, 2), 0))
    made.table("evaluations", [
        {"run_id": "r", "model": m, "against": "", "seed": -1, "slice": "uniform", "metric": "auc", "value": v,
         "low": None, "high": None, "candidate_set_size": None, "rows": 10, "clicks": 300.0,
         "note": "" if v else "one class only"}
        for m, v in (("exposed_only", 0.61234), ("gpl", None))
    ], dt=D.isoformat())  # fmt: skip
    made.table("quarantine", [
        {"source_table": "raw_impressions", "row_hash": h, "row_json": "{}", "occurrences": n, "run_id": "r",
         "failed_checks": [{"name": "item_id_is_known", "message": EVIL, "columns": ["item_id"]}]}
        for h, n in (("a", 3), ("b", 4))
    ], dt=D.isoformat())  # fmt: skip
    return made


def fill(lake: FeedLake) -> None:
    """Samples, scores and impressions of D."""
    lake.exposed(("r1", "u1", 0, 1), ("r3", "u2", 0, 1, True))
    lake.shown(("u1", 0, 1, False), ("u2", 0, 1, True))
    lake.unexposed(("r1", "u1", 2), ("r1", "u1", 3), ("r3", "u2", 1), channel=EVIL)
    lake.scores(
        score("u1", 2, 0.5), score("u1", 3, 0.6), score("u1", 0, 0.2, source="exposed"),
        score("u2", 0, 0.9, source="uniform"),
    )  # fmt: skip


def text_of(lake: FeedLake, page: str = D.isoformat()) -> str:
    return (lake.root / "reports" / f"{page}.html").read_text(encoding="utf-8")


def cells(text: str) -> list[list[str]]:
    """The rows of all tables on the page, without links and what keeps dates whole."""
    text = re.sub(r"</?(a|span)\b[^>]*>", "", text)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)]


def test_report_tells_what_the_tables_hold(lake):
    fill(lake)
    lake.run("pseudo_labels", pseudo_labels.run)
    lake.run("training_feed", training_feed.run)
    anchors = {"anchor_sids": [2, 2, 2, 1, 1, 1], "log_prob": [-0.5, -0.9]}
    prefixes = {"prefixes": [2, -1, -1], "prefix_log_probs": [-0.5]}
    lake.table("score_requests", [
        {"user_id": "u1", "source": "unexposed", "block": 0, **anchors, **prefixes, "history": [0, -1, -1, -1],
         "candidates": [2, 3, -1], "sid_version": lake.tokenizer, "model_version": lake.model}
    ], dt=D.isoformat())  # fmt: skip
    (lake.root / manifest_path(lake.lake, D)).unlink()
    issued = {"sid_version": lake.tokenizer, "issued": 40, "reissued": 1, "drift": {"residual": 1.7, "perplexity": 0.9}}
    mark = SliceMark("assign_sids", {"*": "x"}, "r", {**issued, "warning": EVIL})
    lake.lake.commit(load_contract("item_sids"), [], mark=mark, mode="append")
    lake.table("monitors", [
        {"monitor": m, "value": v, "threshold": t, "bound": "most", "status": s, "reason": r, "run_id": "r"}
        for m, v, t, s, r in (("label_drift", 0.3, 0.2, "warn", "label_drift 0.3 is above 0.2: look"),
                              ("coverage", 0.9, 0.5, "ok", EVIL))
    ], dt=D.isoformat())  # fmt: skip
    feed = lake.lake.open("training_feed").contract
    figures = {"exposed": 5, "labeled": 9, "left_out": {"no history": 1}, "pseudo_label_sum": 0.9, "weight_sum": 14.0}
    versions = {"sid_version": EVIL, "model_version": lake.model, "calibrator_version": "c"}
    mark = SliceMark("training_feed", {day(-2).isoformat(): "x"}, "r", {**figures, "versions": versions})
    lake.lake.commit(feed, [], mark=mark, mode="append")
    earlier = lake.root / "reports" / f"{day(-2)}.html"
    earlier.parent.mkdir()
    earlier.write_text(f"before {site.links(day(-2), ())} after")
    drifted = "label_drift 0.3 is above 0.2: look"
    preranker = lake.bundle("preranker", {"calibrator_version": "older,old"}, "{}", D)
    assert lake.run("report", report.run) == "done"
    assert not [t for t in lake.spark.catalog.listTables() if t.isTemporary], "they would hide tables of the catalog"
    assert (lake.root / manifest_path(lake.lake, D)).exists()

    text, rows = text_of(lake), cells(text_of(lake))
    escaped = EVIL_TEXT
    assert Planner(lake.config()).state(find_step("report"), D).status == "done"
    assert lake.run("report", report.run) == "noop"
    assert text.count("<script") == 1, "the page's own"
    assert f'href="{day(-2)}.html"' in text
    assert f'href="{D}.html"' in earlier.read_text(), "the page before leads here"
    assert "Every figure here is semi-synthetic" in text
    assert [lake.tokenizer, "40", "1", "1.7", "0.9", escaped] in [r[1:] for r in rows]
    sliced = {tuple(r[:4]) for r in rows if len(r) == 7}
    assert {
        ("uniform", "all", "all", "1"),
        ("exposed", "item", "known", "1"),
        ("uniform", "user", "new", "1"),
    } <= sliced
    warnings = lake.context.counts.details["banners"]
    assert len(warnings) == 7
    told = [w for w in warnings if w not in lake.context.counts.details["warnings"]]
    assert told == [drifted, EVIL], "training_feed and assign_sids have warned of these"
    assert any(EVIL in w for w in warnings)
    assert text.count("label_drift 0.3 is above 0.2: look") == 3, "at the top, in its table and in that table's CSV"
    assert ["calibrator_version", "c", "new, as most days"] in [[r[0], r[2], r[3]] for r in rows if len(r) == 4]
    assert "Compared with 2026-01-08, the run date before." in re.sub(r"</?span[^>]*>", "", text)
    assert [r for r in rows if r and r[0] == "coverage" and len(r) == 4] == [["coverage", "0.6667", "0.9", "-25.9%"]]
    assert ["sid_version", lake.tokenizer, EVIL_TEXT, "changed"] in rows
    assert ["training_feed", "4", "0", "from none"] in rows
    for said in ("coverage is 0.6667, was 0.9.", "training_feed is 4, was 0.", "mean pseudo_label is "):
        assert [w for w in warnings if w.startswith(said)], said
    assert any(w.startswith(f"sid_version is {lake.tokenizer}, was {EVIL}: ") for w in warnings)
    assert any(w.startswith(f"preranker {preranker} was built on calibrator_version older,old") for w in warnings)
    made = {r[0]: r[1:] for r in rows if len(r) == 3}
    assert f"pseudo_labels @{lake.version('pseudo_labels')}" in made["training_feed"][0]
    assert made["pseudo_labels"][1] == f"pseudo_labels @{lake.version('pseudo_labels')}"
    assert made["train_preranker"][1] == f"preranker {preranker}"
    assert ["coverage", "ok", "0.9", "0.5", EVIL_TEXT] in rows
    assert "2 of 3 unexposed rows have a pseudo-label (66.7%)" in text
    assert ["unexposed_samples", "sampled unexposed pairs", "3"] in rows
    assert ["other", "1"] in rows
    assert ["raw_impressions", "item_id_is_known", "7", "2", escaped] in rows
    assert [r[1] for r in rows if len(r) == 5 and r[0] == escaped] == ["2"]
    errors = {r[0]: r[6] for r in rows if r[1:3] == ["all", "all"]}
    for source in ("uniform", "exposed"):
        said = re.search(f"{source}: 1 scored impressions, 1 clicks, expected calibration error (0[.][0-9]+)", text)[1]
        assert float(said) == pytest.approx(float(errors[source]), abs=1e-4), "one figure has one value"
    pairs = [r for r in rows if len(r) == 8 and r[0] != "title" and r[1] == EVIL_TEXT]
    assert [[r[0], r[1]] for r in pairs] == [["title of i3", EVIL_TEXT]], (
        "the highest label of the only user; none is both"
    )
    for said in ("it is near the anchor (similarity 0.60, mean 0.55)", "(history_similarity 0.30, mean 0.28)"):
        assert said in pairs[0][2]
    assert not re.search(r"\bu[12]\b", text), "no user id"
    assert "3 items have one" in text
    assert "66.7% of the items share theirs" in text
    assert ["1", "2", "–", "1.89"] in rows  # level 1: codes 1, 1, 2: exp(entropy of (2/3, 1/3)) = 1.890
    assert "Code usage per level" in text
    assert ["1-1-1", "2", "title of i0 | title of i1"] in [[r[0], r[1], " | ".join(sorted(r[2].split(" | ")))]
                                                           for r in rows if len(r) == 3]  # fmt: skip
    assert ["2", "1", escaped] in rows  # level-1 code 2 holds the item whose title is markup
    assert ["2-2", "1", escaped] in rows
    assert [lake.tokenizer, "2026-01-09", "–", "–", "–", "3", "1", "1"] in rows
    assert ["32-63", "1", "40"] in [r[:3] for r in rows]
    assert ["slice", "metric", "exposed_only", "gpl", "candidate-set size", "pairs", "note"] in rows
    assert ["uniform", "auc", "0.6123 (no interval)", "absent", "–", "10", "one class only"] in rows
    assert ["training_feed", "done"] in [r[:2] for r in rows]
    assert text.count("<svg") >= 5
    assert len(text) < 1_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:|index\.html|dictionary\.html|2026-01-08\.html)""", text)

    (line,) = [r for r in cells(text_of(lake, "index")) if r[0] == "2026-01-10"]
    label = next(r[1] for r in rows if r[0] == "mean pseudo_label")
    assert [line[0], *line[2:]] == ["2026-01-10", "4", label, "0.6667", "0.3", "0.6123", ""]
    assert "Not measured on any date: calibration error, AUC gpl." in text_of(lake, "index")
    assert "coverage is 0.6667, was 0.9." in line[1]
    assert EVIL_TEXT in line[1]
    assert '<h2 id="pseudo_labels">' in text_of(lake, "dictionary")
    for target in re.findall(r'href="dictionary\.html#(\w+)"', text):
        assert f'id="{target}"' in text_of(lake, "dictionary")


def test_report_of_an_empty_day(lake):
    """No exposed and no unexposed rows, no scores, no counts, and the optional tables missing."""
    lake.exposed()
    lake.unexposed()
    lake.scores()
    lake.stats()
    lake.table("evaluations", [], dt=D.isoformat())
    for table in ("quarantine", "pseudo_labels", "training_feed"):
        lake.table(table, [], dt=D.isoformat())
    assert lake.run("report", report.run) == "done"
    text = text_of(lake)
    for said in (
        "There are no unexposed rows on this date", "No row of this date was refused", "No unexposed pair was labeled",
        "A table that explains pairs is missing",
        "nothing to compare with", "no clicks to compare with", "no positive event in the window", "Nothing was judged",
    ):  # fmt: skip
        assert said in text


def test_the_pairs_to_read_are_the_best_of_the_users_that_are_told_apart_most_and_least(spark):
    rng = random.Random(0)
    spread = {f"u{n}": rng.choice([0.1, 0.2, 0.3, rng.random()]) for n in range(12)}
    rows = [(user, f"i{n}", rng.choice([0.2, rng.random()]), s) for user, s in spread.items() for n in range(4)]
    frame = spark.createDataFrame(rows, "user_id string, item_id string, pseudo_label double, user_spread double")
    found = [tuple(row) for row in best_pairs(frame, most=4).collect()]
    best = {u: max((label, item) for v, item, label, _ in rows if v == u)[1] for u in spread}
    for doubtful, sign in ((False, -1), (True, 1)):
        users = sorted(spread, key=lambda u: (sign * spread[u], u))[:4]
        assert [row for row in found if row[3] == doubtful] == [(u, best[u], spread[u], doubtful) for u in users]
    assert sorted(row["user_id"] for row in best_pairs(frame, most=8).collect()) == sorted(spread), "none is both"


def test_buckets_and_codes_are_few_however_many_items(spark):
    """Items 0-99 in code 0 (5 share a SID), 100-139 in codes 1 to 20, two each; item 7 has no title."""
    sids = [(n, [0, n % 30, 0 if n < 5 else n]) for n in range(100)] + [
        (n, [n // 2 - 49, 0, n]) for n in range(100, 140)
    ]
    sids[:5] = [(n, [0, 0, 0]) for n in range(5)]
    frame = spark.createDataFrame(sids, "item_index int, sid array<int>")
    items = spark.createDataFrame(
        [(n, "" if n == 7 else "x" * 200) for n in range(140)], "item_index int, title string"
    )
    shared, codes = buckets(frame, items, few=3)
    assert [(b.prefix, b.items, len(b.titles)) for b in shared] == [((0, 0, 0), 5, 4)]
    assert [len(b.prefix) for b in codes] == [1, 1, 1, 2, 2, 2]
    assert (0,) in [b.prefix for b in codes]  # the only first code of more than two items
    for bucket in codes:
        inside = [n for n, sid in sids if tuple(sid[: len(bucket.prefix)]) == bucket.prefix]
        assert bucket.items == len(inside)
        assert len(bucket.titles) == min(4, len(inside))
        assert set(bucket.titles) <= {"x" * 80, "(no title)"}
