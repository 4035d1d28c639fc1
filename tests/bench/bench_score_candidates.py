"""Scoring against what memory allows: pairs per second of `score_block` and `prefix_log_prob` together.

Yardsticks, on the same data in one run: (1) the floor: the two gathers and the one product that the formulas of
`score_block` need, into preallocated buffers, nothing else; (2) a plain per-user numpy loop as one would first write
`score_block`. The default score, `prefix_log_prob`, is on our side alone. Growth: 1x, 4x, 16x different
users. On a CPU: one thread and its CPU seconds, so that figures are per core and other work on the machine does not
decide them.

    python -m tests.bench.bench_score_candidates [--quick]
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from gpl_core.labels.pair_scoring import PairBlock, PairScores, score_block
from gpl_core.labels.prefix_scoring import PrefixKeys, prefix_log_prob
from gpl_core.sids.trie import Trie
from tests.bench.harness import (
    Figure,
    at_least,
    at_most,
    clock,
    device,
    device_name,
    growth_exponent,
    interleaved,
    is_quick,
    median_ratio,
    report,
)

K, H, B, D, LEVELS = 20, 20, 128, 384, 3
P, CODES = 256, 256  # prefixes per user, codes per level


def make_block(users: int, items: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A block as score_requests holds it: K anchors, H history items, B candidates per user."""
    g = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(items, D, generator=g), dim=1)
    anchors = torch.nn.functional.normalize(torch.randn(users, K, D, generator=g), dim=2)
    return (
        anchors,
        torch.ones(users, K, dtype=torch.bool),
        torch.log_softmax(torch.randn(users, K, generator=g), dim=1),
        torch.randint(0, items, (users, H), generator=g),
        torch.randint(0, items, (users, B), generator=g),
        vectors,
    )


def make_prefix_block(users: int, items: int, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], PrefixKeys]:
    """What the default score reads of the same users: anchors, P prefixes and B candidates of a random catalog."""
    rng = np.random.default_rng(seed)
    trie = Trie.build(rng.integers(0, CODES, (items, LEVELS)), CODES)
    every, first = trie.prefixes(), len(trie.tokens[0])
    sids = trie.sids()
    numbers = rng.integers(first, len(every), (users, P))
    numbers[:, : P // 2] = np.argsort(rng.random((users, first)), axis=1)[
        :, : P // 2
    ]  # half of length 1, as in a cache
    parts = (
        sids[rng.integers(0, trie.size, (users, K))],
        np.ones((users, K), dtype=bool),
        np.log(rng.dirichlet(np.ones(K + P), users)[:, :K]).astype(np.float32),
        every[np.sort(numbers, axis=1)],
        np.log(rng.dirichlet(np.ones(P), users)).astype(np.float32),
        sids[rng.integers(0, trie.size, (users, B))],
    )
    return tuple(torch.from_numpy(x).to(device()) for x in parts), PrefixKeys(trie, device())


def floor(block: tuple[torch.Tensor, ...], buffers: tuple[torch.Tensor, ...]) -> None:
    """Gather candidates and history, one product with anchors and history: the bytes that cannot be avoided."""
    anchors, _, _, history, candidates, vectors = block
    gathered, probes, products = buffers
    torch.index_select(vectors, 0, candidates.reshape(-1), out=gathered.view(-1, D))
    probes[:, :K] = anchors
    probes[:, K:] = vectors[history]
    torch.bmm(gathered, probes.transpose(1, 2), out=products)


def naive(block: tuple[torch.Tensor, ...]) -> float:
    """One user at a time in numpy float32, as one would first write it; returns a checksum."""
    anchors, _, logs, history, candidates, vectors = (x.cpu().numpy() for x in block)
    total = 0.0
    for u in range(len(anchors)):
        weight = np.exp(logs[u])
        weight = weight / weight.sum()
        past = vectors[history[u]]
        coherence = np.linalg.norm((weight[:, None] * anchors[u]).sum(axis=0))
        consistency = sum(w * max(0.0, (past @ a).max()) for w, a in zip(weight, anchors[u]))
        for item in candidates[u]:
            e = vectors[item]
            cosines = anchors[u] @ e
            k = int(cosines.argmax())
            total += float(cosines[k] + (past @ e).max() + np.exp(logs[u, k] / LEVELS) + coherence + consistency)
    return total


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    torch.set_num_threads(1)
    users, items, repeats = (64, 20_000, 7) if quick else (256, 100_000, 15)
    seconds_of = clock()
    growth = (1, 4, 16)
    *per_user, vectors = (x.to(device()) for x in make_block(max(growth) * users, items))
    cached, keys = make_prefix_block(max(growth) * users, items)

    def score(chosen: slice) -> PairScores:
        prefix_log_prob(*(x[chosen] for x in cached), keys)
        return score_block(PairBlock(*(x[chosen] for x in per_user)), vectors, LEVELS)

    block = (*(x[:users] for x in per_user), vectors)
    shapes = ((users, B, D), (users, K + H, D), (users, B, K + H))
    buffers = tuple(torch.empty(shape, device=device()) for shape in shapes)
    found = score(slice(users))
    checksum = naive(tuple(x[:4] if n < 5 else x for n, x in enumerate(block)))
    of_users = found.coherence[:4, None] + found.consistency[:4, None]
    ours = (found.similarity + found.history_similarity + found.llm_confidence)[:4] + of_users
    assert abs(float(ours.sum()) - checksum) < 1e-2, "the yardstick computes something else"

    seconds = interleaved(
        {
            "ours": lambda: score(slice(users)), "floor": lambda: floor(block, buffers),
            "score_block": lambda: score_block(PairBlock(*block[:5]), vectors, LEVELS),
        }, repeats, seconds_of,
    )  # fmt: skip
    few = tuple(x[:8] if n < 5 else x for n, x in enumerate(block))
    slow = interleaved({"naive": lambda: naive(few)}, 3, time.process_time)["naive"]
    pairs = users * B
    rate = pairs / statistics.median(seconds["ours"])
    took = []
    for size in growth:
        start = seconds_of()
        for n in range(size):
            score(slice(n * users, (n + 1) * users))
        took.append(seconds_of() - start)
    figures = {
        "pairs per second": Figure(rate, "pairs/s"),
        "floor, pairs per second": Figure(pairs / statistics.median(seconds["floor"]), "pairs/s"),
        "share of the floor's speed": at_least(median_ratio(seconds["floor"], seconds["ours"]), 0.7, "ratio"),
        "  without the default score": Figure(median_ratio(seconds["floor"], seconds["score_block"]), "ratio"),
        "speed over the naive loop": Figure(rate / (8 * B / statistics.median(slow)), "x"),
        "growth exponent, 1x 4x 16x": at_most(growth_exponent(growth, took), 1.05, "exponent"),
        "gathered bytes per second": Figure(rate * D * 4, "B/s"),
    }
    report(
        "score_candidates",
        figures,
        quick,
        f"all scores of a pair: K {K}, H {H}, P {P}, B {B}, d {D}, on {device_name()}",
    )


if __name__ == "__main__":
    main()
