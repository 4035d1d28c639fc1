"""What the quickstart ended with, as a result file: README quotes it, and a picture of its report.

python -m tests.bench.quickstart [CONFIG [section.key=value …]]     (after `make quickstart`)
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpl_core as gpl
from tests.bench.harness import Figure, write

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = DOCS / "images" / "report.png"
SHOWN = ("auc", "gauc")


def main(config: str = "quickstart", *overrides: str) -> None:
    """Writes results/quickstart.<device>.json, docs/images/report.png and the plot of docs/tour.md."""
    lake = gpl.open_lakehouse(config, overrides)
    found = figures(lake)
    path = write("quickstart", found, False, "make quickstart: a simulated marketplace, one start", module="quickstart")
    body = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**body, "pair": pair(lake)}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    photograph(Path(lake.config.lakehouse.root) / "reports" / f"{lake.config.run.end_date}.html", PICTURE)
    here = [*overrides, f"lakehouse.root={Path(lake.config.lakehouse.root).resolve()}"]
    # It saves its plot where it runs.
    subprocess.run([sys.executable, "-c", tour(config, here)], check=True, cwd=PICTURE.parent)


def figures(lake: gpl.LakehouseReader) -> dict[str, Figure]:
    """Rows and coverage; AUC and GAUC of every variant on the day after, the differences with their intervals."""
    day = lake.config.run.end_date
    title = f"Trained through {day}, judged on the day after"
    feed = lake.feed(day)
    unexposed = lake.table("unexposed_samples", day, columns=["user_id"]).num_rows
    found = {
        "exposed rows": Figure(feed.manifest["exposed"], "rows"),
        "unexposed pairs": Figure(unexposed, "rows"),
        "unexposed pairs labeled": Figure(feed.manifest["labeled"], "rows"),
        "mean label": Figure(feed.manifest["pseudo_label_sum"] / feed.manifest["labeled"], "probability"),
    }
    truth = "Judged by the simulated truth"
    for table, heading, where in (
        ("evaluations", title, f"dt = DATE '{day}'"), ("truth_metrics", truth, f"dt > DATE '{day}'"),
    ):  # fmt: skip
        rows = lake.sql(f"SELECT * FROM {table} WHERE {where} AND seed = -1").to_pylist()
        for row in sorted(rows, key=lambda r: (r["slice"], r["metric"], r["against"], r["model"])):
            if row["metric"] not in SHOWN or row["value"] is None:
                continue
            compared = f" - {row['against']}" if row["against"] else ""
            key = f"{heading} | {row['model']}{compared}: {row['slice']}/{row['metric']}"
            found[key] = Figure(row["value"], "mean")
            found[f"{key} from"], found[f"{key} to"] = Figure(row["low"], "low"), Figure(row["high"], "high")
            if "clicks" in row:
                found[f"clicks in {row['slice']}"] = Figure(row["clicks"], "clicks")
    return found


def pair(lake: gpl.LakehouseReader) -> dict[str, Any]:
    """One labeled pair that was not shown: the best item of the user whose anchors and labels are clearest.

    Chosen by a rule: of the pairs whose item carries no anchor and is not in the history, the one with the highest
    similarity among the best-labeled hundredth.
    """
    day = lake.config.run.end_date
    rows = lake.sql(
        "SELECT user_id, item_id, title, anchor_title, pseudo_label, user_rate, user_rank, similarity "
        f"FROM explained_pairs WHERE dt = DATE '{day}' AND source = 'unexposed' AND title <> anchor_title"
    ).to_pylist()
    rows.sort(key=lambda r: (-r["pseudo_label"], r["user_id"], r["item_id"]))
    for row in sorted(rows[: len(rows) // 100], key=lambda r: (-r["similarity"], r["user_id"], r["item_id"])):
        known = [item["title"] for item in lake.explain(row["user_id"], row["item_id"], day)["nearest_history"]]
        if row["title"] not in known:
            return {**row, "run_date": day.isoformat(), "history": known[:2]}
    raise SystemExit("no labeled pair to show")


def tour(config: str, overrides: Sequence[str] = ()) -> str:
    """The code of docs/tour.md, for another configuration."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tour.md").read_text(encoding="utf-8"), re.S)
    return "\n".join(blocks).replace('open_lakehouse("quickstart")', f"open_lakehouse({config!r}, {list(overrides)!r})")


def photograph(page: Path, picture: Path, width: int = 1200, height: int = 900) -> None:
    """The first screen of a page, by headless Chromium; left as it is where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no Chromium: {picture} is left as it was")
        return
    picture.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000",
             "--run-all-compositor-stages-before-draw", f"--user-data-dir={profile}",
             f"--window-size={width},{height}", f"--screenshot={picture}", page.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    print(f"written: {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:])
