"""Label and pre-ranker quality in a simulated marketplace, against every control, on paired seeds.

Per seed: a world (simulate, encode by MiniLM, tokenize, train a small interest model, search, score), then one
pre-ranker per variant (`tests.bench.simulation.variants`): same exposed batches, initial weights and number of
steps. Judged on the next day's recalled pairs by expected AUC against the true click
probabilities. A small transformer, not a pre-trained LLM. Steps, learning rates and lambda were chosen on worlds of
other seeds (301, 302) than those reported here.

    python -m tests.bench.bench_simulation [--quick] [--world plain|popularity_bias|fast_drift] [--seeds 101,102]
        [--work FOLDER]

A full run takes minutes per seed: one process of one thread each, as many at a time as there are cores. With --work
each finished seed is kept in FOLDER, found there by the next run, and all that are there are reported: `--seeds 101`,
then `--seeds 102`, … may be runs of their own.
"""

from __future__ import annotations

from tests.bench.harness import Figure, report
from tests.bench.simulation import variants
from tests.bench.simulation.study import Results, arguments, difference, figures_of, gap_closed, paired, run, show
from tests.bench.simulation.world import QUICK, Size, make_world

SEEDS = (101, 102, 103, 104, 105)
QUICK_SEEDS = (201, 202)
BEST = "gpl_logistic_prefix"  # ahead of gpl_logistic on worlds 301 and 302; it is what `logistic` does in the product


def main() -> None:
    """Run the seeds, print the table, write the figures."""
    args = arguments(("plain", "popularity_bias", "fast_drift"))
    size, seeds, names = (QUICK, QUICK_SEEDS, variants.QUICK) if args.quick else (Size(), SEEDS, variants.ALL)
    results = run(make_world, size, names, seeds, args)
    show(results)
    count = len(results["exposed_only"]["unexposed/auc"])
    if count < 2:
        print("one seed: no paired differences, nothing is written")
        return
    figures = {**goals(results), **figures_of(results)}
    title = f"simulation, {args.world} world, {count} paired seeds"
    report("simulation", figures, args.quick, title, "" if args.world == "plain" else f"--world {args.world}")


def goals(results: Results) -> dict[str, Figure]:
    """The goals of the plain world, as figures: a missed one is written as missed."""
    out = {}
    for metric, goal in (("auc", 0.70), ("gauc", 0.60)):
        for name in (BEST, "gpl_logistic"):
            out[f"{name} closes the {metric} gap"] = gap_closed(results, name, metric, goal)
        gap, half = paired(results, "oracle_hard", "exposed_only", f"unexposed/{metric}")
        out[f"  the gap: oracle_hard - exposed_only, {metric}"] = Figure(gap, metric)
        out[f"  its half width, {metric}"] = Figure(half, "95 %")
    out |= difference(results, BEST, "random_negatives", "unexposed/gauc", 0.0)
    for fixed in (n for n in variants.NO_UNIFORM_ROWS if n in results):
        for metric, goal in (("auc", 0.45), ("gauc", 0.60)):
            out[f"{fixed} (no uniform rows) closes the {metric} gap"] = gap_closed(results, fixed, metric, goal)
    controls = (("gpl_quantile", "cosine_quantile"), ("gpl_prefix", "cosine_quantile"), (BEST, "logistic_no_anchors"))
    for with_anchors, without in controls:
        out |= difference(results, with_anchors, without, "unexposed/gauc", 0.004, above_zero=True)
    out |= difference(results, BEST, "exposed_only", "exposed/auc", 0.0)
    for figure in ("tail/gauc", "top10/coverage"):
        out |= difference(results, BEST, "random_negatives", figure, 0.0)
    return out


if __name__ == "__main__":
    main()
