"""evaluate_truth: figures equal a plain loop over pairs, new items are left out and counted, bayes is the ceiling."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from gpl_core.errors import MissingInputError
from gpl_core.prerank.export import export_bundle
from gpl_core.prerank.features import UserProfiles
from gpl_core.prerank.serving import ServedModel
from gpl_core.prerank.two_tower import TowerConfig, build_model
from gpu_workers import evaluate_truth
from tests.gpu_workers.labels_lake import DAY, SIDS, WIDTH, LabelsLake

NEXT = DAY + timedelta(days=1)


@pytest.fixture
def lake(tmp_path: Path) -> LabelsLake:
    made = LabelsLake(tmp_path / "lake")
    sizes = TowerConfig(
        user_buckets=50, item_buckets=20, dimension=4, hidden=8, content_width=WIDTH, levels=3, codes=3
    )  # fmt: skip
    bundle = made.root / "made" / "preranker"
    export_bundle(
        bundle,
        {"exposed_only-seed0": build_model(sizes, 0), "gpl-seed0": build_model(sizes, 1)},
        UserProfiles(50, WIDTH).table,
        SIDS[:8],
        lambda index: made.vectors[index],
        {},
    )
    made.publish("preranker", "p" * 24, {}, through=DAY)
    made.write(
        "items",
        {},
        [
            {
                "item_id": f"i{n}", "item_index": n, "title": "", "description": "", "category": "", "brand": "",
                "text": "", "image": b"", "image_uri": "", "image_embedding": [0.0], "content_hash": "h",
                "updated_at": 1, "withdrawn_at": -1,
            }
            for n in range(9)
        ],
    )  # fmt: skip
    return made


def _pairs() -> list[tuple[str, int, float, bool]]:
    rng = np.random.default_rng(0)
    return [(f"u{n % 5}", int(rng.integers(9)), round(float(rng.uniform(0.05, 0.6)), 3), n % 3 == 0) for n in range(60)]


def _write_truth(lake: LabelsLake) -> None:
    rows = [
        {"request_id": f"r{n}", "item_id": f"i{item}", "user_id": user, "true_probability": p, "is_exposed": exposed}
        for n, (user, item, p, exposed) in enumerate(_pairs())
    ]
    lake.write("truth", {"dt": NEXT.isoformat()}, rows)


def _expected_auc(scores: np.ndarray, p: np.ndarray) -> float:
    wins = mass = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if i != j:
                weight = p[i] * (1 - p[j])
                mass += weight
                wins += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return wins / mass


def test_figures_equal_a_loop_over_pairs(lake: LabelsLake) -> None:
    _write_truth(lake)
    context = lake.run("evaluate_truth", evaluate_truth.run, day=NEXT)
    rows = lake.read("truth_metrics", NEXT)
    means = [row for row in rows if row["seed"] == -1]
    assert {(row["model"], row["against"]) for row in means if row["against"]} == {("gpl", "exposed_only")}
    of = {(row["model"], row["against"], row["slice"], row["metric"]): row for row in means}
    for (model, against, part, metric), row in of.items():
        assert row["low"] < row["value"] < row["high"]
        if against:
            difference = of[model, "", part, metric]["value"] - of[against, "", part, metric]["value"]
            assert row["value"] == pytest.approx(difference)
    found = {(row["model"], row["slice"], row["metric"]): row for row in rows if row["seed"] == 0}
    assert set(found) == {
        (model, part, metric)
        for model in ("exposed_only", "gpl", "bayes")
        for part in ("exposed", "unexposed")
        for metric in ("auc", "gauc")
    }
    known = [pair for pair in _pairs() if pair[1] < 8]  # the bundle does not hold item 8
    assert context.counts.rows_dropped == len(_pairs()) - len(known) > 0
    folder = lake.store.fetch(lake.store.in_force("preranker", NEXT))
    for part in ("exposed", "unexposed"):
        chosen = [pair for pair in known if pair[3] == (part == "exposed")]
        p = np.array([pair[2] for pair in chosen])
        for model in ("exposed_only", "gpl", "bayes"):
            scores = p
            if model != "bayes":
                served = ServedModel(folder, f"{model}-seed0")
                scores = served.score_pairs([pair[0] for pair in chosen], np.array([pair[1] for pair in chosen]))
            row = found[model, part, "auc"]
            assert row["value"] == pytest.approx(_expected_auc(scores, p), abs=1e-9)
            assert row["rows"] == len(chosen)
            assert row["value"] <= found["bayes", part, "auc"]["value"] + 1e-12


def test_a_day_without_truth_is_named(lake: LabelsLake) -> None:
    lake.write("truth", {"dt": NEXT.isoformat()}, [])
    with pytest.raises(MissingInputError, match="no rows of 2026-01-03"):
        lake.run("evaluate_truth", evaluate_truth.run, day=NEXT)
