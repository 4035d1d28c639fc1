"""Label and pre-ranker quality in a simulated marketplace, against every control, on paired seeds.

Per seed: a world (simulate, encode by MiniLM, tokenize, train a small interest model, search, score), then one
pre-ranker per variant (`tests.bench.simulation.variants`): same exposed batches, initial weights and number of steps.
Judged on the next day's recalled pairs by expected AUC against the true click probabilities; the share of the gap to
the oracle is counted from a constant label on, with an interval over users and seeds. A small transformer, not a
pre-trained LLM. The tokenizer is the product's, the pre-ranker is trained under its shipped settings.

    python -m tests.bench.bench_simulation [--quick] [--world plain|user_bias|confounded|…] [--seeds 101,102]
        [--work FOLDER]

A full run takes minutes per seed: one process of one thread each, as many at a time as there are cores. With --work
each finished seed is kept in FOLDER, found there by the next run, and all that are there are reported: `--seeds 101`,
then `--seeds 102`, … may be runs of their own.
"""

from __future__ import annotations

from gpl_core.labels.controls import CONTROLS
from tests.bench.harness import Figure, report
from tests.bench.simulation import variants
from tests.bench.simulation.log import QUICK, Size
from tests.bench.simulation.study import Results, command_line, difference, farther, figures_of, gap_closed, run, show
from tests.bench.simulation.world import make_world

WORLDS = ("plain", "popularity_bias", "fast_drift", "user_bias", "confounded")
SEEDS = (101, 102, 103, 104, 105)
QUICK_SEEDS = (201, 202)
DEFAULT = "gpl_clicks@1"


def main() -> None:
    """Run the seeds, print the table, write the figures."""
    args = command_line(WORLDS).parse_args()
    size, seeds, names = (QUICK, QUICK_SEEDS, variants.QUICK) if args.quick else (Size(), SEEDS, variants.ALL)
    results = run(make_world, size, names, seeds, args)
    show(results)
    count = len(results["exposed_only"]["unexposed/auc"].seeds)
    if count < 2:
        print("one seed: no paired differences, nothing is written")
        return
    figures = {**goals(results, args.world == "plain"), **figures_of(results)}
    title = f"simulation, {args.world} world, {count} paired seeds"
    report("simulation", figures, args.quick, title, "" if args.world == "plain" else f"--world {args.world}")


def goals(results: Results, plain: bool) -> dict[str, Figure]:
    """The goals as figures: a missed one is written as missed. plain: the world without a catch has higher ones."""
    out = {}
    for metric in ("auc", "gauc"):
        out |= gap_closed(results, DEFAULT, metric, 0.6 if plain else 0.35)
        out |= gap_closed(results, "gpl_logistic", metric, 0.7 if plain else None)
        for name in ("gpl_clicks", "gpl_content@1", "gpl_prefix@1", *CONTROLS[1:]):
            if name in results:
                out |= gap_closed(results, name, metric, 0.4 if plain and name == "gpl_content@1" else None)
        for part in ("unexposed", "exposed"):
            out |= difference(results, DEFAULT, "exposed_only", f"{part}/{metric}", better=part == "unexposed")
    out |= difference(results, DEFAULT, "clicks_no_anchors@1", "unexposed/gauc")
    out |= difference(results, "gpl_logistic", "logistic_no_anchors", "unexposed/gauc")
    if "clicks_no_share@1" in results:
        for figure in ("unexposed/auc", "unexposed/gauc", "exposed/auc", "exposed/gauc"):
            out |= difference(results, DEFAULT, "clicks_no_share@1", figure, better=False)
    if "gpl_weighted@1" in results:
        out |= difference(results, "gpl_weighted@1", DEFAULT, "unexposed/gauc")
    for figure in ("top10/coverage", "top10/tail_share"):
        out |= difference(results, DEFAULT, "exposed_only", figure, better=False)
        out |= farther(results, DEFAULT, "exposed_only", figure)
    for name in (n for n in variants.CONTROLS if n in results):
        out |= difference(results, DEFAULT, name, "tail/gauc")
    return out


if __name__ == "__main__":
    main()
