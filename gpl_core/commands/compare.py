"""`gpl compare`: the labels and anchors of a lakehouse and of a shadow run, side by side."""

import argparse
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpl_core.commands.command import Command, figures_table, run_dates
from gpl_core.config import Config, load_config
from gpl_core.errors import MissingInputError
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.terminal import console
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.key_hashes import hash_keys
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.snapshot import Snapshot

_MOST_ROWS = 2_000_000
_MEANS = ("pseudo_label", "weight", "similarity", "coherence", "consistency", "llm_confidence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dates(parser)
    parser.add_argument("--with", dest="other", required=True, metavar="CONFIG", help="the shadow run's configuration")


def run(args: argparse.Namespace, config: Config) -> int:
    """Print one table per run date."""
    other = load_config(args.other)
    for run_date in run_dates(args, config):
        table = figures_table([str(run_date)], [config.lakehouse.root, other.lakehouse.root])
        for line in compare(config, other, run_date):
            table.add_row(*line)
        console().print(table)
    return 0


def compare(mine: Config, other: Config, run_date: date) -> list[tuple[str, str, str]]:
    """(figure, of `mine`, of `other`) over the unexposed pairs of `run_date`; of both together in the last column.

    Larger slices are sampled by user, the same users in both: about `_MOST_ROWS` rows.
    """
    lakes = [Lake.of(c.lakehouse) for c in (mine, other)]
    labels = [_slice(lake, "pseudo_labels", run_date) for lake in lakes]
    pairs = _slice(lakes[0], "unexposed_samples", run_date)
    share = min(1.0, _MOST_ROWS / max(1, *(rows_in(files) for _, files in (*labels, pairs))))
    found = [_sampled(s, share, "user_id", "item_id", "source", *_MEANS) for s in labels]
    found = [t.filter(pc.equal(t["source"], "unexposed")).drop_columns("source") for t in found]
    asked = _sampled(pairs, share, "user_id", "item_id").group_by(["user_id", "item_id"]).aggregate([])
    lines = [("users read", f"{share:.1%}", f"{share:.1%}")]

    def line(figure: str, *values: float, form: str = ".4f") -> None:
        lines.append((figure, *(format(v, form) for v in values)))  # type: ignore[arg-type]

    line("unexposed pairs labeled", *map(len, found), form=",")
    labeled = (_both(asked, t).num_rows / max(1, len(asked)) for t in found)
    line("share of unexposed pairs labeled", *labeled, form=".1%")
    for name in _MEANS:
        line(f"mean {name}", *(float(np.mean(t[name])) if len(t) else np.nan for t in found))
    for q in (0.1, 0.5, 0.9):
        values = (float(np.quantile(t["pseudo_label"], q)) if len(t) else np.nan for t in found)
        line(f"pseudo_label, quantile {q}", *values)
    shared = _both(found[0], found[1].rename_columns([*found[1].column_names[:2], *(f"other_{n}" for n in _MEANS)]))
    a, b = (shared[n].to_numpy() for n in ("pseudo_label", "other_pseudo_label"))
    users = shared["user_id"].dictionary_encode().combine_chunks().indices.to_numpy() if len(shared) else np.array([])
    for figure, text in (
        ("pairs in both", f"{len(shared):,}"),
        ("rank correlation of labels", f"{rank_correlation(a, b):.4f}"),
        ("the same within a user, mean", f"{_within(users, a, b):.4f}"),
        ("mean absolute difference", f"{np.abs(a - b).mean() if len(a) else np.nan:.4f}"),
        ("anchors in common, mean Jaccard", f"{_anchors_in_common(lakes, run_date, share):.4f}"),
    ):
        lines.append((figure, "", text))
    return lines


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, tied values at their mean rank; NaN if one of them does not vary."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return float("nan")
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def _within(users: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[order])) + 1
    each = [rank_correlation(a[rows], b[rows]) for rows in np.split(order, starts)]
    defined = [r for r in each if not np.isnan(r)]
    return float(np.mean(defined)) if defined else float("nan")


def _anchors_in_common(lakes: list[Lake], run_date: date, share: float) -> float:
    """Mean over users of |A ∩ B| / |A ∪ B| of the semantic IDs of their anchors."""
    sets: list[dict[str, set[tuple[int, ...]]]] = []
    for lake in lakes:
        rows = _sampled(_slice(lake, "score_requests", run_date), share, "user_id", "anchor_sids", "log_prob")
        by_user = {}
        for user, sids, probs in zip(*(rows[c].to_pylist() for c in rows.column_names)):
            n = len(sids) // len(probs)
            by_user[user] = {tuple(sids[i : i + n]) for i in range(0, len(sids), n) if sids[i] >= 0}
        sets.append(by_user)
    both = sets[0].keys() & sets[1].keys()
    each = [len(sets[0][u] & sets[1][u]) / max(1, len(sets[0][u] | sets[1][u])) for u in both]
    return float(np.mean(each)) if each else float("nan")


def _slice(lake: Lake, table: str, run_date: date) -> tuple[Snapshot, tuple]:
    snapshot = lake.open(table)
    if run_date not in snapshot.slices():
        raise MissingInputError(f"table {table} at {snapshot.uri}: no rows for {run_date}; run the graph for it first")
    return snapshot, snapshot.select(start=run_date, end=run_date)


def _sampled(found: tuple[Snapshot, tuple], share: float, *columns: str) -> pa.Table:
    """`columns` of the slice's rows whose user is in the sample; the same users in every table."""
    snapshot, files = found
    kept = []
    for rows in snapshot.row_groups(files, columns):
        users = rows["user_id"].combine_chunks().dictionary_encode()
        chosen = hash_keys(users.dictionary.to_pylist()) < np.uint64(min(share * 2**64, 2**64 - 1))
        kept.append(rows.filter(pa.array(chosen[users.indices.to_numpy()])) if share < 1 else rows)
    return pa.concat_tables(kept)


def _both(left: pa.Table, right: pa.Table) -> pa.Table:
    return left.join(right, ["user_id", "item_id"], join_type="inner")


COMMAND = Command(
    "compare", "compare labels and anchors with those of a shadow run, side by side", run, add_arguments,
    examples=("--config shop.yaml --run-date 2026-03-04 --with lower_rate.yaml",),
)  # fmt: skip
