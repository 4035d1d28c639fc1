"""`gpl init`: what the logs of tables show is proposed, the rest asked for.

tests/spark_jobs/test_layouts.py has the layouts of the documents."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
import yaml
from deltalake import write_deltalake

from gpl_core.cli import main
from gpl_core.config import load_config
from gpl_core.lakehouse.raw_mapping import SeenTable, columns_of, propose
from tests.support import DAY, ONE

NOON = datetime(DAY.year, DAY.month, DAY.day, 12, tzinfo=UTC)
SHOWN: dict[str, Any] = {"requestId": "r", "productId": 7, "uid": "u", "ts": NOON, "slot": 1, "click": True}
RECALLED: dict[str, Any] = {"request_id": "r", "product_id": 7, "userId": "u", "ts": NOON, "source": "x"}
PRODUCTS: dict[str, Any] = {"Product_ID": 7, "name": "red shoe", "modified_at": NOON, "price": 1.5}


def table(place: Path, row: dict[str, Any], days: int = 12, **options: Any) -> None:
    """A table of one row a day, each in a file of its own."""
    for n in range(days):
        moved = {k: v + n * ONE if isinstance(v, (datetime, type(DAY))) else v for k, v in row.items()}
        write_deltalake(place, pa.Table.from_pylist([moved]), mode="append", **options)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tables under names of their own, one level down; no column says what was shown at random."""
    root = tmp_path_factory.mktemp("shop")
    table(root / "web" / "shown_items", SHOWN)
    table(root / "web" / "recalled_items", RECALLED, days=11)
    table(root / "products", PRODUCTS, days=1)
    return root


def init(out: Path, *places: object) -> int:
    return main(["init", *map(str, places), "--out", str(out)])


def test_what_can_be_seen_is_proposed_and_what_is_missing_is_said(shop, tmp_path, capsys):
    out = tmp_path / "conf" / "my shop.yaml"
    assert init(out, shop, "--yes") == 4
    said = capsys.readouterr().out
    assert "raw_impressions: no column found for is_random" in said
    assert f"gpl check-raw --config '{out}'" in said
    text = out.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=my shop.schema.json"
    schema = json.loads((tmp_path / "conf" / "my shop.schema.json").read_text())
    body = yaml.safe_load(text)
    jsonschema.validate(json.loads(json.dumps(body, default=str)), schema)
    config = load_config(str(out))
    assert config.lakehouse.tables == {
        "raw_items": str(shop / "products"), "raw_impressions": str(shop / "web" / "shown_items"),
        "raw_candidates": str(shop / "web" / "recalled_items"),
    }  # fmt: skip
    assert config.lakehouse.columns == {
        "raw_items": {"item_id": "Product_ID", "title": "name", "updated_at": "modified_at"},
        "raw_impressions": {"request_id": "requestId", "item_id": "productId", "user_id": "uid", "event_time": "ts",
                            "position": "slot", "clicked": "click", "dt": "ts"},
        "raw_candidates": {"item_id": "product_id", "user_id": "userId", "event_time": "ts", "channel": "source",
                           "dt": "ts"},
    }  # fmt: skip
    last = DAY + 9 * ONE  # recalled is there a day longer, shown two
    assert (config.run.start_date, config.run.end_date, config.run.history_start) == (last - 6 * ONE, last, DAY)
    assert config.lakehouse.root == str(tmp_path / "conf" / "lakehouse" / "my shop")


def test_history_is_what_users_did_and_check_raw_misses_none_of_it(tmp_path, capsys):
    before = {name: NOON - n * ONE for name, n in (("bought", 3), ("recalled", 5))}
    table(tmp_path / "shop" / "shown", {**SHOWN, "is_random": False}, days=4)
    table(tmp_path / "shop" / "recalled", {**RECALLED, "ts": before["recalled"]}, days=9)
    table(tmp_path / "shop" / "products", PRODUCTS, days=1)
    bought = {"user_id": "u", "item_id": 7, "event_time": before["bought"], "kind": "buy"}
    table(tmp_path / "shop" / "bought", bought, days=4)
    out = tmp_path / "shop.yaml"
    assert init(out, tmp_path / "shop", "--yes") == 0, capsys.readouterr()
    config = load_config(str(out))
    assert config.run.history_start == DAY - 3 * ONE, "what was recalled before is no history"
    capsys.readouterr()
    main(["check-raw", "--config", str(out)])
    assert "history" not in capsys.readouterr().out


def test_nothing_is_overwritten_and_nothing_written_that_would_not_load(shop, tmp_path, capsys):
    out = tmp_path / "shop.yaml"
    (tmp_path / "shop.schema.json").write_text("mine")
    assert init(out, shop, "--yes") == 2
    assert "shop.schema.json: already exists and is not overwritten" in capsys.readouterr().err
    assert init(tmp_path / "other.yaml", shop, "--yes", "--root", "/data/50%") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["shop.schema.json"]
    assert (tmp_path / "shop.schema.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("places", "code", "said"),
    [
        (["{tmp}"], 4, "no Delta tables (folders with _delta_log) are there or below it"),
        (["raw_items={shop}/web"], 4, "2 Delta tables"),
        (["raw_item={shop}/products"], 2, "'raw_item' is no raw table; these are raw_items, "),
        (["catalog://shop.items"], 2, "say which table that is: raw_items=catalog://shop.items"),
        (["{shop}/products", "{shop}/web", "--run-date", "2026-01-05", "--end-date", "2026-01-06"], 2, "give either"),
        (["{shop}/products"], 2, "pass --start-date and --end-date"),
    ],
)
def test_what_it_cannot_do_is_said(shop, tmp_path, capsys, places, code, said):
    places = [p.format(tmp=tmp_path, shop=shop) for p in places]
    assert init(tmp_path / "x.yaml", *places, "--yes") == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


def test_a_damaged_table_is_named_and_the_others_are_looked_at(tmp_path, capsys):
    place = tmp_path / "ds=2026"
    table(place / "items", PRODUCTS, days=1)
    table(place / "broken", PRODUCTS, days=1)
    (place / "broken" / "_delta_log" / f"{0:020d}.json").write_text("not json")
    assert init(tmp_path / "shop.yaml", place, "--run-date", "2026-01-05", "--yes") == 4
    said = capsys.readouterr()
    assert "broken/_delta_log/00000000000000000000.json is damaged" in said.err
    assert f"raw_items: {place}/items" in said.out


def test_tables_may_be_named_and_lie_in_a_catalog(shop, tmp_path, capsys):
    out = tmp_path / "shop.yaml"
    dates = ["--start-date", "2026-01-05", "--end-date", "2026-01-06"]
    assert init(out, f"raw_items={shop}/products", "raw_candidates=catalog://shop.recalled", *dates, "--yes") == 4
    config = load_config(str(out))
    assert config.lakehouse.tables == {
        "raw_items": str(shop / "products"), "raw_candidates": "catalog://shop.recalled"
    }  # fmt: skip
    assert (str(config.run.start_date), str(config.run.end_date)) == ("2026-01-05", "2026-01-06")
    assert "    # raw_impressions: LOCATION  # what was shown: not found" in out.read_text()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said if line.startswith("  gpl ")] == ["register", "check-raw", "run"]


def test_a_terminal_is_asked_for_the_rest_alone(tmp_path, monkeypatch, capsys):
    """A table without telling names, a column of another name, and where to write."""
    table(tmp_path / "a", {"sku": "7", "stamp": NOON, "title": "red shoe"}, days=1)
    table(tmp_path / "b", {**SHOWN, "was_random": False}, days=2)
    table(tmp_path / "c", {k: v for k, v in RECALLED.items() if k != "source"} | {"lane": "x"}, days=2)
    asked: list[str] = []
    answers = iter(["1", "1", "STAMP", "was_random", "nonsense", "s3://bucket/gpl"])

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    out = tmp_path / "shop.yaml"
    assert init(out, tmp_path) == 4, "the channel is still unknown"
    tables = ["Which of these is raw_items, the items", "Which of these is raw_candidates, what was recalled"]
    assert [q.split("?")[0] for q in asked[:2]] == tables
    assert sorted(q.split(" is ")[1].split(" (")[0] for q in asked[2:5]) == ["channel", "is_random", "updated_at"]
    assert asked[5:] == [f"Where should gpl write its tables, models and reports? [{tmp_path}/lakehouse/shop] "]
    lakehouse = load_config(str(out)).lakehouse
    assert lakehouse.root == "s3://bucket/gpl"
    assert lakehouse.columns["raw_items"] == {"item_id": "sku", "updated_at": "stamp"}
    assert lakehouse.columns["raw_impressions"]["is_random"] == "was_random"
    assert "  # raw_candidates has no column for channel: add one, or map one under columns" in out.read_text()


def test_types_decide_where_names_do_not(tmp_path):
    odd = SeenTable(
        "x/orders", {"user": "string", "sku": "long", "time": "long", "created_at": "timestamp", "type": "string"}
    )
    assert columns_of("raw_interactions", odd) == {
        "user_id": "user", "item_id": "sku", "event_time": "created_at", "kind": "type", "dt": "created_at"
    }  # fmt: skip
    assert propose([odd]) == {"raw_interactions": odd}
    partitioned = SeenTable("x/orders", {**odd.kinds, "batch": "string", "p": "integer"}, days=("p",))
    assert columns_of("raw_interactions", partitioned)["dt"] == "p"
    ours = SeenTable("x/interactions", odd.kinds, contract="interactions")
    assert propose([ours, odd]) == {"raw_interactions": odd}, "what gpl has written is no input"
    users = SeenTable("x/users", {"user_id": "string", "opted_out_at": "timestamp"})
    assert propose([SeenTable("x/accounts", {"user_id": "string"}), users]) == {"raw_opt_outs": users}
