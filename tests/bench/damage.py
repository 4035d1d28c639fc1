"""Damage to every kind of file that is ours: said in one line, then the work begins again or the version before serves.

The lakehouse of `concurrency`. Per kind of file, each of missing, empty, truncated and one bit flipped:

- checkpoints and journals: a worker is killed when the file is there, the file is damaged, the worker runs again. It
  must name the file (missing: nothing to name) and leave what an undisturbed run leaves.
- files and manifests of bundles: `gpl status` names the bundle in one line, and the version before is in force or none.
- catalog.json, and commits and data files of tables: `gpl sql` on the table ends with what the version before holds, or
  with another exit code and one message that names the table or file, never a traceback.

    python -m tests.bench.damage [--seconds S] --work FOLDER

The folder keeps the lakehouse, the references and each outcome: the same command again continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from gpl_core.errors import GplError
from gpl_core.graph.planner import Planner
from gpl_core.lakehouse.lake import LOCATIONS, Lake
from tests.bench.concurrency import Overlaps, prepare
from tests.bench.harness import Figure, at_least, at_most, report
from tests.bench.pairs import WAIT, Fork, digests
from tests.support import DAMAGES
from tests.test_pipeline import LAST

# Step -> the file that it leaves when it is killed, under the lakehouse.
_UNDER_WAY = {
    "train_tokenizer": ("checkpoint", "work/train_tokenizer/*/checkpoint/*.safetensors"),
    "train_interest_model": ("checkpoint", "work/train_interest_model/*/*/checkpoints/*/*.safetensors"),
    "generate_anchors": ("journal", "work/generate_anchors/*/*.safetensors"),
}
_TABLES = ("item_sids", "pair_scores", "job_runs", "artifact_decisions")
_CATALOG = "catalog://shop.opt_outs"


class Damages:
    """The campaign in the folder `work`."""

    def __init__(self, work: Path):
        self.overlaps, self.results = Overlaps(work), work / "damages.jsonl"
        self.pairs = self.overlaps.pairs

    def cases(self) -> Iterator[tuple[str, str, str]]:
        """(kind of file, what is damaged, how)."""
        artifacts = self.pairs.lake / "artifacts"
        bundles = [max(p.parent for p in kind.glob("*/manifest.json")) for kind in sorted(artifacts.iterdir())]
        files = [f.relative_to(self.pairs.lake) for b in bundles for f in sorted(b.rglob("*")) if f.is_file()]
        for damage in DAMAGES:
            yield from ((kind, step, damage) for step, (kind, _) in _UNDER_WAY.items())
            yield from (("manifest" if f.name == "manifest.json" else "bundle file", str(f), damage) for f in files)
            yield from ((kind, table, damage) for table in _TABLES for kind in ("commit", "data file"))
            yield "catalog.json", LOCATIONS, damage

    def run(self, seconds: float) -> list[dict[str, Any]]:
        """All outcomes; those written down are not made again, none is started after `seconds`."""
        text = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
        found = {tuple(o["case"]): o for o in map(json.loads, text.splitlines())}
        clock = time.monotonic()
        for case in self.cases():
            if case in found or time.monotonic() - clock > seconds:
                continue
            kind, what, damage = case
            act = self.interrupted if what in _UNDER_WAY else self.bundle if "/" in what else self.table
            found[case] = {"case": case, "wrong": act(kind, what, damage)}
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[case]) + "\n")
            print(f"{damage:<12} {kind:<12} {what:<70} {found[case]['wrong'] or 'ok'}", flush=True)
        return [found[case] for case in self.cases() if case in found]

    def interrupted(self, kind: str, step: str, damage: str) -> str:
        """What went wrong when `step` went on after its file was damaged; "" for nothing."""
        wanted, root = self.pairs.alone(step, step)["left"], self.pairs.copy(step, "damaged")
        run = self.pairs.start(step, root, "damaged")
        assert isinstance(run, Fork)
        path = run.kill_when(lambda: next(iter(root.glob(_UNDER_WAY[step][1])), None))
        if path is None:
            return "it ended before it could be killed"
        _damage(path, damage)
        end = self.pairs.start(step, root, "damaged").end(WAIT)
        said = _lines(self.pairs.work / "damaged.log", "damaged")
        if end.word != "done" or digests(root) != wanted:
            return f"{end.word}, {'other' if digests(root) != wanted else 'the same'} rows"
        return "" if damage == "missing" or len(said) == 1 else f"said {len(said)} times"

    def bundle(self, kind: str, what: str, damage: str) -> str:
        """What was wrong with the status of a lakehouse in which a bundle's file was damaged."""
        root = self.pairs.copy("done", "damaged")
        _damage(root / what, damage)
        _, artifact, version, *_ = Path(what).parts
        code = self.status(root)
        said = _lines(self.pairs.work / "damaged.log", version, "it is not used")
        served = Planner(self.pairs.config(root)).artifacts.in_force_or_none(artifact, LAST + timedelta(days=9))
        if code or (served and served.version == version):
            return f"exit code {code}, {served and served.version} serves"
        unfinished = (kind, damage) == ("manifest", "missing")  # that is a bundle which a killed run left
        return "" if unfinished or len(said) == 1 else f"said {len(said)} times"

    def status(self, root: Path) -> int | None:
        """Exit code of `gpl status`."""
        return self.gpl(root, "status")

    def gpl(self, root: Path, *arguments: str, settings: Sequence[str] = ()) -> int | None:
        """Exit code of a command; what it says is in damaged.log."""
        command, *rest = arguments
        given = [a for s in (f"lakehouse.root={root}", *settings) for a in ("--set", s)]
        where = ["--config", str(self.pairs.file), *given]
        return Fork("gpl", [command, *where, *rest], self.pairs.work / "damaged.log").end(WAIT).code

    def table(self, kind: str, what: str, damage: str) -> str:
        """What was wrong with the end of a query on a table whose newest commit or data file was damaged."""
        root, settings = self.pairs.copy("done", "damaged"), []
        if what == LOCATIONS:
            (root / LOCATIONS).write_text(json.dumps({_CATALOG: str(root / "tables/raw_items")}))
            path, query, settings = root / LOCATIONS, "", [f"lakehouse.tables.raw_opt_outs={_CATALOG}"]
        else:
            if what == "artifact_decisions":
                version = self.overlaps.version("calibrator")
                assert self.gpl(root, "rollback", "calibrator", version) == 0
            folder, query = root / "tables" / what, f"SELECT * FROM {what}"
            log = sorted((folder / "_delta_log").glob("*.json"))[-1]
            added = re.findall(r'"add":\{"path":"([^"]+)"', log.read_text())
            path = log if kind == "commit" else folder / added[-1]
            lake, newest = Lake(str(root)), Lake(str(root)).open(what).version
            good = [lake.open(what, version).read() for version in (newest, newest - 1)]
        _damage(path, damage)
        code = self.gpl(root, *(["sql", query] if query else ["status"]), settings=settings)
        said = _lines(self.pairs.work / "damaged.log", "error: ")
        text = (self.pairs.work / "damaged.log").read_text(errors="replace")
        if "Traceback" in text or code not in (0, 1, 3, 4) or len(said) != bool(code):
            return f"exit code {code}, said {len(said)} times"
        if code and not re.search(rf"{what}|{path.name}", said[0]):
            return f"does not name it: {said[0][:100]}"
        with suppress(GplError):  # the step that reads it next says so
            if not code and query and not any(rows.equals(lake.open(what).read()) for rows in good):
                return "other rows, unnoticed"
        return ""


def _damage(path: Path, damage: str) -> None:
    """Damage a copy in its place: the file may be another name of one in the lakehouse."""
    copied = path.with_name(f"{path.name}.copy")
    shutil.copy2(path, copied)
    os.replace(copied, path)
    DAMAGES[damage](path)


def _lines(log: Path, *words: str) -> list[str]:
    """The lines of `log` with the first of `words` and, if there are more, one of the others."""
    first, *others = words
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [t for t in lines if first in t and (not others or any(w in t for w in others)) and not t.startswith("{")]


def figures(outcomes: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Goals, then wrong ends per kind and damage."""
    kinds = Counter((o["case"][0], o["case"][2]) for o in outcomes)
    wrong = Counter((o["case"][0], o["case"][2]) for o in outcomes if o["wrong"])
    # Parquet pages have checksums, which pyarrow 14 neither writes nor reads.
    unseen = wrong.pop(("data file", "bit flipped"), 0)
    return {
        "files damaged": at_least(len(outcomes), 60, "files"),
        "of these that ended wrong, but for bits in data files": at_most(sum(wrong.values()), 0, "files"),
        "bits in data files of tables that nothing noticed": Figure(unseen, "files"),
        **{f"{k[0]}, {k[1]}: {n} damaged, wrong": Figure(wrong[k], "files") for k, n in sorted(kinds.items())},
    }


def main() -> None:
    """Run the campaign, print its table, write its figures once it is complete."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so long; run it again")
    parser.add_argument("--work", type=Path, required=True, help="keeps the lakehouse and the outcomes")
    args = parser.parse_args()
    prepare()
    logging.getLogger("gpl").setLevel(logging.ERROR)  # what the forks say counts
    damages = Damages(args.work.absolute())
    outcomes, total = damages.run(args.seconds), len(list(damages.cases()))
    if len(outcomes) < total:
        print(f"{len(outcomes)} of {total} files so far: the same command continues")
        return
    report("damage", figures(outcomes), False, f"damage to {total} files of ours", module="damage --work FOLDER")


if __name__ == "__main__":
    main()
