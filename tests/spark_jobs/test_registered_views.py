"""Views in Spark's catalog: the same figures as `gpl sql` gives, with comments, and no table taken for another."""

from __future__ import annotations

import math

import pytest

from gpl_core.commands.forget import forget
from gpl_core.errors import ContractError, UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.person import Person
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.views import all_views
from spark_jobs.register import publish
from tests.documented import questions
from tests.gpl_core.analyst_lake import AnalystLake

pytestmark = pytest.mark.spark


def rounded(rows: list[dict]) -> list[tuple]:
    """Rows in an order of their own, floats to nine digits."""

    def plain(value):
        return float(f"{value:.9g}") if isinstance(value, float) and math.isfinite(value) else value

    return sorted((tuple(plain(v) for v in row.values()) for row in rows), key=repr)


@pytest.mark.slow
def test_spark_gives_what_gpl_sql_gives(spark, tmp_path):
    lake = AnalystLake(tmp_path).with_a_day_before_and_scores().lake
    made = publish(spark, lake, "analysts")
    assert (set(made["views"]), made["left_out"]) == (set(all_views()), [])
    query = Query(lake)
    for name, view in all_views().items():
        table = spark.table(f"analysts.{name}")
        comments = [(f.name, f.metadata["comment"]) for f in table.schema]
        assert comments == list(view.columns)
        assert rounded([r.asDict() for r in table.collect()]) == rounded(query.rows(f"SELECT * FROM {name}")), name
    spark.catalog.setCurrentDatabase("analysts")
    for question, sql in questions().items():
        assert rounded([r.asDict() for r in spark.sql(sql).collect()]) == rounded(query.rows(sql)), question
    spark.catalog.setCurrentDatabase("default")
    described = spark.sql("DESCRIBE TABLE EXTENDED analysts.coverage").collect()
    assert [r["data_type"] for r in described if r["col_name"] == "Comment"] == [all_views()["coverage"].description]

    list(forget(lake, Person("u1")))
    left = spark.table("analysts.pseudo_labels").select("user_id").collect()
    assert [r["user_id"] for r in left] == ["u2", "u2"]

    with pytest.raises(ContractError, match=r"analysts\.\w+ is at .*choose another lakehouse\.database"):
        publish(spark, AnalystLake(tmp_path / "other").lake, "analysts")
    with pytest.raises(UsageError, match=r"lakehouse\.database: .a b."):
        publish(spark, lake, "a b")


def test_a_view_without_its_table_is_left_out(spark, tmp_path):
    assert publish(spark, Lake(str(tmp_path)), "nothing") == {"tables": [], "views": [], "left_out": list(all_views())}
