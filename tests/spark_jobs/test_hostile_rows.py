"""Hostile values in every column of every raw table: written, or quarantined for their reason; no date stops."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from gpl_core.contracts.contract import load_contract
from gpu_workers.inputs.feed import read_batches
from spark_jobs import ingest, samples
from tests.spark_jobs.hostile import (
    EMBEDDING,
    PASSTHROUGH,
    Mutant,
    mutants,
    refused_columns,
    unaccounted,
    write_hostile,
    written_rows,
)
from tests.spark_jobs.tiny_lake import TinyLake

pytestmark = pytest.mark.spark


def hostile(root, spark, *, as_text: bool = False) -> tuple[TinyLake, list[Mutant]]:
    """A lake in which each hostile value has gone through ingest, and what was planted."""
    lake = TinyLake(root, spark, PASSTHROUGH, EMBEDDING)
    made = list(mutants(lake.config(), 100_000, as_text))
    write_hostile(lake, made, as_text)
    assert lake.run("ingest", ingest.run) == "done"
    return lake, made


@pytest.fixture(scope="module")
def planted(tmp_path_factory, spark) -> tuple[TinyLake, list[Mutant]]:
    return hostile(tmp_path_factory.mktemp("hostile"), spark)


def test_every_row_is_written_or_quarantined_for_the_column_that_is_hostile(planted):
    lake, made = planted
    refused = Counter((m.table, (m.column.name,)) for m in made if m.fate == "refused")
    assert refused_columns(lake) == refused
    written = Counter(m.table for m in made if m.fate == "written" and m.table != "raw_opt_outs")
    assert written_rows(lake) == written
    assert unaccounted(lake, made) == 0


def test_what_was_refused_can_be_read_and_says_why_in_few_words(planted):
    lake, _ = planted
    for row, failed in lake.rows("quarantine", "row_json", "failed_checks"):
        json.loads(row)
        assert all(len(dict(check)["message"]) < 300 for check in failed)
    reasons = lake.context.counts.details["reasons"]
    assert max(len(line) for lines in reasons.values() for line in lines) < 1000


def test_what_was_written_is_what_was_there(planted):
    lake, made = planted
    values = {}
    for table, column in (("raw_impressions", "user_id"), ("raw_items", "updated_at"), ("raw_items", "withdrawn_at")):
        chosen = [m.value for m in made if (m.table, m.column.name, m.fate) == (table, column, "written")]
        values[column] = {v.decode() if isinstance(v, bytes) else v for v in chosen if v is not None}
    for table, column in (("impressions", "user_id"), ("items", "updated_at"), ("items", "withdrawn_at")):
        assert values[column] - {value for (value,) in lake.rows(table, column)} == set(), column


def test_workers_and_later_jobs_take_what_was_written(planted):
    lake, _ = planted
    assert lake.run("samples", samples.run) == "done"
    assert len(lake.rows("exposed_samples")) == len(lake.rows("impressions"))
    items = lake.lake.open("items")
    columns = [c for c in load_contract("items").column_names]
    read = [title for batch in read_batches(items, items.files, columns) for title in batch["title"]]
    assert sorted(read) == sorted(title for (title,) in lake.rows("items", "title"))


@pytest.mark.slow
def test_words_where_numbers_and_times_belong_are_quarantined_row_by_row(tmp_path, spark):
    lake, made = hostile(tmp_path, spark, as_text=True)
    assert unaccounted(lake, made) == 0
    assert {columns for _, columns in refused_columns(lake)} <= {(m.column.name,) for m in made}
    assert ("raw_impressions", ("price",)) in refused_columns(lake)
