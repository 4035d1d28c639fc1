"""Label and pre-ranker quality in a simulated marketplace, against every control, on paired seeds.

Per seed: a world (simulate, encode by MiniLM, tokenise, train a small interest model, search, score), then one
pre-ranker per variant (`tests.bench.simulation.variants`): same exposed batches, initial weights and number of
steps. Judged on the next day's recalled pairs by expected AUC against the true click
probabilities. Label settings are METHOD's defaults (lambda 2, spread 1, exponents 1); the pre-ranker's were chosen for
the exposed-only baseline on a world of another seed (301). A small transformer, not a pre-trained LLM.

    python -m tests.bench.bench_simulation [--quick]
"""

from __future__ import annotations

import time

import numpy as np
import torch

from gpl_core.labels.calibration import sigmoid
from tests.bench.harness import Figure, at_least, is_quick, report
from tests.bench.simulation import variants
from tests.bench.simulation.judge import Arena
from tests.bench.simulation.world import QUICK, Size, make_world

LAMBDA = 2.0
SEEDS = (101, 102, 103, 104, 105)
QUICK_SEEDS = (201, 202)
# Two-sided 95 % points of Student's t by degrees of freedom (1 to 9).
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_SHOWN = (
    "unexposed/auc", "unexposed/gauc", "exposed/auc", "tail/gauc", "new/auc", "recalled/hr@10", "recalled/ndcg@10",
    "top10/coverage", "top10/tail_share", "top10/diversity",
)  # fmt: skip

Results = dict[str, dict[str, np.ndarray]]
"""variant -> figure -> one value per seed."""


def run_seed(size: Size, seed: int, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Figures of every variant in one world."""
    start = time.perf_counter()
    world = make_world(size, seed)
    arena = Arena(world, seed)
    rate = world.train.clicked[world.train.is_exposed].mean()
    print(
        f"seed {seed}: {len(world.train)} training rows (click rate {rate:.4f}), {len(world.uniform)} uniform rows "
        f"({variants.uniform_rate(world):.4f}), {len(world.test)} test pairs, in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    found: dict[str, dict[str, float]] = {"bayes": arena.judge(world.test.probability)}
    teacher: np.ndarray | None = None
    for name in names:
        rows = variants.rows_of(name, world, seed, LAMBDA, teacher)
        model = arena.train(rows)
        scores = arena.predict(model, world.test.user, world.test.item, rows.with_content)
        found[name] = arena.judge(scores)
        if name == "exposed_only":
            teacher = sigmoid(arena.predict(model, world.train.user, world.train.item))
    return found


def paired(results: Results, left: str, right: str, figure: str) -> tuple[float, float]:
    """(mean, half width of the 95 % interval) of left - right over seeds."""
    difference = results[left][figure] - results[right][figure]
    n = len(difference)
    return float(difference.mean()), float(_T95[n - 2] * difference.std(ddof=1) / np.sqrt(n))


def gap_closed(results: Results, name: str, metric: str, goal: float) -> Figure:
    """Share of the gap exposed_only -> oracle_hard on unexposed pairs that `name` closes, of the means over seeds.

    Where the gap's own interval holds 0 there is nothing to close: the goal then counts as missed, value 0.
    """
    figure = f"unexposed/{metric}"
    gap, half = paired(results, "oracle_hard", "exposed_only", figure)
    if gap - half <= 0:
        return Figure(0.0, f"no {metric} gap", f">= {goal:g}", False)
    return at_least(paired(results, name, "exposed_only", figure)[0] / gap, goal, "share")


def main() -> None:
    """Run all seeds, print the table, write the figures."""
    quick = is_quick()
    torch.set_num_threads(1)
    size, seeds, names = (QUICK, QUICK_SEEDS, variants.QUICK) if quick else (Size(), SEEDS, variants.ALL)
    per_seed: list[dict[str, dict[str, float]]] = []
    for seed in seeds:
        per_seed.append(run_seed(size, seed, names))
        if len(per_seed) < 2:
            continue
        results: Results = {
            name: {key: np.array([found[name].get(key, np.nan) for found in per_seed]) for key in per_seed[0][name]}
            for name in per_seed[0]
        }
        _print(results)  # after every seed: a run of hours shows where it is going
        report("simulation", _figures(results), quick, f"simulation, plain world, {len(per_seed)} paired seeds")


def _figures(results: Results) -> dict[str, Figure]:
    """Every variant's figures, and the goals."""
    out = {"paired seeds": Figure(float(len(results["exposed_only"]["unexposed/auc"])), "seeds")}
    best = "gpl_logistic"
    for metric, goal in (("auc", 0.70), ("gauc", 0.60)):
        out[f"goal: {best} closes the {metric} gap"] = gap_closed(results, best, metric, goal)
        out[f"gap: oracle_hard - exposed_only, {metric}"] = Figure(
            paired(results, "oracle_hard", "exposed_only", f"unexposed/{metric}")[0], metric
        )
    out[f"goal: {best} gauc - random negatives'"] = at_least(
        paired(results, best, "random_negatives", "unexposed/gauc")[0], 0.0, "gauc"
    )
    for fixed in (n for n in results if n.startswith("gpl_quantile@")):
        for metric, goal in (("auc", 0.45), ("gauc", 0.60)):
            out[f"goal: {fixed} closes the {metric} gap"] = gap_closed(results, fixed, metric, goal)
    for with_anchors, without in (("gpl_quantile", "cosine_quantile"), ("gpl_logistic", "logistic_no_anchors")):
        mean, half = paired(results, with_anchors, without, "unexposed/gauc")
        out[f"goal: anchors' gauc, {with_anchors} - {without}"] = at_least(mean, 0.004, "gauc")
        out[f"  lower end of its interval ({without})"] = at_least(mean - half, 0.0, "gauc")
    mean, half = paired(results, best, "exposed_only", "exposed/auc")
    out[f"goal: {best} exposed auc - exposed_only's"] = at_least(mean, 0.0, "auc")
    out["  half width of its interval"] = Figure(half, "auc")
    for name in ("tail/gauc", "top10/coverage"):
        out[f"goal: {best} {name} - random negatives'"] = at_least(
            paired(results, best, "random_negatives", name)[0], 0.0, name.split("/")[1]
        )
    for name, figures in results.items():
        for key, values in figures.items():
            out[f"{name}: {key}"] = Figure(float(np.nanmean(values)), "mean")
            if key in ("unexposed/auc", "unexposed/gauc", "exposed/auc") and name not in ("exposed_only", "bayes"):
                mean, half = paired(results, name, "exposed_only", key)
                out[f"{name}: {key} - exposed_only's"] = Figure(mean, "difference")
                out[f"{name}: {key} - exposed_only's, half width"] = Figure(half, "95 %")
    return out


def _print(results: Results) -> None:
    print(f"{'variant':<20}" + "".join(f"{name:>18}" for name in _SHOWN))
    for name, figures in results.items():
        cells = (float(np.nanmean(figures[key])) if key in figures else float("nan") for key in _SHOWN)
        print(f"{name:<20}" + "".join(f"{value:>18.4f}" for value in cells))


if __name__ == "__main__":
    main()
