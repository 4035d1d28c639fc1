"""Shared-prefix beam search against the floor of its own prefill and against Hugging Face `generate`.

Same weights, same prompts, one run, L = 3, C = 256, Qwen2.5-0.5B's shape (`--quick`: 4 of its 24 layers, fewer points).

Yardsticks: (1) the floor: one packed prefill of P + (L - 1) K positions a user, without any head, which is what beam
search has to compute; (2) `generate` with `num_beams` and `prefix_allowed_tokens_fn` over a dictionary of prefixes,
with sdpa attention and the key/value cache, renormalised to the same scores, at the best of several batch sizes.

    python -m tests.bench.bench_search [--quick]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpl_core.interest.attention import ATTENTION, CausalPlan
from gpl_core.interest.checkpoint import TinySettings, make_tiny_checkpoint
from gpl_core.interest.model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.scoring import DeviceTrie
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.sids.trie import Trie
from tests.bench.harness import Figure, at_least, at_most, device_name, interleaved, is_quick, median_ratio, report

LEVELS, CODES, ITEMS = 3, 256, 20_000
GRID = tuple((prompt, beams) for prompt in (30, 150, 300) for beams in (20, 50))


@dataclass
class Bench:
    """One model with its catalogue on one device."""

    model: InterestModel
    trie: DeviceTrie
    sids: np.ndarray
    device: torch.device

    def histories(self, users: int, prompt: int) -> list[np.ndarray]:
        """``users`` prompts of exactly ``prompt`` tokens."""
        rng = np.random.default_rng(0)
        return [self.sids[rng.integers(0, len(self.sids), prompt // LEVELS)] for _ in range(users)]

    def ours(self, users: int, prompt: int, beams: int) -> Callable[[], object]:
        histories = self.histories(users, prompt)
        search = BeamSearch(self.model, self.trie, SearchSettings(beams, prompt // LEVELS, token_budget=1 << 30))
        return lambda: search.search(histories)

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

    def generate(self, users: int, prompt: int, beams: int) -> Callable[[], object]:
        vocabulary, plain = self.model.vocabulary, self.model.body.get_base_model()
        ids = np.stack([vocabulary.ids(h).ravel() for h in self.histories(users, prompt)])
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
                    eos_token_id=None, pad_token_id=vocabulary.pad_id,
                    prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[prompt:].tolist())],
                ).cpu()  # fmt: skip
            finally:
                plain.set_attn_implementation(ATTENTION)

        return run


def make_bench(quick: bool) -> Bench:
    """Random weights at Qwen2.5-0.5B's shape; the cost does not depend on their values."""
    device = torch.device("cuda" if device_name()[:3] != "cpu" else "cpu")
    shape = TinySettings(896, 4 if quick else 24, 14, 2, 4864, 4096, vocabulary=151_936)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(folder, shape)
        model = build_interest_model(folder, ModelSettings(LEVELS, CODES)).eval()
    model.merge()
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sids = np.random.default_rng(1).integers(0, CODES, (ITEMS, LEVELS))
    return Bench(model, DeviceTrie(Trie.build(sids, CODES), device), sids, device)


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    bench = make_bench(quick)
    on_gpu = bench.device.type == "cuda"
    # One thread's CPU time, so that a machine shared with others gives the same figures; on a GPU the wall clock.
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    users, repeats = (512, 10) if on_gpu else (2, 5) if quick else (4, 3)
    figures: dict[str, Figure] = {}
    for prompt, beams in ((150, 20), (30, 50)) if quick else GRID:
        jobs = {"ours": bench.ours(users, prompt, beams), "floor": bench.floor(users, prompt, beams)}
        seconds = interleaved(jobs, repeats, clock)
        name = f"P {prompt}, K {beams}"
        rate = users / statistics.median(seconds["ours"])
        goal = 1500.0 if on_gpu and (prompt, beams) == (300, 50) else None
        figures[f"{name}: users per second"] = at_least(rate, goal, "users/s") if goal else Figure(rate, "users/s")
        ratio = median_ratio(seconds["ours"], seconds["floor"])
        figures[f"{name}: time over the floor"] = at_most(ratio, 1.3 if on_gpu else 1.15, "x")
        if (prompt, beams) == (150, 20):
            # `generate` would run out of time, not of memory, at larger batches: its cost per user rises with them.
            batches = (8, 32, 128) if on_gpu else (1,) if quick else (1, 4)
            peer = {b: interleaved({"g": bench.generate(b, prompt, beams)}, 1, clock)["g"][0] / b for b in batches}
            best = min(peer, key=lambda b: peer[b])
            figures[f"{name}: generate, users per second"] = Figure(1 / peer[best], "users/s")
            figures[f"{name}: generate's best batch"] = Figure(best, "users")
            figures[f"{name}: speed over generate"] = at_least(rate * peer[best], 20 if on_gpu else 15, "x")
    layers = bench.model.config.num_hidden_layers
    report("search", figures, quick, f"beam search, Qwen2.5-0.5B shape, {layers} layers, {users} users")


if __name__ == "__main__":
    main()
