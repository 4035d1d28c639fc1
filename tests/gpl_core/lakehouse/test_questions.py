"""The five questions of docs/questions.md, on a lakehouse of two dates: answers as a person would count them."""

from __future__ import annotations

import pytest

from gpl_core.errors import MissingInputError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.query import Query
from tests.documented import questions
from tests.gpl_core.analyst_lake import AnalystLake
from tests.support import DAY, ONE


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> AnalystLake:
    """u1 has two labels, u2 one and u3 none; the day before, u1 had one of a tenth, by another calibrator."""
    return AnalystLake(tmp_path_factory.mktemp("questions")).with_a_day_before_and_scores()


def answer(lake: AnalystLake, words: str) -> list[dict]:
    (sql,) = [sql for title, sql in questions().items() if words in title]
    return Query(lake.lake).rows(sql)


def labels_of(lake: AnalystLake) -> dict[tuple[str, int], float]:
    return {(r["user_id"], r["item_index"]): r["pseudo_label"] for r in lake.labels if r["source"] == "unexposed"}


def test_there_are_five():
    assert len(questions()) == 5


def test_categories_with_the_highest_labels(lake):
    of = {"a": [], "b": []}
    for (_, item), label in labels_of(lake).items():
        of["ab"[item % 2]].append(label)
    found = answer(lake, "categories")
    assert [r["mean_label"] for r in found] == sorted((r["mean_label"] for r in found), reverse=True)
    assert {r["category"]: (r["feed_rows"], r["mean_label"], r["highest_label"]) for r in found} == {
        c: (len(labels), pytest.approx(sum(labels) / len(labels), abs=1e-6), pytest.approx(max(labels), abs=1e-6))
        for c, labels in of.items()
    }


def test_new_items_against_old_ones(lake):
    found = {r["item"]: r for r in answer(lake, "new items")}
    labels = labels_of(lake)  # items 0 and 1 were shown before
    assert found["known"]["feed_rows"] == 1
    assert found["known"]["mean_label"] == pytest.approx(labels["u2", 0], abs=1e-6)
    assert (found["known"]["impressions"], found["known"]["click_rate"]) == (1, 1.0)
    assert found["new"]["feed_rows"] == 2
    assert found["new"]["impressions"] is None, "no exposed label of a new item"


def test_users_without_labels(lake):
    assert answer(lake, "no label") == [
        {"dt": DAY, "reason": "no_history", "users": 1, "pairs": 1, "for_example": "u3"}
    ]


def test_what_changed(lake):
    found = {r["source"]: r for r in answer(lake, "changed")}
    labels = list(labels_of(lake).values())
    unexposed = found["unexposed"]
    assert (unexposed["before_dt"], unexposed["dt"]) == (DAY - ONE, DAY)
    assert (unexposed["pairs_before"], unexposed["pairs"]) == (1, 3)
    assert unexposed["label_change"] == pytest.approx(sum(labels) / 3 / 0.1 - 1)
    assert (unexposed["same_calibrator"], unexposed["same_model"]) == (False, True)
    assert found["exposed"]["before_dt"] is None


def test_scores_that_nobody_asked_for_are_named_with_their_command(tmp_path):
    with pytest.raises(MissingInputError, match=r"table preranker_scores: .*; gpl score writes it"):
        Query(Lake(str(tmp_path))).run("SELECT * FROM preranker_scores")


def test_where_pre_ranker_and_label_disagree(lake):
    labels = labels_of(lake)
    gaps = {pair: abs(0.3 - label) for pair, label in labels.items()}
    found = answer(lake, "disagree")
    pairs = [(r["user_id"], int(r["item_id"][1:])) for r in found]
    assert pairs == sorted(gaps, key=lambda p: (-gaps[p], p))
    assert [r["difference"] for r in found] == pytest.approx([0.3 - labels[p] for p in pairs])
    assert found[0]["title"].startswith("title ")
