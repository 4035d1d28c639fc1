"""The Python interface: what it imports, and how it refuses. On a real lakehouse: tests/test_pipeline.py."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import pytest

import gpl_core as gpl
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, ONE, config_file, put

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lake(tmp_path) -> gpl.LakehouseReader:
    """Two dates of pair_scores, and the newest version without rows of the first."""
    made = Lake(str(tmp_path / "lake"))
    put(made, "pair_scores", 3)
    put(made, "pair_scores", 2, day=DAY + ONE)
    put(made, "pair_scores", 0)
    return gpl.open_lakehouse(str(config_file(tmp_path)))


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a fresh Python has imported after `code`."""
    heavy = "{'torch', 'pyspark', 'transformers', 'deltalake', 'pandas', 'deepspeed', 'pyarrow'}"
    code = f"import json, sys\n{code}\nprint(json.dumps(sorted({heavy} & set(sys.modules))))"
    return set(json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)))


def test_only_what_is_used_is_imported():
    assert loaded_after("import gpl_core as gpl") == set()
    assert "torch" not in loaded_after("import gpl_core as gpl; gpl.open_lakehouse, gpl.FeedReader, gpl.ServedModel")
    assert "torch" in loaded_after("import gpl_core as gpl; gpl.dual_label_loss")


def test_every_name_is_there_and_documented():
    assert len(gpl.__all__) <= 10
    assert set(gpl.__all__) <= set(dir(gpl))
    for name in gpl.__all__:
        assert getattr(gpl, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'lakehose'"):
        getattr(gpl, "lake" + "hose")


def test_a_table_is_read_by_dates_columns_and_version(lake):
    assert lake.versions == {"pair_scores": 3}
    assert lake.table("pair_scores").num_rows == 2
    assert lake.table("pair_scores", version=2).num_rows == 5
    assert lake.table("pair_scores", DAY, version=2).num_rows == 3
    assert lake.table("pair_scores", DAY, DAY + ONE, version=2, columns=["dt"])["dt"].to_pylist() == [
        DAY, DAY, DAY, DAY + ONE, DAY + ONE,
    ]  # fmt: skip
    assert lake.table("pair_scores", datetime(2026, 1, 3, 23), version=2).num_rows == 3
    assert lake.table("pair_scores", end="2026-01-03", version=2).num_rows == 3
    assert lake.table("pair_scores", columns=[]).num_columns == 0
    assert lake.sql("SELECT count(*) AS n FROM pair_scores").to_pylist() == [{"n": 2}]
    assert lake.sql("SELECT count(*) AS n FROM pair_scores", {"pair_scores": 2}).to_pylist() == [{"n": 5}]
    assert lake.sql("SELECT user_id, similarity FROM pair_scores WHERE false").column_names == ["user_id", "similarity"]


@pytest.mark.parametrize(
    ("ask", "error", "says"),
    [
        (lambda lake: lake.table("pair_score"), gpl.UsageError, "no table 'pair_score'"),
        (lambda lake: lake.table("raw_items"), gpl.UsageError, "no table 'raw_items'"),
        (lambda lake: lake.table("items", "2026-01-03"), gpl.MissingInputError, "table items"),
        (lambda lake: lake.table("pair_scores", "3.1.2026"), gpl.UsageError, "expected YYYY-MM-DD"),
        (
            lambda lake: lake.table("pair_scores", columns=["item"]),
            gpl.ContractError,
            "no column 'item'; it has user_id",
        ),
        (lambda lake: lake.sql("DROP TABLE items"), gpl.UsageError, "only reads"),
        (lambda lake: lake.feed("2026-01-03"), gpl.MissingInputError, "no feed of 2026-01-03"),
        (lambda lake: lake.preranker(date(2026, 1, 3)), gpl.MissingInputError, "preranker"),
        (lambda lake: lake.explain("u", "i", "2026-01-03"), gpl.MissingInputError, "pseudo_labels"),
    ],
)
def test_what_is_not_there_is_named(lake, ask, error, says):
    with pytest.raises(error, match=says):
        ask(lake)


@pytest.mark.parametrize(
    ("manifest", "alarms"),
    [
        ({"monitors": {"coverage": {"status": "ok"}, "label_drift": {"status": "unmeasured"}}}, []),
        ({"monitors": {"coverage": {"status": "warn"}}}, ["coverage warns"]),
        ({"completeness": {"because": "raw_candidates has no row"}}, ["raw_candidates has no row"]),
        ({}, []),
    ],
)
def test_a_trainer_can_refuse_a_bad_day(lake, tmp_path, manifest, alarms):
    path = tmp_path / "lake" / "manifests" / "training_feed" / "2026-01-03.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"table_version": 0, **manifest}))
    feed = lake.feed(DAY)
    assert feed.alarms == alarms
    if alarms:
        with pytest.raises(gpl.ContractError, match=alarms[0]):
            feed.refuse_alarms()
    else:
        feed.refuse_alarms()
    path.write_text('{"table_version": ')
    with pytest.raises(gpl.ContractError, match=r"2026-01-03\.json is damaged .*--only report --force"):
        lake.feed(DAY)


@pytest.mark.slow
def test_a_script_that_has_read_a_table_ends_well(lake, tmp_path):
    """Threads of Arrow that hold Python's file objects abort the interpreter at its end: half of the times, before."""
    put(Lake(lake.config.lakehouse.root), "pair_scores", 60_000, day=DAY)
    code = f"import gpl_core as gpl; gpl.open_lakehouse({str(config_file(tmp_path))!r}).table('pair_scores', '{DAY}')"
    ends = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode for _ in range(12)]
    assert ends == [0] * 12
