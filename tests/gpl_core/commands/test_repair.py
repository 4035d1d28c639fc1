"""`gpl repair`: one row per key is left, the newest, and nothing else changes."""

from __future__ import annotations

import pytest

from gpl_core.cli import main
from gpl_core.commands import repair
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.planner import Planner
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, ONE, doubled, legal_rows, put, small_config


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture
def lake(config) -> Lake:
    return Planner(config).lake


def rows_of(table: str, *numbers: int, seed: int = 0, **more) -> list[dict]:
    """Legal rows whose keys are told apart by `numbers` alone."""
    contract, kinds = load_contract(table), {"item_index": int, "content_hash": str, "user_id": str}
    rows = legal_rows(contract, len(numbers), seed=seed, partition=more)
    for row, number in zip(rows, numbers, strict=True):
        row.update({c: kinds[c](number) for c in contract.primary_key if c in kinds}, **more)
        row.update({c: v for c, v in {"issue": 0, "sequence_hash": "h"}.items() if c in row})
    return rows


@pytest.mark.parametrize("table", repair.TABLES)
@pytest.mark.parametrize("keys_at_a_time", [2, 1000])
def test_the_newest_row_of_each_key_stays(lake, tmp_path, capsys, monkeypatch, table, keys_at_a_time):
    """
    file     keys
    oldest   1 2 3
    second   2 4 4      another run, which encoded 2 and 4 differently
    newest   1 2 3      the first run again, of the same rows: as overlapping runs left them
    other    1 2        another version: keys of its own
    """
    monkeypatch.setattr(repair, "_KEYS_AT_A_TIME", keys_at_a_time)
    versioned, *_ = load_contract(table).partition_by
    here, other = ({versioned: name, **({"dt": DAY} if table == "interest_anchors" else {})} for name in ("v1", "v2"))
    newest = rows_of(table, 1, 2, 3, seed=3, **here)
    second = rows_of(table, 2, 4, 4, seed=2, **here)
    for rows in (rows_of(table, 1, 2, 3, seed=1, **here), second, newest):
        put(lake, table, rows, partition=here, mode="append")
    put(lake, table, rows_of(table, 1, 2, **other), partition=other, mode="append")
    before, config = lake.open(table), ["--config", str(tmp_path / "test.yaml")]
    assert len(doubled(lake, table)) == 4

    assert main(["repair", *config, "--dry-run"]) == 0
    assert f"{table}: 5 repeated rows of 2 files would be removed" in capsys.readouterr().err
    assert lake.open(table).version == before.version

    assert main(["repair", *config, "--table", table]) == 0
    assert f"{table}: 5 repeated rows of 2 files removed" in capsys.readouterr().err
    after = lake.open(table)
    assert (doubled(lake, table), after.version) == ([], before.version + 1)
    found = after.read(after.select(where={versioned: "v1"})).to_pylist()
    content = set(load_contract(table).column_names) - {"dt"}
    plain = lambda rows: sorted(repr([row[c] for c in sorted(content)]) for row in rows)  # noqa: E731
    assert plain(found) == plain([*newest, second[1]])
    assert [f.path for f in after.select(where={versioned: "v2"})] == [
        f.path for f in before.select(where={versioned: "v2"})
    ]
    assert after.mark("*" if table != "interest_anchors" else DAY.isoformat()), "what is done stays done"

    assert main(["repair", *config]) == 0
    assert lake.open(table).version == after.version


def test_a_user_cached_by_runs_of_two_dates_is_one_key(lake):
    for day in (DAY, DAY + ONE):
        partition = {"model_version": "m", "dt": day}
        put(lake, "interest_anchors", rows_of("interest_anchors", 1, 2, **partition), day=day, partition=partition)
    (removal,) = repair.repair(lake, "interest_anchors")
    assert (removal.rows, removal.file.partition["dt"], removal.keep) == (2, DAY.isoformat(), None)
    assert len(lake.open("interest_anchors").read()) == 2
