"""Shared-prefix beam search against the floor of its own prefill and against Hugging Face `generate`.

Ours as it ships: content read and scored (384 wide, as the default encoder's), 256 prefixes kept; `generate` has the
SIDs alone. Same weights, same prompts, one run, L = 3, C = 256, Qwen2.5-0.5B's shape (`--quick`: 4 of its 24 layers,
fewer points).

Yardsticks: (1) the floor: one packed prefill of P + (L - 1) K positions a user, without any head, which is what beam
search has to compute; (2) `generate` with `num_beams` and `prefix_allowed_tokens_fn` over a dictionary of prefixes,
with sdpa attention and the key/value cache, renormalized to the same scores, at its best batch: the first is doubled
until that is no faster, or to 128 users.

Ours and the floor compute the same users at once: as many as make about 1,024 positions on a CPU, 512 users on a GPU.
Every pass reads all weights once, so with a user or two ours would be judged by its two more readings, not by what it
computes; a worker fills batches of thousands of positions (`anchors.tokens_per_batch`).

On a CPU one thread's CPU time is measured, so that a machine shared with others gives the same figures: about 40
minutes for the grid, most of them `generate`'s. Each point is printed and written when it is measured; after a
kill `--resume` keeps the points that this commit has measured. On a GPU also: how far the bf16 anchors agree with
fp32 (random weights, whose near-ties are harder than a trained model's).

    python -m tests.bench.bench_search [--quick] [--resume]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpl_core.interest.attention import ATTENTION, CausalPlan
from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.content import leaf_content
from gpl_core.interest.interest_model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.search import Anchors, BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from tests.bench.harness import (
    Figure,
    at_least,
    at_most,
    clock,
    device,
    interleaved,
    median_ratio,
    report,
    write,
    written,
)

LEVELS, CODES, ITEMS, WIDTH, PREFIXES = 3, 256, 20_000, 384, 256
POSITIONS = 1_024  # of a batch on a CPU
GRID = tuple((prompt, beams) for prompt in (30, 150, 300) for beams in (20, 50))


@dataclass
class Bench:
    """One model with its catalog on one device."""

    model: InterestModel
    trie: DeviceTrie
    content: ContentTable
    sids: np.ndarray
    device: torch.device

    def histories(self, users: int, prompt: int) -> list[np.ndarray]:
        """The items of ``users`` prompts of exactly ``prompt`` tokens."""
        rng = np.random.default_rng(0)
        return [rng.integers(0, len(self.sids), prompt // LEVELS) for _ in range(users)]

    def ours(self, users: int, prompt: int, beams: int) -> Callable[[], Anchors]:
        items = self.histories(users, prompt)
        limits = SearchSettings(beams, prompt // LEVELS, token_budget=1 << 30, prefixes=PREFIXES)
        search = BeamSearch(self.model, self.trie, limits, self.content)
        return lambda: search.search([self.sids[i] for i in items], items)

    def floor(self, users: int, prompt: int, beams: int) -> Callable[[], object]:
        length = prompt + (LEVELS - 1) * beams
        lengths = np.full(users, length)
        ids = torch.randint(0, self.model.vocabulary.size, (users * length,), device=self.device)
        ids += self.model.vocabulary.first_id
        positions = torch.arange(length, device=self.device).repeat(users)

        @torch.inference_mode()
        def run() -> object:
            out = self.model.hidden(ids, positions, CausalPlan(lengths, self.device))
            return float(out[-1, 0])  # waits for the device

        return run

    def profile(self, users: int, prompt: int, beams: int, seconds_of: Callable[[], float]) -> dict[str, Figure]:
        """Where one search's time goes: the body over prompts, the body over beams, all else (heads, trie, top K)."""
        search, hidden = self.ours(users, prompt, beams), self.model.hidden
        spent: list[float] = []

        def timed(*args: object) -> torch.Tensor:
            start = seconds_of()
            out = hidden(*args)
            spent.append(seconds_of() - start)
            return out

        self.model.hidden = timed
        try:
            whole = _once(search, seconds_of)
        finally:
            del self.model.hidden
        parts = {"prefill": spent[0], "beam steps": sum(spent[1:]), "heads, trie and top K": whole - sum(spent)}
        return {f"share of {name}": Figure(seconds / whole, "share") for name, seconds in parts.items()}

    def generate(self, users: int, prompt: int, beams: int) -> Callable[[], object]:
        vocabulary, plain = self.model.vocabulary, self.model.body.get_base_model()
        ids = np.stack([vocabulary.ids(self.sids[h]).ravel() for h in self.histories(users, prompt)])
        allowed: dict[tuple[int, ...], list[int]] = {}
        tokens = vocabulary.ids(self.sids)
        for level in range(LEVELS):
            for row in np.unique(tokens[:, : level + 1], axis=0):
                allowed.setdefault(tuple(row[:-1].tolist()), []).append(int(row[-1]))

        @torch.inference_mode()
        def run() -> object:
            plain.set_attn_implementation("sdpa")
            try:
                inputs = torch.from_numpy(ids).to(self.device)
                return plain.generate(
                    inputs, attention_mask=torch.ones_like(inputs), num_beams=beams, num_return_sequences=beams,
                    max_new_tokens=LEVELS, do_sample=False, length_penalty=0.0, renormalize_logits=True,
                    eos_token_id=None, pad_token_id=0,
                    prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[prompt:].tolist())],
                ).cpu()  # fmt: skip
            finally:
                plain.set_attn_implementation(ATTENTION)

        return run


def with_content(
    sids: np.ndarray, width: int, random: np.random.Generator, device: torch.device
) -> tuple[DeviceTrie, ContentTable]:
    """A catalog of one item per row of ``sids`` [N x L], with random unit vectors of ``width`` as content."""
    items = np.arange(len(sids))
    vectors = random.normal(size=(len(sids), width)).astype(np.float32)
    content = ContentTable(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), items)
    catalog = ItemCatalog(items, sids, CODES)
    return DeviceTrie(catalog.trie, device, leaf_content(catalog, content)), content


def make_bench(quick: bool) -> Bench:
    """Random weights at Qwen2.5-0.5B's shape, in float32; the cost does not depend on their values."""
    shape = TinySettings(896, 4 if quick else 24, 14, 2, 4864, 4096, vocabulary=151_936)
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(folder, shape)
        # Codebooks, so that the codes' logits lie apart as trained ones do.
        codebooks = random.normal(size=(LEVELS, CODES, 32))
        settings = ModelSettings(LEVELS, CODES, content_width=WIDTH)
        model = build_interest_model(folder, settings, codebooks).eval()
    model.merge()
    model.to(device())
    sids = random.integers(0, CODES, (ITEMS, LEVELS))
    trie, content = with_content(sids, WIDTH, random, device())
    return Bench(model, trie, content, sids, device())


def point(bench: Bench, prompt: int, beams: int, users: int, repeats: int, batch: int) -> dict[str, Figure]:
    """The figures of one point of the grid; `generate` from ``batch`` users on."""
    on_gpu, seconds_of = bench.device.type == "cuda", clock()
    jobs = {"ours": bench.ours(users, prompt, beams), "floor": bench.floor(users, prompt, beams)}
    seconds = interleaved(jobs, repeats, seconds_of)
    rate = users / statistics.median(seconds["ours"])
    goal = 1500.0 if on_gpu and (prompt, beams) == (300, 50) else None
    ratio = median_ratio(seconds["ours"], seconds["floor"])
    judged = (prompt, beams) == (150, 20)
    peer = batch / _once(bench.generate(batch, prompt, beams), seconds_of)
    while batch < 128 and (twice := 2 * batch / _once(bench.generate(2 * batch, prompt, beams), seconds_of)) > peer:
        batch, peer = 2 * batch, twice
    found = {
        "users per second": at_least(rate, goal, "users/s") if goal else Figure(rate, "users/s"),
        "time over the floor": at_most(ratio, 1.3 if on_gpu else 1.1, "x"),
        "the floor, users per second": Figure(users / statistics.median(seconds["floor"]), "users/s"),
        "generate, users per second": Figure(peer, "users/s"),
        "generate's best batch": Figure(batch, "users"),
        "speed over generate": at_least(rate / peer, 20 if on_gpu else 15, "x") if judged else Figure(rate / peer, "x"),
        **bench.profile(users, prompt, beams, seconds_of),
    }
    return {f"P {prompt}, K {beams}: {key}": figure for key, figure in found.items()}


def agreement(bench: Bench, users: int, prompt: int, beams: int) -> Figure:
    """Share of the fp32 top 10 that the bf16 top 10 holds; leaves the model in bf16."""
    search = bench.ours(users, prompt, beams)
    exact = search().sids[:, :10]
    bench.model.to(torch.bfloat16)
    close = search().sids[:, :10]
    same = (exact[:, :, None] == close[:, None]).all(axis=3).any(axis=2)
    return at_least(float(same.mean()), 0.95, "share")


def _once(job: Callable[[], object], seconds_of: Callable[[], float]) -> float:
    start = seconds_of()
    job()
    return seconds_of() - start


def main() -> None:
    """Measure point by point, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size")
    parser.add_argument("--resume", action="store_true", help="keep the points that this commit has measured")
    arguments = parser.parse_args()
    quick, on_gpu = arguments.quick, device().type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    repeats, size = (10, "512 users") if on_gpu else (3, f"{POSITIONS} positions")
    title = f"beam search, Qwen2.5-0.5B shape, {4 if quick else 24} layers, {ITEMS:,} SIDs, batches of {size}"
    figures = written("search", quick, title) if arguments.resume else {}
    bench = make_bench(quick)
    if on_gpu:
        figures["P 150, K 50: top 10 in bf16 as in fp32"] = agreement(bench, 64, 150, 50)
    for prompt, beams in ((150, 20), (30, 50)) if quick else GRID:
        if f"P {prompt}, K {beams}: users per second" in figures:
            continue
        start = time.perf_counter()
        users = 512 if on_gpu else round(POSITIONS / (prompt + (LEVELS - 1) * beams))
        found = point(bench, prompt, beams, users, repeats, 8 if on_gpu else 1)
        figures |= found
        write("search", figures, quick, title)
        shown = ", ".join(f"{key.split(': ')[1]} {figure.value:.3g}" for key, figure in found.items())
        print(f"P {prompt}, K {beams} in {time.perf_counter() - start:.0f} s: {shown}", flush=True)
    report("search", figures, quick, title)


if __name__ == "__main__":
    main()
