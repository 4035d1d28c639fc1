"""Tokenisers side by side on the Amazon Industrial catalogue (MiniLM text): RQ-VAE, RQ-k-means, RQ-k-means after PCA.

Yardstick: RQ-k-means with a library's clustering, with and without PCA to the RQ-VAE's latent width. L = 3, C = 64
and 256. Figures are means over seeds; the difference in neighbour recall is paired by seed, its 95 % interval from
Student's t. Neighbour recall: of an item's 10 nearest by embedding, the share among its 10 nearest by the SID's
decoded vector.

    python -m tests.bench.bench_tokenizer [--quick]
"""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from gpl_core.sids.encoders import EncoderPart, ItemContent, build_encoder
from gpl_core.sids.health import collision_share, level_usage, mean_cosine, neighbour_recall
from gpl_core.sids.repair import duplicates, repair
from gpl_core.sids.rqvae import RqVaeSettings, fit, fit_rq_kmeans
from gpl_core.sids.tokenizer import Tokenizer
from tests.bench.harness import Figure, at_least, at_most, is_quick, report

PATH = Path(os.environ.get("GPL_SHARED_DATA", "../shared/data")) / "amazon_industrial" / "items.jsonl.gz"


def embeddings(quick: bool) -> np.ndarray:
    """Unit MiniLM vectors of the catalogue [3,686 x 384]; a quick run reads titles only, which is five times as
    fast."""
    with gzip.open(PATH, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row["title"] if quick else f"{row['title']}. {row.get('description') or ''}"[:2000] for row in rows]
    found = build_encoder([EncoderPart("minilm")]).encode([ItemContent(n, text) for n, text in enumerate(texts)])
    kept = np.array([n not in found.rejected for n in range(len(texts))])
    return found.vectors[kept]


def judge(tokenizer: Tokenizer, x: np.ndarray) -> dict[str, float]:
    """The figures of one tokeniser."""
    encoded = tokenizer.encode_full(x)
    first = duplicates(encoded.codes, x)
    mended = repair(encoded.codes, encoded.last_residual, tokenizer.codebooks[-1].numpy(), first=first)
    perplexity, used = level_usage(encoded.codes, tokenizer.codes)
    decoded = tokenizer.decode(encoded.codes)
    return {
        **{f"perplexity_{n}": p / tokenizer.codes for n, p in enumerate(perplexity, start=1)},
        "least_usage": min(used) / tokenizer.codes,
        "collisions": collision_share(encoded.codes, first),
        "collisions_repaired": collision_share(mended.codes, first),
        "moved": mended.moved / len(x),
        "reconstruction": mean_cosine(x, decoded),
        "neighbour_recall": float(neighbour_recall(x, decoded).mean()),
        "neighbour_recall_repaired": float(neighbour_recall(x, tokenizer.decode(mended.codes)).mean()),
    }


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    if not PATH.exists():
        print(f"skipped: {PATH} is absent; set GPL_SHARED_DATA to the folder that holds it")
        return
    torch.set_num_threads(1)
    x = embeddings(quick)
    figures: dict[str, Figure] = {}
    for codes in (256,) if quick else (64, 256):
        found: dict[str, list[dict[str, float]]] = {"rqvae": [], "rq_kmeans": [], "rq_kmeans_pca": []}
        seconds = []
        for seed in range(1 if quick else 5):
            settings = RqVaeSettings(codes=codes, seed=seed, epochs=200 if quick else 400)
            start = time.process_time()
            tokenizer = fit(x, settings)
            seconds.append(time.process_time() - start)
            found["rqvae"].append(judge(tokenizer, x))
            found["rq_kmeans"].append(judge(fit_rq_kmeans(x, settings), x))
            found["rq_kmeans_pca"].append(judge(fit_rq_kmeans(x, settings, pca=settings.latent), x))
        for method, runs in found.items():
            for name in runs[0]:
                value = float(np.mean([run[name] for run in runs]))
                figures[f"{method}_{codes}_{name}"] = Figure(value, "share" if name != "reconstruction" else "cosine")
        figures[f"rqvae_{codes}_training"] = at_most(float(np.median(seconds)), 120, "CPU s")
        if codes == 256:
            add_goals(figures, found)
    report("tokenizer", figures, quick, f"Tokenisers on {len(x)} items")


def add_goals(figures: dict[str, Figure], found: dict[str, list[dict[str, float]]]) -> None:
    """The goals that the project set itself for C = 256."""
    worst = {n: [run[n] for run in found["rqvae"]] for n in found["rqvae"][0]}
    figures["goal_least_usage"] = at_least(min(worst["least_usage"]), 0.99, "share")
    lowest = min(min(worst[f"perplexity_{n}"]) for n in (1, 2, 3))
    figures["goal_least_perplexity"] = at_least(lowest, 0.75, "of C")
    figures["goal_collisions"] = at_most(max(worst["collisions"]), 0.25, "share")
    figures["goal_collisions_repaired"] = at_most(max(worst["collisions_repaired"]), 0.0, "share")
    gain = np.array(
        [a["neighbour_recall"] - b["neighbour_recall"] for a, b in zip(found["rqvae"], found["rq_kmeans"], strict=True)]
    )
    figures["goal_neighbour_recall_gain"] = at_least(float(gain.mean()), 0.03, "")
    if len(gain) > 1:
        half = float(stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain)))
        figures["goal_gain_95_low"] = at_least(float(gain.mean()) - half, 0.0, "")
    figures["goal_neighbour_recall"] = at_least(float(np.mean(worst["neighbour_recall"])), 0.52, "")


if __name__ == "__main__":
    main()
