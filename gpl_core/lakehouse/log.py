"""The commits of a Delta log: their marks, and which of them only regrouped rows (compaction)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.storage import filesystem

_COMMIT_FILE = re.compile(r"/(\d{20})\.json$")


@dataclass(frozen=True)
class History:
    """Commits of one table, newest first.

    Attributes:
        marks: (version, mark) of those that carry one.
        regrouped: of those that only regroup rows: the paths they removed, and the paths they added.
    """

    marks: tuple[tuple[int, SliceMark], ...]
    regrouped: tuple[tuple[set[str], set[str]], ...]


def read_log(uri: str, last: int, since: int = -1) -> History:
    """The commits after version `since`, up to version `last`, of the table at `uri`.

    Read from the log's files: delta-rs' `history` lists every commit there is and numbers them downwards from the
    version it has loaded, so that a pinned table, or one that another run commits to, gets the wrong ones.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    commits = {int(m[1]): p for p in fs.ls(log, detail=False, refresh=True) if (m := _COMMIT_FILE.search(p))}
    marks, regrouped = [], []
    for version in sorted((v for v in commits if since < v <= last), reverse=True):
        text = fs.cat_file(commits[version])
        for line in text.splitlines():
            if not line.lstrip().startswith(b'{"commitInfo"'):
                continue
            mark = SliceMark.from_json(json.loads(line)["commitInfo"].get("userMetadata"))
            if mark is not None:
                marks.append((version, mark))
        # In Delta's protocol, a commit whose files all say dataChange = false leaves the rows as they are.
        if b'"dataChange":false' in text and b'"dataChange":true' not in text:
            regrouped += _regrouped(text)
    return History(tuple(marks), tuple(regrouped))


def followed_back(files: Iterable[DataFile], regrouped: Iterable[tuple[set[str], set[str]]]) -> dict[str, DataFile]:
    """Path -> file of what `files` were made of: one that regroups rows stands for those whose rows it holds."""
    live = {f.path: f for f in files}
    for gone, come in regrouped:
        if come <= live.keys():
            like = live[next(iter(come))]  # of the same partition
            kept = {path: f for path, f in live.items() if path not in come}
            live = kept | {path: replace(like, path=path, rows=-1, stats_min={}) for path in gone}
    return live


def _regrouped(commit: bytes) -> list[tuple[set[str], set[str]]]:
    """(files gone, files come) of each partition in a commit that compacts."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for line in commit.splitlines():
        action = json.loads(line)
        for place, kind in enumerate(("remove", "add")):
            if kind in action:
                partition = json.dumps(action[kind].get("partitionValues"), sort_keys=True)
                found.setdefault(partition, (set(), set()))[place].add(action[kind]["path"])
    return [(gone, come) for gone, come in found.values() if gone and come]
