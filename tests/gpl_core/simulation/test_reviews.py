"""`import_reviews`: order and split are kept, requests surround real purchases, bad input is refused whole."""

import gzip
import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from gpl_core.cli import main
from gpl_core.commands.import_reviews import import_settings
from gpl_core.commands.simulate import simulation_settings
from gpl_core.config import load_config
from gpl_core.contracts.arrow_checks import check_batch
from gpl_core.contracts.contract import load_contract
from gpl_core.contracts.raw_values import midnight
from gpl_core.errors import ContractError, MissingInputError, UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.simulation.marketplace import simulate
from gpl_core.simulation.review_files import Reviews, ReviewUser, read_reviews
from gpl_core.simulation.reviews import (
    TABLES,
    ImportSettings,
    day_of_requests,
    generate,
    histories,
    import_reviews,
    place_events,
)
from gpl_core.simulation.rows import DAY, CatalogItem
from gpl_core.simulation.simulation_settings import SimulationSettings
from tests.gpl_core.simulation.made import Collected

SETTINGS = ImportSettings(candidates_per_request=20, exposed_per_request=5, random_share=0.1)
FIRST = SETTINGS.start_date - timedelta(days=SETTINGS.lead_days)  # first day with requests
WORDS = ["drill", "saw", "glove", "mask", "screw", "tape", "valve", "hose", "lamp", "clamp"]


def made_reviews(users: int = 60, items: int = 80, seed: int = 0) -> Reviews:
    """A small data set: users follow one word each, most have test events, some items recur."""
    rng = np.random.default_rng(seed)
    catalog = tuple(
        CatalogItem(f"p{n}", f"{WORDS[n % 10]} number {WORDS[n // 10 % 10]}", "" if n % 7 == 0 else "useful", "", "")
        for n in range(items)
    )
    people = []
    for n in range(users):
        counts = rng.integers(0, 4, 3) + np.array([1, 0, 0])
        numbers = tuple(int(i) for i in (rng.integers(0, items // 10, counts.sum()) * 10 + n % 10))
        splits = ("train",) * int(counts[0]) + ("valid",) * int(counts[1]) + ("test",) * int(counts[2])
        people.append(ReviewUser(f"A{n}", numbers, splits))
    return Reviews(catalog, tuple(people), "digest")


@pytest.fixture(scope="module")
def imported() -> tuple[Reviews, Collected]:
    reviews, sink = made_reviews(), Collected()
    generate(reviews, SETTINGS, sink.write)
    return reviews, sink


def write(folder: Path, reviews: Reviews) -> tuple[Path, Path]:
    """The two files of `reviews`, gzipped JSON lines."""
    items, sequences = folder / "items.jsonl.gz", folder / "sequences.jsonl.gz"
    with gzip.open(items, "wt") as out:
        for item in reviews.items:
            out.write(json.dumps(item.__dict__) + "\n")
    with gzip.open(sequences, "wt") as out:
        for user in reviews.users:
            events = [{"item_id": reviews.items[i].item_id, "split": s} for i, s in zip(user.items, user.splits)]
            out.write(json.dumps({"user_id": user.user_id, "events": events}) + "\n")
    return items, sequences


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    reviews = made_reviews()
    found = read_reviews(*write(tmp_path, reviews))
    assert (found.items, found.users) == (reviews.items, reviews.users)


@effort(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 5),
)
def test_every_event_keeps_its_place_in_the_order_and_its_splits_window(
    counts: list[tuple[int, int, int]], seed: int
) -> None:
    users = tuple(
        ReviewUser(f"A{n}", (0,) * (a + b + c), ("train",) * a + ("valid",) * b + ("test",) * c)
        for n, (a, b, c) in enumerate(counts)
    )
    settings = replace(SETTINGS, seed=seed)
    events = place_events(Reviews((CatalogItem("p0", "x", "", "", ""),), users, ""), settings)
    start = midnight(settings.start_date)
    low = np.array([start - 31 * DAY, start - 10 * DAY, start])
    high = np.array([start - 10 * DAY, start, start + 4 * DAY])
    assert ((events.time >= low[events.split]) & (events.time < high[events.split])).all()
    same = events.user[1:] == events.user[:-1]
    assert (events.time[1:] > events.time[:-1])[same].all()
    # Spread evenly: of n test events, each of the four days holds n / 4, rounded down or up.
    for n, (_, _, count) in enumerate(counts):
        days = (events.time[(events.user == n) & (events.split == 2)] - start) // DAY
        assert all(count // 4 <= (days == d).sum() <= count // 4 + 1 for d in range(4))


def test_interactions_are_exactly_the_real_events(imported: tuple[Reviews, Collected]) -> None:
    reviews, sink = imported
    rows = sink.table("raw_interactions").to_pandas().sort_values("event_time")
    found = {user: tuple(part.item_id) for user, part in rows.groupby("user_id")}
    assert found == {u.user_id: tuple(reviews.items[i].item_id for i in u.items) for u in reviews.users}
    assert set(rows.kind) == {"purchase"}


@pytest.mark.parametrize("name", TABLES)
def test_rows_keep_the_contract_and_its_primary_key(imported: tuple[Reviews, Collected], name: str) -> None:
    contract, rows = load_contract(name), imported[1].table(name)
    assert check_batch(contract, rows.drop_columns(list(contract.partition_by)), {}) == []
    keys = [tuple(r.values()) for r in rows.select(list(contract.primary_key)).to_pylist()]
    assert len(set(keys)) == len(keys) > 0
    if contract.partition_by:
        assert [t.date() for t in rows["event_time"].to_pylist()] == rows["dt"].to_pylist()


def test_every_purchase_of_the_request_days_has_a_request_before_it_with_the_item_among_the_candidates(
    imported: tuple[Reviews, Collected],
) -> None:
    _, sink = imported
    offers: dict[tuple[str, str], list[datetime]] = defaultdict(list)
    for row in sink.table("raw_candidates").to_pylist():
        offers[row["user_id"], row["item_id"]].append(row["event_time"])
    bought = [r for r in sink.table("raw_interactions").to_pylist() if r["dt"] >= FIRST]
    assert len(bought) > 40
    for row in bought:
        times = offers[row["user_id"], row["item_id"]]
        assert any(timedelta(0) <= row["event_time"] - time <= timedelta(minutes=20) for time in times)


def test_requests_stay_in_their_size_and_exposed_items_are_candidates(imported: tuple[Reviews, Collected]) -> None:
    candidates = imported[1].table("raw_candidates").to_pandas()
    exposed = imported[1].table("raw_impressions").to_pandas()
    offered = set(zip(candidates.request_id, candidates.item_id))
    assert set(zip(exposed.request_id, exposed.item_id)) < offered
    assert max(Counter(request for request, _ in offered).values()) <= SETTINGS.candidates_per_request
    assert set(exposed.groupby("request_id").size()) == {SETTINGS.exposed_per_request}
    assert set(candidates.dt) == {SETTINGS.start_date + timedelta(days=d) for d in range(-2, 4)}


def test_the_channel_of_a_bought_item_does_not_give_it_away() -> None:
    """Items that were put in carry channels in the proportions of recall, none of them a channel of its own."""
    reviews, sink = made_reviews(users=600), Collected()
    generate(reviews, replace(SETTINGS, requests_per_user_day=0.0), sink.write)
    candidates = sink.table("raw_candidates").to_pandas()
    bought = sink.table("raw_interactions").to_pandas()
    bought = set(zip(bought.user_id, bought.item_id, bought.dt))
    candidates["bought"] = [key in bought for key in zip(candidates.user_id, candidates.item_id, candidates.dt)]
    share = candidates.groupby("channel").bought.sum() / candidates.bought.sum()
    assert (share > 0.08).all()
    assert share.max() < 0.6


def test_bought_items_are_clicked_far_more_often_than_others(imported: tuple[Reviews, Collected]) -> None:
    shown = imported[1].table("raw_impressions").to_pandas()
    bought = imported[1].table("raw_interactions").to_pandas()
    bought = set(zip(bought.user_id, bought.item_id, bought.dt))
    real = np.array([key in bought for key in zip(shown.user_id, shown.item_id, shown.dt)])
    assert shown.clicked[real].mean() > 0.4
    assert shown.clicked[~real].mean() < 0.1


def test_a_requests_history_is_what_happened_strictly_before_it() -> None:
    reviews = made_reviews()
    events = place_events(reviews, SETTINGS)
    for day in range(-2, 4):
        user, time, bought = day_of_requests(reviews, SETTINGS, events, day)
        found = histories(events, user, time)
        for u, t, b, row in zip(user, time, bought, found):
            mine = (events.user == u) & (events.time < t)
            expected = events.item[mine][-50:]
            assert row[row >= 0].tolist() == expected.tolist()
            if b >= 0:
                later = np.flatnonzero((events.user == u) & (events.time >= t))
                assert events.item[later[0]] == b


def test_nothing_is_known_of_the_test_split_when_recall_begins() -> None:
    """Changing what test events hold changes no candidate of a request before them, but for the item itself."""
    from gpl_core.simulation.reviews import observe_purchases

    reviews = made_reviews()
    changed = tuple(
        replace(u, items=tuple(79 if s == "test" else i for i, s in zip(u.items, u.splits))) for u in reviews.users
    )
    other = replace(reviews, users=changed)
    before, after = (observe_purchases(r, SETTINGS, place_events(r, SETTINGS)) for r in (reviews, other))
    for name in ("features", "neighbors", "together", "positives"):
        assert (getattr(before, name) == getattr(after, name)).all()


BAD_LINES = [
    ("items", '{"item_id": "p1", "title": "x", "description": "", "brand": "", "category": ""}', "item_id", "unique"),
    (
        "items",
        '{"item_id": "n", "title": "", "description": "", "brand": "", "category": ""}',
        "title",
        "at least 1 character",
    ),
    (
        "items",
        '{"item_id": 5, "title": "x", "description": "", "brand": "", "category": ""}',
        "item_id",
        "valid string",
    ),
    ("items", '{"item_id": "n", "title": "x", "description": "", "brand": ""}', "category", "Field required"),
    ("items", '{"item_id": "n",', "", "Invalid JSON"),
    ("items", '["n"]', "", "should be an object"),
    ("sequences", '{"user_id": "A0", "events": [{"item_id": "p1", "split": "train"}]}', "user_id", "unique"),
    (
        "sequences",
        '{"user_id": "", "events": [{"item_id": "p1", "split": "train"}]}',
        "user_id",
        "at least 1 character",
    ),
    ("sequences", '{"user_id": "n", "events": []}', "events", "at least 1 item"),
    ("sequences", '{"user_id": "n", "events": [3]}', "events[0]", "should be an object"),
    (
        "sequences",
        '{"user_id": "n", "events": [{"item_id": "zz", "split": "train"}]}',
        "events[0].item_id",
        "items file",
    ),
    (
        "sequences",
        '{"user_id": "n", "events": [{"item_id": "p1", "split": "dev"}]}',
        "events[0].split",
        "should be 'train', 'valid' or 'test'",
    ),
    (
        "sequences",
        '{"user_id": "n", "events": [{"item_id": "p1", "split": "test"}, {"item_id": "p1", "split": "train"}]}',
        "events[1].split",
        "no earlier split",
    ),
]


@pytest.mark.parametrize(("file", "line", "field", "expected"), BAD_LINES)
def test_bad_lines_are_refused_with_file_line_and_field_and_nothing_is_written(
    tmp_path: Path, file: str, line: str, field: str, expected: str
) -> None:
    reviews = made_reviews()
    paths = dict(zip(("items", "sequences"), write(tmp_path, reviews)))
    with gzip.open(paths[file], "at") as out:
        out.write(line + "\n")
    number = len(getattr(reviews, "items" if file == "items" else "users")) + 1
    lake = Lake(str(tmp_path / "lake"))
    with pytest.raises(ContractError) as caught:
        import_reviews(paths["items"], paths["sequences"], lake, SETTINGS)
    message = str(caught.value)
    assert f"{paths[file]}:{number}:" in message
    assert f"'{field}'" in message or not field
    assert expected in message
    assert not (tmp_path / "lake").exists()


def test_many_bad_lines_are_named_at_once_up_to_a_bound(tmp_path: Path) -> None:
    items, sequences = write(tmp_path, made_reviews())
    with gzip.open(items, "at") as out:
        out.write("not json\n" * 50)
    with pytest.raises(ContractError, match=r"50 bad line(.|\n)*and 30 more"):
        read_reviews(items, sequences)


def test_a_cut_file_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    items, sequences = write(tmp_path, made_reviews())
    whole = sequences.read_bytes()
    damaged = [whole[:-60], *(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(40, 300, 7))]
    for content in damaged:
        sequences.write_bytes(content)
        with pytest.raises(ContractError, match=r"cannot be read on|Invalid JSON"):
            read_reviews(items, sequences)
    with pytest.raises(MissingInputError, match=r"nowhere\.jsonl"):
        read_reviews(items, tmp_path / "nowhere.jsonl")


def test_a_second_import_writes_nothing_and_another_file_is_refused(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    paths = write(tmp_path, made_reviews())
    first = import_reviews(*paths, lake, SETTINGS)
    assert set(first.rows) == set(TABLES)
    assert {lake.open(name).properties["gpl.provenance"][:14] for name in TABLES} == {"semi-synthetic"}
    assert not lake.exists("truth")
    assert import_reviews(*paths, lake, SETTINGS).rows == {}
    (tmp_path / "other").mkdir()
    others = write(tmp_path / "other", made_reviews(seed=1))
    with pytest.raises(ContractError, match="made with other settings"):
        import_reviews(*others, lake, SETTINGS)


def test_an_import_over_a_simulated_marketplace_leaves_no_truth_of_other_requests(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    paths = write(tmp_path, made_reviews())
    tiny = SimulationSettings(users=20, items=100, days=1, candidates_per_request=20, warmup_days=2, pictures=False)
    simulate(tiny, lake)
    with pytest.raises(ContractError):
        import_reviews(*paths, lake, SETTINGS)
    import_reviews(*paths, lake, SETTINGS, force=True)
    assert lake.open("truth").read().num_rows == 0
    assert lake.open("raw_items").read().num_rows == len(made_reviews().items)
    assert lake.open("raw_items").properties["gpl.provenance"].startswith("semi-synthetic")
    assert min(lake.open("raw_candidates").slices()) == FIRST


def test_more_candidates_than_recall_can_choose_from_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, made_reviews(items=40))
    with pytest.raises(UsageError, match="40 items, expected at least 120"):
        import_reviews(*paths, Lake(str(tmp_path / "lake")), ImportSettings())


def test_dates_follow_the_shipped_configurations(tmp_path: Path) -> None:
    quickstart = simulation_settings(load_config("quickstart"), {"users": 10})
    assert (quickstart.start_date, quickstart.days, quickstart.users) == (date(2026, 1, 1), 5, 10)
    assert quickstart.start_date - timedelta(days=quickstart.warmup_days) == load_config("quickstart").run.history_start
    amazon = import_settings(load_config("amazon"))
    assert amazon.start_date - timedelta(days=amazon.train_days + amazon.valid_days) == date(2025, 12, 2)
    assert (amazon.start_date, amazon.lead_days) == (load_config("amazon").run.start_date, 2)
    assert (amazon.feed_days, amazon.evaluation_days) == (2, 1)
    paths = write(tmp_path, made_reviews(items=200))
    overrides = [f"lakehouse.root={tmp_path / 'lake'}"]
    config = load_config("amazon", overrides)
    files = ["--items", str(paths[0]), "--sequences", str(paths[1])]
    assert main(["import-reviews", "--config", "amazon", "--set", *overrides, *files]) == 0
    slices = Lake(str(tmp_path / "lake")).open("raw_interactions").slices()
    assert config.run.history_start <= min(slices)
    with pytest.raises(UsageError, match="history_start"):
        import_settings(load_config("amazon", ["run.history_start=2025-12-30"]))


@pytest.mark.realdata
def test_the_real_purchases_keep_order_and_split() -> None:
    folder = Path(os.environ.get("GPL_SHARED_DATA", "../shared/data")) / "amazon_industrial"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GPL_SHARED_DATA")
    reviews, sink = read_reviews(folder / "items.jsonl.gz", folder / "sequences.jsonl.gz"), Collected()
    generate(reviews, ImportSettings(), sink.write)
    assert (len(reviews.items), len(reviews.users)) == (3686, 3285)
    rows = sink.table("raw_interactions").to_pandas().sort_values("event_time", kind="stable")
    assert len(rows) == 22743
    found = {user: tuple(part.item_id) for user, part in rows.groupby("user_id")}
    assert found == {u.user_id: tuple(reviews.items[i].item_id for i in u.items) for u in reviews.users}
    split = {user.user_id: user.splits for user in reviews.users}
    rows["split"] = rows.groupby("user_id").cumcount().astype(str) + "|" + rows.user_id
    splits = [split[user][int(place)] for place, user in (key.split("|", 1) for key in rows.split)]
    times = rows.event_time.reset_index(drop=True).groupby(np.array(splits))
    bounds = {name: (part.min(), part.max()) for name, part in times}
    assert bounds["train"][1] < bounds["valid"][0] < bounds["valid"][1] < bounds["test"][0]
    assert bounds["test"][0] >= pd.Timestamp(datetime(2026, 1, 1, tzinfo=UTC))
