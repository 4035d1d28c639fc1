"""Analysts' SQL, views and explanations without Spark: right figures, and nothing but reading."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.cli import main
from gpl_core.commands.explain import explain
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, MissingInputError, UsageError
from gpl_core.interest.down_sampling import keep_probability
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.statements import check_reads, quoted
from gpl_core.lakehouse.views import all_views, parse_view
from tests.gpl_core.analyst_lake import AnalystLake
from tests.support import DAY, ONE, put


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> AnalystLake:
    return AnalystLake(tmp_path_factory.mktemp("analyst"))


@pytest.fixture
def gpl(lake, capsys):
    """Run a `gpl` command on the lake; returns exit code, stdout and stderr."""
    config = str(Path(lake.config.lakehouse.root).parent / "test.yaml")

    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        code = main([command, "--config", config, *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# ---- views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(all_views()))
def test_a_view_has_the_columns_that_its_header_explains(lake, name):
    result = Query(lake.lake).run(f"SELECT * FROM {name}")
    assert result.columns == tuple(column for column, _ in all_views()[name].columns)
    assert list(result.rows)


def test_label_quality(lake):
    found = {r["source"]: r for r in Query(lake.lake).rows("SELECT * FROM label_quality")}
    labels = [r for r in lake.labels if r["source"] == "unexposed"]
    assert set(found) == {"unexposed", "exposed", "uniform"}
    assert found["unexposed"]["pairs"] == 3
    assert found["unexposed"]["users"] == 2
    assert found["unexposed"]["mean_label"] == pytest.approx(sum(r["pseudo_label"] for r in labels) / 3)
    assert found["unexposed"]["mean_weight"] == pytest.approx(1.0)


def test_distributions_and_slices_count_every_row_once_per_measure(lake):
    query = Query(lake.lake)
    rows = query.rows("SELECT measure, sum(pairs) AS n FROM label_distribution GROUP BY measure")
    assert {r["measure"]: r["n"] for r in rows} == {"pseudo_label": 5, "weight": 5}
    found = {(r["slice"], r["value"]): r["feed_rows"] for r in query.rows("SELECT * FROM label_slices")}
    assert found == {
        ("channel", "popular"): 3, ("category", "a"): 2, ("category", "b"): 1, ("popularity", "2"): 1,
        ("popularity", "unseen"): 2, ("item", "known"): 1, ("item", "new"): 2, ("user", "known"): 2, ("user", "new"): 1,
    }  # fmt: skip
    (whole,) = query.rows("SELECT * FROM label_slices WHERE slice = 'channel'")
    labels = [r["pseudo_label"] for r in lake.labels if r["source"] == "unexposed"]
    assert (whole["mean_label"], whole["spread_label"], whole["highest_label"]) == pytest.approx(
        (statistics.mean(labels), statistics.stdev(labels), max(labels)), abs=1e-6
    )


def test_down_sampling_shows_what_the_trainers_rule_removes(lake, tmp_path):
    """Another lakehouse's counts: 37 items of very different popularity, one of them without positives."""
    counts = np.array([0, *(int(2000 / n**1.5) + 1 for n in range(1, 37))])
    apart = Lake(str(tmp_path))
    put(apart, "item_stats", [
        {"item_index": i, "impressions": 0, "clicks": 0, "positives": int(n), "popularity_share": 0.0, "dt": DAY}
        for i, n in enumerate(counts)
    ])  # fmt: skip
    rows = Query(apart).rows("SELECT * FROM down_sampling")
    assert {r["keep_target_share"] for r in rows} == {0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95}
    deciles = np.array_split(np.argsort(counts, kind="stable")[1:], 10)
    for row in rows:
        removed = counts * (1 - keep_probability(counts, row["keep_target_share"]))
        members = deciles[row["popularity"] - 1]
        assert (row["item_count"], row["positives"]) == (len(members), counts[members].sum())
        assert row["removed_share"] == pytest.approx(removed[members].sum() / counts[members].sum(), abs=1e-12)
    assert max(r["removed_share"] for r in rows if r["popularity"] == 10) > 0.5


def test_coverage_tells_why_a_row_has_no_label(lake):
    rows = Query(lake.lake).rows("SELECT outcome, unexposed_rows FROM coverage")
    assert {r["outcome"]: r["unexposed_rows"] for r in rows} == {"labeled": 3, "no_history": 1, "no_embedding": 1}


def test_calibration_compares_labels_with_the_clicks_of_their_own_source(lake):
    found = {r["source"]: r for r in Query(lake.lake).rows("SELECT * FROM calibration")}
    labels = {r["source"]: r["pseudo_label"] for r in lake.labels if r["source"] != "unexposed"}
    assert {s: (r["impressions"], r["clicks"]) for s, r in found.items()} == {"exposed": (1, 1), "uniform": (1, 0)}
    assert found["exposed"]["squared_error"] == pytest.approx((labels["exposed"] - 1) ** 2)
    for source, row in found.items():
        assert row["band_from"] <= labels[source] < row["band_from"] * 2**0.5
    rows = Query(lake.lake).rows("SELECT * FROM calibration_slices")
    assert {(r["source"], r["slice"], r["value"]) for r in rows} == {
        *((s, "all", "all") for s in labels), ("exposed", "category", "a"), ("uniform", "category", "b"),
        ("exposed", "popularity", "2"), ("uniform", "popularity", "unseen"), ("exposed", "item", "known"),
        ("uniform", "item", "new"), ("exposed", "user", "known"), ("uniform", "user", "new"),
    }  # fmt: skip
    for row in rows:
        clicked = found[row["source"]]["clicks"]
        assert (row["impressions"], row["clicks"], row["click_rate"]) == (1, clicked, clicked)
        assert row["calibration_error"] == pytest.approx(abs(labels[row["source"]] - clicked))


def test_anchors_of_a_user_with_the_titles_that_carry_them(lake):
    rows = Query(lake.lake).rows("SELECT * FROM user_anchors ORDER BY user_id, anchor_rank, item_id")
    assert [(r["user_id"], r["anchor_rank"], r["anchor"], r["title"]) for r in rows] == [
        ("u1", 0, "1,1,1", "title 0"), ("u1", 0, "1,1,1", "title 1"), ("u1", 1, "2,2,2", "title 2"),
        ("u2", 0, "2,2,2", "title 2"), ("u2", 1, "9,9,9", None),
    ]  # fmt: skip
    assert rows[0]["probability"] == pytest.approx(0.5)
    (pair,) = Query(lake.lake).rows("SELECT * FROM explained_pairs WHERE user_id = 'u1' AND item_id = 'i3'")
    assert (pair["anchor"], pair["anchor_items"], pair["anchor_title"]) == ("1,1,1", 2, "title 0")


@pytest.mark.parametrize("text", ["SELECT 1", "-- words\nSELECT 1", "-- words\n--   a: b\nDELETE FROM items"])
def test_a_view_without_words_columns_or_select_is_refused(text):
    with pytest.raises(ContractError, match=r"view v: expected a description"):
        parse_view(text, "v")


def test_no_view_is_called_like_a_table():
    assert not set(all_views()) & set(all_contracts())


# ---- gpl sql ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE items", "INSERT INTO items SELECT * FROM items", "WITH x AS (SELECT 1) INSERT INTO items SELECT 1",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO 'FILE'", "/* SELECT */ CREATE VIEW v AS SELECT 1", "SELECT 1; SELECT 2",
        "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION 'FILE'", "SET x = 1", "SHOW ALL", "DESCRIBE SELECT 1", "",
        r"WITH x AS (SELECT E'\'') INSERT INTO items SELECT '1'", "EXPLAIN EXPLAIN ANALYZE DELETE FROM items",
        "COPY items TO 'FILE'", "ATTACH 'FILE' AS x", "INSTALL httpfs", "PRAGMA database_list", "TABLE items",
        "SELECT * FROM '/etc/passwd'", 'SELECT * FROM "/etc/passwd"', "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM items; SELECT * FROM items", "SELECT * INTO x FROM items",
        "EXPLAIN ANALYZE INSERT INTO items SELECT 1",
    ],
)  # fmt: skip
def test_what_does_not_only_read_is_refused_and_changes_nothing(gpl, lake, tmp_path, sql):
    before = lake.lake.open("items").version
    code, out, error = gpl("sql", sql.replace("FILE", str(tmp_path / "x.csv")))
    assert code == 2
    assert error.startswith("error: ")
    assert out == ""
    assert lake.lake.open("items").version == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sql",
    [
        "WITH \"'\" AS (SELECT 1) INSERT INTO items SELECT 1 AS \"'\"",
        'WITH "--" AS (SELECT 1) INSERT INTO items SELECT 1',
        "WITH `/*` AS (SELECT 1) INSERT INTO items SELECT 1 AS `*/`", 'SELECT 1 AS "--"; COPY items TO 0',
        "WITH x AS (SELECT $a$'$a$) INSERT INTO items SELECT 1 -- '",
    ],
)  # fmt: skip
def test_no_quoted_name_hides_what_writes_from_the_check_itself(sql):
    with pytest.raises(UsageError, match=r"only reads|one statement|plain strings"):
        check_reads(sql)


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT 1 AS "a;\'b"',
        "SELECT '$5'",
        "SELECT 'DROP'';' AS x",
        'SELECT "set" FROM t',
        "(SELECT 1)",
        "-- drop\nSELECT 1",
    ],
)
def test_words_inside_strings_names_and_comments_are_no_statement(sql):
    assert check_reads(sql).kind == "select"


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("SELECT items.title FROM pair_scores AS items", {"pair_scores"}),
        ("SELECT 'candidates', samples FROM Items -- impressions", {"items"}),
        ("SELECT * FROM items WHERE item_id IN (SELECT item_id FROM candidates) UNION TABLE truth",
         {"items", "candidates", "truth"}),
        ("WITH x AS (SELECT * FROM items) SELECT * FROM x", {"x", "items"}),
        ("EXPLAIN ANALYZE VERBOSE SELECT * FROM items", {"items"}),
        ("SELECT a ~ 'x', {'k': a[1]}, a DIV 2, * EXCLUDE (b) FROM items LEFT ANTI JOIN truth USING (a)",
         {"items", "truth"}),
    ],
)  # fmt: skip
def test_names_are_those_of_tables_alone(sql, names):
    assert check_reads(sql).names == names


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_any_text_survives_as_a_string_literal_of_the_engine(text):
    assert Query(Lake("/nowhere")).rows(f"SELECT {quoted(text)} AS text") == [{"text": text}]


def test_sql_prints_json_csv_and_a_table(gpl, lake):
    sql = "SELECT user_id, pseudo_label * 0 AS zero, NULL AS nothing, x'ff00' AS b FROM pseudo_labels "
    sql += "WHERE item_id = 'i2'"
    code, out, error = gpl("sql", sql, "--json")
    assert (code, json.loads(out)) == (0, {"user_id": "u1", "zero": 0.0, "nothing": None, "b": "/wA="})
    assert error == f"read: pseudo_labels@{lake.lake.open('pseudo_labels').version}\n"
    assert gpl("sql", sql, "--csv")[1] == "user_id,zero,nothing,b\nu1,0.0,,/wA=\n"
    deep = "SELECT named_struct('b', x'ff00', 'n', make_array(CAST('NaN' AS DOUBLE), 1)) AS deep"
    assert json.loads(gpl("sql", deep, "--json")[1]) == {"deep": {"b": "/wA=", "n": [None, 1.0]}}
    table = gpl("sql", sql)[1]
    assert "user_id" in table
    assert "u1" in table
    assert "2 bytes" in table


def test_sql_reads_the_version_that_it_is_told(gpl, tmp_path, capsys):
    lake = AnalystLake(tmp_path)
    config = str(tmp_path / "test.yaml")
    count = ["SELECT count(*) AS n FROM user_stats"]
    lake.put("user_stats", [{"user_id": "u2", "impressions": 1, "clicks": 0, "positives": 0}])
    newest = lake.lake.open("user_stats").version
    for version, rows in ((newest, 2), (newest - 1, 1)):
        assert main(["sql", "--config", config, *count, "--csv", "--version", f"user_stats={version}"]) == 0
        said = capsys.readouterr()
        assert said.out == f"n\n{rows}\n"
        assert said.err == f"read: user_stats@{version}\n"
    assert main(["sql", "--config", config, *count, "--version", "user_stats=99"]) == 2
    assert f"version 99 cannot be read at {lake.lake.uri('user_stats')}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sql", "code", "named"),
    [
        ("SELECT * FROM pseudo_lables", 2, "did you mean pseudo_labels"),
        ("SELECT nosuch FROM items", 2, "No field named nosuch"),
        ("SELECT * FROM anchor_requests", 4, "run the step anchor_requests first"),
        ("SELECT * FROM raw_items", 4, "lakehouse.tables.raw_items"),
        ("SELECT 1 +", 2, "SQL: "),
        ("DESCRIBE lable_quality", 2, "did you mean label_quality?"),
    ],
)
def test_a_wrong_name_is_said_with_what_to_do(gpl, sql, code, named):
    found, out, error = gpl("sql", sql)
    assert (found, out) == (code, "")
    assert named in error


def test_a_view_whose_table_is_missing_names_both(tmp_path):
    query = Query(Lake(str(tmp_path)))
    with pytest.raises(
        MissingInputError, match=r"view pair_outcomes reads table pseudo_labels: .*run the step pseudo_labels"
    ):
        query.run("SELECT * FROM coverage")
    with pytest.raises(UsageError, match=r"--version nosuch: no such table"):
        Query(query.lake, {"nosuch": 1})


def test_show_and_describe_tell_what_is_there(gpl):
    names = [json.loads(line)["name"] for line in gpl("sql", "SHOW TABLES", "--json")[1].splitlines()]
    assert {"pseudo_labels", "training_feed", *all_views()} <= set(names)
    assert "anchor_requests" not in names
    assert "Calibrated click probability" in gpl("sql", "describe pseudo_labels", "--csv")[1]
    assert "Rows of unexposed_samples" in gpl("sql", "DESCRIBE coverage", "--csv")[1]


def test_the_summary_tells_alarms_and_only_alarms(gpl, lake):
    lake.put("monitors", [
        {"monitor": m, "value": 0.3, "threshold": 0.2, "bound": "most", "status": s,
         "reason": f"{m}: {s}", "run_id": ""}
        for m, s in (("label_drift", "warn"), ("coverage", "ok"))
    ])  # fmt: skip
    code, out, _ = gpl("summary", "--run-date", DAY.isoformat())
    assert code == 0
    assert f"monitor, {DAY}: warn: label_drift: warn" in out
    assert "coverage: ok" not in out


# ---- gpl explain -----------------------------------------------------------------------------------------------


def test_every_label_is_explained_and_its_recomputed_values_equal_the_stored_ones(lake):
    for label in lake.labels:
        found = explain(lake.config, label["user_id"], label["item_id"], DAY)
        assert set(found["recomputed"]) >= {"pseudo_label", "weight", "similarity", "coherence"}
        for name, both in found["recomputed"].items():
            assert both["computed"] == pytest.approx(both["stored"], abs=1e-6), name
            assert both["stored"] == label[name]


@pytest.mark.parametrize(("days", "said"), [(14, True), (-14, True), (15, False)])
def test_a_date_without_the_pair_names_those_nearby_that_have_it(lake, days, said):
    with pytest.raises(MissingInputError, match="no pseudo-label for user u1, item i3 on ") as error:
        explain(lake.config, "u1", "i3", DAY + days * ONE)
    assert str(error.value).endswith(f"; the pair has a label on {DAY}") == said


def test_an_explanation_shows_anchor_titles_and_nearest_history(gpl):
    code, out, _ = gpl("explain", "--user", "u1", "--item", "i3", "--run-date", DAY.isoformat(), "--json")
    found = json.loads(out)
    assert code == 0
    assert [(a["rank"], a["sid"], a["matched"]) for a in found["anchors"]] == [
        (0, [1, 1, 1], True),
        (1, [2, 2, 2], False),
    ]
    assert [i["title"] for i in found["anchors"][0]["items"]] == ["title 0", "title 1"]
    assert [(h["item_id"], h["events_ago"]) for h in found["nearest_history"]] == [("i1", 1), ("i0", 0)]
    words = gpl("explain", "--user", "u1", "--item", "i3", "--run-date", DAY.isoformat())[1]
    assert "pseudo-label" in words
    assert "title 1" in words


@pytest.mark.parametrize(
    ("user", "item", "named"),
    [
        ("u1", "i1", "the item was shown to the user"),
        ("u2", "i2", "not in unexposed_samples"),
        ("u2", "i1", "the worker rejected"),
        ("u3", "i0", "no anchors"),
        ("u1", "i9", "the item is not in table items"),
        ("u1' OR '1'='1", "i9", "the item is not in table items"),
    ],
)
def test_a_pair_without_a_label_is_told_why(gpl, user, item, named):
    code, _, error = gpl("explain", "--user", user, "--item", item, "--run-date", DAY.isoformat())
    assert code == 4
    assert named in error


def test_a_stored_value_that_its_inputs_do_not_give_is_an_error(tmp_path):
    lake = AnalystLake(tmp_path)
    lake.put("item_sids", [
        {"item_index": 3, "issue": 1, "sid": [1, 1, 1], "residual_norm": 0.1, "bucket_size": 1, "content_hash": "h",
         "retired_at": 0}
    ], sid_version=lake.tokenizer)  # fmt: skip
    with pytest.raises(ContractError, match=r"similarity is stored as .*, computed as"):
        explain(lake.config, "u1", "i3", DAY)
