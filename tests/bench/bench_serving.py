"""Serving: latency per 1,000 candidates of the exported pre-ranker, trained with and without pseudo-labels.

Both variants go through the same training loop (lambda 2 and lambda 0), the same export and the reader in plain numpy
(`gpl_core.prerank.serving`): one request is one user vector and 1,000 candidates. The yardstick of the first figure is
the variant without pseudo-labels, of the second the bare gather and product into preallocated buffers.

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

    seconds = interleaved(
        {"exposed_only": lambda: requests("exposed_only"), "gpl": lambda: requests("gpl"), "floor": floor}, repeats
    )
    figures = {
        f"latency, {variant}": Figure(statistics.median(seconds[variant]) / _BURST * 1e6, "us / 1,000 candidates")
        for variant in models
    }
    ratio = median_ratio(seconds["gpl"], seconds["exposed_only"])
    figures["gpl / exposed_only"] = at_most(ratio, 1.05, "ratio")
    figures["gather and product alone / gpl"] = Figure(median_ratio(seconds["floor"], seconds["gpl"]), "ratio")
    report("serving", figures, quick, f"serving, {items:,} items, {CANDIDATES:,} candidates a request")


if __name__ == "__main__":
    main()
