"""Two runs on one lakehouse at a time, and what came of them: the machinery of `concurrency`.

Spark jobs run as threads with sessions of their own in this process, workers and commands in forks of a process that
has imported everything. `launched` pairs are two `gpl` processes that start spark-submit and deepspeed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from deltalake import write_deltalake

from gpl_core.cli import main as gpl
from gpl_core.commands.repair import TABLES as APPENDED
from gpl_core.config import Config, load_config
from gpl_core.contracts.contract import all_contracts, load_contract
from gpl_core.errors import exit_code_of
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.compaction import compactable
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import run_step
from gpl_core.graph.steps import RAW_TABLES, STEPS, find_step
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from tests.bench.kill_campaign import BEHIND, VOLATILE, cut_back

WAIT = 240.0
ENDS = {"done", "noop", "refused", "missing"}
_VOLATILE = {*VOLATILE, "decided_at", "table_version", "fingerprint"}
# Commands that leave rows as they are, and those that a thread of this process runs because they need Spark.
NEUTRAL = ("vacuum", "optimize", "register", "migrate")
_IN_SESSION = ("optimize", "quarantine", "register")
_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["gpl_core.cli", *(f"gpu_workers.{s.name}" for s in STEPS if s.launcher == "deepspeed")])


@dataclass(frozen=True)
class Pair:
    """A state of the lakehouse and two runs on it: names of steps, or commands of `gpl` with their arguments.

    state: the step whose commits are not there yet; `repair` (keys twice), `migrate` (an older table), or `done`.
    """

    state: str
    first: str
    second: str
    launched: bool = False

    @property
    def name(self) -> str:
        """For people."""
        one, two = (" ".join(run.split(" -")[0].split()[:2]) for run in (self.first, self.second))
        return f"{one} x {two}{' launched' * self.launched}"


@dataclass(frozen=True)
class End:
    """How a run ended: exit code (None: not at all), what its last JSON line says, its first error."""

    code: int | None
    status: str
    error: str = ""

    @property
    def word(self) -> str:
        """done, noop, refused (exit 3), missing (exit 4: nothing to forget any more); else it is no clear end."""
        if self.code == 0:
            return self.status or "done"
        known = {3: "refused", 4: "missing"}.get(self.code or 0, "") if self.error else ""
        return known or f"code {self.code}: {self.error or 'no message'}"


def _fork(program: str, arguments: list[str], log: str) -> None:
    """In a fork: `gpl`, or the worker entry."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [program, *arguments]
    if program == "gpl":
        sys.exit(gpl(arguments))
    from gpu_workers.worker import run_workers

    run_workers("run.py")


class Fork:
    """A run in a process of its own."""

    def __init__(self, program: str, arguments: list[str], log: Path):
        self._log = log
        self._process = _FORKS.Process(target=_fork, args=(program, arguments, str(log)))
        self._process.start()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def kill_when(self, found: Callable[[], Path | None]) -> Path | None:
        """kill -9 when `found` is something, which it returns; None when the run has ended before."""
        while self._process.is_alive():
            if path := found():
                self._process.kill()
                self._process.join()
                return path
            time.sleep(0.002)
        return None

    def end(self, seconds: float) -> End:
        """Wait for it, kill what hangs."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            return End(None, "", "hangs")
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        statuses = re.findall(r'"status": "(\w+)"', text) or re.findall(r"\d: (done|noop)\b", text)
        statuses = statuses or ["noop"] * ("nothing to do: everything is up to date" in text)
        error = next((line for line in text.splitlines() if line.startswith(("error: ", "left: "))), "")
        return End(self._process.exitcode, statuses[-1] if statuses else "", error)


class InSession:
    """A run in a thread of this process."""

    def __init__(self, work: Callable[[], str]):
        self._end = End(None, "", "hangs")
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], str]) -> None:
        try:
            self._end = End(0, work())
        except BaseException as error:
            code = exit_code_of(error)
            self._end = End(code, "", f"{type(error).__name__}: {error}"[:2000])

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def end(self, seconds: float) -> End:
        """Wait for it."""
        self._thread.join(seconds)
        return self._end


class Pairs:
    """The lakehouse at `lake` under the configuration `file`; copies of it, and the outcomes, in `work`."""

    def __init__(self, file: Path, lake: Path, work: Path, day: date, session: Callable[[], Any] | None = None):
        self.file, self.lake, self.work, self.day, self.session = file, lake, work, day, session
        self._references = work / "references.json"

    def config(self, root: Path) -> Config:
        """The configuration of the copy at `root`."""
        return load_config(str(self.file), self._settings(root))

    def _settings(self, root: Path) -> list[str]:
        return [f"lakehouse.root={root}", "anchors.retention_days=1"]

    # ---- states ------------------------------------------------------------------------------------------------

    def copy(self, state: str, name: str, *runs: str) -> Path:
        """A copy of the lakehouse in `state`; whom one of `runs` forgets the platform has deleted already."""
        root = self.work / name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(
            self.lake, root, ignore=lambda folder, names: {"logs", "work"} & {*names}, copy_function=_linked
        )
        if state == "repair":
            _double(Lake(str(root)), "item_embeddings")
        elif state == "migrate":
            _age(Lake(str(root)))
        elif state != "done":
            self._cut_back(root, state)
        for user in {run.split()[2] for run in runs if run.startswith("forget ")}:
            for table in (t for t in RAW_TABLES if "user_id" in load_contract(t).column_names):
                if (place := root / "tables" / table).exists():
                    rows = Lake(str(root)).open(table).read()
                    kept = rows.filter(pc.not_equal(rows["user_id"], user))
                    write_deltalake(str(place), kept, mode="overwrite", schema_mode="overwrite", partition_by=["dt"])
        return root

    def _cut_back(self, root: Path, name: str) -> None:
        """To before the step has written its slice of `day`; undated tables and artifacts go as a whole."""
        step, lake = find_step(name), Lake(str(root))
        for table, owner in (*((t, name) for t in (*step.writes, *step.also_writes)), *BEHIND.get(name, ())):
            if "dt" not in load_contract(table).partition_by:
                shutil.rmtree(root / "tables" / table, ignore_errors=True)
                continue
            cut_back(lake, table, owner, self.day.isoformat())
        if step.publishes:
            shutil.rmtree(root / "artifacts" / step.publishes, ignore_errors=True)
        (root / "reports" / f"{self.day}.html").unlink(missing_ok=True)
        (root / "manifests" / "training_feed" / f"{self.day}.json").unlink(missing_ok=True)

    # ---- runs --------------------------------------------------------------------------------------------------

    def start(self, run: str, root: Path, log: str, launched: bool = False) -> Fork | InSession:
        """Start a step or a command on the copy at `root`."""
        where = ["--config", str(self.file), *(a for s in self._settings(root) for a in ("--set", s))]
        day = ["--run-date", self.day.isoformat()]
        path, (command, *arguments) = self.work / f"{log}.log", run.split()
        is_step = command in {s.name for s in STEPS}
        dated = day if is_step or command in ("quarantine", "optimize", "evict") else []
        if launched or not (is_step or command in _IN_SESSION):
            command, arguments = ("run", ["--only", command]) if is_step else (command, arguments)
            return Fork("gpl", [command, *where, *arguments, *dated], path)
        if is_step and find_step(command).launcher == "deepspeed":
            return Fork("worker", ["--steps", command, *where, *dated], path)
        return InSession(lambda: self._in_session(command, root))

    def _in_session(self, command: str, root: Path) -> str:
        """Run a Spark job, or a command that needs one, in a session of its own."""
        from gpl_core.commands.optimize import compact
        from spark_jobs import optimize, register, retry_quarantine
        from spark_jobs.run import job_of, run_body

        assert self.session is not None
        spark, config = self.session().newSession(), self.config(root)
        force = command == "quarantine"
        if command == "register":
            register.publish(spark, Lake(str(root)), f"gpl_{root.name}")
            return "done"
        if command == "optimize":
            for contract in compactable(Lake(str(root)), "delta-rs"):
                compact(Lake(str(root)), contract, [self.day], 2**20)
        job = {"quarantine": retry_quarantine.run, "optimize": optimize.run}.get(command) or job_of(command)
        args = StepArguments(config, (self.day,), f"{command}-{os.urandom(4).hex()}", force=force)
        step = "ingest" if force else command
        return run_step(Planner(config), step, self.day, args, lambda context: run_body(spark, context, job))

    def alone(self, state: str, *runs: str, launched: bool = False) -> dict[str, Any]:
        """What `runs`, one after the other, leave of `state`, and the seconds of the last; kept in the folder."""
        known = json.loads(self._references.read_text()) if self._references.exists() else {}
        key = " | ".join((state, *runs, *["launched"] * launched))
        if key not in known:
            root, clock = self.copy(state, "alone", *runs), time.monotonic()
            for run in runs:
                clock, end = time.monotonic(), self.start(run, root, "alone", launched).end(WAIT)
                assert end.word in ENDS - {"refused"}, f"{run} alone on {state}: {end}"
            known[key] = {"seconds": time.monotonic() - clock, "left": digests(root)}
            self._references.write_text(json.dumps(known))
        found: dict[str, Any] = known[key]
        return found

    def meet(self, pair: Pair, share: float) -> dict[str, Any]:
        """Run `pair`, the second `share` of the time later that the first takes alone, and look at what came of it."""
        gap = share * float(self.alone(pair.state, pair.first)["seconds"])
        root = self.copy(pair.state, "both", pair.first, pair.second)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            one = self.start(pair.first, root, "first", pair.launched)
            time.sleep(gap)
            overlap = one.runs
            two = self.start(pair.second, root, "second", pair.launched)
            ends = [one.end(WAIT), two.end(WAIT)]
            doubled = twice(root)
            for run in [r for r, e in zip((pair.first, pair.second), ends, strict=True) if e.word == "refused"]:
                self.start(run, root, "again").end(WAIT)  # as the message says
            doubled |= twice(root)
            unlike = self.unlike(pair, digests(root))
            again = self.start(pair.first, root, "again").end(WAIT)
        return {
            "pair": pair.name, "launched": pair.launched, "overlap": overlap, "gap": round(gap, 2),
            "ends": [e.word for e in ends],
            "says": [e.error for e in ends], "twice": doubled, "unlike": unlike, "again": again.word,
        }  # fmt: skip

    def unlike(self, pair: Pair, found: Mapping[str, str]) -> list[str]:
        """Tables and artifacts that are not as the two runs one after the other leave them, in the nearer order."""
        runs = [r for r in dict.fromkeys((pair.first, pair.second)) if r.split()[0] not in NEUTRAL or pair.state == r]
        differing = []
        launched = pair.launched and pair.first == "ingest"  # `gpl run` ingests the day after too
        for order in dict.fromkeys([tuple(runs), tuple(reversed(runs))]):
            wanted = self.alone(pair.state, *order, launched=launched)["left"]
            differing.append(sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)))
            if not differing[-1]:
                break
        return min(differing, key=len)


def _linked(source: str, target: str) -> None:
    """Data files never change: a second name for one is a copy of it."""
    (shutil.copy2 if "_delta_log" in source or not source.endswith(".parquet") else os.link)(source, target)


def twice(root: Path) -> dict[str, int]:
    """Table of ours -> keys that occur more than once: in a slice; in a table that is appended to, over all."""
    lake, found = Lake(str(root)), {}
    for name, contract in all_contracts().items():
        if contract.owner == "platform" or not lake.exists(name):
            continue
        dated = {"dt"} & {*contract.partition_by} if name not in APPENDED else set()
        rows = lake.open(name).read(columns=[*{*contract.primary_key, *dated}]).to_pylist()
        if keys := sum(n > 1 for n in Counter(map(repr, rows)).values()):
            found[name] = keys
    return found


def digests(root: Path) -> dict[str, str]:
    """A hash of the rows of each table of ours but job_runs, and of each artifact and manifest, without run ids."""
    lake, found = Lake(str(root)), {}
    for name, contract in all_contracts().items():
        if contract.owner == "platform" or name == "job_runs" or not lake.exists(name):
            continue
        try:
            rows = lake.open(name).read().to_pylist()
        except Exception as error:
            found[name] = f"cannot be read: {error}"
            continue
        if rows:  # made and still empty is as before
            found[name] = _hash(sorted(repr({k: v for k, v in r.items() if k not in _VOLATILE}) for r in rows))
    for path in sorted((root / "artifacts").glob("*/*/manifest.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        whole = all(_hash((path.parent / n).read_bytes()) == digest for n, digest in body["files"].items())
        found[f"{body['kind']}/{path.parent.name}"] = _hash(sorted(body["files"].items())) if whole else "damaged"
    for path in sorted((root / "manifests").rglob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        found[path.name] = _hash({k: v for k, v in body.items() if k not in _VOLATILE})
    found |= {path.name: str(path.read_text().endswith("</html>")) for path in (root / "reports").glob("*.html")}
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _double(lake: Lake, table: str) -> None:
    """Every row once more, as two overlapping runs of an earlier release left them."""
    snapshot, contract = lake.open(table), load_contract(table)
    files = snapshot.files[:1]
    (values,) = ({k: f.partition[k] for k in contract.partition_by} for f in files)
    with lake.writer(contract, values, dims={}) as writer:
        writer.write(snapshot.read(files).drop_columns(list(contract.partition_by)))
    lake.commit(contract, writer.parts, mark=SliceMark("campaign", {}, "twice"), mode="append")


def _age(lake: Lake) -> None:
    """interest_anchors as version 1 of its contract had it: without prefixes."""
    snapshot, now = lake.open("interest_anchors"), load_contract("interest_anchors")
    rows, new = snapshot.read(), ("prefixes", "prefix_log_probs")
    shutil.rmtree(snapshot.uri)
    old = replace(now, version=1, columns=tuple(c for c in now.columns if c.name not in new), migrations=())
    lake.create(old)
    for file in snapshot.files[:1]:
        values = {k: file.partition[k] for k in now.partition_by}
        with lake.writer(old, values, dims={}) as writer:
            writer.write(rows.slice(0, 50).drop_columns([*new, *now.partition_by]))
        lake.commit(old, writer.parts, mark=SliceMark("campaign", {}, "old"), mode="append")


def kind_of(pair: Pair) -> str:
    """`launched`, `session` when one of the two needs Spark, else `forks`."""
    steps = {s.name: s.launcher for s in STEPS}
    needs = {"spark" if steps.get(c) == "spark" or c in _IN_SESSION else "" for c in _commands(pair)}
    return "launched" if pair.launched else "session" if "spark" in needs else "forks"


def _commands(pair: Pair) -> tuple[str, str]:
    return pair.first.split()[0], pair.second.split()[0]


def is_clear(outcome: dict[str, Any]) -> bool:
    """Whether both runs ended as they may, and at least one was not refused."""
    return {*outcome["ends"]} <= ENDS and outcome["ends"] != ["refused", "refused"]


def line(o: dict[str, Any]) -> str:
    """One outcome for people."""
    wrong = [f"{len(o['twice'])} TABLES WITH KEYS TWICE"] if o["twice"] else []
    wrong += [f"UNLIKE: {', '.join(o['unlike'])}"] if o["unlike"] else []
    wrong += [f"AGAIN: {o['again']}"] if o["again"] not in ENDS - {"refused"} else []
    wrong += [] if is_clear(o) else ["NOT CLEAR"]
    return f"{o['number']:3} {o['pair']:<48} {o['gap']:6.1f} s  {' + '.join(o['ends'])}  {'; '.join(wrong) or 'ok'}"
