"""The index of a log against the log itself: every commit ever made, kept aside and read by slow code."""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import pytest
from deltalake import DeltaTable

from gpl_core.commands.optimize import compact
from gpl_core.commands.vacuum import delete_old_files
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError
from gpl_core.lakehouse.files import hash_text
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.log_index import INDEX
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.rewrite import Removal, remove_rows
from gpl_core.lakehouse.snapshot import Snapshot
from tests.support import DAMAGES, DAY, DIMS, ONE, data_table, legal_rows, put

TABLE = "pair_scores"
CONTRACT = load_contract(TABLE)
DAYS = [DAY + i * ONE for i in range(4)]
MONTHS_AGO = 90 * 86400


class Ledger:
    """A table to which anything happens, and every commit that its log has ever held."""

    def __init__(self, root: Path, rng: random.Random, careless: bool):
        self.lake = Lake(str(root))
        self.rng = rng
        self.careless = careless  # whether the index is lost, and whether no step looks at the table for months
        self.commits: dict[int, bytes] = {}
        self.content: dict[str, tuple[str, ...]] = {}  # identity of a slice -> its rows
        self.whole = True  # whether index and log together still hold all of it
        self.pinned = -1
        self.put()
        self.note()

    @property
    def log(self) -> Path:
        return Path(self.lake.uri(TABLE), "_delta_log")

    @property
    def index(self) -> Path:
        return Path(self.lake.uri(TABLE), INDEX)

    # ---- what may happen ---------------------------------------------------------------------------------------

    def put(self) -> None:
        """A run of a step."""
        put(self.lake, TABLE, self.rng.randint(1, 3), day=self.rng.choice(DAYS), fingerprint=self.word(),
            seed=self.rng.randrange(99), file_rows=1, details={"rows": self.rng.randrange(9)})  # fmt: skip

    def pin(self) -> None:
        """A run decides on the table as it is; it commits later, see `put_late`."""
        self.pinned = self.lake.open(TABLE).version

    def put_late(self) -> None:
        """The second of two runs commits; it has lost when the other one wrote the same slice."""
        day = self.rng.choice(DAYS)
        with self.lake.writer(CONTRACT, {"dt": day.isoformat()}, dims=DIMS) as writer:
            writer.write(data_table(CONTRACT, legal_rows(CONTRACT, 1, partition={"dt": day})))
        mark = SliceMark("late", {day.isoformat(): self.word()}, self.word())
        newest = self.lake.open(TABLE).version
        since = self.pinned if self.oldest() <= self.pinned <= newest else newest
        with suppress(ConflictError):
            self.lake.commit(CONTRACT, writer.parts, mark=mark, mode="overwrite",
                             partition={"dt": day.isoformat()}, since=since)  # fmt: skip

    def killed(self) -> None:
        """A run is killed between its commit and the index."""
        before = self.index.read_bytes() if self.index.exists() else None
        self.put()
        self.index.unlink(missing_ok=True)
        if before is not None:
            self.index.write_bytes(before)

    def forget(self) -> None:
        """Rows leave a slice in a commit that marks none."""

        def one(snapshot: Snapshot) -> list[Removal]:
            return [Removal(f, f.rows, None) for f in snapshot.files[:1]]

        remove_rows(self.lake, CONTRACT, one, "forget")

    def compact(self) -> None:
        compact(self.lake, CONTRACT, DAYS, 2**30)

    def restore(self) -> None:
        """Another engine sets the table back."""
        newest = self.lake.open(TABLE).version
        with suppress(Exception):  # its log may have been cleaned of that version
            DeltaTable(self.lake.uri(TABLE)).restore(self.rng.randint(max(newest - 4, 1), newest))

    def by_hand(self) -> None:
        """Another engine's commit, which says nothing of us."""
        table = DeltaTable(self.lake.uri(TABLE))
        table.alter.set_table_properties({"team": self.word()}, raise_if_not_exists=False)

    def vacuum(self) -> None:
        delete_old_files(self.lake, TABLE, 0, orphans=True)

    def clean(self) -> None:
        """Months pass: a checkpoint is made, and the log cleaned by the engine."""
        if not self.careless:
            self.lake.open(TABLE).index()  # as every run of its step does, one that finds it done too
        table = DeltaTable(self.lake.uri(TABLE))
        table.create_checkpoint()
        for path in self.log.iterdir():
            os.utime(path, (time.time() - MONTHS_AGO,) * 2)
        before = sorted(self.log.glob("*.json"))
        table.cleanup_metadata()
        assert sorted(self.log.glob("*.json")) != before or table.version() in (0, self.oldest())
        self.whole = self.whole and self.covered() >= self.oldest() - 1

    def oldest(self) -> int:
        return min(int(p.stem) for p in self.log.glob("*.json"))

    def covered(self) -> int:
        """The newest version in the index; the log is asked, not the index."""
        return self.lake.open(TABLE).history.indexed

    def damage(self) -> None:
        """The index is deleted, or not what was written."""
        if self.index.exists():
            DAMAGES[self.rng.choice(sorted(DAMAGES))](self.index)
            self.whole = self.whole and self.oldest() == 0

    def set_back(self) -> None:
        """An operator deletes the newest commit, as the message about a damaged one says; the next one differs."""
        newest = self.lake.open(TABLE).version
        made_from = [p for p in self.log.glob("*.checkpoint.parquet") if int(p.stem.split(".")[0]) >= newest]
        if newest > 1 and not made_from and self.oldest() < newest:
            (self.log / f"{newest:020d}.json").unlink()
            del self.commits[newest]
            self.content = {}  # its number is given again
            self.put()

    # ---- what must hold ----------------------------------------------------------------------------------------

    def word(self) -> str:
        return f"{self.rng.getrandbits(64):x}"

    def note(self) -> None:
        """Keep the commits that are new."""
        for path in self.log.glob("*.json"):
            self.commits[int(path.stem)] = path.read_bytes()

    def check(self, version: int | None) -> None:
        snapshot = self.lake.open(TABLE, version)
        known = {v: _outline(body) for v, body in self.commits.items() if v <= snapshot.version}
        marks = [(v, mark) for v, (mark, _) in sorted(known.items(), reverse=True) if mark]
        if self.whole:
            assert snapshot.marks() == marks
            for name in map(str, DAYS):
                written = [(v, mark.slices[name]) for v, mark in marks if name in mark.slices]
                assert snapshot.history.fingerprints(name) == written
            for span in ((None, None), *((d, d) for d in DAYS), (DAYS[1], DAYS[2])):
                assert snapshot.identity(*span) == _identity(snapshot, known, *span)
        else:  # what is lost is not made up
            assert all(mark in marks for mark in snapshot.marks())
        for day in DAYS:
            rows = _rows(snapshot, day)
            identity = snapshot.identity(day, day)
            assert not rows or identity, "a slice with rows is never taken for an empty one"
            assert self.content.setdefault(identity, rows) == rows or not identity, "one identity, two contents"


def _rows(snapshot: Snapshot, day: date) -> tuple[str, ...]:
    """What the slice holds: the files' paths would change by compaction, and may be gone after a vacuum."""
    counted: dict[str, int] = {}
    for file in snapshot.select(start=day, end=day):
        counted[file.partition["dt"]] = counted.get(file.partition["dt"], 0) + file.rows
    return tuple(f"{k}:{v}" for k, v in counted.items())


def _outline(commit: bytes) -> tuple[SliceMark | None, set[str]]:
    """The mark of a commit, and the dates whose rows it changed."""
    actions = [json.loads(line) for line in commit.splitlines()]
    (info,) = [a["commitInfo"] for a in actions if "commitInfo" in a]
    files = [f for a in actions for f in (a.get("add"), a.get("remove")) if f and f["dataChange"]]
    return SliceMark.from_json(info.get("userMetadata")), {f["partitionValues"]["dt"] for f in files}


def _identity(snapshot: Snapshot, known: dict, start: date | None, end: date | None) -> str:
    newest = {day: version for version, (_, dates) in sorted(known.items()) for day in dates}
    first, last = str(start or ""), str(end or "~")
    found = sorted((d, v) for d, v in newest.items() if first <= d <= last)
    return hash_text(json.dumps([str(snapshot._table.metadata().id), found])) if found else ""


OPERATIONS = (
    Ledger.put, Ledger.put, Ledger.pin, Ledger.put_late, Ledger.killed, Ledger.forget, Ledger.compact, Ledger.restore,
    Ledger.by_hand, Ledger.vacuum, Ledger.clean, Ledger.damage, Ledger.set_back,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_what_the_index_says_is_what_the_whole_log_says(tmp_path, seed):
    rng, careless = random.Random(seed), bool(seed % 2)
    ledger = Ledger(tmp_path, rng, careless)
    for _ in range(25):
        rng.choice([o for o in OPERATIONS if careless or o is not Ledger.damage])(ledger)
        ledger.note()
        ledger.check(None)
        ledger.check(max(ledger.lake.open(TABLE).version - rng.randrange(3), ledger.oldest()))
    assert ledger.whole or careless
