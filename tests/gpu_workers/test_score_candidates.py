"""score_candidates: pair_scores equal the formulas, what cannot be scored is named, wrong lineage is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

from gpl_core.errors import ContractError, LineageError
from gpl_core.sids.content_table import ContentTable
from gpu_workers import score_candidates
from tests.gpu_workers.labels_lake import DAY, LabelsLake

ROWS = [
    {"user_id": "a", "anchors": [(0, 0.5), (3, 0.25)], "history": [1, 2], "candidates": [4, 5, 4, 8]},
    {"user_id": "a", "anchors": [(0, 0.5), (3, 0.25)], "history": [1, 2], "candidates": [0, 9], "source": "uniform"},
    {
        "user_id": "b",
        "anchors": [(6, 0.1)],
        "history": [3],
        "candidates": [6, 7, 1],
        "source": "exposed",
        "prefixes": [((2,), 0.7), ((2, 0), 0.4)],
    },
    {"user_id": "c", "anchors": [((2, 1, 0), 0.3)], "history": [3], "candidates": [1, 2]},
    {"user_id": "d", "anchors": [((2, 1, 0), 0.3), (2, 0.2)], "history": [8], "candidates": [1, 2]},
]


@pytest.fixture
def lake(tmp_path: Path) -> LabelsLake:
    return LabelsLake(tmp_path / "lake")


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_rows_equal_the_formulas(lake: LabelsLake) -> None:
    lake.write_requests(ROWS)
    context = lake.run("score_candidates", score_candidates.run)
    found = {(row["user_id"], row["item_index"], row["source"]): row for row in lake.read("pair_scores")}
    # 8 has no embedding and 9 none before the day's end; c's only anchor is item 8's SID; 4 stands twice.
    assert set(found) == {
        ("a", 4, "unexposed"), ("a", 5, "unexposed"), ("a", 0, "uniform"),
        ("b", 6, "exposed"), ("b", 7, "exposed"), ("b", 1, "exposed"),
        ("d", 1, "unexposed"), ("d", 2, "unexposed"),
    }  # fmt: skip
    e = lake.vectors.astype(float)
    shared = _unit((e[6] + e[7]) / 2)  # one SID, two items
    row = found["b", 1, "exposed"]
    assert row["similarity"] == pytest.approx(e[1] @ shared, abs=1e-6)
    assert row["history_similarity"] == pytest.approx(e[1] @ e[3], abs=1e-6)
    assert (row["anchor_rank"], row["coherence"]) == (0, pytest.approx(1.0, abs=1e-6))
    # 7 SIDs have a usable vector. Item 1 is one of 6 outside b's prefix 2, all else of which is the anchor's (7 carries
    # it too). What 2 and 2-0 leave has no SID, and falls to the others: they share .4. Of a, two anchors are known.
    assert row["prefix_log_prob"] == pytest.approx(math.log(0.3 / 6 / 0.4), abs=1e-6)
    assert found["b", 6, "exposed"]["prefix_log_prob"] == pytest.approx(math.log(0.1 / 0.4), abs=1e-6)
    assert found["a", 5, "unexposed"]["prefix_log_prob"] == pytest.approx(math.log(0.25 / 5), abs=1e-6)
    assert row["consistency"] == pytest.approx(max(0.0, shared @ e[3]), abs=1e-6)
    assert row["llm_confidence"] == pytest.approx(0.1 ** (1 / 3), abs=1e-6)
    row, cosines = found["a", 5, "unexposed"], (e[5] @ e[0], e[5] @ e[3])
    assert row["similarity"] == pytest.approx(max(cosines), abs=1e-6)
    assert row["anchor_rank"] == int(np.argmax(cosines))
    assert row["llm_confidence"] == pytest.approx((0.5, 0.25)[int(np.argmax(cosines))] ** (1 / 3), abs=1e-6)
    assert row["coherence"] == pytest.approx(np.linalg.norm(2 / 3 * e[0] + 1 / 3 * e[3]), abs=1e-6)
    consistency = sum(w * max(0.0, a @ e[1], a @ e[2]) for w, a in ((2 / 3, e[0]), (1 / 3, e[3])))
    assert row["consistency"] == pytest.approx(consistency, abs=1e-6)
    assert found["d", 1, "unexposed"]["anchor_rank"] == 1  # its first anchor has no item with an embedding
    assert found["d", 1, "unexposed"]["consistency"] == 0.0  # nor has its history
    assert {row["model_version"] for row in found.values()} == {lake.model}
    rejects = {row["key"]: row["reason"] for row in lake.read("worker_rejects")}
    assert rejects == {
        "item_index=8": "candidate without embedding",
        "item_index=9": "candidate without embedding",
        "user_id=c": "no usable anchor",
    }
    assert context.counts.rows_in == 13
    assert context.counts.rows_in == context.counts.rows_out + context.counts.rows_dropped


def test_a_block_gathered_from_disk_scores_alike(lake: LabelsLake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake.write_requests(ROWS)
    lake.run("score_candidates", score_candidates.run)
    whole = lake.read("pair_scores")
    monkeypatch.setattr(score_candidates, "_TABLE_BYTES", 0)
    make = score_candidates.make_lookup
    monkeypatch.setattr(score_candidates, "make_lookup", lambda *given: make(*given)._replace(on_device=None))
    lake.run("score_candidates", score_candidates.run, "labels.users_per_batch=2")
    for one, other in zip(whole, lake.read("pair_scores"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)


@pytest.mark.parametrize(("kind", "error"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_vectors_cost_at_most_their_rounding(lake: LabelsLake, kind: str, error: float) -> None:
    """Each entry is off by a half unit in the last place at most, so a cosine of unit vectors by about as much."""
    lake.write_requests(ROWS)
    lake.run("score_candidates", score_candidates.run)
    exact = lake.read("pair_scores")
    lake.run("score_candidates", score_candidates.run, f"labels.item_vectors={kind}")
    rounded = lake.read("pair_scores")
    assert exact != rounded
    for one, other in zip(exact, rounded, strict=True):
        for name in ("similarity", "history_similarity"):
            assert other[name] == pytest.approx(one[name], abs=error)


def test_an_empty_day_commits_empty_slices(lake: LabelsLake) -> None:
    lake.write_requests([])
    context = lake.run("score_candidates", score_candidates.run)
    assert lake.read("pair_scores") == []
    assert lake.lake.open("pair_scores").mark(DAY.isoformat()) is not None
    assert context.counts.rows_in == 0


def test_an_anchor_whose_sid_was_retired_is_left_out(lake: LabelsLake) -> None:
    """Item 3 alone carried the likelier anchor: the other one is left, and a user without another is named."""
    in_force = lake.lake.open("item_sids").read().drop(["sid_version"]).to_pylist()
    rows = [{**row, "retired_at": int(row["item_index"] == 3)} for row in in_force]
    lake.write("item_sids", {"sid_version": lake.tokenizer}, rows)
    lake.write_requests(
        [
            {"user_id": "a", "anchors": [(3, 0.5), (0, 0.25)], "history": [1], "candidates": [4]},
            {"user_id": "b", "anchors": [(3, 0.5)], "history": [1], "candidates": [4]},
        ]
    )
    lake.run("score_candidates", score_candidates.run)
    (row,) = lake.read("pair_scores")
    assert (row["user_id"], row["anchor_rank"], row["coherence"]) == ("a", 1, pytest.approx(1.0, abs=1e-6))
    assert row["similarity"] == pytest.approx(lake.vectors[4] @ lake.vectors[0], abs=1e-6)
    assert [r["key"] for r in lake.read("worker_rejects")] == ["user_id=b"]


def test_a_vector_with_nan_is_refused_by_the_table_and_never_scored_if_it_is_there(lake: LabelsLake) -> None:
    bad = {"item_index": 0, "content_hash": "h", "embedding": [float("nan"), *[0.1] * 5], "updated_at": 1}
    with pytest.raises(ContractError, match=r"item_embeddings.*NaN"):
        lake.write("item_embeddings", {"encoder_version": "encoder-1"}, [bad])
    vectors = np.array([[1.0, 0.0], [np.nan, 0.0], [9e-7, 0.0]], dtype=np.float32)
    rows = ContentTable.of(np.array([2, 5, 6]), vectors)
    assert rows.rows(np.array([2, 5, 6, 7, -1])).tolist() == [0, -1, -1, -1, -1]
    assert rows.content(np.array([5])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("column", ["sid_version", "model_version"])
def test_requests_of_another_version_are_refused(lake: LabelsLake, column: str) -> None:
    lake.write_requests(ROWS, **{column: "another"})
    with pytest.raises(LineageError, match=rf"{column} another, in force is"):
        lake.run("score_candidates", score_candidates.run)
    assert not lake.lake.exists("pair_scores")


def test_a_model_of_other_sids_is_refused(lake: LabelsLake) -> None:
    lake.write_requests(ROWS)
    lake.publish("tokenizer", "u" * 24, {"encoder_version": "encoder-1"})
    with pytest.raises(LineageError, match="was trained on sid_version"):
        lake.run("score_candidates", score_candidates.run)


@pytest.mark.deepspeed
def test_two_ranks_write_one_ranks_table(lake: LabelsLake) -> None:
    rows = [{**row, "user_id": f"{row['user_id']}{n}"} for n in range(9) for row in ROWS]
    lake.write_requests(rows, files=3)
    lake.run("score_candidates", score_candidates.run)
    alone = lake.read("pair_scores"), lake.read("worker_rejects")
    lake.launch("score_candidates", ranks=2)
    assert {f.path.split("-")[-6] for f in lake.lake.open("pair_scores").files} == {"00000", "00001"}

    def key(row: dict) -> tuple:
        return row.get("user_id", ""), row.get("item_index", 0), row.get("source", ""), row.get("key", "")

    for one, other in zip(alone, (lake.read("pair_scores"), lake.read("worker_rejects")), strict=True):
        one, other = sorted(one, key=key), sorted(other, key=key)
        assert len(one) == len(other) > 0
        for left, right in zip(one, other):
            for name, value in left.items():
                same = (
                    math.isclose(value, right[name], abs_tol=1e-6) if isinstance(value, float) else value == right[name]
                )
                assert same, (name, left, right)
