"""`gpl forget`: a person is removed from every table, after a vacuum from old versions too; others lose no row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.commands.forget import forget, holds
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from spark_jobs.common.manifests import build_manifest
from tests.support import DAY, DIMS, ONE, config_file, data_table, legal_rows, put, small_config

GONE, STAYS = "u-gone-1", "u-gone-10"  # one id begins with the other
NAMING = [n for n, c in all_contracts().items() if holds(c, GONE) is not None]


def named(table: str, user: str) -> dict:
    """The column that identifies the person."""
    if table == "quarantine":
        return {"row_json": json.dumps({"item_id": "i", "user_id": user})}
    if table == "worker_rejects":
        return {"key": f"user_id={user}"}
    return {"user_id": user}


@pytest.fixture
def lake(tmp_path) -> Lake:
    """Two dates of every table that names users: the first has both persons, the second only the one to forget."""
    made = Lake(small_config(tmp_path).lakehouse.root)
    for table in NAMING:
        contract = all_contracts()[table]
        for day, users in ((DAY, (GONE, STAYS, GONE)), (DAY + ONE, (GONE,))):
            dated = {"dt": day} if "dt" in contract.partition_by else {}
            partition = {**{n: "v1" for n in contract.partition_by if n != "dt"}, **dated}
            rows = legal_rows(contract, len(users), seed=day.day, partition=partition)
            filled = [{**row, **named(table, user)} for row, user in zip(rows, users, strict=True)]
            put(made, table, filled, day=day, partition=partition, mode="append")
    return made


def holding(lake: Lake, user: str) -> set[str]:
    """Tables whose newest version holds `user`."""
    found = set()
    for table in NAMING:
        rows = lake.open(table).read()
        _, mask = holds(all_contracts()[table], user)
        found |= {table} if any(mask(rows).to_pylist()) else set()
    return found


def test_every_table_with_a_user_is_looked_at():
    columns = {n for n, c in all_contracts().items() if "user_id" in c.column_names}
    assert columns | {"quarantine", "worker_rejects"} == set(NAMING)


def test_forgetting_removes_the_person_everywhere_and_nobody_else(lake, tmp_path, capsys):
    platform = {n for n in NAMING if all_contracts()[n].owner == "platform"}
    manifest = Path(lake.path("manifests", "training_feed", f"{DAY}.json"))
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    marks = {t: lake.open(t).mark(DAY.isoformat()) for t in NAMING}
    before = {t: lake.open(t).version for t in NAMING}
    config = str(config_file(tmp_path))

    assert main(["forget", "--config", config, "--user", GONE, "--dry-run"]) == 0
    assert "pseudo_labels: 3 rows would be removed" in capsys.readouterr().out
    assert holding(lake, GONE) == set(NAMING)
    assert {t: lake.open(t).version for t in NAMING} == before

    assert main(["forget", "--config", config, "--user", GONE]) == 0
    said = capsys.readouterr().out
    assert holding(lake, GONE) == platform
    assert holding(lake, STAYS) == set(NAMING)
    assert all(rows_in(lake.open(t).files) == len(lake.open(t).read()) == 1 for t in set(NAMING) - platform)
    assert {t: lake.open(t).mark(DAY.isoformat()) for t in NAMING} == marks
    assert "pseudo_labels: 3 rows removed" in said
    assert "left: raw_impressions still has 3 rows" in said
    assert "left: old versions still have the rows" in said
    assert f"gpl run --start-date {DAY} --end-date {DAY + ONE}" in said
    assert not manifest.exists()

    old = [lake.open(t, before[t]) for t in set(NAMING) - platform]
    assert all(len(s.read()) == 4 for s in old)
    assert main(["forget", "--config", config, "--user", GONE, "--vacuum-hours", "0"]) == 0
    files = [p for t in set(NAMING) - platform for p in Path(lake.uri(t)).rglob("*.parquet") if p.is_file()]
    assert not [p for p in files if GONE.encode() in p.read_bytes().replace(STAYS.encode(), b"")]
    for snapshot in old:
        with pytest.raises(FileNotFoundError):
            snapshot.read()
    capsys.readouterr()
    assert main(["forget", "--config", config, "--user", GONE]) == 0
    assert "rows removed" not in capsys.readouterr().out


def test_a_feed_slice_that_lost_rows_gets_no_manifest_of_its_old_sums(lake):
    contract = all_contracts()["training_feed"]
    partition = {"dt": DAY.isoformat()}
    rows = [{**r, **named("training_feed", u)} for r, u in zip(legal_rows(contract, 2), (GONE, STAYS), strict=True)]
    with lake.writer(contract, partition, dims=DIMS) as writer:
        writer.write(data_table(contract, rows))
    mark = SliceMark("training_feed", {DAY.isoformat(): "f"}, "r", {"rows": 2})
    lake.commit(contract, writer.parts, mark=mark, mode="overwrite", partition=partition)
    assert build_manifest(lake, DAY, contract)["rows"] == 2
    list(forget(lake, GONE))
    with pytest.raises(ContractError, match=r"has 1 rows, its commit \d+ promised 2.*run training_feed for 2026-01-03"):
        build_manifest(lake, DAY, contract)


def test_petastorm_reads_what_is_left(lake):
    pytest.importorskip("petastorm")
    from gpu_workers.inputs.feed import read_batches

    list(forget(lake, GONE))
    for table in ("training_feed", "user_sequences", "score_requests"):
        snapshot = lake.open(table)
        columns = [c for c in snapshot.contract.column_names if c not in snapshot.contract.partition_by]
        (batch,) = read_batches(snapshot, snapshot.files, columns)
        assert batch["user_id"].tolist() == [STAYS]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--user"),
        (["--user", ""], "--user is empty"),
        (["--user", "u", "--vacuum-hours", "-1"], "expected 0 or more"),
    ],
)
def test_wrong_words_are_refused(tmp_path, capsys, arguments, said):
    assert main(["forget", "--config", str(config_file(tmp_path)), *arguments]) == 2
    assert said in capsys.readouterr().err
