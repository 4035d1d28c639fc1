"""What a better interest model is worth in labels: content in it and walks beside the users, or SIDs alone.

The same study as `bench_simulation` and `bench_ml_100k`, seed by seed once with each model: same log, tokenizer and
rows; for the pre-ranker same batches, initial weights and number of steps. A world is simulated, its items' titles are
ordinary English. MovieLens 100k (`--data`) has real ratings; requests and unexposed candidates are simulated.

    python -m tests.bench.bench_model_in_labels [--world plain|… | --data FOLDER] [--quick] [--seeds 1] [--work FOLDER]

About two minutes per seed and model on one thread. --data: as in `bench_ml_100k`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.bench import bench_ml_100k, bench_simulation
from tests.bench.bench_simulation import WORLDS
from tests.bench.harness import Figure, report
from tests.bench.simulation.log import QUICK, Size
from tests.bench.simulation.movielens import make_movielens
from tests.bench.simulation.study import Results, command_line, difference, figures_of, gap_closed, run, show
from tests.bench.simulation.world import make_world

MODELS = {"SIDs alone": False, "content and walks": True}
LABELS = ("gpl_clicks@1", "gpl_prefix@1", "gpl_content@1")
NAMES = ("exposed_only", "constant@1", *LABELS, "oracle_hard")


def main() -> None:
    """Run the seeds with each model, print the tables, write the figures."""
    parser = command_line(WORLDS)
    parser.add_argument("--data", type=Path, help="MovieLens 100k instead: folder of raw_impressions.parquet, …")
    args = parser.parse_args()
    if args.data:
        args.world, make = bench_ml_100k.WORLD, partial(make_movielens, args.data)
        size, seeds = bench_ml_100k.QUICK if args.quick else bench_ml_100k.SIZE, bench_ml_100k.SEEDS
    else:
        make, size = make_world, QUICK if args.quick else Size()
        seeds = bench_simulation.QUICK_SEEDS if args.quick else bench_simulation.SEEDS
    joined: Results = {}
    for model, content in MODELS.items():
        own = argparse.Namespace(**{**vars(args), "work": args.work and args.work / model.replace(" ", "-")})
        found = run(make, replace(size, interest_content=content), NAMES, seeds, own)
        print(model)
        show(found)
        joined |= {name if name not in LABELS else f"{name}, {model}": values for name, values in found.items()}
    joined["constant"] = joined.pop("constant@1")
    before, after = MODELS
    figures: dict[str, Figure] = {}
    for label in LABELS:
        for metric in ("auc", "gauc"):
            figures |= difference(joined, f"{label}, {after}", f"{label}, {before}", f"unexposed/{metric}")
            for model in MODELS:
                figures |= gap_closed(joined, f"{label}, {model}", metric)
    count = len(joined["exposed_only"]["unexposed/auc"].seeds)
    if count < 2:
        print("one seed: no paired differences, nothing is written")
        return
    given = f"--data {args.data.name}" if args.data else "" if args.world == WORLDS[0] else f"--world {args.world}"
    title = f"what the better interest model is worth in labels, {args.world}, {count} paired seeds"
    report("model_in_labels", {**figures, **figures_of(joined)}, args.quick, title, given)


if __name__ == "__main__":
    main()
