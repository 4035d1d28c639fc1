"""`gpl optimize` changes files and nothing else; `gpl vacuum` deletes nothing that a run may read."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.commands import optimize
from gpl_core.commands.optimize import compact
from gpl_core.commands.vacuum import alive, check_retention, delete_old_files, vacuum
from gpl_core.contracts.contract import all_contracts, load_contract
from gpl_core.errors import ConflictError, ContractError
from gpl_core.graph.compaction import LEFT_ALONE, compactable
from gpl_core.graph.job_runs import JobRun
from gpl_core.lakehouse.lake import Lake
from tests.gpl_core.toy import RAW, Toy
from tests.support import DAY, ONE, config_file, put, small_config

D0, D1, D2 = DAY - ONE, DAY, DAY + ONE
LARGE = 2**30


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two run dates done in every step, each slice of three files of one row."""
    root = tmp_path_factory.mktemp("finished")
    toy = Toy(small_config(root), files=3)
    toy.raw([D0, D1, D2, D2 + ONE])
    toy.run("ingest", D0)
    toy.run_pending([D1, D2])
    return root


@pytest.fixture
def toy(finished, tmp_path) -> Toy:
    shutil.copytree(finished / "lake", tmp_path / "lake")
    return Toy(small_config(tmp_path), files=3)


def tables(toy: Toy) -> list[str]:
    """The tables that are compacted; here delta-rs has written all of them."""
    both = {c.name for engine in ("spark", "delta-rs") for c in compactable(toy.planner.lake, engine)}
    return sorted(both)


def contents(lake: Lake, table: str) -> list[str]:
    return sorted(map(repr, lake.open(table).read().to_pylist()))


def compact_all(toy: Toy, file_bytes: int = LARGE) -> None:
    for table in tables(toy):
        compact(toy.planner.lake, load_contract(table), [D0, D1, D2, D2 + ONE], file_bytes)


# ---- optimize --------------------------------------------------------------------------------------------------


def test_after_compaction_every_step_is_still_done_and_every_row_still_there(toy):
    lake = toy.planner.lake
    assert toy.not_done([D1, D2]) == {}
    before = {t: contents(lake, t) for t in tables(toy)}
    slices = {t: {tuple(sorted(f.partition.items())) for f in lake.open(t).files} for t in before}
    pair = 2 * max(f.size for f in lake.open("candidates").files)
    compact_all(toy, pair)  # first by twos, then what came of it again
    compact_all(toy)
    assert {t: len(lake.open(t).files) for t in before} == {t: len(s) for t, s in slices.items()}
    assert {t: contents(lake, t) for t in before} == before
    assert toy.not_done([D1, D2]) == {}
    versions = {t: lake.open(t).version for t in before}
    compact_all(toy)
    assert {t: lake.open(t).version for t in before} == versions, "nothing to join: no commit"


def test_a_change_after_compaction_is_noticed_and_so_is_a_slice_that_lost_a_file(toy):
    compact_all(toy)
    toy.write("candidates", D1, step="ingest", fingerprint=toy.state("ingest", D1).fingerprint_of("candidates"))
    assert toy.state("samples", D1).status == "stale"
    assert toy.state("samples", D2).status == "done"
    put(toy.planner.lake, "pair_scores", 1, day=D2, mode="append", step="score_candidates", seed=99,
        fingerprint=toy.state("score_candidates", D2).fingerprint)  # fmt: skip
    assert toy.state("pseudo_labels", D2).status == "stale"


def test_only_the_dates_asked_for_are_compacted(toy):
    lake = toy.planner.lake
    compact(lake, load_contract("pair_scores"), [D1], LARGE)
    assert [len(lake.open("pair_scores").select(start=d, end=d)) for d in (D1, D2)] == [1, 3]


def test_compaction_beside_a_writer_looks_again_and_leaves_no_orphans(toy, monkeypatch):
    """Another slice is written after the files were rewritten and before the commit."""
    lake, rewrite = toy.planner.lake, optimize._rewrite
    came: list[str] = []

    def slow(*given):
        part = rewrite(*given)
        if not came:
            came.append(part["path"])
            toy.write("pair_scores", D2 + ONE, step="score_candidates")
        return part

    monkeypatch.setattr(optimize, "_rewrite", slow)
    compact(lake, load_contract("pair_scores"), [D1], LARGE)
    assert len(lake.open("pair_scores").select(start=D1, end=D1)) == 1
    assert not (Path(lake.uri("pair_scores")) / came[0]).exists()
    monkeypatch.setattr(optimize, "swap", lambda *given, **named: False)
    with pytest.raises(ConflictError, match="run gpl optimize again"):
        compact(lake, load_contract("pair_scores"), [D2], LARGE)


def test_the_row_of_a_running_step_keeps_its_file(tmp_path):
    """It is replaced, file and all, when the step ends."""
    lake = Lake(str(tmp_path))
    for step in ("samples", "sequences", "ingest"):
        put(lake, "job_runs", [job_run(step)], mode="append")
    assert compact(lake, load_contract("job_runs"), [], LARGE)[1] == 1
    put(lake, "job_runs", [job_run("samples", status="running", attempt=2)], mode="append")
    assert compact(lake, load_contract("job_runs"), [], LARGE)[1] == 2
    for step in ("samples", "sequences"):
        put(lake, "job_runs", [job_run(step)], mode="append")
    assert compact(lake, load_contract("job_runs"), [], LARGE) == (4, 2), "one killed run does not end compaction"


def test_the_feed_and_the_platforms_tables_are_left_alone(toy):
    assert not {*LEFT_ALONE, *RAW, "raw_items"} & set(tables(toy))
    owned = {n for n, c in all_contracts().items() if c.owner not in ("platform", "simulation")}
    existing = {n for n in owned if toy.planner.lake.exists(n)}
    assert set(tables(toy)) == existing - set(LEFT_ALONE)


# ---- vacuum ----------------------------------------------------------------------------------------------------


def job_run(step: str = "samples", **given) -> dict:
    row = {
        "run_id": f"run-{step}", "step": step, "run_date": DAY, "attempt": 1, "status": "done", "fingerprint": "",
        "code_version": "", "inputs": "{}", "outputs": "{}", "rows_in": -1, "rows_out": 0, "rows_quarantined": 0,
        "rows_dropped": 0, "bytes_out": 0, "seconds": 1.0, "details": "{}", "error_class": "", "error_message": "",
        "started_at": datetime.now(UTC), "core_seconds": None, "gpu_seconds": None, "bytes_in": None,
    }  # fmt: skip
    return {**row, **given}


def running(lake: Lake, hours: float, step: str = "samples", run_id: str = "night") -> None:
    """A run that began `hours` ago and has not recorded its end."""
    JobRun(lake, step, DAY, run_id, datetime.now(UTC) - timedelta(hours=hours)).begin()


def test_a_vacuum_deletes_what_no_version_in_the_retention_names_and_writes_no_log(toy):
    lake = toy.planner.lake
    before = contents(lake, "pair_scores")
    old = lake.open("pair_scores").version
    compact_all(toy)
    versions = {t: lake.open(t).version for t in tables(toy)}
    raw = {t: lake.open(t).files for t in RAW}
    assert {f.files for f in vacuum(lake, 1)} == {0}, "all are younger than an hour"
    planned = {f.table: f.files for f in vacuum(lake, 0, dry_run=True)}
    assert planned["pair_scores"] == 6
    assert {f.table: f.files for f in vacuum(lake, 0)} == planned
    assert {f.files for f in vacuum(lake, 0)} == {0}
    assert {t: lake.open(t).version for t in tables(toy)} == versions
    assert contents(lake, "pair_scores") == before
    assert toy.not_done([D1, D2]) == {}
    with pytest.raises(ContractError, match="is gone"):
        lake.open("pair_scores", old).read()
    assert {t: lake.open(t).files for t in RAW} == raw
    assert all(lake.open(t).read().num_rows for t in RAW)


def test_a_retention_shorter_than_the_age_of_a_run_is_refused_by_its_name(tmp_path):
    lake = Lake(str(tmp_path))
    running(lake, 10.5)
    with pytest.raises(ContractError, match=r"run night \(samples for 2026-01-03\).*at least 11 hours.*--ended night"):
        list(vacuum(lake, 10))
    assert check_retention(lake, timedelta(hours=11)) == {"samples"}
    assert check_retention(lake, timedelta(0), ended=["night"]) == set()


def test_a_killed_run_that_was_run_again_counts_no_more(tmp_path):
    lake = Lake(str(tmp_path))
    running(lake, 100)
    put(lake, "job_runs", [job_run(attempt=2)], mode="append")
    assert check_retention(lake, timedelta(hours=1)) == set()


@pytest.mark.parametrize("status", ["failed", "noop"])
def test_a_second_start_that_did_nothing_hides_no_run_under_way(tmp_path, status):
    lake = Lake(str(tmp_path))
    running(lake, 100)
    put(lake, "job_runs", [job_run(attempt=2, status=status)], mode="append")
    assert [r["run_id"] for r in alive(lake)] == ["night"]


def test_files_of_a_run_that_began_while_orphans_were_listed_stay(toy):
    toy.write("pair_scores", D1, step="score_candidates")
    orphan = Path(toy.planner.lake.uri("pair_scores")) / "part-orphan.parquet"
    orphan.write_bytes(b"of a run that is on record by now")
    for busy, stays in ((True, True), (False, False)):
        delete_old_files(toy.planner.lake, "pair_scores", 0, orphans=True, busy=lambda busy=busy: busy)
        assert orphan.exists() is stays


def test_a_retention_shorter_than_the_longest_run_is_refused_by_its_name(tmp_path):
    lake = Lake(str(tmp_path))
    put(lake, "job_runs", [job_run(), job_run("sequences", seconds=5 * 3600.0)], mode="append")
    with pytest.raises(ContractError, match=r"run run-sequences.*took 18000 s.*at least 6 hours"):
        check_retention(lake, timedelta(hours=4))
    assert check_retention(lake, timedelta(hours=6)) == set()


def test_orphans_go_unless_a_step_that_writes_the_table_runs(toy):
    """generate_anchors, started again, reuses the part files that its killed run recorded."""
    lake = toy.planner.lake
    orphans = [Path(lake.uri(t)) / "part-orphan.parquet" for t in ("interest_anchors", "pair_scores")]
    for path in orphans:
        path.write_bytes(b"of a killed run")
        os.utime(path, (0, 0))
    running(lake, 0, "generate_anchors")
    taken = {f.table: f.files for f in vacuum(lake, 1)}
    assert (taken["interest_anchors"], taken["pair_scores"]) == (0, 1)
    assert [p.exists() for p in orphans] == [True, False]


def test_the_command_says_what_it_deletes_and_refuses_with_exit_3(toy, tmp_path, capsys):
    config = str(config_file(tmp_path))
    toy.write("pair_scores", D1, step="score_candidates")
    assert main(["vacuum", "--config", config, "--retention-hours", "0", "--dry-run"]) == 0
    assert "pair_scores: 3 files" in capsys.readouterr().out
    running(toy.planner.lake, 2)
    assert main(["vacuum", "--config", config, "--retention-hours", "0"]) == 3
    assert "run night" in capsys.readouterr().err
    assert main(["vacuum", "--config", config, "--retention-hours", "-1"]) == 2
    assert main(["vacuum", "--config", config, "--retention-hours", "0", "--ended", "night"]) == 0
    assert "deleted" in capsys.readouterr().out
