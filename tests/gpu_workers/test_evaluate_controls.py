"""evaluate_controls: labels looked up in the platform's own tables, variants that know what their control knows."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from gpl_core.conf.sections import Labels
from gpl_core.errors import MissingInputError
from gpl_core.labels.controls import CONTROLS, control_labels
from gpl_core.labels.fitting import click_prior
from gpl_core.prerank.comparison import ALL_SEEDS
from gpu_workers import evaluate_controls, train_preranker
from gpu_workers.inputs.control_rows import EVEN, look_up, with_controls
from gpu_workers.inputs.prerank import FeedRows
from gpu_workers.ranks import Ranks
from tests.gpu_workers.labels_lake import DAY, LabelsLake
from tests.gpu_workers.test_train_preranker import write_feed, write_impressions

BEFORE = DAY - timedelta(days=1)


@pytest.fixture
def lake(tmp_path: Path) -> LabelsLake:
    """Two dates of the feed; item n has n positives, user n has clicked n of 30; the history is like items 4 and 6."""
    made = LabelsLake(tmp_path / "lake")
    for day, rows in ((DAY, 240), (BEFORE, 120)):
        write_feed(made, day, rows=rows)
        made.write(
            "item_stats", {"dt": day.isoformat()},
            [{"item_index": i, "impressions": 9, "clicks": 1, "positives": i, "popularity_share": 0.1}
             for i in range(7)],
        )  # fmt: skip
        made.write(
            "user_stats", {"dt": day.isoformat()},
            [{"user_id": f"user-{u:02d}", "impressions": 30, "clicks": u, "positives": u} for u in range(19)],
        )  # fmt: skip
        pairs = [
            (f"user-{u:02d}", i, source) for u in range(20) for i in range(4, 8) for source in ("unexposed", "uniform")
        ]
        made.write(
            "pseudo_labels", {"dt": day.isoformat()},
            [{"user_id": user, "item_id": f"i{i}", "item_index": i, "source": source, "similarity": 0.1,
              "history_similarity": _similarity(i, day) if source == "unexposed" else -1.0, "prefix_log_prob": -1.0,
              "anchor_rank": 0, "user_rate": 0.1, "user_rank": 0.5, "user_spread": 0.2, "coherence": 1.0,
              "consistency": 1.0, "llm_confidence": 1.0, "pseudo_label": 0.1,
              "raw_weight": 1.0, "weight": 1.0, "calibrator_version": "c", "model_version": made.model,
              "sid_version": made.tokenizer} for user, i, source in pairs],
        )  # fmt: skip
    return made


def _similarity(item: int, day) -> float:
    return (0.9 if item % 2 == 0 else 0.2) - 0.05 * (day == BEFORE)


def test_labels_come_from_the_tables_of_the_rows_own_date(lake: LabelsLake, one_rank: Ranks, monkeypatch) -> None:
    """Against a join in plain Python, row by row of the feed."""
    held = {}

    def caught(context, unexposed, folder):
        held["rows"] = with_controls(context, unexposed, folder).bucket(0)
        return with_controls(context, unexposed, folder.with_name("again"))

    monkeypatch.setattr(evaluate_controls, "with_controls", caught)
    write_impressions(lake)
    lake.run("evaluate_controls", evaluate_controls.run, ranks=one_rank)
    rows = held["rows"]
    feed = [(r, day) for day in (DAY, BEFORE) for r in lake.read("training_feed", day) if not r["is_exposed"]]
    assert (rows[EVEN] == 1).all()
    found = {r["shuffle_key"]: r for r in rows}
    kept = [(r, day) for r, day in feed if r["shuffle_key"] in found]
    assert len(kept) == len(rows) > 0.8 * len(feed), "held-out requests aside, every row is there"
    mine = [found[r["shuffle_key"]] for r, _ in kept]
    user = np.array([int(r["user_id"][-2:]) for r, _ in kept])
    shown = np.array([[u, 30.0] for u in range(19)])
    rate, strength = click_prior([shown[:7], shown[7:]])
    expected = control_labels(
        np.array([r["target"] for r, _ in kept]), user,
        positives=np.array([r["item_index"] % 7 for r, _ in kept], float),  # item 7 has no row: 0
        history_similarity=np.array([_similarity(r["item_index"], d) for r, d in kept]),
        user_clicks=np.where(user < 19, user, 0).astype(float), user_impressions=np.where(user < 19, 30.0, 0.0),
        rate=rate, strength=strength, days=np.array([d.toordinal() for _, d in kept]),
        candidates=np.array([1.0 / r["sampling_probability"] for r, _ in kept]),
        spread=Labels().calibrator.spread, by_user=True,
    )  # fmt: skip
    for name in set(CONTROLS) - {"shuffled"}:
        assert [float(r[name]) for r in mine] == pytest.approx(expected[name], abs=1e-6), name
    assert np.average(rows["shuffled"], weights=1 / rows["sampling_probability"]) == pytest.approx(
        np.average(rows["target"], weights=1 / rows["sampling_probability"]), abs=1e-6
    )


def test_variants_are_judged_beside_ours_and_the_graph_is_left_alone(lake: LabelsLake, one_rank: Ranks) -> None:
    write_impressions(lake)
    lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    context = lake.run("evaluate_controls", evaluate_controls.run, ranks=one_rank)
    settings = context.config.prerank
    batches = (1 + 2 * 6) * len(settings.seeds) * settings.steps  # the baseline takes no unexposed rows
    assert context.counts.details["trained_batches"] == batches
    rows = lake.read("control_evaluations")
    assert {r["model"] for r in rows} == {"exposed_only", "gpl", *CONTROLS}
    assert {(r["model"], r["against"]) for r in rows if r["against"]} == {
        *((m, "exposed_only") for m in ("gpl", *CONTROLS)), *(("gpl", c) for c in CONTROLS),
    }  # fmt: skip
    shipped = {(r["model"], r["slice"], r["metric"]): r["value"] for r in lake.read("evaluations") if not r["against"]}
    for r in rows:  # the baseline and ours are the very models that train_preranker publishes
        if r["model"] in ("exposed_only", "gpl") and not r["against"] and r["seed"] == ALL_SEEDS:
            assert r["value"] == shipped[r["model"], r["slice"], r["metric"]]
    of = {
        (r["model"], r["slice"], r["metric"]): r["value"] for r in rows if not r["against"] and r["seed"] == ALL_SEEDS
    }
    assert len({of[c, "tail", "auc"] for c in CONTROLS}) > 3, "controls train on labels of their own"
    assert len(lake.store.manifests("preranker")) == 1


def test_a_feed_without_unexposed_rows_is_refused(lake: LabelsLake, one_rank: Ranks) -> None:
    for day in (DAY, BEFORE):
        write_feed(lake, day, unexposed=0.0)
    write_impressions(lake)
    with pytest.raises(MissingInputError, match=r"no unexposed rows in \d days? \(prerank.train_days\) up to 2026-01"):
        lake.run("evaluate_controls", evaluate_controls.run, ranks=one_rank)


def test_without_the_day_after_nothing_is_trained(lake: LabelsLake, one_rank: Ranks, monkeypatch) -> None:
    monkeypatch.setattr(FeedRows, "__init__", lambda *_: pytest.fail("read the feed"))
    lake.run("evaluate_controls", evaluate_controls.run, ranks=one_rank)
    assert lake.read("control_evaluations") == []


def test_look_ups_find_repeated_keys_and_give_zero_for_unknown_ones() -> None:
    parts = [(np.array([5, 9], np.uint64), np.array([[1.0], [2.0]])), (np.array([7], np.uint64), np.array([[3.0]]))]
    wanted = np.array([7, 5, 6, 7, 2**63], np.uint64)
    assert look_up(wanted, parts, 1).tolist() == [[3.0], [1.0], [0.0], [3.0], [0.0]]
    assert look_up(wanted[:0], parts, 2).shape == (0, 2)
