"""The tables of `simulate`: keys, contracts, dates, and the same bytes from the same seed."""

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from numpy._core import _multiarray_umath as umath
from PIL import Image

from gpl_core.commands.simulate import add_arguments
from gpl_core.contracts.arrow_checks import check_batch
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError, UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.simulation.marketplace import TABLES, generate, simulate
from gpl_core.simulation.simulation_settings import WORLDS, SimulationSettings
from tests.gpl_core.simulation.made import SMALL, Collected, count_distinct, small

TINY = replace(SMALL, users=40, items=100, warmup_days=4, random_share=0.2)


@pytest.mark.parametrize("name", TABLES)
def test_rows_keep_the_contract_and_its_primary_key(name: str) -> None:
    contract = load_contract(name)
    rows = small().table(name)
    assert check_batch(contract, rows.drop_columns(list(contract.partition_by)), {}) == []
    key = rows.select(list(contract.primary_key)).to_pylist()
    assert len({tuple(k.values()) for k in key}) == len(rows) > 0


def test_events_lie_in_their_day_and_the_warm_up_ends_before_the_first_request_day() -> None:
    for name in ("raw_impressions", "raw_candidates", "raw_interactions"):
        rows = small().table(name)
        assert (rows["event_time"].cast(pa.timestamp("us")).cast(pa.date32()).to_pylist()) == rows["dt"].to_pylist()
    days = set(small().table("raw_interactions")["dt"].to_pylist())
    start = SMALL.start_date
    assert days == {start + timedelta(days=d) for d in range(-SMALL.warmup_days, SMALL.days)}
    requests = set(small().table("raw_candidates")["dt"].to_pylist())
    assert requests == {start, start + timedelta(days=1)}


def test_every_exposed_item_is_a_candidate_of_its_request_and_truth_holds_exactly_the_candidates() -> None:
    made = small()
    candidates = {(r["request_id"], r["item_id"]) for r in made.table("raw_candidates").to_pylist()}
    exposed = {(r["request_id"], r["item_id"]) for r in made.table("raw_impressions").to_pylist()}
    truth = {(r["request_id"], r["item_id"]): r["is_exposed"] for r in made.table("truth").to_pylist()}
    assert exposed < candidates == set(truth)
    assert {pair for pair, shown in truth.items() if shown} == exposed
    per_request = Counter(request for request, _ in candidates)
    assert max(per_request.values()) <= SMALL.candidates_per_request
    assert np.median(list(per_request.values())) == SMALL.candidates_per_request
    assert set(Counter(request for request, _ in exposed).values()) == {SMALL.exposed_per_request}


def test_nobody_meets_an_item_before_it_is_released() -> None:
    made = small()
    released = {}
    for row in made.table("raw_items").select(["item_id", "updated_at"]).to_pylist():
        released[row["item_id"]] = min(released.get(row["item_id"], row["updated_at"]), row["updated_at"])
    new = {item for item, time in released.items() if time.date() >= SMALL.start_date - timedelta(days=1)}
    assert len(new) == SMALL.new_items_per_day * SMALL.days
    seen = set()
    for name in ("raw_candidates", "raw_interactions"):
        for row in made.table(name).select(["item_id", "event_time"]).to_pylist():
            assert released[row["item_id"]] < row["event_time"]
            seen.add(row["item_id"])
    assert seen & new


def test_reworded_items_get_a_second_row_with_another_title() -> None:
    rows = small().table("raw_items").to_pylist()
    twice = [item for item, n in Counter(r["item_id"] for r in rows).items() if n == 2]
    assert len(twice) == SMALL.updated_items_per_day * (SMALL.days - 1)
    for item in twice:
        first, second = sorted((r for r in rows if r["item_id"] == item), key=lambda r: r["updated_at"])
        assert first["title"] != second["title"]


def test_pictures_are_pngs_that_differ() -> None:
    pictures = small().table("raw_items")["image"].to_pylist()
    assert all(p.startswith(b"\x89PNG") for p in pictures)
    assert len(set(pictures)) > 0.95 * count_distinct(small().table("raw_items")["item_id"])


def _contents(root: Path) -> dict[tuple[str, str], list[str]]:
    """(table, partition) -> hashes of its data files."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted((root / "tables").rglob("*.parquet")):
        if "_delta_log" not in file.parts:
            key = (file.relative_to(root / "tables").parts[0], file.parent.name)
            found.setdefault(key, []).append(hashlib.sha256(file.read_bytes()).hexdigest())
    return {key: sorted(hashes) for key, hashes in found.items()}


def test_same_settings_same_bytes_another_seed_other_bytes(tmp_path: Path) -> None:
    for name, settings in {"a": TINY, "b": TINY, "c": replace(TINY, seed=8)}.items():
        simulate(settings, Lake(str(tmp_path / name)))
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    other = _contents(tmp_path / "c")
    assert {table for table, _ in other} == set(TABLES)
    assert not set(map(tuple, _contents(tmp_path / "a").values())) & set(map(tuple, other.values()))


def test_a_batch_of_users_does_not_depend_on_how_many_follow() -> None:
    settings = replace(TINY, users=32, batch_users=16, pictures=False)
    few, many = Collected(), Collected()
    generate(settings, few.write)
    # Counts of the platform come from the first eight batches: beyond them, more users change nothing for the others.
    generate(replace(settings, users=16 * 8), many.write)
    known = set(few.table("raw_interactions")["user_id"].to_pylist())
    wanted = few.table("raw_interactions").filter(
        pa.compute.less(few.table("raw_interactions")["dt"], SMALL.start_date)
    )
    found = many.table("raw_interactions")
    found = found.filter(
        pa.compute.and_(
            pa.compute.less(found["dt"], SMALL.start_date),
            pa.compute.is_in(found["user_id"], pa.array(sorted(known))),
        )
    )
    assert found.to_pylist() == wanted.to_pylist()


def test_memory_does_not_grow_with_the_number_of_users() -> None:
    class Counted:
        rows = 0

        def write(self, table: str, dt: date | None, rows: pa.Table) -> None:
            self.rows += len(rows)

    def peak(users: int) -> tuple[int, int]:
        sink = Counted()
        tracemalloc.start()
        generate(replace(TINY, users=users, batch_users=32, pictures=False), sink.write)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return sink.rows, top

    rows_few, few = peak(32 * 9)
    rows_many, many = peak(32 * 36)
    assert rows_many > 3 * rows_few
    assert many < 1.25 * few


def test_a_second_run_writes_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    first = simulate(TINY, lake)
    assert set(first.rows) == set(TABLES)
    versions = {name: lake.open(name).version for name in TABLES}
    again = simulate(TINY, lake)
    assert again.rows == {}
    assert set(again.unchanged) == set(TABLES)
    with pytest.raises(ContractError, match="made with other settings"):
        simulate(replace(TINY, seed=99), lake)
    assert {name: lake.open(name).version for name in TABLES} == versions
    replaced = simulate(replace(TINY, seed=99, users=20), lake, force=True)
    assert replaced.rows["truth"] == lake.open("truth").read().num_rows < first.rows["truth"]


def test_a_killed_run_is_completed(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    simulate(TINY, lake)
    # As if killed after the first commits: one table is there, one is created but empty, the rest absent.
    whole = {name: lake.open(name).read().sort_by("item_id") for name in TABLES}
    for name in TABLES[1:]:
        (tmp_path / "tables" / name).rename(tmp_path / f"gone-{name}")
    lake.create(load_contract("truth"), {"gpl.provenance": "simulated"})
    outcome = simulate(TINY, lake)
    assert outcome.unchanged == ("raw_items",)
    assert {name: lake.open(name).read().num_rows for name in TABLES} == {n: t.num_rows for n, t in whole.items()}


def test_tables_of_the_platform_are_never_overwritten(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    schema = load_contract("raw_items").arrow_schema()
    write_deltalake(lake.uri("raw_items"), schema.empty_table())
    for force in (False, True):
        with pytest.raises(ContractError, match="no generator of this project made"):
            simulate(TINY, lake, force=force)
    assert DeltaTable(lake.uri("raw_items")).version() == 0
    assert not lake.exists("truth")


def test_every_table_says_that_it_is_simulated(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    simulate(TINY, lake)
    assert {lake.open(name).properties["gpl.provenance"] for name in TABLES} == {"simulated"}


def test_settings_that_cannot_work_are_refused_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        SimulationSettings(users=0, random_share=1.5, exposed_per_request=100, world="flat")
    for field in ("users=0", "random_share=1.5", "exposed_per_request=100", "world='flat': expected one of plain, "):
        assert field in str(caught.value)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for world in WORLDS:
        assert parser.parse_args(["--world", world]).world == world


def test_bytes_depend_neither_on_the_process_nor_on_the_cpu(tmp_path: Path) -> None:
    """Python's string hashes change with the process; exp, log, sorts and products with a CPU's vector units."""
    program = (
        "import sys; from gpl_core.lakehouse.lake import Lake; "
        "from gpl_core.simulation.simulation_settings import SimulationSettings as S; "
        "from gpl_core.simulation.marketplace import simulate; "
        "simulate(S(users=300, items=400, days=2, world='confounded'), Lake(sys.argv[1]))"
    )
    units = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    without = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(units), "OPENBLAS_CORETYPE": "Prescott",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
    }  # fmt: skip
    for name, settings in {"a": {"PYTHONHASHSEED": "1"}, "b": {"PYTHONHASHSEED": "2", **without}}.items():
        environment = {**os.environ, **settings}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], env=environment, check=True)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_pictures_show_the_department_by_color() -> None:
    """The nearest picture by mean color and layout belongs to the same department far more often than by chance."""
    rows = small().table("raw_items").to_pandas().drop_duplicates("item_id")
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(p)), float).reshape(-1) for p in rows.image])
    department = rows.category.str.split(" > ").str[0].to_numpy()
    distance = ((pixels[:, None, ::16] - pixels[None, :, ::16]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    assert (department[distance.argmin(1)] == department).mean() > 0.5  # chance is 1 in 12
