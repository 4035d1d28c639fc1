"""Writes what the documents quote from the JSON files under tests/bench/results: no figure is typed by hand.

python -m tests.bench.table

docs/benchmarks.md (one page: what pays), docs/benchmark-figures.md (each benchmark), their plots, and README's figures.
Their words: tests/bench/pages/.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import overview, readme
from tests.bench.harness import RESULTS

ROOT = Path(__file__).parents[2]
FAIR_SINCE = "2026-11-28"  # decision 019
UNFAIR = (
    "*Gains over `exposed_only` are too high here: when this was measured, that baseline saw only the few exposed rows "
    "of mixed batches ([decision 019](decisions/019-a-fair-baseline-and-its-intervals.md)). Differences between two "
    "labels are not affected.*"
)
SHOWN = 12  # figures without a goal that a section shows; what is more stands in the JSON alone


def _figures() -> str:
    """docs/benchmark-figures.md."""
    files = sorted(RESULTS.glob("*.json"))
    sections = [section(path, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return overview.words("benchmark-figures.md", sections="\n".join(sections))


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / "README.md": lambda: readme.with_figures((ROOT / "README.md").read_text(encoding="utf-8")),
    ROOT / "docs" / "benchmarks.md": lambda: overview.words(
        "benchmarks.md", table=overview.table(), **overview.findings()
    ),
    ROOT / "docs" / "benchmark-figures.md": _figures,
    ROOT / "docs" / "images" / "labels.svg": overview.labels_plot,
    ROOT / "docs" / "images" / "goals.svg": overview.goals_plot,
}
"""Every file that quotes results, and what it should say."""


def main() -> None:
    """Write them."""
    for path, text in PAGES.items():
        path.write_text(text(), encoding="utf-8")
        print(f"written: {path}")


def section(path: Path, body: dict[str, Any]) -> str:
    """One benchmark as Markdown: figures with a goal first, then variants x metrics, then the rest when it is short."""
    figures = body["figures"]
    matrix = {key: f for key, f in figures.items() if f["unit"] in ("mean", "half width", "low", "high")}
    goals = {key: f for key, f in figures.items() if f["holds"] is not None}
    rest = {key: f for key, f in figures.items() if key not in matrix and key not in goals}
    more = len(rest) if len(rest) > SHOWN else 0
    run = path.name.removesuffix(f".{body['device']}.json").replace(".", ", ")
    lines = [f"## {run}, {body['device']}", ""]
    if "about" in body:
        lines += [f"{body['about'][0].upper()}{body['about'][1:]}.", ""]
    lines += [f"`{body['command']}`, commit {body['commit']}, {body['when'][:10]}", ""]
    if body["name"] in ("preranker", "simulation") and body["when"] < FAIR_SINCE:
        lines += [UNFAIR, ""]
    if goals or (rest and not more):
        lines += ["| figure | value | unit | goal | |", "|---|---:|---|---|---|"]
        for key, figure in {**goals, **({} if more else rest)}.items():
            verdict = {None: "", True: "holds", False: "**missed**"}[figure["holds"]]
            lines.append(f"| {_cell(key)} | {figure['value']:,.4g} | {figure['unit']} | {figure['goal']} | {verdict} |")
        lines.append("")
    lines += _matrices(matrix)
    if more:
        lines += [f"{more} more figures, without a goal, stand in `tests/bench/results/{path.name}`.", ""]
    return "\n".join(lines)


def _matrices(figures: dict[str, Any]) -> list[str]:
    """Figures named `title | row: column`, one table per title; its interval stands beside it."""
    titles: dict[str, dict[str, dict[str, str]]] = {}
    for key, figure in figures.items():
        if figure["unit"] != "mean":
            continue
        title, _, place = key.partition(" | ")
        row, _, column = place.partition(": ")
        text = f"{figure['value']:.4f}"
        if half := figures.get(f"{key} ±"):
            text = f"{figure['value']:+.4f} ± {half['value']:.4f}"
        elif low := figures.get(f"{key} from"):
            sign = "+" if title.startswith("Paired") or " - " in row else ""
            text = f"{figure['value']:{sign}.4f} [{low['value']:{sign}.4f}, {figures[f'{key} to']['value']:{sign}.4f}]"
        titles.setdefault(title, {}).setdefault(row, {})[column] = text
    lines = []
    for title, rows in titles.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        lines += [f"{title}:", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {row} | " + " | ".join(cells.get(c, "") for c in columns) + " |" for row, cells in rows.items()]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


if __name__ == "__main__":
    main()
