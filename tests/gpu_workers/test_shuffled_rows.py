"""Rows in random order: decided by key, seed and epoch alone, each once an epoch, in bounded memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_workers.inputs.shuffled_rows import ShuffledRows

KIND = np.dtype([("shuffle_key", "<i8"), ("pair", "<i8", (2,))])


def _shuffled(folder: Path, parts: list[list[int]], bucket_rows: int) -> ShuffledRows:
    made = ShuffledRows(folder, KIND, sum(map(len, parts)), bucket_rows)
    for keys in parts:
        rows = np.empty(len(keys), KIND)
        rows["shuffle_key"], rows["pair"] = keys, np.array(keys, np.int64).reshape(-1, 1)
        made.add(rows)
    return made


def _taken(rows: ShuffledRows, count: int, size: int, seed: int = 0) -> list[int]:
    batches = list(itertools.islice(rows.batches(size, seed), -(-count // size)))
    assert {len(batch) for batch in batches} == {size}
    assert all((batch["pair"] == batch["shuffle_key"][:, None]).all() for batch in batches), "a row stays one row"
    return [int(key) for batch in batches for key in batch["shuffle_key"]][:count]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40, unique=True), st.integers(1, 50),
    st.integers(1, 7), st.integers(0, 3), st.lists(st.integers(0, 40), max_size=4), st.randoms(),
)  # fmt: skip
def test_every_row_once_an_epoch_in_an_order_that_the_files_do_not_decide(
    tmp_path_factory, keys, bucket_rows, size, seed, cuts, random
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = _taken(_shuffled(folder / "one", [keys], bucket_rows), 3 * len(keys), size, seed)
    assert [sorted(whole[n:][: len(keys)]) for n in range(0, len(whole), len(keys))] == [sorted(keys)] * 3
    random.shuffle(keys)
    ends = sorted(min(c, len(keys)) for c in cuts)
    parts = [keys[a:b] for a, b in itertools.pairwise([0, *ends, len(keys)])]
    assert _taken(_shuffled(folder / "more", parts, bucket_rows), len(whole), size, seed) == whole


@pytest.mark.parametrize("bucket_rows", [10_000, 300])
def test_epochs_and_seeds_differ_and_mix_the_files(tmp_path, bucket_rows: int) -> None:
    parts = [list(range(n, n + 500)) for n in range(0, 2000, 500)]
    rows = _shuffled(tmp_path / "rows", parts, bucket_rows)
    first, second = np.split(np.array(_taken(rows, 4000, 50)), 2)
    other = np.array(_taken(rows, 2000, 50, seed=1))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(2000))
    for a, b in itertools.combinations([first, second, other, np.arange(2000)], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    per_file = np.array([np.bincount(batch // 500, minlength=4) for batch in np.split(first, 20)])
    assert per_file.min() >= 10, "of a batch of 100, 25 rows are of each file, give or take"


def test_a_bucket_holds_about_as_many_rows_as_it_should(tmp_path) -> None:
    rows = _shuffled(tmp_path / "rows", [list(range(n, n + 500)) for n in range(0, 20_000, 500)], 1000)
    assert rows.buckets == 20
    assert all(850 <= len(rows.bucket(n)) <= 1150 for n in range(20))


def test_without_rows_batches_are_empty(tmp_path) -> None:
    assert [len(b) for b in itertools.islice(_shuffled(tmp_path / "rows", [[]], 10).batches(4, 0), 3)] == [0, 0, 0]
