"""Label and pre-ranker quality on the SEMI-SYNTHETIC Amazon Industrial tables, against the same controls.

Users, items, texts and purchases are real (Amazon reviews 2018, Industrial and Scientific); times, requests, recall,
exposure and clicks are simulated. Judged on the last two days' recalled pairs: which of a request's candidates is the
one that the user really took next (`tests.bench.simulation.purchases`). Seeds differ in requests, exposure, clicks and
initial weights; the purchases are the same in all. `oracle_hard` trains on the real next purchases of unexposed pairs.
What the clicks of the training rows say is a dial: `--world wishes-0.5` draws half of them by nearness to what the user
really took afterwards; with wishes-0 they follow the import's rates per recall channel and say next to nothing.

A variant is better than another one only where the interval of the difference over users and seeds lies above 0.

    python -m tests.bench.bench_preranker [--quick] [--world wishes-0.5|wishes-0|wishes-1] [--seeds 101,102]
        [--work FOLDER]
"""

from __future__ import annotations

from dataclasses import replace

from tests.bench.harness import Figure, report
from tests.bench.simulation import variants
from tests.bench.simulation.log import Size
from tests.bench.simulation.purchases import make_semi_synthetic
from tests.bench.simulation.study import command_line, difference, figures_of, run, show

SEEDS = (101, 102, 103, 104, 105)
QUICK_SEEDS = (201, 202)
SIZE = Size(codes=256, random_share=0.05)
WORLDS = ("wishes-0.5", "wishes-0", "wishes-1")
NAMES = tuple(n for n in variants.ALL if n != "oracle_probability")  # here true probabilities are 0 or 1


def main() -> None:
    """Run the seeds, print the table, write the figures."""
    args = command_line(WORLDS).parse_args()
    quick = replace(SIZE, steps=100, interest_epochs=1)
    size, seeds, names = (quick, QUICK_SEEDS, variants.QUICK) if args.quick else (SIZE, SEEDS, NAMES)
    results = run(make_semi_synthetic, size, names, seeds, args)
    show(results)
    count = len(results["exposed_only"]["unexposed/auc"].seeds)
    if count < 2:
        print("one seed: no paired differences, nothing is written")
        return
    figures: dict[str, Figure] = {}
    for ours in ("gpl_clicks@1", "gpl_prefix@1", "gpl_logistic"):
        for other in ("exposed_only", "constant", "user_rate", "popularity", "cosine", "clicks_no_anchors@1"):
            for figure in ("unexposed/auc", "unexposed/gauc"):
                figures |= difference(results, ours, other, figure)
    pairs = [("gpl_prefix@1", "gpl_clicks@1")]
    if "clicks_no_share@1" in results:
        pairs.append(("gpl_clicks@1", "clicks_no_share@1"))
    for ours, other in pairs:
        for figure in ("unexposed/auc", "unexposed/gauc", "exposed/auc", "exposed/gauc"):
            figures |= difference(results, ours, other, figure, better=False)
    title = f"SEMI-SYNTHETIC Amazon Industrial, clicks {args.world}, {count} paired seeds"
    option = "" if args.world == WORLDS[0] else f"--world {args.world}"
    report("preranker", {**figures, **figures_of(results)}, args.quick, title, option)


if __name__ == "__main__":
    main()
