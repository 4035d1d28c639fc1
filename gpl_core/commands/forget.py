"""`gpl forget`: remove a person from every table and file of this project, from old versions too if asked to vacuum.

Each part can be repeated and finds by itself what is left to do: when a run was killed, or met another commit, the next
one completes it. docs/security.md lists every place where a person can be.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deltalake import DeltaTable

from gpl_core.commands.command import Command
from gpl_core.commands.vacuum import add_ended, alive, attempts, delete_old_files
from gpl_core.config import Config
from gpl_core.contracts.contract import NO_STATISTICS, Contract, all_contracts
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.graph.arguments import count
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.log import drop_statistics
from gpl_core.lakehouse.log_index import newest_changes
from gpl_core.lakehouse.person import Person, Traces
from gpl_core.lakehouse.rewrite import remove_rows
from gpl_core.lakehouse.storage import filesystem, local_folder, log_folder, read_text, write_whole

_STEP, _FEED, _QUARANTINE = "forget", "training_feed", "quarantine"


@dataclass(frozen=True)
class Forgotten:
    """What was found in one place (rows, files), in words what became of it, and what is left to do there."""

    place: str
    found: int = 0
    done: str = ""
    left: str = ""
    dates: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", required=True, metavar="USER_ID", help="the user id, as stored by ingest")
    parser.add_argument("--dry-run", action="store_true", help="only count rows and files")
    parser.add_argument(
        "--vacuum-hours", type=count, metavar="N", help="also delete files that contain the person and that only "
        "versions older than N hours use, and such files left by killed runs"
    )  # fmt: skip
    add_ended(parser)


def run(args: argparse.Namespace, config: Config) -> int:
    """One line per place, then what is left to do; exit code 3 when the next `ingest` or reader may meet the person."""
    person, lake = Person(args.user), Lake.of(config.lakehouse)
    known = attempts(lake)
    if not any(lake.exists(c.name) for c in all_contracts().values() if c.owner != "platform"):
        raise MissingInputError(f"{lake.root} has no tables of this project; correct lakehouse.root")
    if not args.dry_run:
        _refuse_running(lake, args.ended)
    total, left, dates = 0, [], set()
    for found in forget(lake, person, args.vacuum_hours, args.ended, dry_run=args.dry_run):
        total += found.found
        left += [found.left] if found.left else []
        dates |= set(found.dates) if found.place == _FEED else set()
        if found.done:
            print(f"{found.place}: {found.done}")
    if not args.dry_run:
        left += [
            f"run {r['run_id']} ({r['step']} for {r['run_date']}) was active in the meantime and may have written the "
            "person back"
            for r in alive(lake, args.ended, known)
        ]
    if not total and not left:
        older = "" if args.vacuum_hours is not None else "; add --vacuum-hours N to search older versions too"
        raise MissingInputError(f"user {args.user!r} is in no table and no file of {lake.root}{older}")
    for line in [*left, *([] if args.dry_run else _notes(args.vacuum_hours, sorted(dates)))]:
        print(f"left: {line}")
    if not left or args.dry_run:
        return 0
    print("when that is done, run the same command again to finish")
    return 3


def _refuse_running(lake: Lake, ended: list[str]) -> None:
    if running := alive(lake, ended):
        first = running[0]
        raise ContractError(
            f"run {first['run_id']} ({first['step']} for {first['run_date']}) is in progress and would write the "
            f"person back; run gpl forget when it has ended, or add --ended {first['run_id']} if it was killed"
        )


def _notes(hours: int | None, dates: list[str]) -> Iterator[str]:
    if dates:
        yield (
            "slices built on the removed rows are stale; "
            f"gpl run --start-date {dates[0]} --end-date {dates[-1]} rebuilds them"
        )
    if hours != 0:
        kept = "old versions" if hours is None else f"versions younger than {hours} hours"
        yield f"{kept} still have the rows: run it again with --vacuum-hours 0 once nothing reads them any more"
    yield "models trained on the person's history stay until they are trained again; they hold no user id"


def forget(
    lake: Lake, person: Person, vacuum_hours: int | None = None, ended: Sequence[str] = (), *, dry_run: bool = False
) -> Iterator[Forgotten]:
    """Remove `person` place by place: tables, the feed's manifests, quarantine, files; then count the raw rows.

    The platform's own tables are never changed. A place that cannot be worked on is reported as left, and does not
    stop the others.

    vacuum_hours: also delete the files with the person that no version younger than this uses (0: all but the newest).
    ended: runs that were killed; while another one is under way, files that no version names stay.
    """
    known = {n: (c, traces) for n, c in all_contracts().items() if (traces := person.traces(c))}
    tables = [n for n, (c, _) in known.items() if c.owner != "platform" and n not in (_FEED, _QUARANTINE)]

    def table(name: str) -> Forgotten:
        return _from_table(lake, *known[name], dry_run, vacuum_hours, ended)

    for name in (_FEED, *tables):
        yield _attempt(name, table)
    yield _attempt("manifests", partial(_void_manifests, lake, dry_run))
    yield _attempt(_QUARANTINE, table)
    for folder in (log_folder(lake.root), lake.path("reports")):
        yield _attempt(str(folder), partial(_from_texts, person, dry_run))
    yield _attempt(str(local_folder(lake.root)), partial(_from_journals, person, dry_run))
    for name, (contract, traces) in known.items():
        # An opt-out keeps the person out, and nothing of it is copied.
        if contract.owner == "platform" and name != "raw_opt_outs":
            yield _attempt(name, partial(_in_raw, lake, traces))


def _attempt(place: str, work: Callable[[str], Forgotten]) -> Forgotten:
    try:
        return work(place)
    except Exception as error:  # whatever a foreign table or a broken file raises: the other places come first
        return Forgotten(place, left=f"{place} could not be searched: {error}")


def _from_table(
    lake: Lake, contract: Contract, traces: Traces, dry_run: bool, hours: int | None, ended: Sequence[str]
) -> Forgotten:
    name, exists = contract.name, lake.exists(contract.name)
    removed = remove_rows(lake, contract, traces.removals, _STEP, dry_run=dry_run) if exists else ()
    rows, old = sum(r.rows for r in removed), 0
    if hours is not None:
        busy = partial(alive, lake, ended)
        deleted = delete_old_files(lake, name, hours, dry_run=dry_run, orphans=True, only=traces.stand_in, busy=busy)
        old = deleted.files
        if exists and not dry_run and drop_statistics(lake.uri(name)):
            DeltaTable(lake.uri(name)).alter.set_table_properties(NO_STATISTICS, raise_if_not_exists=False)
    would = "would be " if dry_run else ""
    done = f"{rows:,} rows {would}removed, {old:,} old files {would}deleted" if rows or old else ""
    dates = tuple(sorted({r.file.partition["dt"] for r in removed if "dt" in r.file.partition}))
    return Forgotten(name, rows + old, done, dates=dates)


def _void_manifests(lake: Lake, dry_run: bool, place: str) -> Forgotten:
    """Delete the manifests of feed slices from which rows were removed since: they list the files and sums before."""
    if not lake.exists(_FEED):
        return Forgotten(place)
    void = []
    removed = (entry for entry in lake.open(_FEED).history.commits if entry.step == _STEP)
    for day, version in newest_changes(removed).items():
        path = lake.path(place, _FEED, f"{day}.json")
        text = read_text(path)
        if text is not None and _table_version(text) < version:
            void.append(path)
    if void and not dry_run:
        for path in void:
            fs, inside = filesystem(path)
            fs.rm(inside)
    return Forgotten(place, len(void), f"{len(void)} of changed slices deleted" if void else "")


def _table_version(manifest: str) -> int:
    try:
        return int(json.loads(manifest)["table_version"])
    except (ValueError, KeyError, TypeError):
        return -1


def _from_texts(person: Person, dry_run: bool, place: str) -> Forgotten:
    """Logs and reports, with something else in the id's place."""
    fs, base = filesystem(place)
    changed = 0
    for path in fs.find(base) if fs.exists(base) else ():
        text = fs.cat_file(path).decode(errors="surrogateescape")
        if person.is_in(text):
            changed += 1
            if not dry_run:
                write_whole(fs.unstrip_protocol(path), person.removed_from(text).encode(errors="surrogateescape"))
    return Forgotten(place, changed, f"{changed} files {'would be ' if dry_run else ''}cleaned" if changed else "")


def _from_journals(person: Person, dry_run: bool, place: str) -> Forgotten:
    """Records of what killed workers had finished: those that name the person, whose work is then done again."""
    found = [p for p in Path(place).rglob("*.safetensors*") if p.is_file() and person.is_in(_outline(p))]
    if not dry_run:
        for path in found:
            path.unlink()
    verb = "would be deleted" if dry_run else "deleted"
    return Forgotten(place, len(found), f"{len(found)} journals {verb}" if found else "")


def _outline(path: Path) -> str:
    """The text in front of the tensors, as much of it as there is."""
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        return handle.read(min(size, path.stat().st_size)).decode(errors="replace")


def _in_raw(lake: Lake, traces: Traces, place: str) -> Forgotten:
    rows = traces.count(lake.open(place)) if lake.exists(place) else 0
    remedy = "the table belongs to the platform: delete them there, or ingest will bring the person back"
    return Forgotten(place, rows, left=f"{place} still has {rows:,} rows; {remedy}" if rows else "")


COMMAND = Command(
    "forget", "remove a person from every table of this project", run, add_arguments, in_shadow=False,
    examples=("--config shop.yaml --user U --dry-run", "--config shop.yaml --user U --vacuum-hours 0",),
)  # fmt: skip
