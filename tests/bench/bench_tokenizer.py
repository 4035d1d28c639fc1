"""Tokenizers side by side: RQ-VAE, RQ-k-means and RQ-k-means after PCA, on two catalogs, at C = 64 and 256, L = 3.

Catalogs: Amazon Industrial (real texts, MiniLM) and the simulated one (made texts and pictures, the quickstart's
fusion of MiniLM and hog_color); every figure of the second is a simulated one. Yardstick: RQ-k-means with
scikit-learn's clustering on the embeddings themselves, and after PCA to the RQ-VAE's latent width. A second yardstick
for the quantizer, at C = 256 on the first catalog: the same layers and steps around vector-quantize-pytorch's
ResidualVQ, with EMA codebooks and with codebooks trained by gradient (`tests.bench.quality.library_rqvae`).

Figures are means over seeds with the least or largest of all seeds where a goal stands. The difference in neighbor
recall is paired by seed, its 95 % interval from Student's t. Neighbor recall: of an item's 10 nearest by embedding,
the share among its 10 nearest by the SID's decoded vector. Training is timed in CPU seconds of one thread (on an
accelerator: seconds).

    python -m tests.bench.bench_tokenizer [--quick]
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from gpl_core.sids.collisions import duplicates, repair
from gpl_core.sids.encoders import EncoderPart, build_encoder
from gpl_core.sids.health import collision_share, level_usage, mean_cosine
from gpl_core.sids.item_content import ItemContent
from gpl_core.sids.rqvae import RqVaeSettings
from gpl_core.sids.tokenizer import Tokenizer
from gpl_core.simulation.item_world import item_text, make_items, make_taste
from gpl_core.simulation.marketplace import item_rows
from gpl_core.simulation.simulation_settings import SimulationSettings
from tests.bench.harness import Figure, at_least, at_most, clock, device, is_quick, report
from tests.bench.quality.library_rqvae import fit_library
from tests.bench.quality.neighbors import neighbor_recall
from tests.bench.quality.rq_kmeans import fit_rq_kmeans
from tests.gpl_core.sids.plain_torch import LocalEngine, fit

PATH = Path(os.environ.get("GPL_SHARED_DATA", "../shared/data")) / "amazon_industrial" / "items.jsonl.gz"
RELATIONAL = 0.3  # the configuration's default, see docs/decisions/009-tokenizer.md

Runs = dict[str, list[dict[str, float]]]
"""method -> figures of each seed."""


def industrial(quick: bool) -> np.ndarray:
    """Unit MiniLM vectors [3,686 x 384]; a quick run reads titles only, which is five times as fast."""
    with gzip.open(PATH, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row["title"] if quick else f"{row['title']}. {row.get('description') or ''}"[:2000] for row in rows]
    return encoded([ItemContent(n, text) for n, text in enumerate(texts)], [EncoderPart("minilm")])


def simulated(quick: bool) -> np.ndarray:
    """Unit vectors of the made catalog's texts and pictures [1,200 x 820]; a quick run takes 300 items."""
    settings = SimulationSettings(
        start_date=date(2026, 1, 1), days=1, items=300 if quick else 1200, new_items_per_day=0
    )
    world = make_items(settings, make_taste(settings.seed))
    table = next(iter(item_rows(settings, world))).to_pylist()
    items = [
        ItemContent(n, f"{t.title}. {t.brand}. {t.category}. {t.description}", row["image"])
        for n, row in enumerate(table)
        for t in [item_text(world, n)]
    ]
    return encoded(items, [EncoderPart("minilm"), EncoderPart("hog_color", 0.5)])


def encoded(items: list[ItemContent], parts: list[EncoderPart]) -> np.ndarray:
    """The items' unit vectors; kept among temporary files under the encoder's version and the content."""
    encoder = build_encoder(parts, device=str(device()))
    content = hashlib.sha256()
    for item in items:
        content.update(item.text.encode() + (item.image or b""))
    path = Path(tempfile.gettempdir()) / f"gpl-bench-{encoder.version}-{content.hexdigest()[:16]}.npy"
    if not path.exists():
        found = encoder.encode(items)
        np.save(path, found.vectors[[n not in found.rejected for n in range(len(items))]])
    return np.load(path)


def judge(tokenizer: Tokenizer, x: np.ndarray) -> dict[str, float]:
    """The figures of one tokenizer."""
    encoded = tokenizer.encode(x)
    first = duplicates(encoded.codes, x)
    repaired = repair(encoded.codes, encoded.last_residual, tokenizer.codebooks[-1].cpu().numpy(), first=first)
    perplexity, used = level_usage(encoded.codes, tokenizer.codes)
    decoded = tokenizer.decode(encoded.codes)
    return {
        **{f"perplexity_{n}": p / tokenizer.codes for n, p in enumerate(perplexity, start=1)},
        **{f"usage_{n}": u / tokenizer.codes for n, u in enumerate(used, start=1)},
        "collisions": collision_share(encoded.codes, first),
        "collisions_repaired": collision_share(repaired.codes, first),
        "moved": repaired.moved / len(x),
        "reconstruction": mean_cosine(x, decoded),
        "neighbor_recall": float(neighbor_recall(x, decoded).mean()),
        "neighbor_recall_repaired": float(neighbor_recall(x, tokenizer.decode(repaired.codes)).mean()),
    }


def methods(x: np.ndarray, settings: RqVaeSettings) -> Mapping[str, Callable[[], Tokenizer]]:
    """Each method's training under one seed."""
    return {
        "rqvae": lambda: fit(x, settings, engine=LocalEngine(device())),
        "rq_kmeans": lambda: fit_rq_kmeans(x, settings).to(device()),
        "rq_kmeans_pca": lambda: fit_rq_kmeans(x, settings, pca=settings.latent).to(device()),
    }


def compare(x: np.ndarray, codes: int, seeds: int, epochs: int, name: str) -> Runs:
    """All methods on one catalog; prints them side by side."""
    runs: Runs = {}
    tick = clock()
    for seed in range(seeds):
        settings = RqVaeSettings(codes=codes, seed=seed, epochs=epochs, relational=RELATIONAL)
        for method, train in methods(x, settings).items():
            start = tick()
            tokenizer = train()
            seconds = tick() - start
            runs.setdefault(method, []).append({**judge(tokenizer, x), "training": seconds})
    print(f"\n{name}: {len(x)} items, C = {codes}, means over {seeds} seeds")
    print("  " + " " * 25 + "".join(f"{method:>15}" for method in runs))
    for key in runs["rqvae"][0]:
        print(f"  {key:<25}" + "".join(f"{mean(found, key):15.3f}" for found in runs.values()), flush=True)
    return runs


def mean(found: list[dict[str, float]], key: str) -> float:
    """Mean over seeds."""
    return float(np.mean([run[key] for run in found]))


def gain(runs: Runs) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval: neighbor recall of the RQ-VAE over RQ-k-means, paired by seed."""
    pairs = zip(runs["rqvae"], runs["rq_kmeans"], strict=True)
    found = np.array([a["neighbor_recall"] - b["neighbor_recall"] for a, b in pairs])
    if len(found) < 2:
        return float(found.mean()), float("nan")
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean()), float(half)


def goals(runs: Runs, prefix: str) -> dict[str, Figure]:
    """The goals that the project set itself for Amazon Industrial at C = 256; worst seed where not said otherwise."""
    worst = {key: [run[key] for run in runs["rqvae"]] for key in runs["rqvae"][0]}
    levels = (1, 2, 3)
    return {
        f"{prefix}_least_usage": at_least(min(min(worst[f"usage_{n}"]) for n in levels), 0.99, "of C"),
        f"{prefix}_least_perplexity": at_least(min(min(worst[f"perplexity_{n}"]) for n in levels), 0.75, "of C"),
        f"{prefix}_most_collisions": at_most(max(worst["collisions"]), 0.25, "share"),
        f"{prefix}_most_collisions_repaired": at_most(max(worst["collisions_repaired"]), 0.0, "share"),
        f"{prefix}_mean_neighbor_recall": at_least(mean(runs["rqvae"], "neighbor_recall"), 0.52, "share"),
        f"{prefix}_longest_training": at_most(max(worst["training"]), 120, "s"),
    }


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    torch.set_num_threads(1)
    catalogs = {"industrial": industrial, "simulated": simulated}
    if not PATH.exists():
        print(f"without Amazon Industrial: {PATH} is absent; set GPL_SHARED_DATA to the folder that holds it")
        del catalogs["industrial"]
    figures: dict[str, Figure] = {}
    for name, make in catalogs.items():
        x = make(quick)
        for codes in (64,) if quick else (64, 256):
            runs = compare(x, codes, 2 if quick else 5, 100 if quick else 400, name)
            for method, found in runs.items():
                for key in found[0]:
                    unit = {"reconstruction": "cosine", "training": "s"}.get(key, "share")
                    figures[f"{name}_{codes}_{method}_{key}"] = Figure(mean(found, key), unit)
            value, half = gain(runs)
            prefix, judged = f"{name}_{codes}", (name, codes) == ("industrial", 256)
            figures[f"{prefix}_gain"] = at_least(value, 0.03, "share") if judged else Figure(value, "share")
            figures[f"{prefix}_gain_95_low"] = (
                at_least(value - half, 0.0, "share") if judged else Figure(value - half, "share")
            )
            figures[f"{prefix}_gain_95_high"] = Figure(value + half, "share")
            if judged:
                figures |= goals(runs, prefix)
        if name == "industrial":
            figures |= library(x, quick)
    report("tokenizer", figures, quick, "Tokenizers side by side")


def library(x: np.ndarray, quick: bool) -> dict[str, Figure]:
    """The library's quantizer between the same layers: EMA codebooks and codebooks by gradient."""
    figures: dict[str, Figure] = {}
    for codebooks in ("ema", "gradient"):
        found = []
        for seed in range(1 if quick else 2):
            settings = RqVaeSettings(codes=64 if quick else 256, seed=seed, epochs=100 if quick else 400)
            found.append(judge(fit_library(x, settings, codebooks, device()), x))
        for key in found[0]:
            unit = "cosine" if key == "reconstruction" else "share"
            figures[f"library_{codebooks}_{key}"] = Figure(mean(found, key), unit)
        print(f"library, {codebooks}: " + " ".join(f"{k}={mean(found, k):.3f}" for k in found[0]), flush=True)
    return figures


if __name__ == "__main__":
    main()
