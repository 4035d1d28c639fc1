"""`gpl evict`: remove from the anchor cache what nothing has needed for `anchors.retention_days`.

A date needs an entry if its score_requests contain the entry's user and model, because that is when the cache is looked
up. An entry is therefore removed if it was generated before the retention period and its user has not been scored with
its model since. (While a user is still scored with that model, its entries for older sequences stay: too much is kept,
never too little.) Only delta-rs writes `interest_anchors`, so this is not a Spark job.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import date, timedelta

import numpy as np
import pyarrow as pa

from gpl_core.commands.command import Command
from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import MissingInputError, some
from gpl_core.graph.arguments import iso_date, new_run_id
from gpl_core.graph.job_runs import Counts, JobRun
from gpl_core.graph.planner import Planner, StepState
from gpl_core.grouping import grouped
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.key_hashes import hash_keys, members
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.rewrite import Keep, Removal, all_but, remove_rows
from gpl_core.lakehouse.snapshot import Snapshot

STEP = "evict_anchors"
_KEYS_AT_A_TIME = 8_000_000  # cache keys in memory at a time: 64 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-date", required=True, type=iso_date, metavar="D", help="evict as of this date; it needs score_requests"
    )
    parser.add_argument("--dry-run", action="store_true", help="only count the entries")


def run(args: argparse.Namespace, config: Config) -> int:
    found = evict(Planner(config), args.run_date, dry_run=args.dry_run)
    verb = "would be evicted" if args.dry_run else "evicted"
    print(f"interest_anchors: {sum(r.rows for r in found):,} entries of {len(found):,} files {verb}", file=sys.stderr)
    return 0


def evict(planner: Planner, run_date: date, *, dry_run: bool = False) -> Sequence[Removal]:
    """Evict as of `run_date`; returns what was (dry_run: would be) removed, and records a `job_runs` row.

    Memory does not grow with the number of users. No file is deleted here; that is left to `gpl vacuum`.
    """
    lake, counts = planner.lake, Counts()
    run = JobRun(lake, STEP, run_date, new_run_id())
    run.state = StepState("absent", "runs whenever it is called")
    try:
        oldest = run_date - timedelta(days=planner.config.anchors.retention_days - 1)
        version = _complete_requests(planner.lake, run_date).version
        run.state = StepState("absent", run.state.reason, inputs={"score_requests": {"version": version}})

        def find(cache: Snapshot) -> list[Removal]:
            found = _unneeded(cache, _complete_requests(lake, run_date), oldest)
            _complete_requests(lake, run_date)  # minutes have passed
            return found

        found = remove_rows(lake, load_contract("interest_anchors"), find, "evict", dry_run=dry_run)
        counts.rows_dropped = sum(r.rows for r in found)
        counts.details = {"oldest_needed": oldest.isoformat(), "files": len(found), "evicted": counts.rows_dropped}
    except BaseException as error:
        if not dry_run:
            run.end("failed", counts, error)
        raise
    if not dry_run:
        run.end("done" if counts.rows_dropped else "noop", counts)
    return found


def _complete_requests(lake: Lake, run_date: date) -> Snapshot:
    """score_requests, after checking that no date is waiting for it: has asked for anchors since it was written."""
    scored = lake.open("score_requests")
    asked, answered = {run_date: 0, **_written(lake.open("anchor_requests"))}, _written(scored)
    if waiting := sorted(d for d, time in asked.items() if answered.get(d, -1) < time):
        raise MissingInputError(
            f"table score_requests: no answer yet for {some(waiting)}, so it is not known what these "
            "dates need from the cache; run score_requests for them, then evict"
        )
    return scored


def _written(snapshot: Snapshot) -> dict[date, int]:
    """When each slice was written last, by the log; commits that regroup rows or remove a person name no slice."""
    oldest_first = reversed(snapshot.history.commits)
    return {date.fromisoformat(name): entry.timestamp or 0 for entry in oldest_first for name in entry.slices}


def _unneeded(cache: Snapshot, requests: Snapshot, oldest: date) -> list[Removal]:
    """What may be removed: entries generated before `oldest` whose (user, model) is in no request from `oldest` on."""
    recent = requests.select(start=oldest)
    old = cache.select(end=oldest - timedelta(days=1))
    in_use = {
        v for rows in requests.row_groups(recent, ["model_version"]) for v in rows["model_version"].unique().to_pylist()
    }
    removals = [Removal(f, f.rows, None) for f in old if f.partition["model_version"] not in in_use]
    used = [f for f in old if f.partition["model_version"] in in_use]
    for files in grouped(used, lambda f: f.rows, _KEYS_AT_A_TIME):
        keys = np.unique(np.concatenate([_keys(cache, f) for f in files]))
        needed = np.zeros(len(keys), dtype=bool)
        for rows in requests.row_groups(recent, ["user_id", "model_version"]):
            wanted = hash_keys(*(rows[c].to_pylist() for c in ("user_id", "model_version")))
            needed[np.searchsorted(keys, wanted[members(wanted, keys)])] = True
        for file in files:
            gone = ~members(_keys(cache, file), keys[needed])
            if gone.any():
                whole = bool(gone.all())
                removals.append(Removal(file, int(gone.sum()), None if whole else _keep(file, keys[needed])))
    return removals


def _keep(file: DataFile, needed: np.ndarray) -> Keep:
    return all_but(lambda rows: pa.array(~members(_hashes(rows, file), needed)))


def _keys(cache: Snapshot, file: DataFile) -> np.ndarray:
    return np.concatenate([_hashes(rows, file) for rows in cache.row_groups([file], ["user_id"])])


def _hashes(rows: pa.Table, file: DataFile) -> np.ndarray:
    return hash_keys(rows["user_id"].to_pylist(), [file.partition["model_version"]] * len(rows))


COMMAND = Command(
    "evict", "remove anchor cache entries that no run has needed for anchors.retention_days", run, add_arguments,
    in_shadow=False,
    examples=("--config shop.yaml --run-date 2026-03-04",),
)  # fmt: skip
