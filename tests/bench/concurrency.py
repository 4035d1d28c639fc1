"""Two runs at once, of every step and every command that writes: one wins, the other ends as a no-op or says why not.

A tiny marketplace over which the graph has run (that of tests/test_pipeline.py). Per pair (`pairs.py`), on a copy that
was cut back to before a step's commits, the first run is started and, after a random part of the time that it takes
alone, the second. Then

- both ended within four minutes: `done`, `noop`, or exit code 3 (`forget`: 4, nobody left) with a message, not both 3,
- no key occurs twice in any table, job_runs included,
- with what was refused run again, tables and artifacts are, row for row without run ids, what the two leave one after
  the other, in one of the orders,
- the first run, started once more, is done or a no-op.

    python -m tests.bench.concurrency [--pairs N] [--only forks] [--seconds S] [--seed 0] --work FOLDER

The folder keeps the lakehouse, the references and each outcome: the same command again continues.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.lake import Lake
from tests.bench.harness import Figure, at_least, at_most, report
from tests.bench.kill_campaign import Campaign
from tests.bench.pairs import ENDS, WAIT, Fork, Pair, Pairs, is_clear, kind_of, line
from tests.test_pipeline import LAST


class Overlaps:
    """The campaign in the folder `work`: the lakehouse, the plan, the outcomes."""

    def __init__(self, work: Path):
        self.made = Campaign(work)
        self.results = work / "pairs.jsonl"
        self.pairs = Pairs(self.made.file, work / "lake", work, LAST, lambda: self.made.spark)

    @cached_property
    def user(self) -> str:
        """Somebody with rows everywhere."""
        rows = Lake(str(self.pairs.lake)).open("pair_scores").read(columns=["user_id"])
        return str(min(rows["user_id"].to_pylist()))

    def version(self, kind: str) -> str:
        """A published version of `kind`."""
        return max(p.parent.name for p in (self.pairs.lake / "artifacts" / kind).glob("*/manifest.json"))

    def plan(self) -> Iterator[Pair]:
        """Every pair once; `run` adds the cheap ones again, at other distances, until there are enough."""
        forget, retry, jobs = f"forget --user {self.user}", "quarantine retry", [s.name for s in STEPS]
        rollback = f"rollback calibrator {self.version('calibrator')}"
        promote = rollback.replace("rollback", "promote")
        yield from (Pair(s, s, s) for s in jobs)
        with_users = ("ingest", "samples", "sequences", "anchor_requests", "generate_anchors", "score_requests",
                      "score_candidates", "pseudo_labels", "training_feed")  # fmt: skip
        yield from (Pair(s, s, forget) for s in with_users)
        yield from (Pair(s, s, "optimize") for s in ("encode_items", "assign_sids", "score_candidates", "samples"))
        yield from (Pair(s, s, "vacuum") for s in ("ingest", "encode_items", "generate_anchors", "training_feed"))
        yield from (Pair(s, s, "evict") for s in ("generate_anchors",))
        yield from (Pair(s, s, retry) for s in ("ingest",))
        yield from (Pair(s, s, "repair") for s in ("assign_sids", "encode_items"))
        yield from (Pair(s, s, rollback) for s in ("pseudo_labels", "report"))
        yield from (Pair("done", a, b) for a, b in (
            (forget, forget), (forget, "evict"), (forget, "optimize"), (forget, "vacuum"), ("evict", "evict"),
            ("evict", "optimize"), ("optimize", "optimize"), ("optimize", "vacuum"), ("vacuum", "vacuum"),
            (rollback, rollback), (rollback, promote), ("register", "register"), ("migrate", "optimize"),
        ))  # fmt: skip
        yield from (Pair("ingest", retry, retry), Pair("repair", "repair", "repair"), Pair("repair", "repair", forget))
        yield from (Pair("repair", "repair", "optimize"), Pair("migrate", "migrate", "migrate"))
        yield from (Pair("migrate", "migrate", forget),)
        yield from (Pair(s, s, s, launched=True) for s in jobs)
        yield from (Pair("done", a, b, launched=True) for a, b in (
            ("optimize", "optimize"), ("optimize", forget), (retry, "optimize"), ("register", "register"),
        ))  # fmt: skip

    def run(self, count: int, only: str, seconds: float, seed: int) -> list[dict[str, Any]]:
        """The outcomes of `count` pairs by number; starts none after `seconds`. Those written down are kept."""
        Fork("gpl", ["tables"], self.pairs.work / "warm.log").end(WAIT)  # what all forks have imported is imported now
        text = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
        found = {o["number"]: o for o in map(json.loads, text.splitlines())}
        plan, rng, clock = list(self.plan()), random.Random(seed), time.monotonic()
        for number in range(count):
            share = 0.7 * rng.random()
            rest = [p for p in plan if kind_of(p) == "forks"]
            pair = plan[number] if number < len(plan) else rest[(number - len(plan)) % len(rest)]
            if number in found or only not in ("", kind_of(pair)) or time.monotonic() - clock > seconds:
                continue
            found[number] = {"number": number, **self.pairs.meet(pair, share)}
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[number]) + "\n")
            print(line(found[number]), flush=True)
        return [found[number] for number in sorted(found)]


def figures(outcomes: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Goals over all outcomes, then how often each pair ended how."""
    kinds = Counter(f"{o['pair']}: {' + '.join(sorted(o['ends']))}" for o in outcomes)
    return {
        "pairs of which the second began before the first had ended": at_least(
            sum(o["overlap"] for o in outcomes), 100, "pairs"
        ),
        "of these through the launchers": at_least(sum(o["launched"] for o in outcomes), 20, "pairs"),
        "tables with a key twice": at_most(sum(len(o["twice"]) for o in outcomes), 0, "tables"),
        "runs that hung": at_most(sum("hangs" in word for o in outcomes for word in o["says"]), 0, "runs"),
        "ends that are not clear": at_most(sum(not is_clear(o) for o in outcomes), 0, "pairs"),
        "pairs that left other rows than the two one after the other": at_most(
            sum(bool(o["unlike"]) for o in outcomes), 0, "pairs"
        ),
        "first runs that could not be run again": at_most(
            sum(o["again"] not in ENDS - {"refused"} for o in outcomes), 0, "pairs"
        ),
        **{kind: Figure(count, "pairs") for kind, count in sorted(kinds.items())},
    }


def prepare() -> None:
    """What a launcher would set."""
    here = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    for name, value in {**here, "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)


def main() -> None:
    """Run the campaign as far as it gets, print its table, write its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=140)
    parser.add_argument("--only", default="", choices=("forks", "session", "launched"), help="pairs that run this way")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no pair after so long; run it again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="keeps the lakehouse and the outcomes")
    args = parser.parse_args()
    prepare()
    outcomes = Overlaps(args.work.absolute()).run(args.pairs, args.only, args.seconds, args.seed)
    title = f"two runs at once, {len(outcomes)} pairs of steps and commands"
    report("concurrency", figures(outcomes), False, title, module="concurrency --work FOLDER")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
