"""`gpl evaluate`: exposed-only against GPL, and against controls, on the day after a run date."""

import argparse
import json
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from gpl_core.commands.command import Command, source
from gpl_core.config import Config
from gpl_core.errors import MissingInputError, counted
from gpl_core.graph.arguments import add_dates, given_dates
from gpl_core.graph.launch_runner import run_launches
from gpl_core.graph.launches import Launch, pending
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import WITH_CONTROLS, Step, find_step
from gpl_core.graph.terminal import console
from gpl_core.labels.controls import CONTROLS
from gpl_core.lakehouse.files import rows_in
from gpl_core.prerank.comparison import (
    ALL_SEEDS,
    BASELINE,
    OURS,
    absences,
    difference_text,
    figure_text,
    ordered_slices,
    too_small,
)

BATCHES = "trained_batches"  # in the details of a training run: of exposed and of unexposed rows, over all its models
_START = 8  # seconds until a launcher's worker begins

Rows = Sequence[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dates(parser)
    parser.add_argument(
        "--controls", action="store_true",
        help="also train on labels that need no language model, to see whether it is worth it",
    )  # fmt: skip


def run(args: argparse.Namespace, config: Config) -> int:
    """Bring the evaluation of the given run dates, or of the last one, up to date and print it."""
    step = WITH_CONTROLS if args.controls else find_step("train_preranker")
    out = console()
    for run_date in given_dates(args) or (config.run.end_date,):
        launch = Launch((step,), (run_date,))
        if pending(Planner(config), launch, False):
            out.print(announcement(config, step, run_date))
        out.print(sources(config, step, run_date))
        # Late impressions of the day after are a reason to judge again; nothing is trained twice.
        if code := run_launches([launch], source(args), config):
            return code
        print_evaluation(config, run_date, out, step.writes[0])
    return 0


def announcement(config: Config, step: Step, run_date: date) -> str:
    """What the step will train for a run date, and how long that takes by the newest training on record."""
    settings = config.prerank
    variants = 2 + (len(CONTROLS) if step is WITH_CONTROLS else len(settings.lambda_sweep))
    models = variants * len(settings.seeds)
    text = (
        f"{run_date}: {models} pre-rankers ({variants} variants, {counted(len(settings.seeds), 'seed')}) of "
        f"{settings.steps:,} steps, unless they are already trained"
    )
    batches = (2 * variants - 1) * len(settings.seeds) * settings.steps  # the baseline takes no unexposed rows
    seconds = _seconds_per_batch(config)
    lasts = "training time not known yet" if seconds is None else _lasting(_START + seconds * batches)
    return f"{text}; {lasts}"


def sources(config: Config, step: Step, run_date: date) -> str:
    """Which rows the figures of a run date come from, and where they are kept."""
    following, first = run_date + timedelta(days=1), run_date - timedelta(days=config.prerank.train_days - 1)
    feed, judged = (_rows(config, t, *ends) for t, *ends in (("training_feed", first, run_date),
                                                             ("impressions", following, following)))  # fmt: skip
    return (
        f"{run_date}: trained on {feed}, evaluated on {judged}; the results are in table {step.writes[0]}, "
        "with 95% intervals over users"
    )


def _rows(config: Config, table: str, start: date, end: date) -> str:
    snapshot, dates = Planner(config).snapshot(table), f"{start}" if start == end else f"{start} to {end}"
    rows = "no rows" if snapshot is None else f"{rows_in(snapshot.select(start=start, end=end)):,} rows"
    return f"{rows} of {table}{'' if snapshot is None else f'@{snapshot.version}'} ({dates})"


def _seconds_per_batch(config: Config) -> float | None:
    """Of the newest training on record, its reading and judging included; None without one."""
    runs = Planner(config).snapshot("job_runs")
    rows = runs.read(columns=["step", "started_at", "seconds", "details"]).to_pylist() if runs else []
    trained = [r for r in rows if r["step"] in ("train_preranker", WITH_CONTROLS.name) and r["seconds"]]
    known = [(r["started_at"], r["seconds"], json.loads(r["details"] or "{}").get(BATCHES)) for r in trained]
    return max(((start, seconds / n) for start, seconds, n in known if n), default=(None, None))[1]


def _lasting(seconds: float) -> str:
    text = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    return f"about {text} if this machine is as busy as it was when it last trained one"


def print_evaluation(config: Config, run_date: date, console: Console, name: str = "evaluations") -> None:
    """Print what table `name` holds for `run_date`, a table per slice, the one with most clicks first.

    Raises:
        MissingInputError: it holds nothing, for example because the impressions of the day after are not there.
    """
    following = run_date + timedelta(days=1)
    found = Planner(config).snapshot(name)
    rows = found.read(found.select(start=run_date, end=run_date)).to_pylist() if found else []
    if not rows:
        raise MissingInputError(
            f"table {name}: no rows for {run_date}, which is evaluated on the impressions of {following}; ingest "
            f"them, then run gpl evaluate --run-date {run_date} again"
        )
    seeds = len({row["seed"] for row in rows} - {ALL_SEEDS})
    console.print(
        f"pre-ranker trained through {run_date}, evaluated on {following}; in brackets: 95% intervals over users"
        + (f" and {seeds} training seeds" if seeds > 1 else "; list several seeds under prerank.seeds to include them")
    )
    rows = [row for row in rows if row["seed"] == ALL_SEEDS]
    if caveat := bias_caveat(rows):
        console.print(caveat)
    for part in ordered_slices(rows):
        mine = [row for row in rows if row["slice"] == part]
        if all(row["value"] is None for row in mine):
            continue
        console.print(f"\n[bold]slice {part}[/]" + (f" ({small})" if (small := too_small(mine)) else ""))
        console.print(slice_table(mine))
    console.print("\n* better or worse: the interval of the difference excludes 0")
    for line in absences(rows):
        console.print(line)
    if not any(row["metric"] == "snips_auc" for row in rows):
        console.print("No off-policy estimate: prerank.propensity names no logged propensities.")


def bias_caveat(rows: Rows) -> str:
    """A warning when no uniformly exposed traffic is there to judge on."""
    uniform = [row for row in rows if (row["slice"], row["metric"]) == ("uniform", "auc")]
    if uniform and uniform[0]["value"] is not None and not too_small(uniform):
        return ""
    why = uniform[0]["note"] or too_small(uniform) if uniform else "no such slice"
    return (
        f"Caveat: that day has too little uniformly exposed traffic to evaluate on ({why}). Other slices contain only "
        "pairs that the serving policy chose to expose; they say nothing about unexposed ones, which get pseudo-labels."
    )


def slice_table(rows: Rows) -> Table:
    """Per metric a line for each model, with its paired differences; no line for a metric that no model has."""
    models = sorted({row["model"] for row in rows}, key=lambda m: (m != BASELINE, m != OURS, m))
    compared = len(models) > 2 and any(row["against"] not in ("", BASELINE) for row in rows)
    table = Table("", "", f"minus {BASELINE}", *[f"{OURS} minus it"] * compared, box=None, pad_edge=False)
    of = {(row["metric"], row["model"], row["against"]): row for row in rows}
    for metric in dict.fromkeys(row["metric"] for row in rows if row["value"] is not None):
        one = of[metric, models[0], ""]
        size = one["candidate_set_size"]
        table.add_row(metric, f"{one['rows']:,} rows", "" if size is None else f"lists of {size:.1f} candidates")
        for model in models:
            row = of[metric, model, ""]
            cells = ["absent" if row["value"] is None else figure_text(row)]
            cells.append(difference_text(of.get((metric, model, BASELINE)), "*", "*"))
            if compared and model != BASELINE:
                cells.append(difference_text(of.get((metric, OURS, model)), "*", "*"))
            table.add_row(f"  {model}", *cells)
    return table


COMMAND = Command(
    "evaluate", "train the pre-ranker with and without pseudo-labels, test both on the next day", run, add_arguments,
    examples=("--config shop.yaml --run-date 2026-03-04", "--config shop.yaml --controls"),
)  # fmt: skip
