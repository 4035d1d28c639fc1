"""SIDs per second: `Tokenizer.encode_full` on a memory-mapped file, then collision repair, at 1x, 4x and 16x items.

Yardstick, on the same data in one run: the bare loop that the formulas need, with the data in memory: three linear
layers, then matmul, argmin and subtraction per level, in one batch after the other. Not timed on either side: making
the data. One thread and its CPU seconds, so that other work on the machine does not decide the figures. Also the
trie: SIDs built per second, and its bytes per SID.

    python -m tests.bench.bench_assign_sids [--quick]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gpl_core.sids.health import collision_share
from gpl_core.sids.kmeans import residual_kmeans
from gpl_core.sids.repair import duplicates, repair
from gpl_core.sids.tokenizer import Tokenizer, mlp
from gpl_core.sids.trie import Trie
from tests.bench.harness import Figure, at_least, at_most, growth_exponent, interleaved, is_quick, median_ratio, report

D, WIDTHS, LEVELS, CODES, BATCH = 384, (384, 512, 32), 3, 1024, 16_384


def make_items(path: Path, count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors, 80 around each centre, [count x D]: a larger catalogue is a broader one. Mapped as the worker
    does."""
    rng = np.random.default_rng(seed)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, D))
    for start in range(0, count, 10_000):
        rows = out[start : start + 10_000]
        centres = rng.standard_normal((len(rows) // 80, D), dtype=np.float32)
        noise = rng.standard_normal(rows.shape, dtype=np.float32)
        rows[:] = centres[rng.integers(len(centres), size=len(rows))] + 0.1 * noise  # near relatives: they collide
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.load(path, mmap_mode="r")


def make_tokenizer(items: np.ndarray) -> Tokenizer:
    """A random encoder with codebooks fitted to what it makes of these items: realistic sizes and collisions."""
    torch.manual_seed(0)
    encoder, decoder = mlp(WIDTHS), mlp(WIDTHS[::-1])
    mean = torch.zeros(D)
    with torch.no_grad():
        latent = encoder(torch.as_tensor(np.array(items[:20_000])) * D**0.5).numpy()
    books, _ = residual_kmeans(latent, LEVELS, CODES, seed=0)
    return Tokenizer(encoder, decoder, torch.as_tensor(books), mean, D**0.5, {})


@torch.no_grad()
def bare(tokenizer: Tokenizer, items: torch.Tensor) -> None:
    """The products and minima, nothing else."""
    halves = tokenizer.codebooks.square().sum(-1) / 2
    for start in range(0, len(items), BATCH):
        residual = tokenizer.encoder(items[start : start + BATCH] * tokenizer.scale)
        for book, half in zip(tokenizer.codebooks, halves, strict=True):
            residual = residual - book[torch.argmin(half - residual @ book.T, dim=1)]


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    torch.set_num_threads(1)
    sizes = [10_000, 40_000, 160_000] if quick else [100_000, 400_000, 1_600_000]
    figures: dict[str, Figure] = {}
    encode_seconds, repair_seconds = [], []
    with tempfile.TemporaryDirectory() as scratch:
        everything = make_items(Path(scratch) / "items.npy", sizes[-1])
        tokenizer = make_tokenizer(everything)
        part = everything[: sizes[0]]
        held = torch.as_tensor(np.array(part))
        seconds = interleaved(
            {"ours": lambda: tokenizer.encode_full(part), "bare": lambda: bare(tokenizer, held)}, 5, time.process_time
        )
        figures["encode_rate_of_bare"] = at_least(median_ratio(seconds["bare"], seconds["ours"]), 0.8, "x")
        for size in sizes:
            items = everything[:size]
            start = time.process_time()
            encoded = tokenizer.encode_full(items)
            encode_seconds.append(time.process_time() - start)
            start = time.process_time()
            first = duplicates(encoded.codes, items)
            result = repair(encoded.codes, encoded.last_residual, tokenizer.codebooks[-1].numpy(), first=first)
            repair_seconds.append(time.process_time() - start)
            figures[f"items_per_cpu_second_{size}"] = Figure(
                size / (encode_seconds[-1] + repair_seconds[-1]), "items/s"
            )
            figures[f"collisions_before_{size}"] = Figure(collision_share(encoded.codes, first), "share")
            figures[f"collisions_after_{size}"] = at_most(collision_share(result.codes, first), 0.0, "share")
    total = [a + b for a, b in zip(encode_seconds, repair_seconds, strict=True)]
    figures["growth_exponent"] = at_most(growth_exponent(sizes, total), 1.1, "")
    figures["repair_share_of_time"] = Figure(repair_seconds[-1] / total[-1], "share")
    sids = np.random.default_rng(0).integers(0, CODES, size=(1_000_000, LEVELS), dtype=np.int32)
    build = interleaved({"trie": lambda: Trie.build(sids, CODES)}, 5, time.process_time)["trie"]
    figures["trie_sids_per_second"] = at_least(len(sids) / float(np.median(build)), 2e6, "SIDs/s")
    trie = Trie.build(sids, CODES)
    figures["trie_bytes_per_sid"] = Figure(trie.nbytes / trie.size, "bytes")
    report("assign_sids", figures, quick, "SIDs from embeddings, 384 wide, C = 1024, L = 3")


if __name__ == "__main__":
    main()
