"""Rows deleted by a deletion vector, as Spark and other engines do; delta-rs writes none."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_PROTOCOL = {
    "minReaderVersion": 3, "minWriterVersion": 7,
    "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"],
}  # fmt: skip


def delete_by_vector(uri: str, *rows: int) -> None:
    """Delete `rows` (places below 2^16) of the newest data file of the table at `uri`: its first such commit."""
    table = DeltaTable(uri)
    assert not table.protocol().reader_features, "the removal of a file names its vector: this one has none yet"
    files = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    file = max(files, key=lambda f: f["modification_time"])
    values = {k.removeprefix("partition."): str(v) for k, v in file.items() if k.startswith("partition.")}
    same = {"path": file["path"], "size": file["size_bytes"], "partitionValues": values, "dataChange": True}
    add = {
        **same, "modificationTime": file["modification_time"], "stats": json.dumps({"numRecords": file["num_records"]}),
        "deletionVector": _inline(rows),
    }  # fmt: skip
    actions = [{"protocol": _PROTOCOL}, {"remove": {**same, "deletionTimestamp": 0}}, {"add": add}]
    commit = Path(uri, "_delta_log", f"{table.version() + 1:020d}.json")
    commit.write_text("\n".join(json.dumps(a, separators=(",", ":")) for a in actions))


def _inline(rows: tuple[int, ...]) -> dict[str, str | int]:
    """The vector's descriptor: a Roaring bitmap of one container, in Z85."""
    container = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *sorted(rows))
    data = struct.pack("<IQI", 1681511377, 1, 0) + container
    words = struct.unpack(f">{-(-len(data) // 4)}I", data + bytes(-len(data) % 4))
    text = "".join(_Z85[word // 85**place % 85] for word in words for place in (4, 3, 2, 1, 0))
    return {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(data), "cardinality": len(rows)}
