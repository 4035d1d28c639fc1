"""A study: variants on paired seeds, kept seed by seed, their means, paired differences and goals.

Intervals are 95 % over users and seeds together (`gpl_core.prerank.bootstrap`): users are drawn again within each seed,
and all but one of the seeds with replacement; variants share the draws. Figures of lists have none over users: theirs
are over seeds alone. "Better" is a goal that holds only when the interval of the difference lies above 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import gpl_core
from gpl_core.labels.calibration import sigmoid
from gpl_core.prerank.bootstrap import REPLICATES, interval, over_seeds
from tests.bench.harness import Figure, at_least
from tests.bench.simulation import variants
from tests.bench.simulation.judge import Arena
from tests.bench.simulation.log import Size
from tests.bench.simulation.world import World

_SHOWN = (
    "unexposed/auc", "unexposed/gauc", "exposed/auc", "tail/gauc", "new/auc", "recalled/hr@10", "recalled/ndcg@10",
    "top10/coverage", "top10/tail_share", "top10/diversity",
)  # fmt: skip
_COMPARED = (
    "unexposed/auc", "unexposed/gauc", "exposed/auc", "exposed/gauc", "uniform/auc", "tail/gauc", "new/auc",
    "recalled/hr@10", "recalled/ndcg@10", "top10/coverage", "top10/tail_share",
)  # fmt: skip


class Found(NamedTuple):
    """Of one seed: variant -> figure -> value, and `variant:figure` -> replicates over users."""

    figures: dict[str, dict[str, float]]
    drawn: dict[str, np.ndarray]


class Values(NamedTuple):
    """A figure of a variant: one value per seed [S], replicates [B x S]."""

    seeds: np.ndarray
    drawn: np.ndarray


Results = dict[str, dict[str, Values]]
"""variant -> figure -> values."""
MakeWorld = Callable[[Size, int, str], World]
"""(size, seed, kind) -> world; a function of a module, so that another process can call it."""


def command_line(kinds: tuple[str, ...]) -> argparse.ArgumentParser:
    """The command line of a study: --quick, --world (one of `kinds`), --seeds, --work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size, two seeds")
    parser.add_argument("--world", choices=kinds, default=kinds[0])
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], help="default: all reported")
    parser.add_argument("--work", type=Path, help="folder that keeps finished seeds")
    return parser


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
    return joined(per_seed)


def joined(per_seed: list[Found]) -> Results:
    """Seed by seed to figure by figure; without replicates over users a seed's are its value."""

    def values(name: str, key: str) -> Values:
        seeds = np.array([one.figures[name].get(key, np.nan) for one in per_seed])
        drawn = [one.drawn.get(f"{name}:{key}", np.full(REPLICATES, value)) for one, value in zip(per_seed, seeds)]
        return Values(seeds, np.stack(drawn, axis=1).astype(np.float64))

    first = per_seed[0].figures
    return {name: {key: values(name, key) for key in figures} for name, figures in first.items()}


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
    figures: dict[str, dict[str, float]] = {}
    drawn: dict[str, np.ndarray] = {}

    def judged(name: str, scores: np.ndarray) -> None:
        figures[name], replicated = arena.judge(scores)
        drawn.update({f"{name}:{key}": each for key, each in replicated.items() if key in _COMPARED})

    judged("bayes", world.test.probability)
    teacher: np.ndarray | None = None
    for name in names:
        rows = variants.rows_of(name, world, seed, teacher)
        model = arena.train(rows)
        scores = arena.predict(model, world.test.user, world.test.item, rows.with_content)
        judged(name, scores)
        if name == "exposed_only":
            teacher = sigmoid(arena.predict(model, world.train.user, world.train.item))
    print(f"seed {seed}: {len(names)} variants, {time.perf_counter() - start:.0f} s in all", flush=True)
    return Found(figures, drawn)


def kept_seed(make: MakeWorld, folder: Path | None, size: Size, seed: int, names: tuple[str, ...], kind: str) -> Found:
    """`run_seed`, or what an earlier run with the same settings left in `folder`."""
    torch.set_num_threads(1)
    if folder is None:
        return run_seed(make, size, seed, names, kind)
    path = folder / f"{kind}-{seed}.json"
    settings = {**asdict(size), "variants": list(names), "code": _code_digest()}
    if path.exists():
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["settings"] == settings:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as drawn:
                return Found(body["figures"], dict(drawn))
    found = run_seed(make, size, seed, names, kind)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **found.drawn)
    path.write_text(json.dumps({"settings": settings, "figures": found.figures}, indent=1) + "\n", encoding="utf-8")
    return found


def _code_digest() -> str:
    """Digest of all code that a seed's figures come from: one that other code made is not this one's."""
    code = [*Path(gpl_core.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(code) if "test_" not in p.name)).hexdigest()[:16]


def paired(results: Results, left: str, right: str, figure: str) -> tuple[float, float, float]:
    """(mean, low, high) of left - right over users and seeds."""
    a, b = results[left][figure], results[right][figure]
    low, high = interval(over_seeds(a.drawn - b.drawn))
    mean = float(np.mean(a.seeds - b.seeds))
    return mean, mean if low is None else low, mean if high is None else high


def gap_closed(results: Results, name: str, metric: str, goal: float | None = None) -> dict[str, Figure]:
    """Share of the gap constant -> oracle_hard on unexposed pairs that `name` closes, with its interval.

    A constant label closes a good part of the gap exposed_only -> oracle_hard, and every label holds one: what counts
    is the share above it. Where the gap's own interval holds 0 there is nothing to close: missed, with value 0.
    """
    figure = f"unexposed/{metric}"
    key = f"{name} closes the {metric} gap above the constant"
    gap, low, _ = paired(results, "oracle_hard", "constant", figure)
    if low <= 0:
        return {
            key: Figure(
                0.0, f"no {metric} gap", "" if goal is None else f">= {goal:g}", None if goal is None else False
            )
        }
    of = {v: over_seeds(results[v][figure].drawn) for v in (name, "constant", "oracle_hard")}
    low, high = interval((of[name] - of["constant"]) / (of["oracle_hard"] - of["constant"]))
    share = paired(results, name, "constant", figure)[0] / gap
    return {
        key: Figure(share, "share") if goal is None else at_least(share, goal, "share"),
        f"  from ({key})": Figure(float(np.nan if low is None else low), "95 %"),
        f"  to ({key})": Figure(float(np.nan if high is None else high), "95 %"),
    }


def difference(results: Results, left: str, right: str, figure: str, better: bool = True) -> dict[str, Figure]:
    """left - right and its interval. better: the goal holds when all of it lies above 0, else unless all lies below."""
    mean, low, high = paired(results, left, right, figure)
    name = f"{left} - {right}, {figure}"
    return {
        name: Figure(mean, "difference"),
        f"  from ({name})": Figure(low, "95 %", *(("> 0", low > 0) if better else ())),
        f"  to ({name})": Figure(high, "95 %", *(() if better else (">= 0", high >= 0))),
    }


def farther(results: Results, left: str, right: str, figure: str) -> dict[str, Figure]:
    """How much farther from that of the true probabilities (`bayes`) left's figure is than right's, and its interval.

    Of a list figure more is not better: a top ten of tail items alone has the largest share of them.
    """
    best = results["bayes"][figure]
    off = {
        name: {figure: Values(np.abs(v.seeds - best.seeds), np.abs(v.drawn - best.drawn))}
        for name in (left, right)
        for v in [results[name][figure]]
    }
    mean, low, high = paired(off, left, right, figure)
    name = f"{left} farther from the truth's {figure} than {right}"
    return {
        name: Figure(mean, "difference"),
        f"  from ({name})": Figure(low, "95 %"),
        f"  to ({name})": Figure(high, "95 %"),
    }


def figures_of(results: Results) -> dict[str, Figure]:
    """Every variant's figures, and the paired differences to exposed-only."""
    out = {"paired seeds": Figure(float(len(results["exposed_only"]["unexposed/auc"].seeds)), "seeds")}
    for name, figures in results.items():
        for key, values in figures.items():
            out[f"Means over seeds | {name}: {key}"] = Figure(float(np.nanmean(values.seeds)), "mean")
    for name in results:
        for key in _COMPARED if name not in ("exposed_only", "bayes") else ():
            if key not in results[name]:  # a slice without rows
                continue
            mean, low, high = paired(results, name, "exposed_only", key)
            place = f"Paired differences to exposed_only, 95 % intervals over users and seeds | {name}: {key}"
            out |= {
                place: Figure(mean, "mean"),
                f"{place} from": Figure(low, "low"),
                f"{place} to": Figure(high, "high"),
            }
    return out


def show(results: Results) -> None:
    """Print the variants' means."""
    print(f"{'variant':<24}" + "".join(f"{name:>18}" for name in _SHOWN))
    for name, figures in results.items():
        cells = (float(np.nanmean(figures[key].seeds)) if key in figures else float("nan") for key in _SHOWN)
        print(f"{name:<24}" + "".join(f"{value:>18.4f}" for value in cells))
