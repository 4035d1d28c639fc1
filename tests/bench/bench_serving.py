"""Serving: what a candidate costs online with the exported pre-ranker, against what nobody can do without.

One request is one user vector and 1,000 candidates, scored by the reader in plain numpy (`gpl_core.prerank.serving`)
from an exported bundle. Yardsticks: the same request where the exported item vectors, which pseudo-labels need no more
of, are computed online by the model itself (what a pre-ranker costs whose item tower can't be exported), and the bare
gather and product into preallocated buffers. That both of our variants cost the same is no measurement, they have one
architecture; what is compared is that their bundles are equally large, byte for byte, file by file.

    python -m tests.bench.bench_serving [--quick]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from gpl_core.prerank.export import export_bundle
from gpl_core.prerank.features import TowerBatch
from gpl_core.prerank.loss import dual_label_loss
from gpl_core.prerank.serving import ServedModel
from gpl_core.prerank.two_tower import TowerConfig, TwoTower, build_model, parameter_groups
from tests.bench.harness import Figure, at_most, interleaved, is_quick, median_ratio, report

CANDIDATES, WIDTH, DIMENSION, LEVELS, CODES = 1000, 384, 32, 3, 256
_BURST = 50  # requests per timing: one is too short for the clock


def trained(lambda_: float, items: int, users: int) -> TwoTower:
    """A model after 20 steps on random rows: what is served depends on the sizes alone."""
    config = TowerConfig(users, items, DIMENSION, 64, WIDTH, LEVELS, CODES)
    model = build_model(config, 0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randint(0, min(items, users), (256,), generator=g)
        batch = TowerBatch(
            rows, torch.randn(256, WIDTH, generator=g), rows, torch.randn(256, WIDTH, generator=g),
            torch.randint(0, CODES, (256, LEVELS), generator=g), torch.zeros(256, 0),
        )  # fmt: skip
        exposed, target = rows % 2 == 0, torch.rand(256, generator=g)
        optimizer.zero_grad()
        dual_label_loss(model(batch), target, exposed, torch.ones(256), lambda_).backward()
        optimizer.step()
    return model


def main() -> None:
    """Export both, serve both in turns."""
    quick = is_quick()
    torch.set_num_threads(1)
    items, users, repeats = (20_000, 5_000, 11) if quick else (200_000, 50_000, 41)
    rng = np.random.default_rng(0)
    sids = rng.integers(0, CODES, (items, LEVELS))
    vectors = rng.normal(size=(items, WIDTH)).astype(np.float32)
    profiles = rng.normal(size=(users, WIDTH)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        models = {"exposed_only": trained(0.0, items, users), "gpl": trained(2.0, items, users)}
        export_bundle(Path(name), models, profiles, sids, lambda index: vectors[index], {})
        served = {variant: ServedModel(Path(name), variant) for variant in models}
        size = {v: sum(f.stat().st_size for f in (Path(name) / v).iterdir()) for v in models}
        added = size["gpl"] - size["exposed_only"]
    candidates = rng.integers(0, items, (_BURST, CANDIDATES))
    ids = [f"u{n}" for n in range(_BURST)]

    def requests(variant: str) -> None:
        model = served[variant]
        for user, wanted in zip(ids, candidates):
            model.score(model.users([user])[0], wanted)

    table, user = served["gpl"].items, served["gpl"].users(ids)
    gathered = np.empty((CANDIDATES, DIMENSION + 1), np.float32)
    scores = np.empty(CANDIDATES, np.float32)

    def floor() -> None:
        for vector, wanted in zip(user, candidates):
            np.take(table, wanted, axis=0, out=gathered)
            np.dot(gathered[:, :-1], vector, out=scores)

    tower, content = models["gpl"], torch.from_numpy(vectors)
    all_sids = torch.from_numpy(sids)

    def online() -> None:
        with torch.no_grad():
            for vector, wanted in zip(torch.from_numpy(user), torch.from_numpy(candidates)):
                computed = tower.item(wanted, content[wanted], all_sids[wanted])
                torch.mv(computed[:, :-1], vector)

    seconds = interleaved({"gpl": lambda: requests("gpl"), "item tower online": online, "floor": floor}, repeats)
    figures = {
        f"latency, {job}": Figure(statistics.median(each) / _BURST * 1e6, "us / 1,000 candidates")
        for job, each in seconds.items()
    }
    ratio = median_ratio(seconds["gpl"], seconds["item tower online"])
    figures["exported bundle / item tower online"] = at_most(ratio, 0.1, "ratio")
    ratio = median_ratio(seconds["gpl"], seconds["floor"])
    figures["exported bundle / gather and product alone"] = at_most(ratio, 2.5, "ratio")
    figures["bytes that pseudo-labels add to a bundle"] = at_most(added, 0, "bytes")
    report("serving", figures, quick, f"serving, {items:,} items, {CANDIDATES:,} candidates a request")


if __name__ == "__main__":
    main()
