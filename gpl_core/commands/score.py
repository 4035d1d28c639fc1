"""`gpl score`: the reference pre-ranker's expectation of the feed's unexposed rows, as a table beside their labels."""

import argparse
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpl_core.commands.command import Command, run_dates
from gpl_core.config import Config, with_passthrough
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError, MissingInputError
from gpl_core.graph.arguments import add_dates, new_run_id
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import ONE_DAY
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.prerank.comparison import OURS
from gpl_core.prerank.serving import ServedModel

_TABLE = "preranker_scores"
_KEY = ("request_id", "user_id", "item_id", "item_index", "pseudo_label")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dates(parser)
    parser.add_argument("--variant", default=OURS, help="as in table evaluations, or with -seedN (default: gpl)")


def run(args: argparse.Namespace, config: Config) -> int:
    """Score the run dates with numpy alone, one slice after the other."""
    for run_date in run_dates(args, config):
        rows, name, version = score(config, run_date, args.variant)
        print(f"{_TABLE}, {run_date}: {rows:,} rows by {name} of preranker {version}")
    return 0


def served_model(config: Config, run_date: date, variant: str = OURS) -> tuple[ServedModel, str, Manifest]:
    """The pre-ranker in force once `run_date` is done: the model, its variant with the seed, its manifest.

    variant: as in table evaluations, for the first of its training seeds, or with the seed: `gpl-seed0`.
    """
    artifacts = Planner(config).artifacts
    manifest = artifacts.in_force("preranker", run_date + ONE_DAY)
    folder = artifacts.fetch(manifest)
    seeds = [name for name in ServedModel.describe(folder)["variants"] if name.startswith(f"{variant}-seed")]
    name = seeds[0] if seeds else variant
    return ServedModel(folder, name), name, manifest


def score(config: Config, run_date: date, variant: str) -> tuple[int, str, str]:
    """Replace the slice of the table; returns its rows, the variant and the version of the pre-ranker.

    One row group is in memory at a time. MissingInputError without a feed or a pre-ranker.
    """
    lake, contract, day = Lake.of(config.lakehouse), load_contract(_TABLE), run_date.isoformat()
    model, name, manifest = served_model(config, run_date, variant)
    feed = lake.open("training_feed", contract=with_passthrough("training_feed", config))
    if feed.mark(day) is None or day in feed.history.refused:
        raise MissingInputError(
            f"training_feed has no slice for {day}, or one that was refused; run training_feed for that date first"
        )
    files = feed.select(start=run_date, end=run_date)
    lake.create(contract)
    with lake.writer(contract, {"dt": day}, dims={}) as writer:
        for group in feed.row_groups(files, ["is_exposed", *_KEY, *model.pair_features]):
            rows = group.filter(pc.invert(group["is_exposed"]))
            features = [rows[f].to_numpy().astype(np.float32) for f in model.pair_features]
            pair = np.stack(features, axis=1) if features else None
            logits = model.score_pairs(rows["user_id"].to_pylist(), rows["item_index"].to_numpy(), pair)
            made = {column: rows[column] for column in _KEY}
            made["score"] = pa.array(1 / (1 + np.exp(-logits.astype(np.float64))))
            for column, text in (("variant", name), ("preranker_version", manifest.version)):
                made[column] = pa.array([text] * rows.num_rows, pa.string())
            writer.write(pa.table(made))
    mark = SliceMark("gpl score", {day: manifest.fingerprint}, new_run_id())
    _refuse_other_feed(lake, feed, run_date)
    commit = lake.commit(contract, writer.parts, mark=mark, mode="overwrite", partition={"dt": day})
    _refuse_other_feed(lake, feed, run_date)  # gpl forget takes a person out of the feed first, then out of the scores
    return commit.rows, name, manifest.version


def _refuse_other_feed(lake: Lake, feed: Snapshot, run_date: date) -> None:
    if lake.open("training_feed").identity(run_date, run_date) != feed.identity(run_date, run_date):
        raise ConflictError(
            f"training_feed dt={run_date} was written by another run meanwhile; run gpl score for {run_date} again"
        )


COMMAND = Command(
    "score", "score unexposed rows with the pre-ranker, next to their labels (table preranker_scores)", run,
    add_arguments, in_shadow=False, examples=("--config shop.yaml --run-date 2026-03-04",),
)  # fmt: skip
