"""A tiny lakehouse as scoring leaves it: artifacts in force, pair_scores, counts; calibrators put there by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyspark.sql import SparkSession

from gpl_core.graph.planner import Planner
from gpl_core.labels.calibration import Calibrator, FittedOn
from spark_jobs.common.calibrators import CALIBRATOR_FILE, load_calibrator
from tests.spark_jobs.tiny_lake import D, TinyLake, at, day

BEFORE = day(-1)


def score(
    user: str, item: int, similarity: float, *, source: str = "unexposed",
    factors: tuple[float, float, float] = (0.5, 0.5, 0.5), model: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A row of pair_scores; `model` stands for the model in force when empty."""
    return {
        "user_id": user, "item_index": item, "source": source, "similarity": similarity,
        "history_similarity": similarity / 2, "prefix_log_prob": -1.0 - item % 7,
        "anchor_rank": 0, "coherence": factors[0], "consistency": factors[1],
        "llm_confidence": factors[2], "model_version": model,
    }  # fmt: skip


class LabelLake(TinyLake):
    """A tokenizer and an interest model in force for D; the rest is added by the test."""

    def __init__(self, root: Path, spark: SparkSession, *overrides: str):
        super().__init__(root, spark, "labels.calibrator.min_rows=4", "labels.calibrator.score=similarity", *overrides)
        self.tokenizer = self.bundle("tokenizer", {}, "{}")
        self.model = self.bundle("interest_model", {"sid_version": self.tokenizer}, "{}")

    def bundle(
        self, kind: str, lineage: dict[str, str], body: str, through: date = BEFORE, name: str = "x.json"
    ) -> str:  # fmt: skip
        """Publish a bundle of one file; its version."""
        folder = self.root / "made" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
        return (
            Planner(self.config())
            .artifacts.publish(
                kind, folder, trained_through=through, config_hash="test", lineage=lineage,
                fingerprint=hashlib.sha256(f"{kind}{lineage}{body}".encode()).hexdigest()[:24],
            )
            .version
        )  # fmt: skip

    def calibrator(
        self, calibrator: Calibrator, lineage: dict[str, str] | None = None, through: date = BEFORE
    ) -> str:  # fmt: skip
        """Publish `calibrator` as fit_calibrator would; its version."""
        lineage = lineage or {"model_version": self.model, "sid_version": self.tokenizer}
        return self.bundle("calibrator", lineage, calibrator.to_json(), through, CALIBRATOR_FILE)

    def platt(self, weights: tuple[float, ...] = (3.0,), **options: Any) -> str:
        """A platt calibrator sigmoid(3 sim - 2)."""
        fitted = FittedOn("uniform", 10, 3, "2026-01-01", "2026-01-09", 0.3)
        made = Calibrator(kind="platt", fitted_on=fitted, features=("similarity",), weights=weights, intercept=-2.0)
        return self.calibrator(made, **options)

    def load(self, version: str) -> Calibrator:
        """The calibrator of a published version."""
        store = Planner(self.config()).artifacts
        manifest = store.find("calibrator", version)
        assert manifest is not None
        return load_calibrator(store, manifest)

    def scores(self, *rows: dict[str, Any], dt: date = D) -> None:
        """Replace one slice of pair_scores."""
        full = [{"sid_version": self.tokenizer, **r, "model_version": r["model_version"] or self.model} for r in rows]
        self.table("pair_scores", full, dt=dt.isoformat())

    def items_table(self, *ids: str, titles: Mapping[str, str] = MappingProxyType({})) -> None:
        """Table items: item_index counts up from 0."""
        rows = [
            {"item_id": name, "item_index": i, "title": titles.get(name, f"title of {name}"), "description": "",
             "category": "", "brand": "", "text": name, "image": b"", "image_uri": "", "image_embedding": [0.0],
             "content_hash": name, "updated_at": 0, "withdrawn_at": -1}
            for i, name in enumerate(ids)
        ]  # fmt: skip
        self.table("items", rows)

    def stats(
        self, items: Sequence[tuple[int, int, int, int]] = (), users: Sequence[tuple[str, int, int, int]] = (),
        dt: date = D,
    ) -> None:  # fmt: skip
        """Replace one slice of item_stats and user_stats: (key, impressions, clicks, positives)."""
        keys = ("impressions", "clicks", "positives")
        self.table(
            "item_stats",
            [{"item_index": r[0], **dict(zip(keys, r[1:])), "popularity_share": 0.0} for r in items],
            dt=dt.isoformat(),
        )
        self.table("user_stats", [{"user_id": r[0], **dict(zip(keys, r[1:]))} for r in users], dt=dt.isoformat())

    def shown(self, *rows: tuple, dt: date = D) -> None:
        """Replace one slice of impressions: (user, item_index, clicked[, is_random])."""
        full = [
            {"request_id": f"q{dt}{n}", "item_id": f"i{r[1]}", "item_index": r[1], "user_id": r[0],
             "event_time": at((dt - D).days), "position": n, "clicked": r[2], "is_random": r[3] if len(r) > 3 else True}
            for n, r in enumerate(rows)
        ]  # fmt: skip
        self.table("impressions", full, dt=dt.isoformat())

    def unexposed(self, *rows: tuple, channel: str = "popular", dt: date = D, **features: float) -> None:
        """(request, user, item_index), or with the row's sampling_probability behind."""
        full = [
            {"request_id": r[0], "item_id": f"i{r[2]}", "user_id": r[1], "item_index": r[2], "channel": channel,
             "sampling_probability": r[3] if len(r) > 3 else 0.25, "event_time": at((dt - D).days), **features}
            for r in rows
        ]  # fmt: skip
        self.table("unexposed_samples", full, dt=dt.isoformat())

    def rows_where(self, table: str, where: dict[str, Any], *columns: str) -> list[tuple]:
        """Rows of D whose columns have the given values."""
        found = self.rows(table, *where, *columns, dt=D)
        return [row[len(where) :] for row in found if list(row[: len(where)]) == list(where.values())]

    def mark_details(self, table: str, dt: date = D) -> dict[str, Any]:
        """Details in the newest mark of the slice."""
        found = self.lake.open(table).mark(dt.isoformat())
        assert found is not None
        return json.loads(json.dumps(dict(found[1].details)))


class FeedLake(LabelLake):
    """Samples, labels, SIDs and what tells why a label is missing."""

    def exposed(self, *rows: tuple) -> None:
        """(request, user, item_index, label[, is_random])."""
        full = [
            {"request_id": r[0], "item_id": f"i{r[2]}", "user_id": r[1], "item_index": r[2], "label": r[3],
             "position": n, "is_random": r[4] if len(r) > 4 else False, "event_time": at(0)}
            for n, r in enumerate(rows)
        ]  # fmt: skip
        self.table("exposed_samples", full, dt=D.isoformat())

    def labels(self, *rows: tuple, **overrides: str) -> None:
        """(user, item_index, pseudo_label, weight[, source])."""
        full = [
            {"user_id": r[0], "item_id": f"i{r[1]}", "item_index": r[1], "source": r[4] if len(r) > 4 else "unexposed",
             "similarity": 0.5, "history_similarity": 0.5, "user_rate": 0.1, "user_rank": 0.5, "user_spread": 0.2,
             "prefix_log_prob": -1.0, "anchor_rank": 0, "coherence": 0.25, "consistency": 0.5,
             "llm_confidence": 0.75, "pseudo_label": r[2], "raw_weight": 0.5, "weight": r[3],
             "calibrator_version": "cal-1", "model_version": self.model, "sid_version": self.tokenizer, **overrides}
            for r in rows
        ]  # fmt: skip
        self.table("pseudo_labels", full, dt=D.isoformat())

    def sids(self, *rows: tuple) -> None:
        """(item_index, issue, sid, retired_at)."""
        full = [
            {"item_index": r[0], "issue": r[1], "sid": list(r[2]), "residual_norm": 0.1, "bucket_size": 1,
             "content_hash": "h", "retired_at": r[3]}
            for r in rows
        ]  # fmt: skip
        self.table("item_sids", full, sid_version=self.tokenizer)

    def feed(self, *columns: str) -> list[tuple]:
        """Rows of the feed's slice."""
        return self.rows("training_feed", *columns, dt=D)
