"""The part of README that quotes figures, between its two marks, from the results' JSON."""

from __future__ import annotations

from tests.bench.overview import OURS, SHIPPED, Interval, findings, mean, over_exposed_only, result, tuned, value, words

START, END = "<!-- figures: python -m tests.bench.table -->", "<!-- end of figures -->"
DAY = "Trained through 2026-01-04, judged on the day after"
TRUTH = "Judged by the simulated truth"
CONTROLS = {
    "constant": "a constant", "shuffled": "ours, shuffled", "user_rate": "the user's click rate",
    "cosine": "cosine to history", SHIPPED: "**ours**", "popularity": "popularity",
}  # fmt: skip


def with_figures(page: str) -> str:
    """README with the part between its marks written again."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{_block()}{END}{after}"


def _quickstart(column: str, judged: str = DAY) -> list[str]:
    alone, labels = (value("quickstart", f"{judged} | {m}: {column}") for m in ("exposed_only", "gpl"))
    key = f"{judged} | gpl - exposed_only: {column}"
    difference = Interval(*(value("quickstart", f"{key}{end}") for end in ("", " from", " to")))
    return [f"{alone:.3f}", f"{labels:.3f}", f"{difference}, {difference.verdict}"]


def _movielens(column: str) -> list[str]:
    found = over_exposed_only(OURS, column)
    return [f"{mean('exposed_only', column):.3f}", f"{mean(OURS, column):.3f}", f"{found}, {found.verdict}"]


def _figures() -> str:
    rows = {
        "quickstart: exposed requests of the next day, AUC": _quickstart("exposed/auc"),
        "the same, GAUC": _quickstart("exposed/gauc"),
        "quickstart: unexposed pairs against the simulated truth, AUC": _quickstart("unexposed/auc", TRUTH),
        "MovieLens 100k, shipped labels: unexposed pairs, later liked or not, GAUC": _movielens("unexposed/gauc"),
        "the same pairs, AUC": _movielens("unexposed/auc"),
        "MovieLens 100k: held-out exposed pairs, AUC": _movielens("exposed/auc"),
    }
    head = ["| evaluation of the pre-ranker | clicks alone | with labels | difference [95%] |", "|---|---:|---:|---|"]
    return "\n".join([*head, *(f"| {text} | {' | '.join(cells)} |" for text, cells in rows.items())])


def _controls() -> str:
    rows = [OURS if c == SHIPPED else tuned(c) for c in CONTROLS]
    cells = [f"{mean(row, 'unexposed/gauc'):.3f} / {mean(row, 'unexposed/auc'):.3f}" for row in rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in (CONTROLS.values(), ["---"] * len(cells), cells)])


def _block() -> str:
    """The figures with their caveats, and one labeled pair as a sentence."""
    pair = result("quickstart")["pair"]
    return words(
        "readme.md", figures=_figures(), controls=_controls(), **findings(),
        best=value("quickstart", f"{TRUTH} | bayes: unexposed/auc"),
        core_hours=value("spark_scale", "all jobs: core-hours per 10^9 candidate rows"),
        **{**pair, "history": pair["history"][0], "mean_label": value("quickstart", "mean label")},
    )  # fmt: skip
