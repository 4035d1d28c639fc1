"""What is asked of the GPU workers: whose anchors, and which pairs against them."""

from __future__ import annotations

from collections import defaultdict

import pytest

from gpl_core.errors import LineageError, MissingInputError
from spark_jobs import anchor_requests, score_requests
from spark_jobs.common.histories import scored_pairs
from spark_jobs.score_requests import candidate_blocks
from tests.spark_jobs.tiny_lake import D, TinyLake, at, day

pytestmark = pytest.mark.spark


class RequestLake(TinyLake):
    """
    | user | sequence (newest row)  | anchors in the cache            | unexposed pairs | exposed pairs      |
    |------|------------------------|---------------------------------|-----------------|--------------------|
    | u1   | h1, D                  | none                            | 1 … 7           |                    |
    | u2   | h2, D-1                | of h2                           | 1, 1 (twice)    | 2, uniformly       |
    | u3   | none                   |                                 | 3               |                    |
    | u4   | h4b, D (h4a on D-1)    | of h4a                          |                 | 4                  |
    | u5   | h5, D                  | of h5, by another model         |                 | 5                  |
    | u6   | h6, D                  | none, and no pair either        |                 |                    |
    """

    def __init__(self, root, spark, *overrides):
        super().__init__(root, spark, "samples.scored_exposed_share=1.0", *overrides)
        self.tokenizer = self.artifact("tokenizer", day(-3)).version
        self.model = self.artifact("interest_model", day(-1), {"sid_version": self.tokenizer}).version
        self.table("user_sequences", [self.sequence(u, h) for u, h in (("u2", "h2"), ("u4", "h4a"))], dt=str(day(-1)))
        new = (("u1", "h1"), ("u4", "h4b"), ("u5", "h5"), ("u6", "h6"))
        self.table("user_sequences", [self.sequence(u, h) for u, h in new], dt=str(D))
        pairs = [("u1", i) for i in range(1, 8)] + [("u2", 1), ("u2", 1), ("u3", 3)]
        self.table("unexposed_samples", [
            {"request_id": f"r{n}", "item_id": f"i{i}", "user_id": u, "item_index": i, "channel": "c",
             "sampling_probability": 1.0, "event_time": at(0)} for n, (u, i) in enumerate(pairs)
        ], dt=str(D))  # fmt: skip
        self.table("exposed_samples", [
            {"request_id": "r", "item_id": f"i{i}", "user_id": u, "item_index": i, "label": 0, "position": 0,
             "is_random": uniform, "event_time": at(0)}
            for u, i, uniform in (("u2", 2, True), ("u4", 4, False), ("u5", 5, False))
        ], dt=str(D))  # fmt: skip
        self.anchors(self.model, ("u2", "h2"), ("u4", "h4a"))
        self.anchors("another-model", ("u5", "h5"))

    def sequence(self, user: str, digest: str) -> dict:
        return {
            "user_id": user, "sid": [1, 2, 3] + [-1] * 9, "item_index": [9, -1, -1, -1], "keep_u": [0.5, -1, -1, -1],
            "length": 1, "last_event_time": int(at(-2).timestamp() * 1e6), "sequence_hash": digest,
            "sid_version": self.tokenizer, "day": 0,
        }  # fmt: skip

    def anchors(self, model: str, *keys: tuple[str, str], dt=None) -> None:
        """Rows of the cache: two anchors each."""
        self.table("interest_anchors", self.two(keys), model_version=model, dt=str(dt or day(-1)))

    def two(self, keys) -> list[dict]:
        """Two anchors of each (user, sequence)."""
        return [
            {"user_id": u, "sequence_hash": h, "anchor_sids": [1, 2, 3, 4, 5, 6], "log_prob": [-1.0, -2.0],
             "prefixes": [1, -1, -1], "prefix_log_probs": [-0.5], "anchor_count": 2, "sid_version": self.tokenizer}
            for u, h in keys
        ]  # fmt: skip


@pytest.fixture
def lake(tmp_path, spark) -> RequestLake:
    return RequestLake(tmp_path, spark)


def test_only_what_the_cache_lacks_is_asked_for_and_what_it_holds_is_scored(lake):
    assert lake.run("anchor_requests", anchor_requests.run) == "done"
    assert lake.rows("anchor_requests", "user_id", "sequence_hash", "model_version") == [
        ("u1", "h1", lake.model), ("u4", "h4b", lake.model), ("u5", "h5", lake.model),
    ]  # fmt: skip
    details = lake.context.counts.details
    assert (details["users"], details["without_history"], details["cached"]) == (5, 1, 1)
    assert lake.run("anchor_requests", anchor_requests.run) == "noop"
    _, mark = lake.lake.open("anchor_requests").mark(str(D))
    assert mark.details["cache_version"] == lake.lake.open("interest_anchors").version

    with pytest.raises(MissingInputError, match="run generate_anchors for 2026-01-10 first"):
        lake.run("score_requests", score_requests.run)
    lake.answers(lake.two([("u1", "h1"), ("u5", "h5")]), lake.model)  # u4 got none
    assert lake.run("score_requests", score_requests.run) == "done"
    assert lake.rows("score_requests", "user_id", "source", "block", "candidates", "history") == [
        ("u1", "unexposed", 0, (1, 2, 3), (9, -1, -1, -1)),
        ("u1", "unexposed", 1, (4, 5, 6), (9, -1, -1, -1)),
        ("u1", "unexposed", 2, (7, -1, -1), (9, -1, -1, -1)),
        ("u2", "unexposed", 0, (1, -1, -1), (9, -1, -1, -1)),
        ("u2", "uniform", 0, (2, -1, -1), (9, -1, -1, -1)),
        ("u5", "exposed", 0, (5, -1, -1), (9, -1, -1, -1)),
    ]
    details = lake.context.counts.details
    assert (details["pairs"], details["pairs_scored"], details["users_without_anchors"]) == (12, 10, 2)

    # Now the cache holds all: an empty slice, and nothing for the worker to do. Another number of anchors is no hit.
    lake.anchors(lake.model, ("u4", "h4b"), dt=day(1))
    lake.run("anchor_requests", anchor_requests.run, force=True)
    assert lake.rows("anchor_requests") == []
    lake.run("anchor_requests", anchor_requests.run, D, "anchors.count=3")
    assert len(lake.rows("anchor_requests")) == 4


def test_of_users_who_opted_out_and_withdrawn_items_nothing_is_asked(lake):
    """u1 and u2 opt out, item 5 (u5's) is withdrawn: u4 and its item 4 are left."""
    lake.opt_outs(("u1", at(0, 23)), ("u2", None), ("u4", at(1, 0)))
    lake.table("items", [
        {"item_id": f"i{i}", "item_index": i, "withdrawn_at": int(t.timestamp() * 1e6), "updated_at": 0, "image": b"",
         "image_embedding": [0.0],
         **{c: "" for c in ("title", "description", "category", "brand", "text", "image_uri", "content_hash")}}
        for i, t in ((4, at(1, 0)), (5, at(0)))
    ])  # fmt: skip
    lake.run("anchor_requests", anchor_requests.run)
    assert lake.rows("anchor_requests", "user_id") == [("u4",)]
    details = lake.context.counts.details
    assert [details[k] for k in ("users", "without_history", "opted_out", "cached")] == [4, 1, 2, 0]

    lake.answers(lake.two([*((f"u{n}", f"h{n}") for n in (1, 2, 5)), ("u4", "h4b")]), lake.model)
    lake.run("score_requests", score_requests.run)
    assert lake.rows("score_requests", "user_id", "source", "candidates") == [("u4", "exposed", (4, -1, -1))]
    details = lake.context.counts.details
    assert [details[k] for k in ("users", "users_opted_out", "users_without_anchors")] == [4, 2, 1]


def test_a_model_of_other_semantic_ids_is_refused(lake):
    other = lake.artifact("tokenizer", day(-1), {"encoder_version": "new"}).version
    for name, job in (("anchor_requests", anchor_requests), ("score_requests", score_requests)):
        if name == "score_requests":
            lake.table("anchor_requests", [], dt=str(D))
        with pytest.raises(LineageError) as refusal:
            lake.run(name, job.run)
        assert other in str(refusal.value)
        assert lake.tokenizer in str(refusal.value)


def test_a_hot_user_is_split_and_no_pair_is_lost_or_scored_twice(spark):
    pairs = spark.range(0, 1000).selectExpr(
        "if(id < 900, 'hot', concat('u', id % 7)) AS user_id", "cast(id AS int) AS item_index", "'unexposed' AS source"
    )
    found = defaultdict(list)
    rows = candidate_blocks(pairs.repartition(3), 64).collect()
    for row in rows:
        assert len(row["candidates"]) == 64
        found[row["user_id"]] += [i for i in row["candidates"] if i >= 0]
    assert sorted(i for items in found.values() for i in items) == list(range(1000))
    assert sum(row["user_id"] == "hot" for row in rows) == 15  # 900 / 64, rounded up
    assert sorted(map(str, rows)) == sorted(map(str, candidate_blocks(pairs.coalesce(1), 64).collect()))


def test_the_scored_share_of_exposed_pairs_is_a_hash(spark):
    exposed = spark.range(0, 2000).selectExpr(
        "concat('r', id) AS request_id", "concat('i', id) AS item_id", "concat('u', id) AS user_id",
        "cast(id AS int) AS item_index", "id % 10 = 0 AS is_random",
    )  # fmt: skip
    unexposed = exposed.limit(0)

    def chosen(frame, share):
        rows = scored_pairs(unexposed, frame, share, 0).collect()
        assert sum(r["source"] == "uniform" for r in rows) == 200
        return {r["item_index"] for r in rows if r["source"] == "exposed"}

    tenth = chosen(exposed, 0.1)
    assert abs(len(tenth) - 180) < 5 * (1800 * 0.1 * 0.9) ** 0.5
    assert chosen(exposed.repartition(5), 0.1) == tenth
    assert tenth < chosen(exposed, 0.3)
    assert not any(i % 10 == 0 for i in tenth)
