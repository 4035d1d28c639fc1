"""A lakehouse of one date as the graph leaves it, by hand: two users with anchors, one without, and what is behind.

item   e(i)       SID      | user  history (oldest first)  anchors (probability)
i0     (1, 0)     1,1,1    | u1    i1, i0                  1,1,1 (.5)   2,2,2 (.3)
i1     (.6, .8)   1,1,1    | u2    i2                      2,2,2 (.4)   9,9,9 (.2: carried by no item)
i2     (0, 1)     2,2,2    | u3    none                    none
i3     (.8, .6)   3,3,3    |
"""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.planner import Planner
from gpl_core.labels.calibration import CALIBRATOR_FILE, Calibrator, FittedOn, apply
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from tests.support import DAY, ONE, data_table, small_config

VECTORS = {0: (1.0, 0.0), 1: (0.6, 0.8), 2: (0.0, 1.0), 3: (0.8, 0.6)}
SIDS = {0: (1, 1, 1), 1: (1, 1, 1), 2: (2, 2, 2), 3: (3, 3, 3)}
ANCHORS = {
    "u1": ([1, 1, 1, 2, 2, 2], (0.5, 0.3), [1, 0, -1]),
    "u2": ([2, 2, 2, 9, 9, 9], (0.4, 0.2), [2, -1, -1]),
}
"""user -> (anchor SIDs, probabilities, history)."""


class AnalystLake:
    """Writes the tables; `labels` holds what scoring and labeling made of each pair, by plain loops."""

    def __init__(self, root: Path):
        self.config: Config = small_config(root, {"tokenizer": {"levels": 3}, "anchors": {"count": 2, "prefixes": 1}})
        self.lake = Lake(self.config.lakehouse.root)
        self.tokenizer = self.publish("tokenizer", {"encoder_version": "enc"}, "{}", "x.json")
        self.model = self.publish("interest_model", {"sid_version": self.tokenizer}, "{}", "x.json")
        fitted = FittedOn("exposed", 10, 3, "2026-01-01", "2026-01-02", 0.3)
        self.calibrator = Calibrator(
            "quantile", fitted, features=("similarity", "item_click_logit"), weights=(3.0, 0.5), location=-1.0
        )
        lineage = {"model_version": self.model, "sid_version": self.tokenizer}
        self.calibrator_version = self.publish("calibrator", lineage, self.calibrator.to_json(), CALIBRATOR_FILE)
        self.labels: list[dict[str, Any]] = []
        self._write()

    def publish(self, kind: str, lineage: dict[str, str], body: str, name: str) -> str:
        """Publish a bundle of one file, trained through the day before."""
        folder = Path(self.config.lakehouse.root).parent / "made" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
        store = Planner(self.config).artifacts
        made = store.publish(kind, folder, trained_through=DAY - ONE, fingerprint=(kind * 9)[:24].encode().hex()[:24],
                             config_hash="test", lineage=lineage)  # fmt: skip
        return made.version

    def put(self, table: str, rows: list[dict[str, Any]], *, details: dict[str, Any] | None = None, day: date = DAY,
            **partition: str) -> None:  # fmt: skip
        """Append rows to one partition, marked as its owner would."""
        contract = load_contract(table)
        values = {**({"dt": day.isoformat()} if "dt" in contract.partition_by else {}), **partition}
        with self.lake.writer(contract, values, dims=self.config.dims()) as writer:
            writer.write(data_table(contract, rows))
        mark = SliceMark(contract.owner, {values.get("dt", "*"): "by-hand"}, "by-hand", details or {})
        self.lake.commit(contract, writer.parts, mark=mark, mode="append")

    def with_a_day_before_and_scores(self) -> AnalystLake:
        """A label of a tenth the day before by another calibrator, and a pre-ranker that expects 0.3 of every pair."""
        label = {**self.labels[0], "pseudo_label": 0.1, "calibrator_version": "older"}
        self.put("pseudo_labels", [label], day=DAY - ONE)
        self.put("preranker_scores", [
            {"request_id": "r", **{c: r[c] for c in ("user_id", "item_id", "item_index", "pseudo_label")}, "score": 0.3,
             "variant": "gpl-seed0", "preranker_version": "p"}
            for r in self.labels if r["source"] == "unexposed"
        ])  # fmt: skip
        return self

    def score(self, user: str, item: int, source: str) -> dict[str, Any]:
        """A row of pseudo_labels but for weights, by the formulas of the method, one pair at a time."""
        sids, probabilities, past = ANCHORS[user]
        live = []
        for k, p in enumerate(probabilities):
            carriers = [np.array(VECTORS[i]) for i, s in SIDS.items() if list(s) == sids[3 * k : 3 * k + 3]]
            if carriers:
                mean = sum(carriers) / len(carriers)
                live.append((k, p, mean / np.linalg.norm(mean)))
        total = sum(p for _, p, _ in live)
        e = np.array(VECTORS[item])
        history = [np.array(VECTORS[i]) for i in past if i >= 0]
        similarity, rank, p = max((float(g @ e), -k, p) for k, p, g in live)
        clicks, impressions = (2, 9) if user == "u1" else (0, 0)
        rate = (clicks + 20 * 0.05) / (impressions + 20)
        parts = {"user_rate": rate, "user_rank": (item + 0.5) / 4}
        return {
            "user_id": user, "item_id": f"i{item}", "item_index": item, "source": source, "similarity": similarity,
            "history_similarity": max(float(h @ e) for h in history), "anchor_rank": -rank,
            "prefix_log_prob": -1.0,
            "coherence": float(np.linalg.norm(sum(p / total * g for _, p, g in live))),
            "consistency": sum(p / total * max(0.0, *(float(g @ h) for h in history)) for _, p, g in live),
            "llm_confidence": p ** (1 / 3), **parts, "user_spread": 0.25,
            "pseudo_label": float(apply(self.calibrator, parts)),
            "calibrator_version": self.calibrator_version, "model_version": self.model, "sid_version": self.tokenizer,
        }  # fmt: skip

    def _write(self) -> None:
        self.put("items", [
            {"item_id": f"i{n}", "item_index": n, "title": f"title {n}", "description": "", "category": "ab"[n % 2],
             "brand": "", "text": "", "image": b"", "image_uri": "", "image_embedding": [0.0], "content_hash": "h",
             "updated_at": 0, "withdrawn_at": -1}
            for n in VECTORS
        ])  # fmt: skip
        self.put("item_embeddings", [
            {"item_index": n, "content_hash": "h", "embedding": v, "updated_at": 0} for n, v in VECTORS.items()
        ], encoder_version="enc")  # fmt: skip
        self.put("item_sids", [
            {"item_index": n, "issue": 0, "sid": list(s), "residual_norm": 0.1, "bucket_size": 1, "content_hash": "h",
             "retired_at": 0}
            for n, s in SIDS.items()
        ], sid_version=self.tokenizer)  # fmt: skip
        self.put("item_stats", [
            {"item_index": 0, "impressions": 10, "clicks": 4, "positives": 3, "popularity_share": 0.75},
            {"item_index": 1, "impressions": 5, "clicks": 1, "positives": 1, "popularity_share": 0.25},
        ])  # fmt: skip
        self.put("user_stats", [{"user_id": "u1", "impressions": 9, "clicks": 2, "positives": 2}])
        self.put("user_sequences", [
            {"user_id": u, "sid": [-1] * 60, "item_index": [-1] * 20, "keep_u": [0.0] * 20, "length": 1,
             "last_event_time": 0, "day": 0, "sequence_hash": u, "sid_version": self.tokenizer}
            for u in ANCHORS
        ])  # fmt: skip
        self.put("score_requests", [
            {"user_id": u, "source": source, "block": 0, "anchor_sids": sids, "log_prob": [math.log(p) for p in ps],
             "prefixes": [1, -1, -1], "prefix_log_probs": [-0.5],
             "history": [*past, *[-1] * 17], "candidates": [0] * 128, "sid_version": self.tokenizer,
             "model_version": self.model}
            for u, (sids, ps, past) in ANCHORS.items() for source in ("unexposed", "exposed")
        ])  # fmt: skip
        exposed = [("r1", "u1", 0, 1, False), ("r1", "u1", 1, 0, False), ("r2", "u2", 3, 0, True)]
        times = {"event_time": np.datetime64(DAY.isoformat(), "us").item()}
        self.put("impressions", [
            {"request_id": r, "item_id": f"i{i}", "item_index": i, "user_id": u, "position": 0, "clicked": c,
             "is_random": x, **times} for r, u, i, c, x in exposed
        ])  # fmt: skip
        self.put("exposed_samples", [
            {"request_id": r, "item_id": f"i{i}", "item_index": i, "user_id": u, "position": 0, "label": c,
             "is_random": x, **times} for r, u, i, c, x in exposed
        ])  # fmt: skip
        unexposed = [("r1", "u1", 2), ("r1", "u1", 3), ("r2", "u2", 0), ("r2", "u2", 1), ("r3", "u3", 0)]
        self.put("unexposed_samples", [
            {"request_id": r, "item_id": f"i{i}", "item_index": i, "user_id": u, "channel": "popular",
             "sampling_probability": 0.5, **times} for r, u, i in unexposed
        ])  # fmt: skip
        # (u2, i1) was rejected by the worker: it has no label.
        self.put("worker_rejects", [
            {"key": "item_index=1", "reason": "candidate without embedding", "detail": ""}
        ], step="score_candidates")  # fmt: skip
        rows = [self.score("u1", 2, "unexposed"), self.score("u1", 3, "unexposed"), self.score("u2", 0, "unexposed"),
                self.score("u1", 0, "exposed"), self.score("u2", 3, "uniform")]  # fmt: skip
        for row in rows:
            row["raw_weight"] = (row["coherence"] * row["consistency"] * row["llm_confidence"]) ** (1 / 3)
        mean = sum(r["raw_weight"] for r in rows[:3]) / 3
        for row in rows:
            row["weight"] = row["raw_weight"] / mean
        self.labels = rows
        self.put("pseudo_labels", rows, details={"mean_raw_weight": mean})
        zero = {"coherence": 0.0, "consistency": 0.0, "llm_confidence": 0.0, "pseudo_label": 0.0}
        feed = [
            {**zero, "request_id": r, "item_id": f"i{i}", "item_index": i, "user_id": u, "is_exposed": True,
             "is_random": x, "has_label": True, "label": c, "target": c, "sample_weight": 1.0, "channel": "",
             "sampling_probability": 1.0, "position": 0} for r, u, i, c, x in exposed
        ]  # fmt: skip
        labels = {(r["user_id"], r["item_index"]): r for r in rows[:3]}
        feed += [
            {**{k: labels[u, i][k] for k in zero}, "request_id": r, "item_id": f"i{i}", "item_index": i, "user_id": u,
             "is_exposed": False, "is_random": False, "has_label": False, "label": 0.0,
             "target": labels[u, i]["pseudo_label"], "sample_weight": labels[u, i]["weight"], "channel": "popular",
             "sampling_probability": 0.5, "position": -1} for r, u, i in unexposed if (u, i) in labels
        ]  # fmt: skip
        made = {"sid": [0, 0, 0], "event_time": 0, "model_version": self.model, "sid_version": self.tokenizer,
                "calibrator_version": self.calibrator_version, "dt_copy": "", "shuffle_key": 0}  # fmt: skip
        self.put("training_feed", [{**row, **made} for row in feed])
