"""The `gpl` command: makes raw tables, plans, runs and shows. Imports neither torch nor pyspark."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpl_core.commands.capacity import capacity, newest_measurement, read_measurement
from gpl_core.commands.settings import settings_page
from gpl_core.config import Config, date_range, load_config
from gpl_core.errors import ContractError, GplError, UsageError, exit_code_of, told
from gpl_core.graph.arguments import LOG_LEVELS, count
from gpl_core.graph.launches import Launch, Source, environment, plan, shell, spark_submit
from gpl_core.graph.planner import Planner
from gpl_core.graph.runner import run_launches
from gpl_core.graph.schedulers import FORMATS, render
from gpl_core.graph.steps import JUDGE, OPTIMIZE, RETRY, STEPS, find_step
from gpl_core.lakehouse.artifacts import KINDS
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.views import dictionary


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}\n{self.format_usage()}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; wrong words raise UsageError."""
    parser = _Parser(prog="gpl", description="Generative Pseudo-Labeling for pre-ranking", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, text: str, *, dates: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--config", required=True, help="a shipped configuration's name or a YAML file")
        sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
        if dates:
            sub.add_argument("--run-date", type=_date)
            sub.add_argument("--start-date", type=_date)
            sub.add_argument("--end-date", type=_date)
        return sub

    sub = add("simulate", "write the raw tables of a simulated marketplace with known click probabilities")
    for name, kind in (("users", int), ("items", int), ("days", int), ("candidates", int), ("exposed", int)):
        sub.add_argument(f"--{name}", type=kind)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--world", choices=("plain", "popularity_bias", "fast_drift"))
    sub.add_argument("--force", action="store_true", help="replace raw tables made under other settings")
    sub = add("import-reviews", "write raw tables from real purchases; requests and exposure are simulated")
    sub.add_argument("--items", required=True, help="items.jsonl.gz")
    sub.add_argument("--sequences", required=True, help="sequences.jsonl.gz")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--force", action="store_true", help="replace raw tables made from other input")
    for name, text in (("plan", "print the launcher commands"), ("run", "run the graph, skipping what is done")):
        sub = add(name, text, dates=True)
        sub.add_argument("--from", dest="first", metavar="STEP", help="begin with this step")
        sub.add_argument("--only", action="append", default=[], metavar="STEP", help="only this step; repeatable")
        sub.add_argument("--isolated", action="store_true", help="a launch of its own for every Spark step")
        sub.add_argument("--force", action="store_true", help="run even what is done")
        if name == "plan":
            sub.add_argument(
                "--format", dest="form", choices=FORMATS, default="shell", help="airflow: a file with a DAG"
            )
        if name == "run":
            sub.add_argument(
                "--max-failures", type=count, default=0, metavar="N",
                help="leave out dates that fail, until more than N did; the rest are done",
            )  # fmt: skip
            sub.add_argument("--verbose", action="store_true", help="show the steps' own output")
            sub.add_argument("--log-level", choices=LOG_LEVELS, default="", help="of the steps' words, default info")
    sub = add("shadow", "print the configuration of a run in tables of its own, beside what is published")
    sub.add_argument("--name", required=True, help="its tables lie under lakehouse.root/shadow/NAME")
    sub.add_argument(
        "--from", dest="first", required=True, metavar="STEP", help="what lies before is read, never written"
    )
    sub.add_argument(
        "--use", action="append", default=[], metavar="ARTIFACT=VERSION", help="in force there; repeatable"
    )
    sub = add("compare", "labels and anchors of this lakehouse and of a shadow run, side by side", dates=True)
    sub.add_argument("--with", dest="other", required=True, metavar="CONFIG", help="the shadow run's configuration")
    add("status", "done, absent or stale per run date and step, by what the tables say", dates=True)
    add("judge", "simulation only: pre-ranker variants against the true click probabilities", dates=True)
    add("evaluate", "the pre-ranker with and without pseudo-labels on the day after, your own tables", dates=True)
    add("summary", "rows per table, coverage and evaluation of the run dates", dates=True)
    sub = add("sql", "read-only SQL over tables and views, without Spark")
    sub.add_argument("statement", nargs="+", help="SELECT …, EXPLAIN …, DESCRIBE name or SHOW TABLES")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const="json", help="one JSON object per row")
    form.add_argument("--csv", action="store_const", dest="form", const="csv")
    sub.add_argument("--version", action="append", default=[], metavar="TABLE=N", help="read this version; repeatable")
    sub = add("explain", "why a pair has its pseudo-label: anchor, factors, history, all computed again")
    sub.add_argument("--user", required=True, metavar="USER_ID")
    sub.add_argument("--item", required=True, metavar="ITEM_ID")
    sub.add_argument("--run-date", required=True, type=_date)
    sub.add_argument("--json", action="store_true")
    sub = add("check-raw", "look at the raw tables before the first run: every problem at once", dates=True)
    sub.add_argument("--sample-rows", type=int, default=100_000, help="rows looked at per table (default 100,000)")
    for name, text in (
        ("promote", "put a published artifact back in force"), ("rollback", "take a published artifact out of force")
    ):  # fmt: skip
        sub = add(name, text)
        sub.add_argument("artifact", choices=KINDS)
        sub.add_argument("version", help="as under lakehouse.root/artifacts/ARTIFACT/")
        sub.add_argument("--reason", default="", help="kept in the table artifact_decisions")
        if name == "rollback":
            sub.add_argument("--from-date", type=_date, metavar="D", help="run dates before D go on using it")
    add("register", "ask Spark's catalog where raw tables lie, and name our tables in lakehouse.database")
    sub = add("quarantine", "retry: accept the quarantined rows of a date that pass now", dates=True)
    sub.add_argument("action", choices=("retry",))
    add("optimize", "join small files, so that nothing turns stale", dates=True)
    sub = add("vacuum", "delete the files of old versions that no run needs")
    sub.add_argument("--retention-hours", type=int, default=168, metavar="N", help="keep younger ones (default 168)")
    sub.add_argument("--ended", action="append", default=[], metavar="RUN_ID", help="this run was killed; repeatable")
    sub.add_argument("--dry-run", action="store_true", help="count only")
    sub = add("migrate", "bring tables to the version of their contracts, as these declare")
    sub.add_argument("table", nargs="*", help="default: every table")
    sub.add_argument("--ended", action="append", default=[], metavar="RUN_ID", help="this run was killed; repeatable")
    sub.add_argument("--dry-run", action="store_true", help="say what would be done")
    sub = add("forget", "remove a person from every table of this project")
    sub.add_argument("--user", required=True, metavar="USER_ID")
    sub.add_argument("--dry-run", action="store_true", help="count only")
    sub.add_argument("--vacuum-hours", type=int, metavar="N", help="also delete files of versions older than N hours")
    sub = add("evict", "take out of the anchor cache what nothing has needed for cache.retention_days")
    sub.add_argument("--run-date", required=True, type=_date, help="as of this date, whose score_requests are written")
    sub.add_argument("--dry-run", action="store_true", help="count only")
    text = "GPUs and cost of a day's anchors, extrapolated from a measured search"
    sub = commands.add_parser("capacity", help=text, description=text, allow_abbrev=False)
    sub.add_argument("--users", type=float, required=True, help="users whose anchors are generated, e.g. 300e6")
    sub.add_argument("--hours", type=float, required=True, help="time they may take")
    sub.add_argument("--gpus", type=int, metavar="N", help="say how long N devices take")
    sub.add_argument("--gpu-hour-cost", type=float, metavar="COST", help="price of one device hour, in any currency")
    sub.add_argument("--prompt", type=int, metavar="TOKENS", help="a measured prompt length; default: the slowest")
    sub.add_argument("--beams", type=int, metavar="K", help="a measured number of anchors; default: the slowest")
    sub.add_argument(
        "--measurement", type=Path, metavar="FILE", help="a result of bench_search; default: this checkout's"
    )
    commands.add_parser("settings", help="print the configuration reference as Markdown")
    commands.add_parser("tables", help="print the data dictionary, views included, as Markdown")

    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see `errors.py`)."""
    try:
        args = make_parser().parse_args(argv)
        if args.command == "settings":
            print(settings_page())
            return 0
        if args.command == "tables":
            print(dictionary())
            return 0
        if args.command == "capacity":
            return _capacity(args)
        config = load_config(args.config, args.overrides)
        if (shadow := config.lakehouse.shadow).of and args.command in _NOT_IN_A_SHADOW:
            raise UsageError(
                f"gpl {args.command} is not for a shadow run: it would change {shadow.of}. Give that lakehouse's "
                f"configuration; a shadow that is done with is deleted as a folder: {config.lakehouse.root}"
            )
        return int(_COMMANDS[args.command](args, config))
    except BrokenPipeError:  # the reader of our output (head, less) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GplError, OSError) as error:
        if not isinstance(told(error), GplError):
            raise
        print(f"error: {told(error)}", file=sys.stderr)
        return exit_code_of(error)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a date; expected YYYY-MM-DD") from None


def _dates(args: argparse.Namespace, config: Config) -> tuple[date, ...]:
    if args.run_date and (args.start_date or args.end_date):
        raise UsageError("give either --run-date or --start-date with --end-date")
    if args.run_date:
        return (args.run_date,)
    if bool(args.start_date) != bool(args.end_date):
        raise UsageError("--start-date and --end-date belong together")
    start, end = args.start_date or config.run.start_date, args.end_date or config.run.end_date
    if end < start:
        raise UsageError(f"--end-date {end} lies before --start-date {start}")
    return tuple(date_range(start, end))


def _source(args: argparse.Namespace) -> Source:
    name = args.config
    return Source(str(Path(name).absolute()) if Path(name).is_file() else name, tuple(args.overrides))


# ---- plan and run ----------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace, config: Config) -> int:
    launches = plan(Planner(config), _dates(args, config), first=args.first, only=args.only, isolated=args.isolated)
    print(render(args.form, launches, _source(args), config, force=args.force))
    return 0


def _run(args: argparse.Namespace, config: Config) -> int:
    dates, planner = _dates(args, config), Planner(config)
    launches = plan(planner, dates, first=args.first, only=args.only, isolated=args.isolated)
    _warn_of_empty_dates(planner, dates)
    return _start(
        launches, args, config, force=args.force, verbose=args.verbose, max_failures=args.max_failures
    )  # fmt: skip


def _warn_of_empty_dates(planner: Planner, dates: Sequence[date]) -> None:
    """A date without raw rows is a legal day without traffic, and more often a mistyped date."""
    raw = planner.snapshot("raw_impressions")
    have = raw.slices() if raw is not None else ()
    if have and (lacking := [d for d in dates if d not in have]):
        listed = ", ".join(map(str, lacking[:5])) + (" …" if len(lacking) > 5 else "")
        print(f"warning: raw_impressions has no rows for {listed}; it has {have[0]} to {have[-1]}", file=sys.stderr)


def _judge(args: argparse.Namespace, config: Config) -> int:
    after = tuple(d for d in (*_dates(args, config),))[-1:]
    following = tuple(date.fromordinal(d.toordinal() + 1) for d in after)
    return _start([Launch((JUDGE,), following)], args, config)


def _evaluate(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.evaluate import print_comparison

    for day in _dates(args, config):
        # Late impressions of the day after are a reason to judge again; nothing is trained twice.
        if code := _start([Launch((find_step("train_preranker"),), (day,))], args, config):
            return code
        print_comparison(config, day)
    return 0


def _start(
    launches: Sequence[Launch], args: argparse.Namespace, config: Config, *, force: bool = False, verbose: bool = False,
    max_failures: int = 0,
) -> int:  # fmt: skip
    return run_launches(
        launches, _source(args), config, force=force, verbose=verbose, log_level=getattr(args, "log_level", ""),
        max_failures=max_failures,
    )  # fmt: skip


def _shadow(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.shadow import as_yaml, shadow_config

    use = dict(text.partition("=")[::2] for text in args.use)
    if wrong := [k for k in use if k not in KINDS]:
        raise UsageError(f"--use {wrong[0]}: expected ARTIFACT=VERSION, ARTIFACT one of {', '.join(KINDS)}")
    print(as_yaml(shadow_config(config, args.name, args.first, use)), end="")
    return 0


def _compare(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.shadow import compare, print_comparison

    other = load_config(args.other)
    for day in _dates(args, config):
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        print_comparison(compare(config, other, day), day, (config.lakehouse.root, other.lakehouse.root), console)
    return 0


def _status(args: argparse.Namespace, config: Config) -> int:
    planner = Planner(config)
    if "://" not in config.lakehouse.root and not Path(config.lakehouse.root).is_dir():
        print(f"note: lakehouse.root {config.lakehouse.root} does not exist (yet)", file=sys.stderr)
    table = Table("run date", "step", "state", "why / versions")
    colours = {"done": "green", "stale": "yellow", "absent": "cyan", "blocked": "dim"}
    for run_date in _dates(args, config):
        for step in STEPS:
            state = planner.state(step, run_date)
            table.add_row(
                run_date.isoformat(), step.name, f"[{colours[state.status]}]{state.status}[/]", escape(state.reason)
            )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return 0


# ---- raw tables ------------------------------------------------------------------------------------------------


def _simulate(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.simulate import run_simulate

    given = {
        "users": args.users, "items": args.items, "days": args.days, "candidates_per_request": args.candidates,
        "exposed_per_request": args.exposed, "seed": args.seed, "world": args.world,
    }  # fmt: skip
    return run_simulate(config, {k: v for k, v in given.items() if v is not None}, force=args.force)


def _import_reviews(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.simulate import run_import

    return run_import(config, args.items, args.sequences, seed=args.seed, force=args.force)


def _summary(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.summary import print_summary

    print_summary(config, _dates(args, config))
    return 0


# ---- analysts --------------------------------------------------------------------------------------------------


def _sql(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.lakehouse.query import Query, print_result

    if len(args.statement) > 1:
        raise UsageError('put the statement in quotes, for example "SELECT * FROM items": a shell takes it apart else')
    versions = {}
    for text in args.version:
        table, _, number = text.partition("=")
        if not number.isdigit():
            raise UsageError(f"--version {text}: expected TABLE=N, for example training_feed=3")
        versions[table] = int(number)
    query = Query(Lake.of(config.lakehouse), versions)
    print_result(query.run(args.statement[0]), args.form or "table", sys.stdout)
    if query.versions:
        print("read: " + ", ".join(f"{t}@{v}" for t, v in sorted(query.versions.items())), file=sys.stderr)
    return 0


def _explain(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.explain import explain, print_explanation

    found = explain(config, args.user, args.item, args.run_date)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print_explanation(found, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    return 0


# ---- operators -------------------------------------------------------------------------------------------------


def _check_raw(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.check_raw import check_raw

    if args.sample_rows < 1:
        raise UsageError(f"--sample-rows {args.sample_rows}: expected at least 1")
    found = check_raw(config, _dates(args, config), args.sample_rows)
    for finding in found:
        print(f"{finding.level}: {finding.table}: {finding.text}")
    errors = sum(f.level == "error" for f in found)
    print(f"{errors} error(s), {len(found) - errors} warning(s)" if found else "the raw tables are fit to be ingested")
    return ContractError.exit_code if errors else 0


def _register(args: argparse.Namespace, config: Config) -> int:
    arguments = spark_submit(config, "spark_jobs/register.py", _source(args).arguments())
    print(f"$ {shell(arguments, environment(config))}", flush=True)
    return subprocess.run(arguments, env={**os.environ, **environment(config)}, check=False).returncode


def _quarantine(args: argparse.Namespace, config: Config) -> int:
    return _start([Launch((RETRY,), _dates(args, config))], args, config)


def _optimize(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.optimize import compact, compactable

    dates, lake = _dates(args, config), Lake.of(config.lakehouse)
    for contract in compactable(lake, "delta-rs"):
        done = compact(lake, contract, dates, config.maintenance.file_mb * 2**20)
        if done.after < done.before:
            print(f"{done.table}: {done.before} files are {done.after} now")
    return _start([Launch((OPTIMIZE,), dates)], args, config) if compactable(lake, "spark") else 0


def _vacuum(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.optimize import vacuum

    lake, files = Lake.of(config.lakehouse), 0
    verb = "would be deleted" if args.dry_run else "deleted"
    for found in vacuum(lake, args.retention_hours, dry_run=args.dry_run, ended=args.ended):
        files += found.files
        if found.files:
            print(f"{found.table}: {found.files:,} files, {found.bytes:,} bytes {verb}")
    print(f"in all {files:,} files {verb}")
    return 0


def _migrate(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.migrate import migrate_all
    from gpl_core.contracts.contract import all_contracts, load_contract

    contracts = [load_contract(t) for t in args.table] or list(all_contracts().values())
    return migrate_all(
        Lake.of(config.lakehouse), contracts, config.feed.passthrough, dry_run=args.dry_run, ended=args.ended
    )  # fmt: skip


def _capacity(args: argparse.Namespace) -> int:
    measurement = read_measurement(args.measurement) if args.measurement else newest_measurement()
    for line in capacity(
        measurement, args.users, args.hours, gpus=args.gpus, prompt=args.prompt, beams=args.beams,
        gpu_hour_cost=args.gpu_hour_cost,
    ):  # fmt: skip
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)
    return 0


def _forget(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.forget import forget_everywhere

    lake = Lake.of(config.lakehouse)
    return forget_everywhere(lake, args.user, dry_run=args.dry_run, vacuum_hours=args.vacuum_hours)


def _decide(args: argparse.Namespace, config: Config) -> int:
    planner, from_date = Planner(config), getattr(args, "from_date", None)
    made = planner.artifacts.decide(
        args.artifact, args.version, args.command, from_date=from_date, reason=args.reason
    )  # fmt: skip
    print(f"{args.artifact} {args.version}: " + (f"{args.command} recorded" if made else "so it is already"))
    if (newest := planner.artifacts.in_force_or_none(args.artifact, date.max)) is None:
        print(f"no {args.artifact} is in force for later dates: the next gpl run trains one")
    else:
        print(f"in force after {newest.trained_through}: {newest.version}")
    print("gpl status shows what is stale now")
    return 0


def _evict(args: argparse.Namespace, config: Config) -> int:
    from gpl_core.commands.evict import evict

    found = evict(Planner(config), args.run_date, dry_run=args.dry_run)
    verb = "would be evicted" if args.dry_run else "evicted"
    print(f"interest_anchors: {sum(r.rows for r in found):,} entries of {len(found):,} files {verb}", file=sys.stderr)
    return 0


_COMMANDS = {
    "simulate": _simulate,
    "import-reviews": _import_reviews,
    "plan": _plan,
    "run": _run,
    "shadow": _shadow,
    "compare": _compare,
    "status": _status,
    "judge": _judge,
    "evaluate": _evaluate,
    "summary": _summary,
    "sql": _sql,
    "explain": _explain,
    "check-raw": _check_raw,
    "promote": _decide,
    "rollback": _decide,
    "register": _register,
    "quarantine": _quarantine,
    "optimize": _optimize,
    "vacuum": _vacuum,
    "migrate": _migrate,
    "forget": _forget,
    "evict": _evict,
}

# They change tables that a shadow run only reads.
_NOT_IN_A_SHADOW = {
    "simulate", "import-reviews", "promote", "rollback", "register", "quarantine", "optimize", "vacuum", "migrate",
    "forget", "evict",
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
