"""kill -9 in every Spark job: the same job run again leaves the rows that an undisturbed run leaves.

A tiny marketplace over which the graph has run (that of tests/test_pipeline.py). Per job, on a copy whose logs were cut
back to before the job's commits: a driver of its own is killed with its process group, at one of two kinds of moment,

- `written`: the first data file of one of the job's tables is there, its commit is not;
- `file k`: the k-th new file of any kind is there, log entries and checksums too; k is drawn from all the job makes.

Moments are events, not times, so a busy machine changes nothing. Then the job runs again, in this process' session (one
JVM less per kill), and every table it writes is compared row for row, without run ids, with an undisturbed run of the
same copy; artifacts and manifests too. What a reader sees is compared with the log right after the kill and at the end.
On a standalone cluster the executor is killed instead, at a `written`, and the driver must end well by itself.

    python -m tests.bench.kill_campaign [--kills 36] [--executors 3] [--seed 0] --work FOLDER

The folder keeps the lakehouse and each outcome: the same command again continues.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import yaml

from gpl_core.cli import main as gpl
from gpl_core.config import Config, load_config
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.launches import DELTA_PACKAGE, script_path, tool
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import run_step
from gpl_core.graph.steps import STEPS, find_step
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Lake
from tests.bench.harness import Figure, at_least, at_most, report
from tests.support import started
from tests.test_pipeline import FIRST, LAST, SMALL

JOBS = tuple(s.name for s in STEPS if s.launcher == "spark")
# Of other runs and places: two runs of one job never agree on these.
VOLATILE = {"run_id", "location", "files"}
# What else must be cut back so that a job has rows to write: (table, step that wrote it).
BEHIND = {"anchor_requests": (("interest_anchors", "generate_anchors"),)}


def files_of(root: Path, job: str) -> set[Path]:
    """Every file that `job` may write."""
    step = find_step(job)
    places = [root / "tables" / t for t in (*step.writes, *step.also_writes, "job_runs")]
    places += [root / "artifacts" / step.publishes] if step.publishes else []
    places += [root / "manifests", root / "reports"] if job in ("training_feed", "report") else []
    return {Path(d) / f for place in places for d, _, names in os.walk(place) for f in names}


def is_data(path: Path, table: str) -> bool:
    """Whether `path` is a finished or half-written data file of `table`."""
    return f"/tables/{table}/" in str(path) and "_delta_log" not in path.parts and path.suffix == ".parquet"


Moment = Callable[[set[Path]], bool]


def written(table: str) -> Moment:
    """A data file of `table` is there: its commit comes later."""
    return lambda new: any(is_data(p, table) for p in new)


def at_file(number: int) -> Moment:
    """The `number`-th new file is there."""
    return lambda new: len(new) >= number


def kill_at(moment: Moment, command: Sequence[str], root: Path, job: str, victim: Callable[[int], int] | None = None
) -> int | None:  # fmt: skip
    """Start `command`; at `moment` of `job`'s new files kill -9 its process group, or the process `victim(its pid)`.

    Returns its exit code when it ended by itself (before the moment, or although its victim was killed), else None.
    """
    before, killed = files_of(root, job), False
    with open(f"{root}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while True:
            if not killed and moment(files_of(root, job) - before):
                if victim is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return None
                os.kill(victim(process.pid), signal.SIGKILL)
                killed = True
            try:
                return process.wait(0.005)
            except subprocess.TimeoutExpired:
                continue


def orphans(root: Path, job: str) -> set[Path]:
    """Data files in the folders of the job's tables that no commit names."""
    found = set()
    for table in (*find_step(job).writes, *find_step(job).also_writes):
        log = "".join(p.read_text(encoding="utf-8") for p in (root / "tables" / table / "_delta_log").glob("*.json"))
        found |= {p for p in files_of(root, job) if is_data(p, table) and p.name not in log}
    return found


def contents(root: Path, job: str) -> dict[str, list[str]]:
    """What `job` left, table by table as sorted rows, without run ids; artifacts and manifests as text.

    Raises:
        AssertionError: a table's files hold other rows than its log says.
    """
    lake, found = Lake(str(root)), {}
    step = find_step(job)
    for table in (*step.writes, *step.also_writes):
        if lake.exists(table):
            snapshot = lake.open(table)
            rows = snapshot.read().to_pylist()
            assert len(rows) == rows_in(snapshot.files), f"{table}: {len(rows)} rows read, not what the log says"
            found[table] = sorted(repr({k: v for k, v in r.items() if k not in VOLATILE}) for r in rows)
    if step.publishes:
        for path in sorted((root / "artifacts" / step.publishes).glob("*/*.json")):
            if (path.parent / "manifest.json").exists() and path.name != "manifest.json":
                found[f"{path.parent.name}/{path.name}"] = [path.read_text(encoding="utf-8")]
    if job == "training_feed":
        for path in sorted((root / "manifests" / job).glob("*.json")):
            body = json.loads(path.read_text(encoding="utf-8"))
            found[path.name] = [repr({k: v for k, v in body.items() if k not in VOLATILE})]
    if job == "report":
        found["reports"] = [f"{p.name} {p.read_text().endswith('</html>')}" for p in (root / "reports").glob("*.html")]
    return found


def differing(one: dict[str, list[str]], other: dict[str, list[str]]) -> int:
    """Rows that are in one of the two and not in the other, over all tables."""
    total = 0
    for name in one.keys() | other.keys():
        left, right = list(one.get(name, [])), other.get(name, [])
        for row in right:
            if row in left:
                left.remove(row)
            else:
                total += 1
        total += len(left)
    return total


# ---- the campaign ------------------------------------------------------------------------------------------------


# What start_session sets where it sees a launcher with a local master.
_LOCAL = [
    "--conf", "spark.databricks.delta.snapshotPartitions=2", "--conf", "spark.sql.shuffle.partitions=4",
    "--conf", "spark.ui.enabled=false",
]  # fmt: skip


def cut_back(lake: Lake, table: str, owner: str, day: str) -> None:
    """The log of `table` as it was before `owner` wrote its slice of `day`."""
    mark = lake.open(table).mark(day, owner) if lake.exists(table) else None
    for path in list(Path(lake.root, "tables", table, "_delta_log").iterdir()) if mark else ():
        version = re.match(r"\.?(\d{20})\.", path.name)
        if path.is_file() and (version is None or int(version[1]) >= mark[0]):
            path.unlink()


class Campaign:
    """The lakehouse under `work`, a copy of it per job, and what each kill came to."""

    def __init__(self, work: Path):
        self.work, self.file = work, work / "small.yaml"
        self.results = work / "outcomes.jsonl"
        self.references: dict[str, tuple[dict[str, list[str]], int]] = {}
        if not self.file.exists():
            work.mkdir(parents=True, exist_ok=True)
            body = {**SMALL, "lakehouse": {"root": str(work / "lake")}}
            self.file.write_text(yaml.safe_dump(body), encoding="utf-8")
            size = ["--users", "60", "--items", "90", "--candidates", "24", "--exposed", "6"]
            assert gpl(["simulate", "--config", str(self.file), *size]) == 0
            assert gpl(["run", "--config", str(self.file)]) == 0

    @property
    def spark(self) -> Any:
        """This process' session."""
        from pyspark.sql import SparkSession

        from spark_jobs.session import start_session

        if SparkSession.getActiveSession() is None:  # as a launcher would have started it
            os.environ["PYSPARK_SUBMIT_ARGS"] = shlex.join(
                [*SMALL["launch"]["spark_submit"], "--packages", DELTA_PACKAGE, *_LOCAL, "pyspark-shell"]
            )
        return start_session("kill_campaign")

    def config(self, root: Path) -> Config:
        """The configuration of the copy at `root`."""
        return load_config(str(self.file), [f"lakehouse.root={root}"])

    def day(self, job: str) -> date:
        """The run date at which `job` is killed: `ingest` on raw tables alone, the others on the last of two dates."""
        return FIRST if job == "ingest" else LAST

    def copy(self, job: str, name: str) -> Path:
        """A copy of the lakehouse as it was when `job` had not written its slice of `day(job)`."""
        root = self.work / name
        shutil.rmtree(root, ignore_errors=True)
        kept = ("raw_*", "truth") if job == "ingest" else ("*",)
        for place in ("artifacts", "manifests", "reports"):
            shutil.copytree(self.work / "lake" / place, root / place)
        for pattern in kept:
            for table in (self.work / "lake" / "tables").glob(pattern):
                shutil.copytree(table, root / "tables" / table.name)
        step, day = find_step(job), self.day(job).isoformat()
        lake = Lake(str(root))
        written_by = [(t, job) for t in (*step.writes, *step.also_writes)]
        for table, owner in (*written_by, *BEHIND.get(job, ())):
            cut_back(lake, table, owner, day)
        if step.publishes:
            made = [p.parent for p in (root / "artifacts" / step.publishes).glob(f"{LAST - timedelta(days=1)}*/*")]
            for folder in set(made):
                shutil.rmtree(folder)
        if job in ("training_feed", "report"):
            for path in root.glob(f"manifests/*/{day}.json" if job == "training_feed" else f"reports/{day}.html"):
                path.unlink()
        return root

    def again(self, job: str, root: Path) -> None:
        """Run `job` in this process' session."""
        from spark_jobs.run import job_of, run_body

        config = self.config(root)
        args = StepArguments(config, (self.day(job),), "again")
        run_step(Planner(config), job, self.day(job), args, lambda c: run_body(self.spark, c, job_of(job)))

    def command(self, job: str, root: Path, *master: str) -> list[str]:
        """The launcher command of `job` over the copy at `root`."""
        given = SMALL["launch"]["spark_submit"]
        return [
            tool("spark-submit"), *(master or given[:2]), "--packages", DELTA_PACKAGE, *given[2:],
            script_path("spark_jobs/run.py"), "--steps", job, "--config", str(self.file),
            "--set", f"lakehouse.root={root}", "--run-date", self.day(job).isoformat(),
        ]  # fmt: skip

    def reference(self, job: str) -> tuple[dict[str, list[str]], int]:
        """What an undisturbed run of `job` leaves, and how many files it makes."""
        if job not in self.references:
            root = self.copy(job, f"undisturbed-{job}")
            before = files_of(root, job)
            self.again(job, root)
            self.references[job] = contents(root, job), len(files_of(root, job) - before)
        return self.references[job]

    def kill(self, job: str, kind: str, moment: Moment, *master: str, victim: Callable[[int], int] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """One kill and what came of it."""
        wanted, _ = self.reference(job)
        root = self.copy(job, "killed")
        before, known = contents(root, job), orphans(root, job)
        code = kill_at(moment, self.command(job, root, *master), root, job, victim)
        state = contents(root, job)
        # Made and still empty is as before.
        torn = sum(state.get(t, []) not in (before.get(t, []), wanted[t]) for t in wanted)
        left = len(orphans(root, job) - known)
        self.again(job, root)
        return {
            "job": job, "moment": kind, "ended": code, "orphans": left, "torn": torn,
            "committed": sum(state.get(t) == wanted[t] != before.get(t) for t in wanted), "of": len(wanted),
            "differing": differing(contents(root, job), wanted), "after": self.state(job, root),
        }  # fmt: skip

    def state(self, job: str, root: Path) -> str:
        """Whether `job` is done by what the tables say."""
        return Planner(self.config(root)).state(find_step(job), self.day(job)).status

    def plan(self, kills: int, seed: int) -> Iterator[tuple[str, str, Moment]]:
        """`kills` (job, kind, moment): the jobs in turn, by turns a moment before a commit and any file at all."""
        rng = random.Random(seed)
        for number in range(kills):
            job, turn = JOBS[number % len(JOBS)], number // len(JOBS)
            tables = find_step(job).writes
            table, share = (rng.choice(tables) if tables else ""), rng.random()
            if turn % 2 == 0 and table:
                yield job, f"written {table}", written(table)
            else:
                place = 1 + int(share * self.reference(job)[1])
                yield job, f"file {place} of {self.reference(job)[1]}", at_file(place)

    def run(self, kills: int, executors: int, seed: int) -> list[dict[str, Any]]:
        """All outcomes by number; those that earlier calls wrote down are not made again."""
        text = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
        found = {(o["victim"], o["number"]): o for o in map(json.loads, text.splitlines())}
        for number, (job, kind, moment) in enumerate(self.plan(kills, seed)):
            if ("driver", number) not in found:
                found["driver", number] = self.keep("driver", number, self.kill(job, kind, moment))
        for number in range(executors):
            if ("executor", number) in found:
                continue
            job = ("samples", "sequences", "training_feed")[number % 3]
            table = find_step(job).writes[0]
            with cluster(self.work / "cluster") as (address, worker):
                size = ["--executor-memory", "600m", "--conf", "spark.driver.host=127.0.0.1"]
                master = ["--master", address, *size, *_LOCAL]
                outcome = self.kill(job, f"written {table}", written(table), *master, victim=lambda _: executor(worker))
            found["executor", number] = self.keep("executor", number, outcome)
        return [found[key] for key in sorted(found)]

    def keep(self, victim: str, number: int, outcome: dict[str, Any]) -> dict[str, Any]:
        """Write one outcome down."""
        kept = {"victim": victim, "number": number, **outcome}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")
        print(line(kept), flush=True)
        return kept


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, int]]:
    """A standalone master and one worker on loopback: (address, pid of the worker)."""
    spark_class, deploy, local = tool("spark-class"), "org.apache.spark.deploy", ["--host", "127.0.0.1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"spark://127.0.0.1:{port}"
    web = ["--webui-port", "0"]
    running = [started([spark_class, f"{deploy}.master.Master", *local, *web, "--port", port], "New state: ALIVE")]
    size = ["--cores", "1", "--memory", "600m", "--work-dir", str(folder)]
    try:
        command = [spark_class, f"{deploy}.worker.Worker", *local, *web, *size, address]
        running.append(started(command, "Successfully registered"))
        yield address, running[1].pid
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


def executor(worker: int) -> int:
    """Pid of the executor that the worker runs now."""
    children = Path(f"/proc/{worker}/task").glob("*/children")
    pids = [int(p) for c in children for p in c.read_text().split()]
    return next(p for p in pids if b"ExecutorBackend" in Path(f"/proc/{p}/cmdline").read_bytes())


def line(o: dict[str, Any]) -> str:
    """One outcome for people."""
    how = "killed" if o["ended"] is None else f"ended with {o['ended']}"
    verdict = "equal" if not o["differing"] and o["after"] == "done" else f"{o['differing']} ROWS DIFFER, {o['after']}"
    return (
        f"{o['victim']:<8}  {o['job']:<15}  {o['moment']:<28}  {how}, {o['committed']} of {o['of']} committed, "
        f"{o['orphans']} orphans, {o['torn']} torn; run again: {verdict}"
    )


def figures(outcomes: Sequence[dict[str, Any]], kills: int, executors: int) -> dict[str, Figure]:
    """Goals over all outcomes, then one figure per job and moment."""
    drivers = [o for o in outcomes if o["victim"] == "driver" and o["ended"] is None]
    hit = [o for o in outcomes if o["victim"] == "executor"]
    return {
        "drivers killed": at_least(len(drivers), kills * 5 // 6, "kills"),
        "of these with files written and not committed": at_least(sum(o["orphans"] > 0 for o in drivers), 1, "kills"),
        "executors killed": at_least(len(hit), executors, "kills"),
        "of these whose job ended well by itself": at_least(sum(o["ended"] == 0 for o in hit), executors, "jobs"),
        "rows that differ after the second run": at_most(sum(o["differing"] for o in outcomes), 0, "rows"),
        "jobs not done after the second run": at_most(sum(o["after"] != "done" for o in outcomes), 0, "jobs"),
        "tables read in a state between": at_most(sum(o["torn"] for o in outcomes), 0, "tables"),
        **{
            f"{n:02} {o['victim']}, {o['job']}, {o['moment']}: "
            f"{o['committed']} of {o['of']} committed, {o['orphans']} orphans; rows that differ": Figure(
                o["differing"], "rows"
            )
            for n, o in enumerate(outcomes, 1)
        },
    }


def main() -> None:
    """Run the campaign, print its table, write its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=36, help="drivers to kill")
    parser.add_argument("--executors", type=int, default=3, help="executors to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="keeps the lakehouse and the outcomes")
    args = parser.parse_args()
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    outcomes = Campaign(args.work.absolute()).run(args.kills, args.executors, args.seed)
    for outcome in outcomes:
        print(line(outcome))
    title = f"kill -9 in every Spark job, {args.kills} drivers and {args.executors} executors"
    report("kill_campaign", figures(outcomes, args.kills, args.executors), False, title, module="kill_campaign")


if __name__ == "__main__":
    main()
