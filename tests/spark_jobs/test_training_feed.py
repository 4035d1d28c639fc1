"""The training feed: which rows reach it, with which values, in which files, and what its manifest promises."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np
import pyarrow.parquet as pq
import pytest

from gpl_core.api import LakehouseReader
from gpl_core.config import with_passthrough
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError, GateError, LineageError, MissingInputError
from spark_jobs import training_feed
from spark_jobs.common.manifests import ensure_manifest, incompatibilities, manifest_path, schema_of
from tests.spark_jobs.label_lake import FeedLake
from tests.spark_jobs.tiny_lake import D, at, day

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def labeled(tmp_path_factory, spark) -> FeedLake:
    """
    | request | user | exposed                  | unexposed               | labels      |
    |---------|------|--------------------------|-------------------------|-------------|
    | r1      | u1   | 0 (clicked), 1           | 2, 3                    | 2, 3        |
    | r2      | u1   | 1                        | 2 (again)               |             |
    | r3      | u2   | 0 (clicked, uniform)     | 1, 2 (no embedding)     | 1           |
    | r4      | u3   |                          | 1 (no history)          |             |
    | r5      | u4   |                          | 1 (no anchors)          |             |
    """
    made = FeedLake(tmp_path_factory.mktemp("labeled"), spark)
    made.exposed(("r1", "u1", 0, 1), ("r1", "u1", 1, 0), ("r2", "u1", 1, 0), ("r3", "u2", 0, 1, True))
    made.unexposed(
        ("r1", "u1", 2), ("r1", "u1", 3), ("r2", "u1", 2), ("r3", "u2", 1), ("r3", "u2", 2), ("r4", "u3", 1),
        ("r5", "u4", 1),
    )  # fmt: skip
    made.labels(
        ("u1", 2, 0.25, 1.5), ("u1", 3, 0.75, 0.5), ("u2", 1, 0.5, 1.0), ("u1", 0, 0.9, 1.0, "exposed"),
        ("u2", 0, 0.8, 1.0, "uniform"),
    )  # fmt: skip
    # item 1 was issued again, item 2's only SID is retired, item 3 has none
    made.sids((0, 0, (1, 1, 1), 0), (1, 0, (2, 2, 2), 5), (1, 1, (2, 2, 3), 0), (2, 0, (3, 3, 3), 7))
    history = {"sid": [0] * 12, "item_index": [0, -1, -1, -1], "keep_u": [0.5, -1.0, -1.0, -1.0],
               "sequence_hash": "s", "day": 1, "sid_version": made.tokenizer}  # fmt: skip
    last = {**dict.fromkeys(("u1", "u2", "u4"), int(at(-4).timestamp() * 1e6)), "u3": 1}  # u3's is long past
    made.table(
        "user_sequences",
        [{"user_id": u, "length": 1, "last_event_time": time, **history} for u, time in last.items()],
        dt=(D - timedelta(days=3)).isoformat(),
    )
    request = {"source": "unexposed", "block": 0, "anchor_sids": [0] * 6, "log_prob": [-1.0] * 2,
               "prefixes": [1, -1, -1], "prefix_log_probs": [-0.5],
               "history": [0, -1, -1, -1], "candidates": [1, 2, -1], "sid_version": made.tokenizer,
               "model_version": made.model}  # fmt: skip
    made.table("score_requests", [{"user_id": u, **request} for u in ("u1", "u2")], dt=D.isoformat())
    made.table(
        "worker_rejects",
        [{"key": "item_index=2", "reason": "candidate without embedding", "detail": ""}],
        dt=D.isoformat(), step="score_candidates",
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def done(labeled, tmp_path_factory) -> FeedLake:
    """The same with its feed, for all tests that start from there."""
    made = labeled.copied(tmp_path_factory.mktemp("done"))
    assert made.run("training_feed", training_feed.run) == "done"
    return made


@pytest.fixture
def lake(labeled, tmp_path) -> FeedLake:
    return labeled.copied(tmp_path)


@pytest.fixture
def fed(done, tmp_path) -> FeedLake:
    return done.copied(tmp_path)


def test_rows_of_the_feed(fed):
    lake = fed
    columns = ("is_exposed", "is_random", "has_label", "label", "pseudo_label", "target", "sample_weight")
    assert lake.feed("request_id", "item_index", *columns) == [
        ("r1", 0, True, False, True, 1.0, 0.0, 1.0, 1.0),
        ("r1", 1, True, False, True, 0.0, 0.0, 0.0, 1.0),
        ("r1", 2, False, False, False, 0.0, 0.25, 0.25, 1.5),
        ("r1", 3, False, False, False, 0.0, 0.75, 0.75, 0.5),
        ("r2", 1, True, False, True, 0.0, 0.0, 0.0, 1.0),
        ("r2", 2, False, False, False, 0.0, 0.25, 0.25, 1.5),
        ("r3", 0, True, True, True, 1.0, 0.0, 1.0, 1.0),
        ("r3", 1, False, False, False, 0.0, 0.5, 0.5, 1.0),
    ]  # fmt: skip
    assert set(lake.feed("item_index", "sid")) == {
        (0, (1, 1, 1)), (1, (2, 2, 3)), (2, (-1, -1, -1)), (3, (-1, -1, -1)),
    }  # fmt: skip
    columns = ("coherence", "consistency", "llm_confidence", "sampling_probability", "channel")
    assert set(lake.feed("is_exposed", *columns)) == {
        (True, 0.0, 0.0, 0.0, 1.0, ""), (False, 0.25, 0.5, 0.75, 0.25, "popular"),
    }  # fmt: skip
    assert set(lake.feed("is_exposed", "model_version", "calibrator_version", "sid_version", "dt_copy")) == {
        (True, "", "", lake.tokenizer, D.isoformat()), (False, lake.model, "cal-1", lake.tokenizer, D.isoformat()),
    }  # fmt: skip
    assert set(lake.feed("event_time")) == {(int(at(0).timestamp() * 1_000_000),)}
    assert {p for e, p in lake.feed("is_exposed", "position") if not e} == {-1}

    assert lake.context.counts.rows_in == 11
    assert lake.context.counts.rows_dropped == 3
    assert lake.mark_details("training_feed")["left_out"] == {"no history": 1, "no anchors": 1, "no embedding": 1}


def test_manifest_is_what_a_reader_finds(done):
    """In the fixture itself, which it leaves as it was: a copy would lie elsewhere than its manifest says."""
    lake = done
    path = manifest_path(lake.lake, D)
    with open(path, encoding="utf-8") as handle:
        text = handle.read()
    manifest = json.loads(text)
    found = lake.feed("label", "pseudo_label", "sample_weight")
    assert manifest["rows"] == len(found) == sum(f["rows"] for f in manifest["files"])
    assert (manifest["exposed"], manifest["random"], manifest["labeled"]) == (4, 1, 4)
    sums = np.sum(found, axis=0)
    assert [manifest[k] for k in ("label_sum", "pseudo_label_sum", "weight_sum")] == pytest.approx(sums.tolist())
    assert manifest["versions"] == {
        "sid_version": lake.tokenizer, "model_version": lake.model, "calibrator_version": "cal-1",
    }  # fmt: skip
    assert manifest["uniform_share"] == 1 / 4
    assert manifest["calibrator"] == {}, "cal-1 was never published"
    assert "origin" not in manifest
    assert manifest["table_version"] == lake.version("training_feed")
    # A run that was killed before the file was written: the table still tells it, word for word.
    (lake.root / path).unlink()
    ensure_manifest(lake.lake, D, lake.context.contract("training_feed"))
    with open(path, encoding="utf-8") as handle:
        assert handle.read() == text


def test_rerun_is_a_noop_and_forced_rerun_gives_the_same_rows(fed):
    lake = fed
    before, version = lake.feed(), lake.version("training_feed")
    assert lake.run("training_feed", training_feed.run) == "noop"
    assert lake.version("training_feed") == version
    lake.run("training_feed", training_feed.run, D, "feed.rows_per_file=2", force=True)
    assert lake.feed() == before


def test_late_labels_hold_the_slice_back_or_let_its_exposed_rows_through_until_they_come(lake):
    setting = "feed.publish=exposed_only_on_failure"
    labels = lake.root / "tables" / "pseudo_labels"
    labels.rename(lake.root / "late")
    with pytest.raises(MissingInputError, match="pseudo_labels"):
        lake.run("training_feed", training_feed.run)
    assert lake.run("training_feed", training_feed.run, D, setting) == "done"
    assert lake.feed("is_exposed", "request_id", "item_index") == [
        (True, "r1", 0), (True, "r1", 1), (True, "r2", 1), (True, "r3", 0)
    ]  # fmt: skip
    manifest = json.loads((lake.root / manifest_path(lake.lake, D)).read_text())
    assert manifest["completeness"] == {
        "rows": "exposed_only",
        "because": f"pseudo_labels has no slice dt={D} that stands",
    }
    assert (manifest["rows"], manifest["labeled"], manifest["left_out"]) == (4, 0, {"labels late": 7})
    assert manifest["weight_sum"] == 4.0
    told = "only exposed rows are published: pseudo_labels has no slice"
    assert told in lake.context.counts.details["warnings"][0], "what an alarm tells"
    assert lake.run("training_feed", training_feed.run, D, setting) == "noop"

    (lake.root / "late").rename(labels)
    assert lake.run("training_feed", training_feed.run, D, setting) == "done", "stale since the labels came"
    assert len(lake.feed()) == 8
    assert lake.mark_details("training_feed")["completeness"] == {"rows": "complete", "because": ""}
    assert lake.run("training_feed", training_feed.run) == "noop", "the setting alone makes nothing stale"


def test_even_files_in_the_order_of_the_shuffle_key(lake):
    """3,000 unexposed rows in files of 700: five files, each sorted by shuffle_key, sizes within a fifth."""
    users = [f"v{n}" for n in range(300)]
    lake.unexposed(*[(f"q{u}", u, item) for u in users for item in range(10)])
    lake.labels(*[(u, item, 0.5, 1.0) for u in users for item in range(10)])
    lake.run("training_feed", training_feed.run, D, "feed.rows_per_file=700")
    snapshot = lake.lake.open("training_feed")
    files = snapshot.select(start=D, end=D)
    assert len(files) == 5
    assert sum(f.rows for f in files) == 3004
    mean = 3004 / 5
    for f, uri in zip(files, snapshot.uris(files)):
        keys = pq.read_table(uri, columns=["shuffle_key"], partitioning=None).column(0).to_numpy()
        assert (np.diff(keys) >= 0).all()
        assert abs(f.rows - mean) < 0.2 * mean


def test_exposed_pair_among_the_unexposed_is_refused(lake):
    lake.unexposed(("r9", "u1", 0), ("r1", "u1", 2))
    with pytest.raises(ContractError, match=r"1 row of pairs that are in exposed_samples"):
        lake.run("training_feed", training_feed.run)
    assert not lake.lake.exists("training_feed")


def test_labels_of_another_tokenizer_are_refused(lake):
    lake.labels(("u1", 2, 0.25, 1.5), sid_version="2025-01-01-old")
    with pytest.raises(LineageError, match=rf"2025-01-01-old.*{lake.tokenizer}"):
        lake.run("training_feed", training_feed.run)


def test_pair_with_two_labels_is_refused(lake):
    lake.labels(("u1", 2, 0.25, 1.5), ("u1", 2, 0.5, 1.5))
    with pytest.raises(ContractError, match="11 rows came in, 13 would"):
        lake.run("training_feed", training_feed.run)


MISSING = {
    "no unexposed rows": ["raw_candidates"], "no exposed rows": ["raw_impressions"],
    "empty day": ["raw_impressions", "raw_candidates"],
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_days_with_little(lake, what):
    because = [f"{table} has no usable row of {D}" for table in MISSING[what]]
    if what != "no exposed rows":
        lake.unexposed()
        lake.labels()
    if what != "no unexposed rows":
        lake.exposed()
    assert lake.run("training_feed", training_feed.run) == "done"
    assert {e for (e,) in lake.feed("is_exposed")} == {
        "no unexposed rows": {True}, "no exposed rows": {False}, "empty day": set(),
    }[what]  # fmt: skip
    manifest = json.loads((lake.root / manifest_path(lake.lake, D)).read_text())
    assert manifest["rows"] == len(lake.feed())
    assert manifest["completeness"] == {"rows": "incomplete", "because": "; ".join(because)}
    assert lake.context.counts.details["warnings"] == because
    assert lake.run("training_feed", training_feed.run) == "noop"
    with pytest.raises(GateError, match="coverage could not be measured.*" + because[0]):
        lake.run("training_feed", training_feed.run, D, "monitors.fail=[coverage]", "monitors.ignore=[]", force=True)
    found = lake.rows("monitors", "monitor", "status", "value", dt=D)
    assert ("coverage", "fail", None) in found
    assert ("label_drift", "unmeasured", None) in found


def test_candidates_that_were_all_exposed_are_a_complete_day(lake):
    lake.unexposed()
    lake.labels()
    row = {"request_id": "r1", "user_id": "u1", "item_id": "i0", "item_index": 0, "event_time": at(0)}
    lake.table("candidates", [{**row, "channel": "c", "channels": ["c"], "recall_score": 0.5}], dt=D.isoformat())
    lake.run("training_feed", training_feed.run)
    assert lake.mark_details("training_feed")["completeness"] == {"rows": "complete", "because": ""}


def test_wrong_date_names_what_is_missing(lake):
    with pytest.raises(MissingInputError, match=r"exposed_samples.*run samples for 2026-01-11"):
        lake.run("training_feed", training_feed.run, day(1))


def test_features_pass_through_and_their_loss_is_refused(tmp_path, spark):
    """A feature that the platform gives for some rows only is 0 for the others; dropping it would break readers."""
    setting = "feed.passthrough={price: float}"
    made = FeedLake(tmp_path, spark, setting)
    made.exposed(("r1", "u1", 0, 1))
    made.unexposed(("r1", "u1", 2), ("r1", "u1", 3), price=2.5)
    made.labels(("u1", 2, 0.25, 1.5))
    made.sids()
    made.run("training_feed", training_feed.run)
    assert made.mark_details("training_feed")["left_out"] == {"other": 1}  # no table is there that tells the reason
    contract = with_passthrough("training_feed", made.config())
    snapshot = made.lake.open("training_feed", contract=contract)
    found = snapshot.read(columns=["item_index", "price"]).to_pylist()
    assert sorted(tuple(r.values()) for r in found) == [(0, 0.0), (2, 2.5)]
    lake = LakehouseReader(made.config())
    assert lake.table("training_feed", D)["price"].to_pylist() == [r["price"] for r in found]
    with pytest.raises(ContractError, match="training_feed: no column 'pirce'"):
        next(lake.feed(D).batches(8, ["pirce"]))
    made.overrides = made.overrides[:-1]
    with pytest.raises(ContractError, match=r"column 'price' \(float\) is gone.*feed\.passthrough"):
        made.run("training_feed", training_feed.run)


def test_incompatibilities():
    contract = load_contract("training_feed")
    before = schema_of(contract)
    assert incompatibilities(before, contract) == []
    assert incompatibilities(before[:-1], contract) == []
    changed = [*before[1:], {"name": "old", "type": "int"}, {"name": "label", "type": "double"}]
    assert incompatibilities(changed, contract) == [
        "column 'old' (int) is gone", "column 'label' was double, would be float",
    ]  # fmt: skip
