"""Similarities and confidence factors of requested pairs, without calibration: score_requests -> pair_scores.

deepspeed --num_accelerators 2 gpu_workers/score_candidates.py --config quickstart --run-date 2026-01-01
"""

import json
import warnings
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from gpl_core.contracts.contract import load_contract
from gpl_core.graph.step_run import StepContext, log
from gpl_core.labels.pair_scoring import PairBlock, first_occurrence, score_block
from gpl_core.labels.prefix_scoring import PrefixKeys, prefix_log_prob
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from gpu_workers.inputs.feed import assign_files, read_batches, rebatch, require_versions
from gpu_workers.inputs.item_tables import content_table, sids_in_force
from gpu_workers.outputs import commit_parts, commit_rows, reject, table_of
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main

COLUMNS = (
    "user_id", "source", "anchor_sids", "log_prob", "prefixes", "prefix_log_probs", "history", "candidates",
    "sid_version", "model_version",
)  # fmt: skip
_TABLE_BYTES = 512 * 2**20  # anchor embeddings of all SIDs are computed once if they fit, otherwise per block
_DEVICE_SHARE = 0.4  # of the device's memory: item vectors that take less stay there, others are gathered per block

Rejects = dict[str, tuple[str, str]]  # key -> (reason, detail)


class Lookup(NamedTuple):
    """The lookups for scoring a block."""

    items: ContentTable
    on_device: torch.Tensor | None  # [n x d], all item vectors in the configured type, when they fit
    catalog: ItemCatalog  # SIDs by row of `items`
    anchors: np.ndarray | None  # float32 [S x d], g(a) of every SID, when they fit
    keys: PrefixKeys


def run(context: StepContext, ranks: Ranks) -> None:
    """Score one run date's requests and commit its slices of worker_rejects and pair_scores."""
    with ranks.together():
        sid_version, model_version = context.sid_and_model_versions()
        requests = context.snapshot("score_requests")
        files = requests.select(start=context.run_date, end=context.run_date)
        share = assign_files(files, ranks.size)[ranks.rank]
        partition = {"dt": context.run_date.isoformat()}
        writer = context.lake.writer(
            context.contract("pair_scores"), partition, dims=context.config.dims(), rank=ranks.rank
        )
        rejects: Rejects = {}
        pairs_in = 0
    with content_table(context, ranks) as items, ranks.together():
        index, sids = sids_in_force(context.snapshot("item_sids"), sid_version)
        kind = getattr(torch, context.config.labels.item_vectors)
        lookup = make_lookup(items, index, sids, ranks.device, kind)
        with writer:
            stream = read_batches(requests, share, COLUMNS)
            for batch in rebatch(stream, context.config.labels.users_per_batch):
                require_versions(batch, "score_requests", sid_version=sid_version, model_version=model_version)
                pairs_in += int((batch["candidates"] >= 0).sum())
                writer.write(score(batch, lookup, ranks.device, rejects))
    _commit_rejects(context, ranks, rejects)
    commit_parts(context, ranks, "pair_scores", writer.parts, mode="overwrite", partition=partition)
    written = int(ranks.sum(sum(part["rows"] for part in writer.parts)))
    context.counts.rows_in = int(ranks.sum(pairs_in))
    context.counts.rows_out = written
    context.counts.rows_dropped = context.counts.rows_in - written
    if ranks.is_main:
        log.info("score_candidates %s: %d of %d pairs scored", context.run_date, written, context.counts.rows_in)


def score(batch: dict[str, np.ndarray], lookup: Lookup, device: torch.device, rejects: Rejects) -> pa.Table:
    """Rows of pair_scores (without dt) for one block of score_requests; what cannot be scored goes to `rejects`.

    Candidates that occur twice in a row are scored once. Anchors whose SID no item carries anymore are left out.
    """
    users, k = batch["log_prob"].shape
    levels = lookup.catalog.levels
    leaf = lookup.catalog.trie.leaf_of(batch["anchor_sids"].reshape(users * k, levels))
    mask = (leaf >= 0).reshape(users, k) & np.isfinite(batch["log_prob"])
    anchors = _anchor_vectors(lookup, leaf).reshape(users, k, -1)
    candidates = batch["candidates"].astype(np.int64)
    rows = lookup.items.rows(candidates)
    _note_rejects(batch, candidates, rows, mask, rejects)
    own = prefix_log_prob(
        _tensor(batch["anchor_sids"].reshape(users, k, levels), device), _tensor(mask, device),
        _tensor(batch["log_prob"], device), _tensor(batch["prefixes"].reshape(users, -1, levels), device),
        _tensor(batch["prefix_log_probs"], device), _tensor(lookup.catalog.sids_of(rows), device), lookup.keys,
    )  # fmt: skip
    vectors, history, rows = _gathered(lookup, lookup.items.rows(batch["history"].astype(np.int64)), rows)
    per_user = (anchors, mask, batch["log_prob"].astype(np.float32), history, rows)
    found = score_block(PairBlock(*(_tensor(values, device) for values in per_user)), vectors.to(device), levels)
    kept = (found.valid.cpu() & first_occurrence(torch.from_numpy(candidates))).numpy()
    row, _ = np.nonzero(kept)

    of_user = {name: batch[name][row] for name in ("user_id", "source", "model_version", "sid_version")}
    of_user |= {name: getattr(found, name).cpu().numpy()[row] for name in ("coherence", "consistency")}
    of_pair = {
        "similarity": found.similarity, "history_similarity": found.history_similarity, "prefix_log_prob": own,
        "anchor_rank": found.anchor_rank, "llm_confidence": found.llm_confidence,
    }  # fmt: skip
    pairs = {"item_index": candidates[kept], **{name: v.cpu().numpy()[kept] for name, v in of_pair.items()}}
    return table_of(load_contract("pair_scores"), of_user | pairs)


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def make_lookup(
    items: ContentTable, item_index: np.ndarray, sids: np.ndarray, device: torch.device, kind: torch.dtype
) -> Lookup:
    """Lookups over items and SIDs [n x L]; items without a usable vector do not contribute to anchor embeddings."""
    rows = items.rows(item_index)
    catalog = ItemCatalog(rows[rows >= 0], sids[rows >= 0], int(sids.max()) + 1)
    fits = catalog.trie.size * items.vectors.shape[1] * 4 <= _TABLE_BYTES
    anchors = catalog.anchor_embeddings(items.vectors) if fits else None
    on_device = None
    size = items.vectors.size * kind.itemsize
    if device.type == "cpu" or size < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[1]:
        with warnings.catch_warnings():
            # torch warns about read-only memory; nothing here writes to it.
            warnings.simplefilter("ignore", UserWarning)
            # float32 on a CPU stays the memory map itself
            on_device = torch.from_numpy(items.vectors).to(device, kind)
    return Lookup(items, on_device, catalog, anchors, PrefixKeys(catalog.trie, device))


def _anchor_vectors(lookup: Lookup, leaf: np.ndarray) -> np.ndarray:
    """g(a) float32 [n x d] of leaves [n]; 0 where the leaf is -1."""
    known = leaf >= 0
    out = np.zeros((len(leaf), lookup.items.vectors.shape[1]), dtype=np.float32)
    if lookup.anchors is not None:
        out[known] = lookup.anchors[leaf[known]]
    else:
        wanted, inverse = np.unique(leaf[known], return_inverse=True)
        out[known] = lookup.catalog.anchor_embeddings(lookup.items.vectors, wanted)[inverse]
    return out


def _gathered(
    lookup: Lookup, history: np.ndarray, candidates: np.ndarray
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(vectors [M x d], history, candidates): all vectors if they are on the device, otherwise those of this block."""
    if lookup.on_device is not None:
        return lookup.on_device, history, candidates
    used = np.unique(np.concatenate([[0], history[history >= 0], candidates[candidates >= 0]]))

    def renumbered(rows: np.ndarray) -> np.ndarray:
        return np.where(rows >= 0, np.searchsorted(used, rows), -1)

    return torch.from_numpy(np.asarray(lookup.items.vectors[used])), renumbered(history), renumbered(candidates)


def _note_rejects(
    batch: dict[str, np.ndarray], candidates: np.ndarray, rows: np.ndarray, mask: np.ndarray, rejects: Rejects
) -> None:
    for row in np.flatnonzero(~mask.any(axis=1)):
        key = f"user_id={batch['user_id'][row]}"
        rejects[key] = ("no usable anchor", "no item in the catalog carries any of the user's anchor SIDs")
    for item in np.unique(candidates[(candidates >= 0) & (rows < 0)]).tolist():
        rejects[f"item_index={item}"] = ("candidate without embedding", "no finite embedding up to the run date")


def _commit_rejects(context: StepContext, ranks: Ranks, rejects: Rejects) -> None:
    """One row per key over all ranks."""
    held = map(json.loads, ranks.gather_text(json.dumps(rejects)))
    merged: Rejects = {key: why for some in held for key, why in some.items()}
    rows = [reject(key, *merged[key]) for key in sorted(merged)] if ranks.is_main else []
    commit_rows(context, ranks, "worker_rejects", rows)
    context.counts.details["rejects"] = len(merged)


if __name__ == "__main__":
    worker_main("score_candidates", run)
