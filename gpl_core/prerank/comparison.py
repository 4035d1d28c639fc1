"""Rows of `evaluations`: every model's figures by seed, their means over seeds, and paired differences of models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpl_core.prerank.bootstrap import FloatArray, interval, over_seeds, replicates
from gpl_core.prerank.metrics import Figure

BASELINE, OURS = "exposed_only", "gpl"
"""The two models that every evaluation has: trained on exposed rows alone, and with pseudo-labels too."""
ALL_SEEDS = -1
"""In place of a seed: the mean over all of them, with an interval over users and seeds together."""
TOO_FEW_CLICKS = 200
"""A slice with fewer is too small to judge by."""

Found = Mapping[tuple[str, int], Sequence[Figure]]
"""(model, seed) -> figures of one slice, the same metrics in the same order for all."""


def compared(found: Found, pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of one slice, without run and slice: model, against, seed and the columns of a figure with its interval.

    pairs: (model, against): rows of the model's difference to another one, over all seeds. "Better" may be said of a
    difference only whose interval lies above 0.
    """
    models = list(dict.fromkeys(model for model, _ in found))
    seeds = sorted({seed for _, seed in found})
    rows = []
    for number in range(len(next(iter(found.values()), ()))):
        figures = {key: figures[number] for key, figures in found.items()}
        drawn = _drawn(figures)
        for (model, seed), figure in figures.items():
            each = None if drawn is None else drawn[model, seed][:, None]
            rows.append(_row(model, "", seed, figure, figure.value, each))
        for model, against in [*((m, "") for m in models), *pairs]:
            first = figures[model, seeds[0]]
            if drawn is None:
                rows.append(_row(model, against, ALL_SEEDS, first, None, None))
                continue
            value, each = _means(figures, drawn, model, seeds)
            if against:
                other, minus = _means(figures, drawn, against, seeds)
                value, each = value - other, each - minus
            rows.append(_row(model, against, ALL_SEEDS, first, value, each))
    return rows


def _drawn(figures: Mapping[tuple[str, int], Figure]) -> dict[tuple[str, int], FloatArray] | None:
    sums = [f.sums for f in figures.values() if f.sums is not None]
    if len(sums) < len(figures):
        return None
    return dict(zip(figures, replicates(sums).T, strict=True))


def _means(
    figures: Mapping[tuple[str, int], Figure], drawn: Mapping[tuple[str, int], FloatArray], model: str, seeds: list[int]
) -> tuple[float, FloatArray]:
    """(mean over seeds, replicates [count x S])."""
    values = [figures[model, seed].value for seed in seeds]
    return float(np.mean([v for v in values if v is not None])), np.stack([drawn[model, s] for s in seeds], axis=1)


def _row(
    model: str, against: str, seed: int, figure: Figure, value: float | None, drawn: FloatArray | None
) -> dict[str, Any]:
    low, high = (None, None) if drawn is None else interval(over_seeds(drawn))
    about = {"model": model, "against": against, "seed": seed}
    return {**about, **figure.columns(), "value": value, "low": low, "high": high}


def too_small(rows: Sequence[Mapping[str, Any]]) -> str:
    """A note for the rows of a slice with too few clicks; empty for other slices, and for rows without click counts."""
    clicks = max(row.get("clicks", TOO_FEW_CLICKS) for row in rows)
    return f"too small: {clicks:,.0f} clicks, fewer than {TOO_FEW_CLICKS}" * (clicks < TOO_FEW_CLICKS)


def ordered_slices(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The slices of the rows, the one with most clicks first: those too small to judge by stand last."""
    clicks: dict[str, float] = {}
    for row in rows:
        clicks[row["slice"]] = max(row["clicks"], clicks.get(row["slice"], 0.0))
    return sorted(clicks, key=lambda part: (-clicks[part], part))


def figure_text(row: Mapping[str, Any]) -> str:
    """A figure with its interval, or why there is none."""
    if row["value"] is None:
        return f"absent: {row['note']}"
    between = "(no interval)" if row["low"] is None else f"[{row['low']:.4f}, {row['high']:.4f}]"
    return f"{row['value']:.4f} {between}"


def absences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why figures are absent: a line for each reason, with the slices and metrics that have it."""
    found: dict[tuple[str, str], list[str]] = {}  # (reason, metric) -> slices
    for note, metric, part in dict.fromkeys((r["note"], r["metric"], r["slice"]) for r in rows if r["value"] is None):
        found.setdefault((note, metric), []).append(part)
    places: dict[str, dict[str, list[str]]] = {}  # reason -> slices -> metrics
    for (note, metric), parts in found.items():
        places.setdefault(note, {}).setdefault(", ".join(parts), []).append(metric)
    return [
        f"absent: {'; '.join(', '.join(metrics) + f' ({parts})' for parts, metrics in of.items())}: {note}"
        for note, of in places.items()
    ]


def difference_text(row: Mapping[str, Any] | None, better: str = " better", worse: str = " worse") -> str:
    """A paired difference; "better" and "worse" only where its interval does not hold 0. Empty without one."""
    if row is None or row["value"] is None:
        return ""
    low, high = row["low"], row["high"]
    if low is None:
        return f"{row['value']:+.4f} (no interval)"
    verdict = better if low > 0 else worse if high < 0 else ""
    return f"{row['value']:+.4f} [{low:+.4f}, {high:+.4f}]{verdict}"
