"""Deletion vectors as a log holds them, whatever its checkpoints; and when delta-rs' engine must not be asked."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from gpl_core.lakehouse.deletion_vectors import DeletionVector, deletion_vectors
from gpl_core.lakehouse.engine import UnreadableError, register

VECTOR = pa.struct([
    ("storageType", pa.string()), ("pathOrInlineDv", pa.string()), ("offset", pa.int32()),
    ("sizeInBytes", pa.int32()), ("cardinality", pa.int64()),
])  # fmt: skip
ADD = pa.struct([("path", pa.string()), ("size", pa.int64()), ("deletionVector", VECTOR)])
SIDECAR = pa.struct([("path", pa.string()), ("sizeInBytes", pa.int64())])


def add(path: str, vector: int | None) -> dict[str, Any]:
    """The action for a file whose vector has the number (and deletes as many rows as) `vector`."""
    found = {"path": path, "size": 1, "dataChange": True}
    if vector is not None:
        found["deletionVector"] = {
            "storageType": "u", "pathOrInlineDv": f"v{vector}", "offset": 1, "sizeInBytes": 2, "cardinality": vector,
        }  # fmt: skip
    return found


def write_parquet(path: Path, column: str, rows: list[dict[str, Any]], kind: pa.StructType) -> None:
    """Actions of one kind as a checkpoint has them, beside one of another kind."""
    pq.write_table(pa.table({column: pa.array([*rows, None], kind), "version": [None] * len(rows) + [7]}), path)


def write_checkpoint(log: Path, version: int, live: dict[str, int | None], form: str) -> None:
    """A checkpoint of `live`: one file, several, or one of version 2 with sidecars, itself JSON or Parquet."""
    adds, name = [add(path, vector) for path, vector in live.items()], f"{version:020d}.checkpoint"
    halves = [adds[::2], adds[1::2]]
    if form == "whole":
        write_parquet(log / f"{name}.parquet", "add", adds, ADD)
    elif form == "parts":
        for part, half in enumerate(halves, 1):
            write_parquet(log / f"{name}.{part:010d}.{len(halves):010d}.parquet", "add", half, ADD)
    else:
        (log / "_sidecars").mkdir(exist_ok=True)
        files = [f"{version}-{part}.parquet" for part in range(len(halves))]
        for file, half in zip(files, halves):
            write_parquet(log / "_sidecars" / file, "add", half, ADD)
        named, unique = [{"path": f, "sizeInBytes": 1} for f in files], "80a083e8-7026-4e79-81be-64bd76c43a11"
        if form == "v2 json":
            lines = [
                json.dumps({"checkpointMetadata": {"version": version}}),
                *(json.dumps({"sidecar": s}) for s in named),
            ]
            (log / f"{name}.{unique}.json").write_text("\n".join(lines))
        else:
            write_parquet(log / f"{name}.{unique}.parquet", "sidecar", named, SIDECAR)


CHANGES = st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.just(0), st.integers(1, 9))), max_size=3)
FORMS = st.sampled_from(["", "", "whole", "parts", "half of the parts", "v2 json", "v2 parquet"])


@settings(max_examples=60, deadline=None)
@given(commits=st.lists(st.tuples(CHANGES, FORMS), min_size=1, max_size=8), data=st.data())
def test_any_log_gives_the_vectors_of_its_live_files(commits, data):
    """A change is (file, None: removed, 0: without a vector, n: with that vector); the oracle replays all of them."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "_delta_log")
        log.mkdir()
        live: dict[str, int | None] = {}
        states, cleanable = [], 0
        for version, (changes, form) in enumerate(commits):
            actions: list[dict[str, Any]] = [{"commitInfo": {"operation": "x"}}]
            for path, vector in dict(changes).items():
                if path in live:
                    actions.append({"remove": {**add(path, live.pop(path)), "dataChange": True}})
                if vector is not None:
                    live[path] = vector or None
                    actions.insert(1, {"add": add(path, live[path])})  # an add may stand before the removal
            (log / f"{version:020d}.json").write_text("\n".join(json.dumps(a, separators=(",", ":")) for a in actions))
            if form == "half of the parts":  # of a writer that was killed
                write_parquet(log / f"{version:020d}.checkpoint.{1:010d}.{2:010d}.parquet", "add", [add("z", 5)], ADD)
            elif form:
                write_checkpoint(log, version, live, form)
                cleanable = version
            states.append(dict(live))
        for version in range(data.draw(st.integers(0, cleanable))):
            (log / f"{version:020d}.json").unlink()
        assert deletion_vectors(folder, len(states) - 1) == {
            path: DeletionVector(f"uv{vector}@1", vector) for path, vector in states[-1].items() if vector
        }


def test_a_log_that_lacks_a_commit_is_refused_by_name(tmp_path):
    log = tmp_path / "_delta_log"
    log.mkdir()
    (log / f"{1:020d}.json").write_text("{}")
    with pytest.raises(ContractError, match=f"{0:020d}.json is gone, and no checkpoint"):
        deletion_vectors(str(tmp_path), 1)


def test_the_engine_is_never_asked_for_more_vectors_than_it_returns_from(tmp_path):
    uri = str(tmp_path / "raw")
    write_deltalake(uri, pa.table({"a": [1]}))
    log = tmp_path / "raw" / "_delta_log"
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"],
                "writerFeatures": ["deletionVectors"]}  # fmt: skip
    for version, files in ((1, 500), (2, 1)):
        adds = [{**add(f"{version}-{i}", 1), "partitionValues": {}, "modificationTime": 0} for i in range(files)]
        lines = [{"protocol": protocol}, *({"add": a} for a in adds)]
        (log / f"{version:020d}.json").write_text("\n".join(json.dumps(line, separators=(",", ":")) for line in lines))
    register(QueryBuilder(), "raw_items", uri, DeltaTable(uri, version=1))
    with pytest.raises(UnreadableError, match=r"raw_items at .* has deletion vectors on 501 files.* APPLY \(PURGE\)"):
        register(QueryBuilder(), "raw_items", uri, DeltaTable(uri))
