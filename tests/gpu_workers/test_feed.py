"""The feed: every row exactly once over ranks and epochs, files shared out by (seed, epoch) alone, bounded."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.snapshot import Snapshot
from gpu_workers.inputs.feed import assign_files, read_batches, rebatch
from tests.support import DAY, DIMS, ONE, data_table, legal_rows, partition_text, put

TABLE = "training_feed"
CONTRACT = load_contract(TABLE)
COLUMNS = ["request_id", "item_index", "is_exposed", "label", "sid", "event_time"]


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Lake:
    """Five files of 7, 7, 7, 7 and 3 rows in row groups of 3, 3 and 1 (or 3)."""
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    write(lake, 31)
    return lake


def write(lake: Lake, count: int, *, day=DAY, file_rows: int = 7, row_group_rows: int = 3) -> list[dict]:
    from gpl_core.lakehouse.marks import SliceMark

    rows = legal_rows(CONTRACT, count, partition={"dt": day})
    for i, row in enumerate(rows):
        row["request_id"] = f"r{i}"
    partition = partition_text({"dt": day})
    with lake.writer(CONTRACT, partition, dims=DIMS, file_rows=file_rows, row_group_rows=row_group_rows) as writer:
        writer.write(data_table(CONTRACT, rows))
    mark = SliceMark("training_feed", {day.isoformat(): "f"}, "r")
    lake.commit(CONTRACT, writer.parts, mark=mark, mode="overwrite", partition=partition)
    return rows


def read(snapshot: Snapshot, files, columns=COLUMNS) -> list[dict]:
    """All rows of `files` as Python values."""
    rows = []
    for batch in read_batches(snapshot, files, columns):
        size = len(batch[columns[0]])
        rows += [{c: batch[c][i].tolist() if hasattr(batch[c][i], "tolist") else batch[c][i] for c in columns}
                 for i in range(size)]  # fmt: skip
    return rows


# ---- shares of ranks -------------------------------------------------------------------------------------------

FILES = st.lists(st.integers(0, 50), max_size=20).map(
    lambda sizes: [DataFile(f"f{i:03d}", {}, rows, 1, {}) for i, rows in enumerate(sizes)]
)


@given(FILES, st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_every_file_goes_to_exactly_one_rank_balanced_by_rows(files, ranks, seed, epoch):
    shares = assign_files(files, ranks, seed=seed, epoch=epoch)
    assert len(shares) == ranks
    assert sorted(f.path for s in shares for f in s) == sorted(f.path for f in files)
    largest, rows = max((f.rows for f in files), default=0), [rows_in(s) for s in shares]
    assert max(rows) - min(rows) <= largest
    mean = rows_in(files) / ranks
    assert max(rows) <= mean + largest * (1 - 1 / ranks) + 1e-9, "Graham's bound of list scheduling"


@given(FILES, st.integers(1, 4), st.randoms())
def test_shares_depend_on_seed_and_epoch_only_not_on_the_order_of_the_log(files, ranks, rng):
    shuffled = rng.sample(files, len(files))
    assert assign_files(files, ranks, seed=1, epoch=2) == assign_files(shuffled, ranks, seed=1, epoch=2)


def test_files_change_hands_from_epoch_to_epoch():
    files = [DataFile(f"f{i:03d}", {}, 10, 1, {}) for i in range(12)]
    of_rank_0 = {tuple(sorted(f.path for f in assign_files(files, 3, epoch=e)[0])) for e in range(6)}
    orders = {tuple(f.path for f in assign_files(files, 1, epoch=e)[0]) for e in range(6)}
    other_seed = assign_files(files, 3, seed=1)[0]
    assert len(of_rank_0) > 1
    assert len(orders) > 1
    assert other_seed != assign_files(files, 3, seed=0)[0]


# ---- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_read_exactly_once_over_the_ranks(lake, ranks):
    snapshot = lake.open(TABLE)
    expected = snapshot.read(columns=COLUMNS).to_pylist()
    shares = assign_files(snapshot.select(start=DAY, end=DAY), ranks, seed=4)
    rows = [row for share in shares for row in read(snapshot, share)]
    assert sorted(rows, key=lambda r: r["request_id"]) == sorted(expected, key=lambda r: r["request_id"])


def test_rows_come_in_the_order_of_the_files(lake):
    snapshot = lake.open(TABLE)
    for files in (snapshot.files, snapshot.files[::-1], snapshot.files[1:3]):
        assert read(snapshot, files) == snapshot.read(files, COLUMNS).to_pylist()


def test_a_batch_is_a_row_group_never_more(lake):
    snapshot = lake.open(TABLE)
    batches = list(read_batches(snapshot, snapshot.files, COLUMNS))
    assert {len(b["label"]) for b in batches} == {1, 3}
    for batch in batches:
        size = len(batch["label"])
        assert batch["sid"].shape == (size, DIMS["L"]), "array columns are [rows x length], of a single row too"
        assert batch["sid"].dtype == np.int32
        assert batch["label"].dtype == np.float32
        assert batch["event_time"].dtype == np.int64
        assert batch["is_exposed"].dtype == np.bool_


def test_reading_stops_when_the_reader_stops(lake):
    """A generator that is closed early leaves no reader thread behind."""
    import threading

    before = set(threading.enumerate())
    batches = read_batches(lake.open(TABLE), lake.open(TABLE).files, COLUMNS, queue_size=1)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
    assert {t for t in threading.enumerate() if t.is_alive()} <= before


def test_strings_and_floats_arrive_unchanged(lake):
    snapshot = lake.open(TABLE)
    (batch, *_) = read_batches(snapshot, snapshot.files[:1], ["user_id", "channel", "target"])
    expected = snapshot.read(snapshot.files[:1], ["user_id", "channel", "target"]).slice(0, len(batch["target"]))
    assert batch["user_id"].tolist() == expected.column("user_id").to_pylist()
    assert batch["channel"].tolist() == expected.column("channel").to_pylist()
    assert batch["target"].tolist() == expected.column("target").to_pylist()


def test_a_long_text_costs_its_own_length_and_no_character_is_lost(tmp_path):
    lake = Lake(str(tmp_path))
    users = ["x" * 10_000_000, "a", "a\0", "\0", *(f"u{i}" for i in range(79))]
    rows = legal_rows(CONTRACT, len(users), partition={"dt": DAY})
    put(lake, TABLE, [{**row, "user_id": user} for row, user in zip(rows, users, strict=True)])
    snapshot = lake.open(TABLE)
    (batch,) = read_batches(snapshot, snapshot.files, ["user_id"])
    assert batch["user_id"].tolist() == users
    assert batch["user_id"].nbytes == 8 * len(users), "references: an array of fixed width would take 3.3 GB"


@pytest.mark.parametrize("table", ["anchor_requests", "score_requests", "item_embeddings", "items", "item_sids"])
def test_every_table_that_workers_read_can_be_read(tmp_path, table):
    """All columns, two files of which one holds a single row: strings, pictures, arrays."""
    lake, contract = Lake(str(tmp_path)), load_contract(table)
    put(lake, table, 3)
    put(lake, table, 1, seed=2, mode="append")
    snapshot = lake.open(table)
    columns = [n for n in contract.column_names if n not in contract.partition_by]
    assert read(snapshot, snapshot.files, columns) == snapshot.read(columns=columns).to_pylist()


def test_slices_without_rows_are_nothing(tmp_path):
    lake = Lake(str(tmp_path))
    put(lake, TABLE, 0)
    snapshot = lake.open(TABLE)
    assert list(read_batches(snapshot, snapshot.files, COLUMNS)) == []
    assert assign_files([], 2) == [(), ()]


# ---- refusals --------------------------------------------------------------------------------------------------


def planted(tmp_path: Path, change) -> tuple[Snapshot, list[DataFile]]:
    """A slice whose second file is rewritten by `change(table)`, as by a writer that does not know the contract."""
    lake = Lake(str(tmp_path))
    write(lake, 14)
    snapshot = lake.open(TABLE)
    path = snapshot.uris(snapshot.files)[1]
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    return snapshot, list(snapshot.files)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.drop_columns(["label"]), "'label' .* is missing"),
        (lambda t: t.set_column(t.schema.get_field_index("label"), "label", t["label"].cast(pa.float64())),
         "'label' is double, expected float"),
        (lambda t: t.set_column(t.schema.get_field_index("sid"), "sid", pa.array([[1.0]] * len(t))), "'sid' is list"),
    ],
)  # fmt: skip
def test_a_file_with_another_footer_is_refused_by_column_and_file(tmp_path, change, named):
    snapshot, files = planted(tmp_path, change)
    with pytest.raises(ContractError, match=named) as caught:
        next(read_batches(snapshot, files, COLUMNS))
    assert TABLE in str(caught.value)
    assert files[1].path in str(caught.value)


@pytest.mark.parametrize(
    ("feature", "properties"),
    [
        ("deletionVectors", {}),
        ("typeWidening-preview", {}),
        ("columnMapping", {"delta.columnMapping.mode": "name"}),
    ],
)
def test_a_table_whose_files_do_not_tell_all_is_refused(tmp_path, feature, properties):
    """Someone switched on a Delta feature that Petastorm cannot see: deleted rows would train."""
    lake = Lake(str(tmp_path))
    write(lake, 3)
    log = Path(lake.uri(TABLE)) / "_delta_log"
    (metadata,) = [json.loads(line)["metaData"] for line in (log / f"{0:020d}.json").read_text().splitlines()
                   if "metaData" in line]  # fmt: skip
    metadata["configuration"].update(properties)
    if feature == "columnMapping":
        schema = json.loads(metadata["schemaString"])
        for number, field in enumerate(schema["fields"], 1):
            field["metadata"] |= {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": field["name"]}
        metadata["schemaString"] = json.dumps(schema)
    writers = [feature, "appendOnly", "invariants", "checkConstraints"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [feature], "writerFeatures": writers}
    actions = [{"commitInfo": {"timestamp": 1, "operation": "X"}}, {"protocol": protocol}, {"metaData": metadata}]
    (log / f"{2:020d}.json").write_text("\n".join(map(json.dumps, actions)))
    snapshot = lake.open(TABLE)
    with pytest.raises(ContractError, match=rf"training_feed: version 2 uses {feature.removesuffix('-preview')}"):
        next(read_batches(snapshot, snapshot.files, COLUMNS))


@pytest.mark.parametrize("second", [[1, 2], None])
def test_arrays_of_more_than_one_length_are_refused(tmp_path, second):
    def change(table: pa.Table) -> pa.Table:
        sids = [second if n == 1 else [1, 2, 3] for n in range(len(table))]
        place = table.schema.get_field_index("sid")
        return table.set_column(place, "sid", pa.array(sids, table.schema.field("sid").type))

    snapshot, files = planted(tmp_path, change)
    with pytest.raises(ContractError, match=r"training_feed\.sid: arrays of (2|-1) to 3 elements"):
        list(read_batches(snapshot, files, COLUMNS))


def test_fewer_rows_than_the_log_promises_are_an_error(tmp_path):
    snapshot, files = planted(tmp_path, lambda table: table.slice(1))
    with pytest.raises(ContractError, match="promises 14 rows, 13 were read"):
        list(read_batches(snapshot, files, COLUMNS))


def test_a_vacuumed_file_names_the_version(tmp_path):
    lake = Lake(str(tmp_path))
    write(lake, 14)
    pinned = lake.open(TABLE)
    write(lake, 7)
    Path(pinned.uris(pinned.files)[0]).unlink()
    with pytest.raises(ContractError, match=rf"training_feed: .*version {pinned.version} is gone.*vacuumed"):
        list(read_batches(pinned, pinned.files, COLUMNS))
    assert len(read(lake.open(TABLE), lake.open(TABLE).files)) == 7


@pytest.mark.parametrize("column", ["dt", "price"])
def test_a_column_that_is_not_in_the_files_is_refused(lake, column):
    snapshot = lake.open(TABLE)
    with pytest.raises(ContractError, match=rf"\['{column}'\] are not data columns"):
        next(read_batches(snapshot, snapshot.files, ["label", column]))


def test_files_without_statistics_are_read_without_a_promise(lake):
    snapshot = lake.open(TABLE)
    unknown = [replace(f, rows=-1) if i == 0 else f for i, f in enumerate(snapshot.files)]
    assert read(snapshot, unknown) == snapshot.read(columns=COLUMNS).to_pylist()


def test_passthrough_columns_are_read_through_the_wider_contract(tmp_path):
    from gpl_core.contracts.contract import Column

    wider = CONTRACT.with_columns((Column("price", "double", False, "Price"),))
    lake = Lake(str(tmp_path))
    put(lake, TABLE, 3, contract=wider)
    snapshot = lake.open(TABLE, contract=wider)
    assert len(read(snapshot, snapshot.files, ["price"])) == 3


def test_only_the_asked_slices_are_read(tmp_path):
    lake = Lake(str(tmp_path))
    for i in range(3):
        write(lake, 2 + i, day=DAY + i * ONE)
    snapshot = lake.open(TABLE)
    assert len(read(snapshot, snapshot.select(start=DAY + ONE))) == 7


# ---- batches of one size ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), max_size=6), st.integers(1, 5))
def test_rebatch_keeps_every_row_in_order(sizes, rows):
    numbers = iter(range(100))
    batches = [{"a": np.array([next(numbers) for _ in range(size)], np.int64)} for size in sizes]
    batches = [{**b, "b": np.stack([b["a"]] * 2, 1)} for b in batches]
    cut = list(rebatch(iter(batches), rows))
    assert [len(b["a"]) for b in cut[:-1]] == [rows] * (len(cut) - 1)
    assert all(0 < len(b["a"]) <= rows for b in cut)
    assert [int(x) for b in cut for x in b["a"]] == list(range(sum(sizes)))
    assert all((b["b"] == b["a"][:, None]).all() for b in cut)


class _Evaluated:
    """Pickled, it passes the names that Petastorm's unpickler lets through, and makes a folder."""

    def __init__(self, ran: Path) -> None:
        self._code = f"__import__('os').mkdir({str(ran)!r})"

    def __reduce__(self):
        return eval, (self._code,)


@pytest.mark.parametrize("files", [1, 5])
def test_a_schema_that_was_planted_beside_the_files_is_not_unpickled(tmp_path, files):
    from petastorm.etl.legacy import restricted_loads

    lake = Lake(str(tmp_path / "lake"))
    write(lake, 7 * files)
    snapshot = lake.open(TABLE)
    planted = pickle.dumps(_Evaluated(tmp_path / "ran"))
    restricted_loads(planted)
    (tmp_path / "ran").rmdir()
    schema = snapshot.contract.arrow_schema(partitions=False).with_metadata({b"dataset-toolkit.unischema.v1": planted})
    for folder in {Path(snapshot.uri), *(Path(uri).parent for uri in snapshot.uris(snapshot.files))}:
        for name in ("_common_metadata", "_metadata"):
            pq.write_metadata(schema, folder / name)
    assert len(read(snapshot, snapshot.files)) == 7 * files
    assert not (tmp_path / "ran").exists()
