"""The manifest of one date of training_feed: what a trainer must find when it reads the slice.

Its figures are in the commit that wrote the slice (`SliceMark.details`): they appear with the rows or not at all. The
JSON file repeats them for readers without Delta and adds the files. It can be made from the table again at any time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from gpl_core.contracts.contract import Contract
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.storage import read_text, write_whole

TABLE = "training_feed"


def manifest_path(lake: Lake, run_date: date) -> str:
    """Path of the manifest of `run_date`."""
    return lake.path("manifests", TABLE, f"{run_date.isoformat()}.json")


def schema_of(contract: Contract) -> list[dict[str, str]]:
    """Name and type of every column in the data files, in order."""
    return [{"name": c.name, "type": c.type} for c in contract.columns if c.name not in contract.partition_by]


def schema_hash(contract: Contract) -> str:
    """Hash of `schema_of`: equal hashes mean that a reader needs no change."""
    return hashlib.sha256(json.dumps(schema_of(contract)).encode()).hexdigest()[:16]


def incompatibilities(before: Sequence[Mapping[str, str]], contract: Contract) -> list[str]:
    """What a trainer that reads the schema `before` would miss in `contract`: columns gone, or of another type.

    New columns are compatible: readers select by name.
    """
    now = {c["name"]: c["type"] for c in schema_of(contract)}
    return [
        f"column '{name}' was {kind}, would be {now[name]}" if name in now else f"column '{name}' ({kind}) is gone"
        for name, kind in ((c["name"], c["type"]) for c in before)
        if now.get(name) != kind
    ]


def check_compatible(lake: Lake, contract: Contract) -> None:
    """Refuse a feed that readers of its last published slice could not read.

    A new version of the contract may change anything: every reader sees that version. The ContractError names each
    column, and what to do.
    """
    if not lake.exists(TABLE):
        return
    marks = [m.details for _, m in lake.open(TABLE).marks() if "schema" in m.details]
    if not marks or marks[0]["contract_version"] != contract.version:
        return
    problems = incompatibilities(marks[0]["schema"], contract)
    if problems:
        raise ContractError(
            f"table {TABLE}: its readers would break: {'; '.join(problems)}. Keep the columns in feed.passthrough, or "
            "raise the contract's version"
        )


def build_manifest(lake: Lake, run_date: date, contract: Contract) -> dict[str, Any]:
    """The manifest of the slice as the table's newest version holds it.

    MissingInputError before the slice is written; ContractError when rows have left it since, so that the sums in its
    commit no longer hold.
    """
    snapshot = lake.open(TABLE, contract=contract)
    found = snapshot.mark(run_date.isoformat(), TABLE)
    if found is None:
        raise MissingInputError(f"table {TABLE}: no slice dt={run_date}; run the step training_feed for {run_date}")
    version, mark = found
    files = snapshot.select(start=run_date, end=run_date)
    rows = rows_in(files)
    if rows != mark.details.get("rows", rows):
        raise ContractError(
            f"table {TABLE}: slice dt={run_date} has {rows} rows, its commit {version} promised "
            f"{mark.details['rows']}: it was changed since (gpl forget?); run training_feed for {run_date}"
        )
    return {
        "table": TABLE,
        "location": snapshot.uri,
        "dt": run_date.isoformat(),
        "table_version": version,
        "fingerprint": mark.slices[run_date.isoformat()],
        "run_id": mark.run_id,
        **{name: value for name, value in mark.details.items() if name != "origin"},
        "files": [{"path": f.path, "rows": f.rows, "bytes": f.size} for f in files],
    }


def ensure_manifest(lake: Lake, run_date: date, contract: Contract) -> dict[str, Any]:
    """Write the manifest file unless it is already up to date; returns the manifest."""
    manifest = build_manifest(lake, run_date, contract)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    path = manifest_path(lake, run_date)
    if read_text(path) != text:
        write_whole(path, text.encode())
    return manifest
