"""A study: variants on paired seeds, kept seed by seed, their means, paired differences and goals."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from gpl_core.commands.evaluate import T95
from gpl_core.labels.calibration import sigmoid
from tests.bench.harness import Figure, at_least
from tests.bench.simulation import variants
from tests.bench.simulation.judge import Arena
from tests.bench.simulation.world import Size, World

_SHOWN = (
    "unexposed/auc", "unexposed/gauc", "exposed/auc", "tail/gauc", "new/auc", "recalled/hr@10", "recalled/ndcg@10",
    "top10/coverage", "top10/tail_share", "top10/diversity",
)  # fmt: skip
_COMPARED = (
    "unexposed/auc", "unexposed/gauc", "exposed/auc", "uniform/auc", "tail/gauc", "new/auc", "recalled/hr@10",
    "recalled/ndcg@10", "top10/coverage", "top10/tail_share",
)  # fmt: skip

Found = dict[str, dict[str, float]]
"""variant -> figure -> value, of one seed."""
Results = dict[str, dict[str, np.ndarray]]
"""variant -> figure -> one value per seed."""
MakeWorld = Callable[[Size, int, str], World]
"""(size, seed, kind) -> world; a function of a module, so that another process can call it."""


def arguments(kinds: tuple[str, ...]) -> argparse.Namespace:
    """The command line of a study: --quick, --world (one of `kinds`), --seeds, --work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small world, two seeds, a few variants")
    parser.add_argument("--world", choices=kinds, default=kinds[0])
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], help="default: all reported")
    parser.add_argument("--work", type=Path, help="folder that keeps finished seeds")
    return parser.parse_args()


def run(
    make: MakeWorld, size: Size, names: tuple[str, ...], seeds: tuple[int, ...], args: argparse.Namespace
) -> Results:
    """Figures of every variant on the wanted seeds, and on those of `seeds` that earlier runs left in `args.work`."""
    there = [s for s in seeds if args.work is not None and (args.work / f"{args.world}-{s}.json").exists()]
    todo = sorted({*(args.seeds or seeds), *there})
    # One process of one thread per seed: the matrices are small.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(kept_seed, make, args.work, size, seed, names, args.world) for seed in todo]
        per_seed = [job.result() for job in jobs]
    print(f"seeds {', '.join(map(str, todo))}")
    return {
        name: {key: np.array([one[name].get(key, np.nan) for one in per_seed]) for key in per_seed[0][name]}
        for name in per_seed[0]
    }


def run_seed(make: MakeWorld, size: Size, seed: int, names: tuple[str, ...], kind: str) -> Found:
    """Figures of every variant in one world."""
    start = time.perf_counter()
    world = make(size, seed, kind)
    arena = Arena(world, seed)
    rate = world.train.clicked[world.train.is_exposed].mean()
    print(
        f"seed {seed}: {len(world.train)} training rows (click rate {rate:.4f}), {len(world.uniform)} uniform rows "
        f"({variants.uniform_rate(world):.4f}), {len(world.test)} test pairs, in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    found: Found = {"bayes": arena.judge(world.test.probability)}
    teacher: np.ndarray | None = None
    for name in names:
        rows = variants.rows_of(name, world, seed, teacher)
        model = arena.train(rows)
        scores = arena.predict(model, world.test.user, world.test.item, rows.with_content)
        found[name] = arena.judge(scores)
        if name == "exposed_only":
            teacher = sigmoid(arena.predict(model, world.train.user, world.train.item))
    print(f"seed {seed}: {len(names)} variants, {time.perf_counter() - start:.0f} s in all", flush=True)
    return found


def kept_seed(make: MakeWorld, folder: Path | None, size: Size, seed: int, names: tuple[str, ...], kind: str) -> Found:
    """`run_seed`, or what an earlier run with the same settings left in `folder`."""
    torch.set_num_threads(1)
    if folder is None:
        return run_seed(make, size, seed, names, kind)
    path = folder / f"{kind}-{seed}.json"
    settings = {**asdict(size), "variants": list(names), "lambdas": variants.LAMBDAS}
    if path.exists():
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["settings"] == settings:
            found: Found = body["figures"]
            return found
    found = run_seed(make, size, seed, names, kind)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "figures": found}, indent=1) + "\n", encoding="utf-8")
    return found


def paired(results: Results, left: str, right: str, figure: str) -> tuple[float, float]:
    """(mean, half width of the 95 % interval) of left - right over seeds."""
    difference = results[left][figure] - results[right][figure]
    n = len(difference)
    return float(difference.mean()), float(T95[n - 2] * difference.std(ddof=1) / np.sqrt(n))


def gap_closed(results: Results, name: str, metric: str, goal: float) -> Figure:
    """Share of the gap exposed_only -> oracle_hard on unexposed pairs that `name` closes, of the means over seeds.

    Where the gap's own interval holds 0 there is nothing to close: the goal then counts as missed, value 0.
    """
    figure = f"unexposed/{metric}"
    gap, half = paired(results, "oracle_hard", "exposed_only", figure)
    if gap - half <= 0:
        return Figure(0.0, f"no {metric} gap", f">= {goal:g}", False)
    return at_least(paired(results, name, "exposed_only", figure)[0] / gap, goal, "share")


def difference(
    results: Results, left: str, right: str, figure: str, goal: float, above_zero: bool = False
) -> dict[str, Figure]:
    """left - right with its goal; above_zero: the lower end of its interval has a goal too."""
    mean, half = paired(results, left, right, figure)
    name = f"{left} - {right}, {figure}"
    low = mean - half
    return {
        name: at_least(mean, goal, "difference"),
        f"  lower end of its interval ({name})": at_least(low, 0.0, "95 %") if above_zero else Figure(low, "95 %"),
    }


def figures_of(results: Results) -> dict[str, Figure]:
    """What the extras give, every variant's figures, and the paired differences to exposed-only."""
    out = {"paired seeds": Figure(float(len(results["exposed_only"]["unexposed/auc"])), "seeds")}
    for name, beaten in variants.EXTRAS.items():
        if name in results:
            for figure in ("unexposed/auc", "unexposed/gauc"):
                difference = results[name][figure] - results[beaten][figure]
                out[f"extra {name} - {beaten}, {figure}"] = Figure(float(difference.mean()), "difference")
                out[f"  seeds on which it is higher ({name}, {figure})"] = Figure(
                    float((difference > 0).sum()), "seeds"
                )
    for name, figures in results.items():
        for key, values in figures.items():
            out[f"Means over seeds | {name}: {key}"] = Figure(float(np.nanmean(values)), "mean")
    for name in results:
        for key in _COMPARED if name not in ("exposed_only", "bayes") else ():
            if key not in results[name]:  # a slice without rows
                continue
            mean, half = paired(results, name, "exposed_only", key)
            place = f"Paired differences to exposed_only, 95 % intervals | {name}: {key}"
            out[place], out[f"{place} ±"] = Figure(mean, "mean"), Figure(half, "half width")
    return out


def show(results: Results) -> None:
    """Print the variants' means."""
    print(f"{'variant':<24}" + "".join(f"{name:>18}" for name in _SHOWN))
    for name, figures in results.items():
        cells = (float(np.nanmean(figures[key])) if key in figures else float("nan") for key in _SHOWN)
        print(f"{name:<24}" + "".join(f"{value:>18.4f}" for value in cells))
