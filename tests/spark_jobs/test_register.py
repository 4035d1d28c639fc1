"""Tables by their names in Spark's catalog: what `gpl register` finds is what every process reads, until it moves."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpl_core.cli import main
from gpl_core.conf.sections import Lakehouse
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.graph.launches import tool
from gpl_core.lakehouse.lake import LOCATIONS, Lake
from gpl_core.lakehouse.query import Query
from spark_jobs.catalog import check_registered
from spark_jobs.register import locate, register
from tests.documented import ROOT, commands
from tests.gpl_core.analyst_lake import AnalystLake
from tests.support import DAY, JVM, config_file, put

pytestmark = pytest.mark.spark
# As in conftest: tables of a few rows, a JVM of half a minute.
QUICK = f"""
spark.driver.extraJavaOptions {JVM}
spark.ui.enabled false
spark.sql.shuffle.partitions 2
spark.databricks.delta.snapshotPartitions 1
spark.sql.codegen.wholeStage false
spark.sql.codegen.factoryMode NO_CODEGEN
"""


@pytest.fixture
def catalog(spark, tmp_path):
    """A database `shop` with an external table, a managed one, one that is not Delta, and a view."""
    put(Lake(str(tmp_path / "there")), "raw_items", 2)
    spark.sql("CREATE DATABASE shop")
    spark.sql(f"CREATE TABLE shop.items USING delta LOCATION '{tmp_path}/there/tables/raw_items'")
    spark.sql(f"CREATE TABLE shop.shown USING delta PARTITIONED BY (dt) AS SELECT 'r' AS request_id, DATE'{DAY}' AS dt")
    spark.sql("CREATE TABLE shop.plain (a INT) USING parquet")
    spark.sql("CREATE VIEW shop.seen AS SELECT * FROM shop.shown")
    yield spark
    spark.sql("DROP DATABASE shop CASCADE")
    spark.sql("DROP DATABASE IF EXISTS ours CASCADE")


def test_the_command_starts_the_job_and_ends_with_its_exit_code(tmp_path, capfd):
    path = config_file(tmp_path, {"launch": {"spark_submit": ["--version"]}})  # it says its version and starts nothing
    assert main(["register", "--config", str(path)]) == 0
    said = capfd.readouterr()
    assert f"spark_jobs/register.py --config {path}" in said.out
    assert "version 4.0" in said.err
    wrong = config_file(tmp_path, {"launch": {"spark_submit": ["--no-such-option"]}})
    assert main(["register", "--config", str(wrong)]) == 1


def test_names_are_looked_up_once_for_every_process_and_a_move_is_noticed(catalog, tmp_path):
    named = {"raw_items": "catalog://shop.items", "raw_impressions": "catalog://spark_catalog.shop.shown"}
    house = Lakehouse(root=str(tmp_path / "lake"), tables=named, database="ours")
    with pytest.raises(MissingInputError, match=r"raw_items: .*catalog://shop\.items; run gpl register"):
        Lake.of(house).open("raw_items")
    put(Lake(house.root), "user_stats", 1)
    done = register(catalog, house)
    found = done["located"]
    assert set(done["tables"]) == {"raw_items", "raw_impressions", "user_stats"}
    assert catalog.table("ours.user_stats").count() == 1
    assert json.loads((tmp_path / "lake" / LOCATIONS).read_text()) == found
    lake = Lake.of(house)
    assert lake.uri("raw_items") == f"{tmp_path}/there/tables/raw_items"
    assert len(lake.open("raw_items").read(columns=["item_id"])) == 2
    managed = Path(lake.uri("raw_impressions"))
    assert (managed.name, (managed / "_delta_log").is_dir()) == ("shown", True)
    assert lake.uri("items") == f"{tmp_path}/lake/tables/items"

    check_registered(catalog, lake, "raw_items")
    put(Lake(str(tmp_path / "moved")), "raw_items", 1)
    catalog.sql("DROP TABLE shop.items")
    catalog.sql(f"CREATE TABLE shop.items USING delta LOCATION '{tmp_path}/moved/tables/raw_items'")
    with pytest.raises(ContractError, match=r"raw_items: .*moved.*there.*gpl register again"):
        check_registered(catalog, lake, "raw_items")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("shop.nothing", MissingInputError, "no table shop.nothing"),
        ("shop.plain", ContractError, "shop.plain is not a Delta table"),
        ("shop.seen", ContractError, "shop.seen is a view, which has no log"),
    ],
)
def test_a_name_that_leads_nowhere_changes_nothing(catalog, tmp_path, name, error, words):
    house = Lakehouse(root=str(tmp_path / "lake"), tables={"raw_items": f"catalog://{name}"})
    with pytest.raises(error, match=words):
        locate(catalog, house)
    assert not (tmp_path / "lake").exists()


@pytest.mark.slow
def test_the_catalog_of_the_documents_outlives_its_sessions(tmp_path):
    """Files and commands of docs/deploy.md as they stand there, but for `gpl run`: the tables are there already."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    section = page.partition("\n## Tables in a catalog\n")[2].partition("\n## ")[0]
    conf, config, sql, _ = re.findall(r"```\w*\n(.*?)```", section.replace("/data/", f"{tmp_path}/"), re.S)
    (tmp_path / "catalog.conf").write_text(conf + QUICK)
    (tmp_path / "shop.sql").write_text(sql)
    house = AnalystLake(tmp_path).lake
    Path(house.root).rename(tmp_path / "gpl")
    lake = Lake(str(tmp_path / "gpl"))
    raw = {name.removeprefix("raw_"): name for name in yaml.safe_load(config)["lakehouse"]["tables"]}
    for name, table in raw.items():
        put(Lake(str(tmp_path / "made")), table, 2)
        (tmp_path / "shop").mkdir(exist_ok=True)
        (tmp_path / "made" / "tables" / table).rename(tmp_path / "shop" / name)
    (tmp_path / "shop.yaml").write_text(f"{config}run: {{start_date: {DAY}, end_date: {DAY}}}\n")

    env = {**os.environ, "PYTHONPATH": str(ROOT), "SPARK_LOCAL_IP": "127.0.0.1"}
    said = {}
    for command in dict.fromkeys(c for c in commands(section) if not c.startswith("gpl run")):
        program, *words = shlex.split(command)
        start = [sys.executable, "-m", "gpl_core.cli"] if program == "gpl" else [tool(program)]
        done = subprocess.run([*start, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said[command] = done.stdout
    _, registered, coverage = said.values()
    done = json.loads(registered.splitlines()[-1])
    assert sorted(done["located"].values()) == sorted(str(tmp_path / "shop" / name) for name in raw)
    assert done["left_out"] == []
    rows = Query(lake).rows("SELECT * FROM coverage ORDER BY dt, outcome")
    assert [line.split("\t") for line in coverage.splitlines()] == [[str(v) for v in row.values()] for row in rows]
    assert len(rows) > 1
