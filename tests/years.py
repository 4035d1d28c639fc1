"""A lakehouse that was run every day for years, its logs and manifests written by hand; and what is opened in one."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from deltalake import DeltaTable

from gpl_core.config import Config
from gpl_core.contracts.contract import Contract, all_contracts
from gpl_core.lakehouse.artifacts import KINDS, Manifest, artifact_version
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.storage import filesystem, write_whole
from tests.gpl_core.toy import Toy
from tests.support import DAY, ONE, default_partition, partition_text

# As much as item_stats' commits say: a digest of every date that its counts have seen.
_SAW = {f"2026-01-{day:02}": "0123abcd" for day in range(60)}


def aged(config: Config, commits: int) -> Toy:
    """A lakehouse with `commits` earlier commits per table and versions per kind of artifact; DAY is done."""
    past(config.lakehouse.root, commits)
    return today(config)


def today(config: Config) -> Toy:
    """Runs DAY in whatever lakehouse there is; the day after has raw rows too."""
    toy = Toy(config)
    toy.raw([DAY, DAY + ONE])
    toy.run_pending([DAY])
    return toy


def past(root: str, commits: int) -> None:
    """The earlier commits and versions, in a folder of this machine."""
    lake = Lake(root)
    for contract in all_contracts().values():
        if contract.owner != "simulation" and contract.name != "artifact_decisions":  # as many as operators made
            _past_commits(lake, contract, commits)
    for kind in KINDS:
        for age in range(1, commits + 1):
            through, made = DAY - (age + 1) * ONE, f"{age:024x}"
            manifest = Manifest(kind, artifact_version(through, made), through, {}, made, "", {})
            write_whole(f"{root}/artifacts/{kind}/{manifest.version}/manifest.json", manifest.to_json().encode())


def _past_commits(lake: Lake, contract: Contract, commits: int) -> None:
    """One commit a day up to the day before DAY, a checkpoint after the last, and the index of all."""
    uri = lake.create(contract).uri
    fs, log = filesystem(f"{uri}/_delta_log")
    details = {"saw": {"impressions": _SAW}} if contract.name in ("item_stats", "user_stats") else {}
    for version in range(1, commits + 1):
        day = (DAY - timedelta(days=commits + 1 - version)).isoformat()
        dated = "dt" in contract.partition_by
        mark = SliceMark(contract.owner, {day if dated else "*": f"{version:024x}"}, f"run-{version}", details)
        partition = partition_text({**default_partition(contract), **({"dt": day} if dated else {})})
        actions = [
            {"commitInfo": {"timestamp": 1_700_000_000_000 + version, "userMetadata": mark.to_json()}},
            {"txn": {"appId": f"{mark.step}:{contract.name}:{day}", "version": 0}},
            {"add": {"path": f"part-{version}.parquet", "partitionValues": partition, "size": 1000,
                     "modificationTime": 1_700_000_000_000, "dataChange": True, "stats": '{"numRecords": 5}'}},
        ]  # fmt: skip
        text = "\n".join(json.dumps(a, separators=(",", ":")) for a in actions)
        fs.pipe_file(f"{log}/{version:020d}.json", text.encode())
    DeltaTable(uri).create_checkpoint()
    lake.open(contract.name).index()


@contextmanager
def opened(root: Path) -> Iterator[list[str]]:
    """Names of the files under `root` that anything opens inside the block, by the kernel: delta-rs is not Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    notices, found = libc.inotify_init1(os.O_NONBLOCK), []
    folders = {
        libc.inotify_add_watch(notices, os.fsencode(folder), 0x20): folder  # IN_OPEN
        for folder, _, _ in os.walk(root)
    }
    try:
        yield found
        while True:
            try:
                read = os.read(notices, 1 << 20)
            except BlockingIOError:
                break
            while read:
                watch, mask, _, length = struct.unpack_from("iIII", read)
                name = read[16 : 16 + length].rstrip(b"\0").decode()
                assert not mask & 0x4000, "more was opened than the kernel remembers"
                if not mask & 0x40000000:  # a folder
                    found.append(f"{folders[watch]}/{name}")
                read = read[16 + length :]
    finally:
        os.close(notices)
