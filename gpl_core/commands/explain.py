"""`gpl explain`: why a pair has its pseudo-label, recomputed with numpy from the few rows that concern it.

`prefix_log_prob` and `user_rank`, which the calibrator may read, are taken as stored: the one rests on the whole
catalog, the other on all pairs of the user. Formulas: `labels/pair_scoring.py` and `labels/calibration.py`.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpl_core.commands.command import Command
from gpl_core.config import Config
from gpl_core.contracts.raw_values import midnight
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.graph.arguments import iso_date
from gpl_core.graph.job_runs import newest_done
from gpl_core.graph.planner import Planner
from gpl_core.graph.terminal import console
from gpl_core.labels.calibration import CALIBRATOR_FILE, COUNT_COLUMNS, SCORES, USER_PARTS, Calibrator, apply, user_rate
from gpl_core.labels.confidence import combined_weight
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.statements import quoted

FACTORS = ("coherence", "consistency", "llm_confidence")
_MOST_DATES = 3  # of those on which the pair has a label
_NEAR = timedelta(days=14)  # of the date asked for: where they are looked for
NEAREST = 5  # this many items of the history, and titles per anchor, are shown
_VECTOR_TOLERANCE = 1e-4  # scores were computed in float32, perhaps on a GPU in another order
_FORMULA_TOLERANCE = 1e-9

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", required=True, metavar="USER_ID", help="as in table pseudo_labels")
    parser.add_argument("--item", required=True, metavar="ITEM_ID", help="as in table pseudo_labels")
    parser.add_argument("--run-date", required=True, type=iso_date, metavar="D", help="run date of the label")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, config: Config) -> int:
    found = explain(config, args.user, args.item, args.run_date)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _print(found, console())
    return 0


def explain(config: Config, user: str, item: str, day: date) -> Row:
    """Everything behind the label of one pair, as a JSON-able dict; `recomputed` holds stored and recomputed values.

    MissingInputError says why the pair has no label on `day`; ContractError when a recomputed value differs.
    """
    planner = Planner(config)
    # The versions that scoring read, if its run is on record: later SIDs and embeddings are not what it saw.
    inputs = (newest_done(planner.lake, "score_candidates", day) or {"inputs": {}})["inputs"]
    read = {t: int(inputs[t]["version"]) for t in ("item_sids", "item_embeddings") if t in inputs}
    query = Query(planner.lake, read)
    pair = _pair(query, user, item, day)
    request = _request(query, user, day)
    encoder_version = _artifact(planner, "tokenizer", pair["sid_version"]).lineage["encoder_version"]
    anchors = _anchors(query, request, pair["sid_version"])
    history = [i for i in request["history"] if i >= 0]
    carriers = {i for a in anchors for i in a["carriers"]}
    vectors = _vectors(query, {pair["item_index"], *history, *carriers}, encoder_version, day)
    scores = _score(pair["item_index"], anchors, history, vectors)
    folder = planner.artifacts.fetch(_artifact(planner, "calibrator", pair["calibrator_version"]))
    calibrator = Calibrator.from_json((folder / CALIBRATOR_FILE).read_text(encoding="utf-8"))
    rate, label, raw, weight = _label(planner, query, calibrator, pair, day)
    names = _titles(query, {pair["item_index"], *history, *carriers})
    compared = {k: (pair[k], scores[k], _VECTOR_TOLERANCE) for k in ("similarity", "history_similarity", *FACTORS)}
    if calibrator.has_user_parts:
        compared["user_rate"] = (pair["user_rate"], rate, _FORMULA_TOLERANCE)
    compared["pseudo_label"] = (pair["pseudo_label"], label, _FORMULA_TOLERANCE)
    compared["raw_weight"] = (pair["raw_weight"], raw, _FORMULA_TOLERANCE)
    if weight is not None:
        compared["weight"] = (pair["weight"], weight, _FORMULA_TOLERANCE * max(1.0, weight))
    wrong = [f"{k} is stored as {a!r}, computed as {b!r}" for k, (a, b, t) in compared.items() if abs(a - b) > t]
    if wrong:
        raise ContractError(
            f"pseudo_labels dt={day}, user {user}, item {item}: {'; '.join(wrong)}. Its input tables have changed "
            f"since, or the label is wrong: run the steps from score_candidates on again for {day}"
        )
    for place, anchor in enumerate(anchors):
        anchor["items"] = [names[i] for i in sorted(anchor.pop("carriers"))[:NEAREST]]
        anchor["matched"] = place == scores["matched"]
    nearest = sorted(scores["history"], key=lambda found: -found[1])[:NEAREST]
    return {
        "user_id": user,
        "item": names[pair["item_index"]],
        "run_date": day.isoformat(),
        **{k: pair[k] for k in ("source", "pseudo_label", *USER_PARTS, "weight", "raw_weight", "similarity")},
        "factors": {k: pair[k] for k in FACTORS},
        "calibrator": {
            "version": pair["calibrator_version"],
            "kind": calibrator.kind,
            "features": calibrator.features,
            "has_user_parts": calibrator.has_user_parts,
        },
        **{k: pair[k] for k in ("model_version", "sid_version")},
        "anchors": anchors,
        "nearest_history": [{**names[i], "similarity": s, "events_ago": ago} for i, s, ago in nearest],
        "recomputed": {k: {"stored": a, "computed": b} for k, (a, b, _) in compared.items()},
        "versions": dict(sorted(query.versions.items())),
    }


# ---- the inputs of the pair ---------------------------------------------------------------------------------


def _pair(query: Query, user: str, item: str, day: date) -> Row:
    found = query.rows(
        f"SELECT * FROM pseudo_labels WHERE dt = DATE '{day}' AND user_id = {quoted(user)} "
        f"AND item_id = {quoted(item)} ORDER BY source LIMIT 1"
    )
    if not found:
        raise MissingInputError(
            f"no pseudo-label for user {user}, item {item} on {day}: {_reason(query, user, item, day)}"
            + _other_dates(query, user, item, day)
        )
    return found[0]


def _other_dates(query: Query, user: str, item: str, day: date) -> str:
    near = f"dt BETWEEN DATE '{day - _NEAR}' AND DATE '{day + _NEAR}'"  # not the slices of years
    pair = f"user_id = {quoted(user)} AND item_id = {quoted(item)}"
    found = query.rows(f"SELECT DISTINCT dt FROM pseudo_labels WHERE {near} AND {pair} ORDER BY dt DESC")
    dates = [str(r["dt"]) for r in found]
    return f"; the pair has a label on {', '.join(dates[:_MOST_DATES])}" if dates else ""


def _request(query: Query, user: str, day: date) -> Row:
    """Anchors and history that the user's pairs were scored with; they are the same in all rows of the user."""
    found = query.rows(
        f"SELECT anchor_sids, log_prob, history FROM score_requests WHERE dt = DATE '{day}' "
        f"AND user_id = {quoted(user)} LIMIT 1"
    )
    if not found:
        raise MissingInputError(
            f"score_requests dt={day} has no row for user {user}, whose pairs are labeled; run score_requests for {day}"
        )
    return found[0]


def _reason(query: Query, user: str, item: str, day: date) -> str:
    """Why a pair has no label."""

    def some(table: str, where: str) -> bool:
        return query.lake.exists(table) and bool(query.rows(f"SELECT 1 FROM {table} WHERE {where} LIMIT 1"))

    on, pair = f"dt = DATE '{day}'", f"user_id = {quoted(user)} AND item_id = {quoted(item)}"
    if not some("pseudo_labels", on):
        return f"no pair of that date is labeled; run pseudo_labels for {day}"
    if not some("items", f"item_id = {quoted(item)}"):
        return "the item is not in table items"
    if some("exposed_samples", f"{on} AND {pair}"):
        return (
            "the item was shown to the user: the feed has the observed click, and only a sample of the exposed pairs "
            "is scored for calibration (samples.scored_exposed_share)"
        )
    if not some("unexposed_samples", f"{on} AND {pair}"):
        return (
            "the pair is not in unexposed_samples: the item was not recalled for the user, was shown within "
            "samples.exposure_window_days, was not sampled (samples.unexposed_per_request) or was withdrawn, or the "
            "user had opted out"
        )
    if some("score_requests", f"{on} AND user_id = {quoted(user)}"):
        return "the worker rejected the item or the user's anchors; see table worker_rejects for that date"
    return "the user has no anchors: no history before that date, or no item in it has a semantic ID"


def _anchors(query: Query, request: Row, sid_version: str) -> list[Row]:
    """Anchors without the padding: rank, sid, log_prob and the items that carry the SID."""
    count = len(request["log_prob"])
    sids = np.asarray(request["anchor_sids"], dtype=np.int64).reshape(count, -1)
    wanted = {",".join(map(str, s)) for s in sids.tolist()}
    listed = ", ".join(quoted(s) for s in sorted(wanted))
    found = query.rows(
        "SELECT item_index, array_join(sid, ',') AS anchor FROM item_sids WHERE retired_at = 0 "
        f"AND sid_version = {quoted(sid_version)} AND array_join(sid, ',') IN ({listed})"
    )
    return [
        {
            "rank": k, "sid": sid, "log_prob": float(log_prob), "probability": float(np.exp(log_prob)),
            "carriers": [r["item_index"] for r in found if r["anchor"] == ",".join(map(str, sid))],
        }
        for k, (sid, log_prob) in enumerate(zip(sids.tolist(), request["log_prob"], strict=True)) if sid[0] >= 0
    ]  # fmt: skip


def _vectors(query: Query, items: Iterable[int], encoder_version: str, day: date) -> dict[int, npt.NDArray[np.float64]]:
    """item_index -> its newest usable embedding before the end of `day`, of `encoder_version`."""
    rows = query.rows(
        f"SELECT item_index, embedding FROM item_embeddings WHERE encoder_version = {quoted(encoder_version)} "
        f"AND updated_at < {midnight(day + timedelta(days=1))} "
        f"AND item_index IN ({', '.join(map(str, sorted(items)))}) ORDER BY updated_at"
    )
    found = {r["item_index"]: np.asarray(r["embedding"], dtype=np.float64) for r in rows}
    return {i: v for i, v in found.items() if np.isfinite(v).all() and v.any()}


def _score(
    item: int, anchors: Sequence[Row], history: Sequence[int], vectors: Mapping[int, npt.NDArray[np.float64]]
) -> Row:
    """The formulas of `labels/pair_scoring.py` for one pair; adds `similarity` to every anchor carried by an item."""
    for anchor in anchors:
        anchor["carriers"] = [i for i in anchor["carriers"] if i in vectors]
        anchor["carried_by"] = len(anchor["carriers"])
    live = [anchor for anchor in anchors if anchor["carriers"]]
    if item not in vectors or not live:
        raise ContractError(
            "the pair has a label, but the embedding of the item or the SIDs of all anchors are missing from "
            "item_embeddings and item_sids at the versions that scoring read"
        )
    points = np.stack([np.mean([vectors[i] for i in a["carriers"]], axis=0) for a in live])  # [K x d]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    # Each item once, at its last event.
    past = list({i: len(history) - place - 1 for place, i in enumerate(history) if i in vectors}.items())
    similarity = points @ vectors[item]
    for anchor, value in zip(live, similarity.tolist(), strict=True):
        anchor["similarity"] = value
    logs = np.array([a["log_prob"] for a in live])
    share = np.exp(logs - logs.max())
    share /= share.sum()
    best = int(similarity.argmax())
    nearness = [(i, float(vectors[i] @ vectors[item]), ago) for i, ago in past]
    agreement = np.zeros(len(live))
    if past:
        agreement = np.maximum(points @ np.stack([vectors[i] for i, _ in past]).T, 0).max(axis=1)
    return {
        "matched": anchors.index(live[best]),
        "similarity": float(np.clip(similarity[best], -1, 1)),
        "history_similarity": max((s for _, s, _ in nearness), default=0.0),
        "coherence": float(np.clip(np.linalg.norm(share @ points), 0, 1)),
        "consistency": float(np.clip(share @ agreement, 0, 1)),
        "llm_confidence": float(np.exp(logs[best] / len(live[best]["sid"]))),
        "history": nearness,
    }


def _label(
    planner: Planner, query: Query, calibrator: Calibrator, pair: Row, day: date
) -> tuple[float, float, float, float | None]:
    """(user rate, label, raw weight, weight) from stored scores; no weight if no commit has the mean of the date."""
    columns: dict[str, Any] = {c: [0.0] for c in COUNT_COLUMNS}
    keys = {"item": f"item_index = {pair['item_index']}", "user": f"user_id = {quoted(pair['user_id'])}"}
    for owner, key in keys.items():
        for row in query.rows(f"SELECT * FROM {owner}_stats WHERE dt = DATE '{day}' AND {key}"):
            columns |= {c: [row[c.removeprefix(f"{owner}_")]] for c in COUNT_COLUMNS if c.startswith(owner)}
    rate = float(user_rate(calibrator, columns)[0])
    columns |= {name: [pair[name]] for name in SCORES} | {"user_rate": [rate], "user_rank": [pair["user_rank"]]}
    label = float(apply(calibrator, columns)[0])
    raw = min(1.0, float(combined_weight(pair["coherence"], pair["consistency"], pair["llm_confidence"])))
    found = planner.lake.open("pseudo_labels").mark(day.isoformat(), "pseudo_labels")
    if found is None or "mean_raw_weight" not in found[1].details:
        return rate, label, raw, None
    if found[1].details.get("weight", "factors") == "none":
        return rate, label, raw, 1.0
    return rate, label, raw, raw / (found[1].details["mean_raw_weight"] or 1.0)


def _artifact(planner: Planner, kind: str, version: str) -> Manifest:
    manifest = planner.artifacts.find(kind, version)
    if manifest is None:
        raise MissingInputError(f"artifact {kind} {version}, which made the label, is not in {planner.artifacts.root}")
    return manifest


def _titles(query: Query, items: Iterable[int]) -> dict[int, Row]:
    listed = ", ".join(map(str, sorted(items)))
    rows = query.rows(f"SELECT item_index, item_id, title FROM items WHERE item_index IN ({listed})")
    return {r["item_index"]: {"item_id": r["item_id"], "title": r["title"]} for r in rows}


# ---- output ------------------------------------------------------------------------------------------------------


def _print(found: Row, console: Console) -> None:
    calibrator = found["calibrator"]
    by, says = ", ".join(calibrator["features"]), f"; similarity {found['similarity']:.4f}"
    if calibrator["has_user_parts"]:
        rate, rank = found["user_rate"], found["user_rank"]
        says = f": the user clicks on {rate:.2%} of what is shown, and the pair ranks {rank:.3f} among the user's "
        says += "other pairs (1: highest)"
    console.print(
        f"user {escape(found['user_id'])}, item {_item(found['item'])}, {found['run_date']}, {found['source']}\n"
        f"pseudo-label {found['pseudo_label']:.5f} ({calibrator['kind']} of {by}{says}; "
        f"calibrator {calibrator['version']})"
    )
    factors = ", ".join(f"{k} {v:.4f}" for k, v in found["factors"].items())
    console.print(f"weight {found['weight']:.4f} (raw {found['raw_weight']:.4f}: {factors})")
    title = "anchors of the user (rank 0: most likely; *: matched)"
    table = Table("rank", "anchor", "probability", "similarity", "carried by", title=title)
    for anchor in found["anchors"]:
        rank = f"{anchor['rank']}" + " *" * anchor["matched"]
        names = "; ".join(_item(i) for i in anchor["items"]) or "no current item"
        more = f" and {anchor['carried_by'] - len(anchor['items'])} more" if anchor["carried_by"] > NEAREST else ""
        near = f"{anchor['similarity']:.4f}" if "similarity" in anchor else "–"
        table.add_row(rank, ",".join(map(str, anchor["sid"])), f"{anchor['probability']:.5f}", near, names + more)
    console.print(table)
    table = Table("history item", "similarity", "events ago", title="nearest items in the user's history")
    for row in found["nearest_history"]:
        table.add_row(_item(row), f"{row['similarity']:.4f}", str(row["events_ago"]))
    console.print(table)
    console.print("recomputed from vectors and formulas: all values match the stored ones")


def _item(item: Row) -> str:
    return escape(f"{item['item_id']} ({item['title']})" if item["title"] else item["item_id"])


COMMAND = Command(
    "explain", "show why a pair has its pseudo-label: anchor, factors and history, recomputed", run, add_arguments,
    examples=("--config shop.yaml --run-date 2026-03-04 --user U --item I",),
)  # fmt: skip
