"""MovieLens 100k: unexposed candidates that the user likes later, against every control.

Real: users, items, ratings and their times; a rating >= 4 is a click. Simulated: requests (a user's session) and their
unexposed candidates (100 that the user has not rated yet: half by popularity, half uniform). No row was exposed at
random, so every label has a target rate fixed to a share of the exposed click rate, the same shares and lambdas for
ours and for every control: `<label>@<share>/<lambda>`. Pre-rankers train on 60 days and are judged on all later
requests: does an unexposed candidate that the user rates >= 4 later stand above those that never are? Seeds differ in
samples, tokenizer, interest model, batches and initial weights; users are the same, so intervals are over the same
users and all seeds. The interest model is a small one from random weights, not a pre-trained LLM.

    python -m tests.bench.bench_ml_100k [--data FOLDER] [--quick] [--seeds 1,2] [--work FOLDER]

--data: the folder of raw_*.parquet, ml-100k by default: what ../shared/data/ml_100k/prepare.py writes; research only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from gpl_core.labels.controls import CONTROLS
from tests.bench.harness import Figure, report
from tests.bench.simulation.log import Size
from tests.bench.simulation.movielens import make_movielens
from tests.bench.simulation.study import command_line, difference, figures_of, run, show

WORLD = "ml-100k"
SEEDS = (1, 2, 3, 4, 5)
SIZE = Size(codes=256, interest_epochs=8)
QUICK = replace(SIZE, steps=100, interest_epochs=1)
TUNED = ("0.5/2", "1/4")
"""Share of the exposed click rate / lambda, tried for every label; the second is the product's default."""
OURS = ("gpl_clicks", "gpl_prefix")
NAMES = (
    "exposed_only", "oracle_hard", *(f"{label}@{t}" for t in TUNED for label in (*CONTROLS, *OURS)),
    f"clicks_no_share@{TUNED[1]}", f"clicks_no_anchors@{TUNED[1]}",
)  # fmt: skip


def main() -> None:
    """Run the seeds, print the table, write the figures."""
    parser = command_line((WORLD,))
    parser.add_argument("--data", type=Path, default=Path(WORLD), help="folder of raw_impressions.parquet, …")
    args = parser.parse_args()
    names = tuple(n for n in NAMES if not n.endswith(TUNED[0])) if args.quick else NAMES
    seeds = SEEDS[:2] if args.quick else SEEDS
    results = run(partial(make_movielens, args.data), QUICK if args.quick else SIZE, names, seeds, args)
    show(results)
    figures: dict[str, Figure] = {}
    for tuned in TUNED[args.quick :]:
        for ours in (f"{name}@{tuned}" for name in OURS):
            for other in ("exposed_only", *(f"{c}@{t}" for t in TUNED[args.quick :] for c in CONTROLS)):
                for metric in ("auc", "gauc"):
                    figures |= difference(results, ours, other, f"unexposed/{metric}")
            for metric in ("auc", "gauc"):
                figures |= difference(results, ours, "exposed_only", f"exposed/{metric}", better=False)
            for figure in ("top10/coverage", "top10/tail_share"):
                figures |= difference(results, ours, "exposed_only", figure, better=False)
    ours, no_share, no_anchors = (f"{n}@{TUNED[1]}" for n in ("gpl_clicks", "clicks_no_share", "clicks_no_anchors"))
    for metric in ("auc", "gauc"):
        figures |= difference(results, ours, no_anchors, f"unexposed/{metric}")
        for part in ("unexposed", "exposed"):
            figures |= difference(results, ours, no_share, f"{part}/{metric}", better=False)
    count = len(results["exposed_only"]["unexposed/auc"].seeds)
    title = f"MovieLens 100k (real ratings; requests and unexposed candidates simulated), {count} seeds"
    report("ml_100k", {**figures, **figures_of(results)}, args.quick, title)


if __name__ == "__main__":
    main()
