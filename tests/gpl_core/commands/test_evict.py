"""`gpl evict`: what no date has needed within the retention is removed from the cache, and nothing else."""

from __future__ import annotations

from datetime import date

import pytest

from gpl_core.cli import main
from gpl_core.commands import evict as module
from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, ONE, config_file, legal_rows, put, small_config

DAYS = [DAY + n * ONE for n in range(5)]
KEEP_TWO = ("--set", "anchors.retention_days=2")


def write(lake: Lake, table: str, day: date, users: str, model: str = "m1", step: str | None = None) -> None:
    """One slice of `table`: a row per letter of `users`."""
    contract = load_contract(table)
    values = {"dt": day, **({"model_version": model} if "model_version" in contract.partition_by else {})}
    rows = legal_rows(contract, len(users), seed=day.day, partition=values)
    put(lake, table, [{**r, "user_id": u, "model_version": model} for r, u in zip(rows, users)], day=day,
        partition=values)  # fmt: skip


@pytest.fixture
def lake(tmp_path) -> Lake:
    """Two models, five dates; the retention of two days covers the last two.

    day       0      1      2      3      4
    cache     abc    d      eg m2  f m2
    scored    abc    abd    e m2   b      e m2
    """
    made = Lake(small_config(tmp_path).lakehouse.root)
    write(made, "interest_anchors", DAYS[0], "abc")
    write(made, "interest_anchors", DAYS[1], "d")
    write(made, "interest_anchors", DAYS[2], "eg", "m2")
    write(made, "interest_anchors", DAYS[3], "f", "m2")
    for day, users, model in zip(DAYS, ("abc", "abd", "e", "b", "e"), ("m1", "m1", "m2", "m1", "m2"), strict=True):
        write(made, "anchor_requests", day, users, model)
        write(made, "score_requests", day, users, model)
    return made


def evict(tmp_path, *words: str, day: date = DAYS[4]) -> int:
    return main(["evict", "--config", str(config_file(tmp_path)), "--run-date", day.isoformat(), *KEEP_TWO, *words])


def cached(lake: Lake) -> str:
    return "".join(sorted(lake.open("interest_anchors").read()["user_id"].to_pylist()))


@pytest.mark.parametrize("keys_at_a_time", [8_000_000, 1])
def test_what_was_not_needed_within_the_retention_goes(lake, tmp_path, monkeypatch, capsys, keys_at_a_time):
    """b was looked up on day 3 and e on day 4; f is as young as day 3, though nobody has needed it since."""
    monkeypatch.setattr(module, "_KEYS_AT_A_TIME", keys_at_a_time)
    before = lake.open("interest_anchors")
    rows = {r["user_id"]: r for r in before.read().to_pylist()}
    assert evict(tmp_path, "--dry-run") == 0
    assert "4 entries of 3 files would be evicted" in capsys.readouterr().err
    assert lake.open("interest_anchors").version == before.version
    assert evict(tmp_path) == 0
    assert "4 entries of 3 files evicted" in capsys.readouterr().err
    after = lake.open("interest_anchors")
    assert {r["user_id"]: r for r in after.read().to_pylist()} == {u: rows[u] for u in "bef"}
    assert after.version == before.version + 1
    assert evict(tmp_path) == 0
    assert lake.open("interest_anchors").version == after.version
    runs = lake.open("job_runs").read().to_pylist()
    assert [(r["step"], r["status"], r["rows_dropped"]) for r in sorted(runs, key=lambda r: r["attempt"])] == [
        ("evict_anchors", "done", 4), ("evict_anchors", "noop", 0),
    ]  # fmt: skip


def test_a_model_that_nobody_uses_any_more_leaves_whole_files_unread(lake, tmp_path, monkeypatch):
    """With one day of retention only m2 is in use: the files of m1 are dropped without a look inside."""
    read: list[str] = []
    keys = module._keys
    monkeypatch.setattr(module, "_keys", lambda cache, file: read.append(file.path) or keys(cache, file))
    assert evict(tmp_path, "--set", "anchors.retention_days=1") == 0
    assert cached(lake) == "e"
    assert read
    assert not [p for p in read if "model_version=m1" in p]


def test_dates_that_still_wait_for_their_anchors_are_waited_for(lake, tmp_path, capsys):
    write(lake, "anchor_requests", DAYS[4] + ONE, "a")
    assert evict(tmp_path) == 4
    assert f"no answer yet for {DAYS[4] + ONE}" in capsys.readouterr().err
    assert cached(lake) == "abcdefg"
    write(lake, "score_requests", DAYS[4] + ONE, "a")
    assert evict(tmp_path) == 0  # a is needed now
    assert cached(lake) == "abef"


def test_a_backfill_of_dates_before_the_retention_is_waited_for(lake, tmp_path, capsys):
    """Its anchors are made, under a date that is old, and its requests not read yet."""
    write(lake, "anchor_requests", DAYS[0], "ac")
    assert evict(tmp_path) == 4
    assert f"no answer yet for {DAYS[0]}" in capsys.readouterr().err
    assert cached(lake) == "abcdefg"


def test_a_date_that_asks_while_the_cache_is_searched_is_waited_for(lake, tmp_path, monkeypatch):
    unneeded = module._unneeded

    def asked_meanwhile(*given):
        found = unneeded(*given)
        write(lake, "anchor_requests", DAYS[0], "ac")
        return found

    monkeypatch.setattr(module, "_unneeded", asked_meanwhile)
    assert evict(tmp_path) == 4
    assert cached(lake) == "abcdefg"


def test_a_run_date_that_has_not_scored_is_named(lake, tmp_path, capsys):
    assert evict(tmp_path, day=DAYS[4] + ONE) == 4
    assert str(DAYS[4] + ONE) in capsys.readouterr().err


def test_without_a_cache_the_step_that_makes_it_is_named(tmp_path, capsys):
    assert evict(tmp_path) == 4
    assert "score_requests" in capsys.readouterr().err


def test_what_generation_has_done_stays_done(lake, tmp_path):
    """The cache's own slice marks survive, so that no date is generated again for what it no longer needs."""
    marks = lake.open("interest_anchors").mark(DAYS[0].isoformat())
    assert evict(tmp_path) == 0
    assert lake.open("interest_anchors").mark(DAYS[0].isoformat()) == marks


def test_workers_read_the_files_that_were_written_anew(lake, tmp_path):
    pytest.importorskip("petastorm")
    from gpu_workers.inputs.feed import read_batches

    assert evict(tmp_path) == 0
    snapshot = lake.open("interest_anchors")
    batches = list(read_batches(snapshot, snapshot.files, ["user_id", "sequence_hash", "log_prob"]))
    assert sorted(u for b in batches for u in b["user_id"]) == list("bef")
