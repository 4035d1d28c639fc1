"""SIDs per second at 1x, 4x and 16x items: what assign_sids does between reading and writing, and the reading itself.

Measured is the worker's own path: `encode_rows` from a memory-mapped file, then `issue` (duplicates, collision repair,
bucket sizes). Yardstick, on the same data in one run: the bare loop that the formulas need, with the data in memory:
three linear layers, then matmul, argmin and subtraction per level, in one batch after the other. One thread and its CPU
seconds, so that other work on the machine does not decide the figures (on an accelerator: seconds).

A larger catalog is a broader one: more center, of as many items each. About a third of the items have a variant that
no tokenizer of this size tells apart, so that there is as much to repair at every size; beyond that a larger
catalog collides more, C being the same. The codebooks are fitted to a sample of the largest size: fitted to the
first items, they would be worse for the later ones.

Memory is the largest amount that Python and numpy hold at once over what they held before, per item. Reading is
`item_vectors`: a Delta table through Petastorm into the memory-mapped file. Also the trie (SIDs built per second, bytes
per SID), and the share of SIDs that stay the same when encoder and distances are computed in bfloat16.

    python -m tests.bench.bench_assign_sids [--quick]
"""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.sids.collisions import duplicates
from gpl_core.sids.health import collision_share
from gpl_core.sids.issuing import Issued, RowView, issue
from gpl_core.sids.kmeans import residual_kmeans
from gpl_core.sids.tokenizer import TokenizedItems, Tokenizer, mlp
from gpl_core.sids.trie import Trie
from gpu_workers.assign_sids import encode_rows
from gpu_workers.inputs.embeddings import item_vectors
from gpu_workers.ranks import Ranks
from tests.bench.harness import (
    Figure,
    at_least,
    at_most,
    clock,
    device,
    growth_exponent,
    interleaved,
    is_quick,
    median_ratio,
    report,
)

D, WIDTHS, LEVELS, CODES, BATCH = 384, (384, 512, 32), 3, 1024, 16_384


def make_items(path: Path, count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors, 80 around each center, every fifth a variant of the one before it, [count x D]. Mapped as the
    worker does."""
    rng = np.random.default_rng(seed)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, D))
    for start in range(0, count, 10_000):
        rows = out[start : start + 10_000]
        center = rng.standard_normal((len(rows) // 80, D), dtype=np.float32)
        rows[:] = center[rng.integers(len(center), size=len(rows))]
        rows += 0.1 * rng.standard_normal(rows.shape, dtype=np.float32)
        own = np.maximum.accumulate(np.where(rng.random(len(rows)) < 0.8, np.arange(len(rows)), 0))
        rows[:] = rows[own] + 2e-3 * rng.standard_normal(rows.shape, dtype=np.float32)  # too near to be told apart
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.load(path, mmap_mode="r")


def make_tokenizer(items: np.ndarray, rows: int) -> Tokenizer:
    """A random encoder with codebooks fitted to what it makes of a sample of these items."""
    torch.manual_seed(0)
    encoder, decoder = mlp(WIDTHS), mlp(WIDTHS[::-1])
    sample = np.sort(np.random.default_rng(1).choice(len(items), rows, replace=False))
    with torch.no_grad():
        latent = encoder(torch.as_tensor(np.array(items[sample])) * D**0.5).numpy()
    books, _ = residual_kmeans(latent, LEVELS, CODES, seed=0)
    return Tokenizer(encoder, decoder, torch.as_tensor(books), torch.zeros(D), D**0.5, {}).to(device())


@torch.no_grad()
def bare(tokenizer: Tokenizer, items: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The products and minima, nothing else; codes [N x L] on the device."""
    encoder, books = tokenizer.encoder.to(dtype), tokenizer.codebooks.to(dtype)
    halves = books.square().sum(-1) / 2
    codes = torch.empty((len(items), LEVELS), dtype=torch.int32, device=items.device)
    for start in range(0, len(items), BATCH):
        residual = encoder((items[start : start + BATCH] * tokenizer.scale).to(dtype))
        for level, (book, half) in enumerate(zip(books, halves, strict=True)):
            code = torch.argmin(half - residual @ book.T, dim=1)
            codes[start : start + BATCH, level] = code
            residual = residual - book[code]
    tokenizer.encoder.to(torch.float32)
    return codes


def assign(tokenizer: Tokenizer, items: np.ndarray, folder: Path) -> tuple[TokenizedItems, Issued, float, float]:
    """The worker's path on one rank; encoded, issued and the seconds of each."""
    tick = clock()
    start = tick()
    encoded = encode_rows(tokenizer, items, np.arange(len(items)), Ranks(0, 1, device()), folder)
    middle = tick()
    nothing = np.empty((0, LEVELS), np.int32)
    book = tokenizer.codebooks[-1].cpu().numpy()
    issued = issue(encoded, items, book, nothing, RowView(items, np.empty(0, np.int64)))
    return encoded, issued, middle - start, tick() - middle


def reading(items: np.ndarray, folder: Path) -> float:
    """Seconds to read these embeddings as the worker does."""
    contract, lake = load_contract("item_embeddings"), Lake(str(folder / f"lake{len(items)}"))
    lake.create(contract)
    with lake.writer(contract, {"encoder_version": "bench"}, dims={"d": D}) as writer:
        for start in range(0, len(items), BATCH):
            part = np.array(items[start : start + BATCH])
            index = np.arange(start, start + len(part), dtype=np.int32)
            offsets = pa.array(np.arange(len(part) + 1, dtype=np.int32) * D)
            columns = {
                "item_index": pa.array(index),
                "content_hash": pa.array([f"{n:016x}" for n in index]),
                "embedding": pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1))),
                "updated_at": pa.array(np.zeros(len(part), dtype=np.int64)),
            }
            writer.write(pa.table(columns))
    lake.commit(contract, writer.parts, mark=SliceMark("encode_items", {WHOLE: "bench"}, "bench"), mode="append")
    tick = clock()
    start = tick()
    with item_vectors(lake.open("item_embeddings"), "bench", Ranks(0, 1, device())) as found:
        seconds = tick() - start
        assert np.array_equal(found.vectors[-1], items[-1])
    return seconds


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    torch.set_num_threads(1)
    sizes = [10_000, 40_000, 160_000] if quick else [100_000, 400_000, 1_600_000]
    figures: dict[str, Figure] = {}
    encoding, issuing = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        everything = make_items(folder / "items.npy", sizes[-1])
        tokenizer = make_tokenizer(everything, 20_000 if quick else 40_000)
        part = everything[: sizes[0]]
        held = torch.as_tensor(np.array(part)).to(device())
        rows, alone = np.arange(len(part)), Ranks(0, 1, device())
        jobs = {
            "ours": lambda: encode_rows(tokenizer, part, rows, alone, folder),
            "bare": lambda: bare(tokenizer, held),
            "bf16": lambda: bare(tokenizer, held[:BATCH], torch.bfloat16),
        }
        seconds = interleaved(jobs, 5, clock())
        figures["encode_rate_of_bare"] = at_least(median_ratio(seconds["bare"], seconds["ours"]), 0.8, "x")
        figures["bare_items_per_second"] = Figure(len(part) / float(np.median(seconds["bare"])), "items/s")
        figures["bf16_items_per_second"] = Figure(len(held[:BATCH]) / float(np.median(seconds["bf16"])), "items/s")
        same = bare(tokenizer, held[:BATCH]) == bare(tokenizer, held[:BATCH], torch.bfloat16)
        figures["bf16_first_codes_equal"] = Figure(float(same[:, 0].float().mean()), "share")
        figures["bf16_sids_equal"] = Figure(float(same.all(dim=1).float().mean()), "share")
        for size in sizes:
            items = everything[:size]
            encoded, issued, *spent = assign(tokenizer, items, folder)
            encoding.append(spent[0])
            issuing.append(spent[1])
            first = duplicates(encoded.codes, items)
            figures[f"items_per_second_{size}"] = Figure(size / sum(spent), "items/s")
            figures[f"issue_share_of_time_{size}"] = Figure(spent[1] / sum(spent), "share")
            figures[f"collisions_before_{size}"] = Figure(collision_share(encoded.codes, first), "share")
            figures[f"collisions_after_{size}"] = at_most(collision_share(issued.sids, first), 0.0, "share")
            figures[f"moved_{size}"] = Figure(issued.moved / size, "share")
        total = [a + b for a, b in zip(encoding, issuing, strict=True)]
        figures["growth_exponent"] = at_most(growth_exponent(sizes, total), 1.1, "")
        figures["growth_exponent_encode"] = Figure(growth_exponent(sizes, encoding), "")
        figures["growth_exponent_issue"] = Figure(growth_exponent(sizes, issuing), "")
        for size in sizes[:2]:
            tracemalloc.start()
            assign(tokenizer, everything[:size], folder)
            figures[f"peak_bytes_per_item_{size}"] = Figure(tracemalloc.get_traced_memory()[1] / size, "bytes")
            tracemalloc.stop()
        spent = [reading(everything[:size], folder) for size in sizes[:2]]
        figures["read_items_per_second"] = Figure(sizes[1] / spent[1], "items/s")
        figures["growth_exponent_read"] = at_most(growth_exponent(sizes[:2], spent), 1.1, "")
    sids = np.random.default_rng(0).integers(0, CODES, size=(1_000_000, LEVELS), dtype=np.int32)
    for name, found in {"": sids, "catalog_": issued.sids}.items():
        build = interleaved({"trie": lambda found=found: Trie.build(found, CODES)}, 5, clock())["trie"]
        trie = Trie.build(found, CODES)
        figures[f"{name}trie_sids_per_second"] = at_least(len(found) / float(np.median(build)), 2e6, "SIDs/s")
        figures[f"{name}trie_bytes_per_sid"] = Figure(
            sum(a.nbytes for a in (*trie.offsets, *trie.tokens)) / trie.size, "bytes"
        )
    report("assign_sids", figures, quick, "SIDs from embeddings, 384 wide, C = 1024, L = 3")


if __name__ == "__main__":
    main()
