"""The forty messages that people read most, as they are printed: tests/messages.txt.

Each is brought about, none is copied. A diff is a change of words that somebody should have read:
`GPL_ACCEPT_MESSAGES=1 python -m pytest tests/test_messages.py` writes the file again.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from difflib import unified_diff
from pathlib import Path

import pytest

import gpl_core as gpl
from gpl_core.cli import main
from gpl_core.conf.sections import Monitors
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import GplError
from gpl_core.labels.fitting import check_fitting_rows
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.sids.health import Health, check_gates
from spark_jobs.common.monitors import Measured, judge
from spark_jobs.fit_calibrator import REMEDY
from tests.gpl_core.analyst_lake import AnalystLake
from tests.gpl_core.commands.test_check_raw import rows, write
from tests.support import DAY, config_file, emptied, put, small_config

SNAPSHOT = Path(__file__).parent / "messages.txt"
HEAD = f"# Written by {Path(__file__).name}; do not edit.\n"


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """All messages, each under what brought it about."""
    patch = pytest.MonkeyPatch()
    patch.setenv("COLUMNS", "120")
    patch.setenv("NO_COLOR", "1")
    patch.delenv("GPL_CONFIG", raising=False)
    root = tmp_path_factory.mktemp("messages")
    try:
        found = [*_command_line(root / "a"), *_tables(root / "b"), *_labels(root / "c")]
    finally:
        patch.undo()
    text = HEAD + "".join(f"\n=== {title}\n{body.strip()}\n" for title, body in found)
    text = text.replace(str(root), "ROOT")
    for old, new in ((r"-[0-9a-f]{10}\b", "-VERSION"), (r"part-[0-9a-f-]+", "part")):
        text = re.sub(old, new, text)
    return text


def typed(config: str, *given: str) -> str:
    """What `gpl` prints, and its exit code."""
    out = io.StringIO()
    arguments = [a.replace("CONFIG", config) for a in given]
    with redirect_stdout(out), redirect_stderr(out):
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
    return f"{out.getvalue()}[exit {code}]"


def raised(body: Callable[[], object]) -> str:
    """The error that `body` raises, as `gpl` prints it."""
    with pytest.raises(GplError) as error:
        body()
    return f"error: {error.value}\n[exit {error.value.exit_code}]"


def _command_line(root: Path) -> list[tuple[str, str]]:
    """What is said before anything is read, and on a lakehouse that is empty."""
    config = str(config_file(root))
    bad = root / "bad.yaml"
    bad.write_text(
        "lakehouse: {root: x}\nrun: {start_date: 2026-01-03, end_date: 2026-01-02}\nanchors: {cuont: 5}\n"
        "tokenizer: {method: rq_kmeans}\nlabels: {calibrator: {kind: quantiles}}\n"
    )
    (root / "broken.yaml").write_text("lakehouse: {root: x\n")
    shared = [
        (), ("rnu",), ("run",), ("run", "--help"), ("run", "--config", "quikstart"), ("run", "--config", str(bad)),
        ("run", "--config", str(root / "broken.yaml")), ("status", "--config", "CONFIG", "--set", "anchors.count"),
        ("run", "--config", "CONFIG", "--onyl", "samples"), ("plan", "--config", "CONFIG", "--only", "smaples"),
        ("plan", "--config", "CONFIG", "--only", "evaluate_truth"),
        ("run", "--config", "CONFIG", "--run-date", "tomorrow"),
        ("run", "--config", "CONFIG", "--start-date", "2026-01-03"),
        ("run", "--config", "CONFIG", "--start-date", "2026-01-04", "--end-date", "2026-01-03"),
        ("run", "--config", "CONFIG"), ("summary", "--config", "CONFIG"),
        ("check-raw", "--config", "CONFIG"), ("evaluate", "--config", "CONFIG"), ("judge", "--config", "CONFIG"),
        ("forget", "--config", "CONFIG", "--user", "u1"),
        ("capacity", "--users", "0", "--hours", "6"),
    ]  # fmt: skip
    return [(" ".join(["gpl", *_shown(given)]), typed(config, *given)) for given in shared]


def _shown(given: tuple[str, ...]) -> list[str]:
    return [Path(a).name if "/" in a else f"'{a}'" if " " in a else a for a in given]


def _tables(root: Path) -> list[tuple[str, str]]:
    """Asked of a lakehouse of one date: `tests/gpl_core/analyst_lake.py`."""
    made = AnalystLake(root)
    config = str(root / "test.yaml")
    day = DAY.isoformat()
    asked = [
        ("sql", "SELECT * FROM pseudo_label"), ("sql", "SELECT labels FROM pseudo_labels"),
        ("sql", "SELEC * FROM items"), ("sql", "DELETE FROM items"), ("sql", "SELECT 1; SELECT 2"),
        ("sql", "SELECT source, count(*) AS labels FROM pseudo_labels GROUP BY source ORDER BY source"),
        ("explain", "--user", "u3", "--item", "i0", "--run-date", day),
        ("explain", "--user", "u1", "--item", "i9", "--run-date", day),
        ("rollback", "calibrator", "2026-01-01-0000000000"), ("forget", "--user", "nobody"),
        ("vacuum", "--retention-hours", "1", "--dry-run"), ("migrate",),
        ("explain", "--user", "u1", "--item", "i3", "--run-date", day),
        ("sql", "SELECT i.title FROM items i WHERE i.title LIKE 'x%'"), ("explain", "--user", "u1", "--item", "i3"),
    ]  # fmt: skip
    found = [(" ".join(["gpl", *_shown(g)]), typed(config, g[0], "--config", "CONFIG", *g[1:])) for g in asked]
    lake = gpl.open_lakehouse(config)
    found += [
        ("lake.table: no such table", raised(lambda: lake.table("labels"))),
        ("lake.feed: nothing published", raised(lambda: lake.feed(day))),
        ("lake.table: not a date", raised(lambda: lake.table("pseudo_labels", "yesterday"))),
    ]
    found.append(("two runs of one slice", raised(lambda: _conflict(made.lake))))
    for file in Path(made.lake.uri("pseudo_labels")).rglob("*.parquet"):
        file.unlink()
    found.append(("a data file is gone", raised(lambda: made.lake.open("pseudo_labels").read())))
    commit = Path(made.lake.uri("items")) / "_delta_log" / f"{0:020}.json"
    emptied(commit)
    found.append(("a commit has no bytes", raised(lambda: Lake(made.lake.root).open("items"))))
    return found


def _conflict(lake: Lake) -> None:
    """A step commits a slice that another run has written since it looked."""
    contract = load_contract("pseudo_labels")
    seen = lake.open("pseudo_labels").version
    put(lake, "pseudo_labels", 1, seed=1)
    with lake.writer(contract, {"dt": DAY.isoformat()}, dims={}) as writer:
        pass
    mark = SliceMark("pseudo_labels", {DAY.isoformat(): "other"}, "run")
    lake.commit(contract, writer.parts, mark=mark, mode="overwrite", partition={"dt": DAY.isoformat()}, since=seen)


def _labels(root: Path) -> list[tuple[str, str]]:
    """What refuses or warns on a bad day: raw rows, gates, monitors, a trainer."""
    config = small_config(root, {"labels": {"calibrator": {"target_rate": 0.02}}})
    late = datetime(2026, 1, 9, tzinfo=UTC)
    write(config, "raw_items", rows("raw_items").drop_columns(["updated_at"]))
    write(config, "raw_impressions", rows("raw_impressions", {"position": -1}, {"event_time": late}))
    write(config, "raw_candidates", rows("raw_candidates", {"item_id": "nowhere"}))
    health = Health(1000, 64, (12.5, 60.0), (40, 64), (64, 64), 0.3, 0.41)
    gates = {"min_perplexity_share": 0.5, "max_dead_share": 0.1, "max_collision_share": 0.25,
             "min_reconstruction_cosine": 0.5}  # fmt: skip
    measured = Measured(
        label_drift=0.31, quarantine_share=0.03, anchors_per_user=1.5, calibration_error=None, uniform_impressions=300,
        first_labels=False,
    )  # fmt: skip
    verdicts = judge(measured, labeled=40, left_out={"no_history": 50, "no_embedding": 10}, settings=Monitors())
    Path(config.lakehouse.root, "manifests/training_feed").mkdir(parents=True)
    manifest = {"monitors": {"label_drift": {"status": "warn"}}, "completeness": {"because": "labels late"}}
    Path(config.lakehouse.root, f"manifests/training_feed/{DAY}.json").write_text(json.dumps(manifest))
    feed = gpl.LakehouseReader(config).feed(DAY)
    return [
        ("gpl check-raw, tables with faults", typed(str(root / "test.yaml"), "check-raw", "--config", "CONFIG")),
        ("a tokenizer that is refused", raised(lambda: check_gates(health, **gates))),
        ("too few rows to fit a calibrator", raised(lambda: check_fitting_rows(120, 4, 1000, REMEDY))),
        ("monitors of a bad day", "\n".join(f"{v.status}: {v.reason}" for v in verdicts)),
        ("feed.refuse_alarms on a bad day", raised(feed.refuse_alarms)),
    ]


def test_the_messages_are_those_that_were_read(said):
    if os.environ.get("GPL_ACCEPT_MESSAGES"):
        SNAPSHOT.write_text(said, encoding="utf-8")
    known = SNAPSHOT.read_text(encoding="utf-8")
    changed = "\n".join(unified_diff(known.splitlines(), said.splitlines(), "messages.txt", "now", lineterm="", n=1))
    assert said == known, f"words changed; if you like them: GPL_ACCEPT_MESSAGES=1 …\n{changed}"


def test_there_are_forty_and_none_is_a_traceback(said):
    assert said.count("\n=== ") >= 40
    assert "Traceback" not in said
    assert not re.search(r"\bNone\b|<class|object at 0x", said)
