"""Bytes per user of the anchor cache as stored, and what its rounding changes in the labels.

100,000 synthetic users (`--quick`: 5,000), written by the worker's own functions: K = 20 anchors and P = 256 prefixes
each, chosen from random catalogs of 3,700 SIDs (C = 256) and 300,000 (C = 1,024), whose levels' log-probabilities are
normal with a spread of 2 and 1.5 nats. score_requests repeats these columns once per block of candidates: their bytes
as Spark writes them.
Labels: 100 candidates each of the first 6,000 users, ranked as a `quantile` label ranks them (spread .75, mean rate
.05), from the exact log-probabilities and from the stored ones: by prefix_log_prob alone, and with the share that it
has in the default order, a quarter, beside a score of other features (normal, independent). No step is fine enough for
the second: two pairs may be as near to each other as one likes.

    python -m tests.bench.bench_anchor_cache [--quick]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import numpy as np
import torch

from gpl_core.conf.sections import CalibratorSettings
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.launches import DELTA_PACKAGE
from gpl_core.interest.search import Anchors
from gpl_core.labels.calibration import rank_logits, sigmoid
from gpl_core.labels.fitting import prefix_weight
from gpl_core.labels.prefix_scoring import PrefixKeys, prefix_log_prob
from gpl_core.lakehouse.lake import Lake
from gpl_core.sids.trie import Trie
from gpu_workers.generate_anchors import anchor_rows
from spark_jobs.session import start_session
from tests.bench.harness import Figure, at_most, is_quick, report

K, P, L, BLOCK, CANDIDATES = 20, 256, 3, 2_000, 100
REPEATED = ("user_id", "anchor_sids", "log_prob", "prefixes", "prefix_log_probs")
RATE, SPREAD = 0.05, 0.75
CATALOGS = {"3,700 SIDs": (256, 3_700), "300,000 SIDs": (1_024, 300_000)}


def blocks(trie: Trie, users: int, random: np.random.Generator) -> Iterator[Anchors]:
    """Users as a search returns them: beams of the likeliest prefixes, and the likeliest prefixes that were scored."""
    every, first = trie.prefixes(), len(trie.tokens[0])
    children = [np.diff(offsets) for offsets in trie.offsets]
    for start in range(0, users, BLOCK):
        count = min(BLOCK, users - start)
        top = _normalized(random.normal(0, 2.0, (count, 1, first)))[:, 0]
        beams = np.argsort(-top, axis=1)[:, :K]
        numbers, scores = [np.tile(np.arange(first), (count, 1))], [top]
        for beam in beams.T:  # each user's children of one beam, padded
            width = int(children[1].max())
            place = np.arange(width)
            valid = place < children[1][beam][:, None]
            drawn = np.where(valid, random.normal(0, 1.5, (count, width)), -np.inf)
            score = np.take_along_axis(top, beam[:, None], 1) + _normalized(drawn[:, None])[:, 0]
            numbers.append(np.where(valid, first + trie.offsets[1][beam][:, None] + place, first))
            scores.append(score)
        number, score = np.concatenate(numbers, axis=1), np.concatenate(scores, axis=1)
        best = np.argpartition(-score, P, axis=1)[:, :P]
        best = np.take_along_axis(best, np.take_along_axis(number, best, 1).argsort(axis=1), 1)
        kept, kept_score = np.take_along_axis(number, best, 1), np.take_along_axis(score, best, 1)
        pairs = np.where(number >= first, score, -np.inf).argsort(axis=1)[:, ::-1][:, :K]
        node, of_pair = np.take_along_axis(number, pairs, 1) - first, np.take_along_axis(score, pairs, 1)
        leaf = trie.offsets[2][node]  # the first SID below, which takes nearly all that the pair has
        rest = np.exp(random.uniform(-12, -1, node.shape))  # what it leaves to its siblings, however little
        part = np.where(children[2][node] > 1, np.log1p(-rest), 0.0)
        order = (-(of_pair + part)).argsort(axis=1)
        sids = np.take_along_axis(trie.sids()[leaf], order[:, :, None], 1)
        found = np.where(np.isfinite(kept_score), kept_score, -100.0)
        prefixes = np.where(np.isfinite(kept_score)[:, :, None], every[kept], -1)
        log_prob = np.take_along_axis(of_pair + part, order, 1)
        yield Anchors(sids, log_prob.astype(np.float32), prefixes.astype(np.int32), found.astype(np.float32))


def _normalized(logits: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def prefix_scores(anchors: Anchors, candidates: np.ndarray, keys: PrefixKeys) -> np.ndarray:
    """prefix_log_prob of each of the ``candidates``' SIDs int [U x B x L], [U x B]."""
    mask = torch.ones(anchors.log_prob.shape, dtype=torch.bool)
    inputs = (
        torch.from_numpy(np.ascontiguousarray(a)) for a in (anchors.prefixes, anchors.prefix_log_probs, candidates)
    )
    return prefix_log_prob(
        torch.from_numpy(anchors.sids), mask, torch.from_numpy(anchors.log_prob), *inputs, keys
    ).numpy()  # fmt: skip


def labels(score: np.ndarray) -> np.ndarray:
    """The `quantile` label of each user's pairs by their ``score``, [U x B]."""
    ordered = np.sort(score, axis=1)
    below = np.stack([np.searchsorted(row, values, "left") for row, values in zip(ordered, score, strict=True)])
    up_to = np.stack([np.searchsorted(row, values, "right") for row, values in zip(ordered, score, strict=True)])
    rank = (below + (up_to - below - 1) / 2 + 0.5) / score.shape[1]
    return sigmoid(np.log(RATE / (1 - RATE)) + rank_logits(rank, SPREAD))


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    users = 5_000 if quick else 100_000
    figures: dict[str, Figure] = {}
    contract, share = load_contract("interest_anchors"), CalibratorSettings().prefix_share
    os.environ["PYSPARK_SUBMIT_ARGS"] = f"--master local[1] --packages {DELTA_PACKAGE} pyspark-shell"
    spark = start_session("bench_anchor_cache")
    for name, (codes, count) in CATALOGS.items():
        random = np.random.default_rng(0)
        trie = Trie.build(random.integers(0, codes, (count, L)), codes)
        keys = PrefixKeys(trie)
        changes, shared, moved = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            lake = Lake(folder)
            lake.create(contract)
            partition = {"model_version": "m", "dt": "2026-01-02"}
            with lake.writer(contract, partition, dims={"K": K, "P": P, "L": L}) as writer:
                for number, anchors in enumerate(blocks(trie, users, random)):
                    hashes = np.array([random.bytes(16).hex() for _ in anchors.sids])
                    ids = np.array([f"user-{number * BLOCK + n}" for n in range(len(hashes))])
                    users_of = {"user_id": ids, "sequence_hash": hashes, "sid_version": np.full(len(ids), "sid")}
                    rows = anchor_rows(users_of, anchors, keys)
                    writer.write(rows)
                    if number < 3:
                        stored = anchors._replace(
                            log_prob=np.stack(rows["log_prob"].to_numpy()),
                            prefix_log_probs=np.stack(rows["prefix_log_probs"].to_numpy()),
                        )
                        candidates = trie.sids()[random.integers(0, trie.size, (len(hashes), CANDIDATES))]
                        exact, kept = (prefix_scores(a, candidates, keys) for a in (anchors, stored))
                        others = random.normal(0, 1, exact.shape)
                        weight = prefix_weight(share, 1.0, exact.var(axis=1).mean())
                        moved.append(np.abs(kept - exact))
                        changes.append(np.abs(labels(kept) - labels(exact)))
                        shared.append(np.abs(labels(others + weight * kept) - labels(others + weight * exact)))
            files = [str(p) for p in Path(folder).rglob("*.parquet")]
            spark.read.parquet(*files).select(*REPEATED).coalesce(1).write.parquet(f"{folder}/requests")
            size, again = (
                sum(Path(f).stat().st_size for f in of) for of in (files, glob(f"{folder}/requests/*.parquet"))
            )
        change, move = np.concatenate(changes), np.concatenate(moved)
        figures[f"{name}: bytes per user"] = at_most(size / users, 1_200, "bytes")
        figures[f"{name}: bytes of them in score_requests"] = at_most(again / users, 1_200, "bytes")
        figures[f"{name}: prefix_log_prob changed by, 99.9 % of pairs"] = Figure(
            float(np.quantile(move, 0.999)), "nats"
        )
        # A logistic label of slope 1 changes by a quarter of what its score does at most.
        figures[f"{name}: logistic labels changed by, at most"] = at_most(float(move.max()) / 4, 1e-3, "")
        figures[f"{name}: labels changed by more than .001"] = at_most(float((change > 1e-3).mean()), 0, "share")
        figures[f"{name}: mean change of a label"] = at_most(float(change.mean()), 1e-3, "")
        default = np.concatenate(shared)
        figures[f"{name}: labels of the default order changed by more than .001"] = at_most(
            float((default > 1e-3).mean()), 0, "share"
        )
        figures[f"{name}: mean change of a label of the default order"] = at_most(float(default.mean()), 1e-3, "")
    report("anchor_cache", figures, quick, f"interest_anchors, {users} synthetic users, K {K}, P {P}, L {L}")


if __name__ == "__main__":
    main()
