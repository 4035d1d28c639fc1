"""Assign SIDs to items that have none, with the tokenizer in force: item_embeddings -> item_sids, worker_rejects.

    deepspeed --num_accelerators 1 gpu_workers/assign_sids.py --config quickstart --run-date 2026-01-02

Published rows never change except to be retired: a changed item keeps its SID unless its embedding moved further than
0.3 in cosine distance; then the row is retired and the item gets a new one (issue + 1).

Embeddings and residuals are in memory-mapped scratch files. Rank 0 holds a few integers per item, the other ranks only
what they are encoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from gpl_core.errors import ContractError, LineageError, counted
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.scratch import scratch_array, scratch_folder
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.writer import PartWriter
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.issuing import RowView, drift, issue
from gpl_core.sids.tokenizer import TokenizedItems, Tokenizer, load_tokenizer
from gpu_workers.inputs.embeddings import ItemVectors, digests, encoder_version_of, item_vectors
from gpu_workers.inputs.feed import read_batches
from gpu_workers.outputs import commit_parts, commit_rows, reject, table_of
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main

_ROWS = 65_536
_REISSUE_DISTANCE = 0.3  # cosine distance beyond which a changed item gets a new SID
_DRIFT_WARN = 1.25  # residual of new over published items: a warning from here on,
_DRIFT_RENEW = 1.6  # and from here on the request for a new tokenizer version
_COLUMNS = ["item_index", "issue", "sid", "residual_norm", "bucket_size", "content_hash", "retired_at"]


@dataclass(frozen=True)
class _Published:
    """Rows of one sid_version in force, by ascending item_index, and the last issue of every item that ever had one."""

    item_index: np.ndarray
    sids: np.ndarray
    norms: np.ndarray
    content: np.ndarray
    last_issue: dict[int, int]


def run(context: StepContext, ranks: Ranks) -> None:
    """Encode what is new on all ranks; rank 0 repairs collisions and writes."""
    with ranks.together():
        manifest = context.artifact("tokenizer")
        snapshot = context.snapshot("item_embeddings")
        encoder_version = encoder_version_of(snapshot)
        if manifest.lineage["encoder_version"] != encoder_version:
            raise LineageError(
                f"tokenizer {manifest.version} was trained on encoder_version {manifest.lineage['encoder_version']}, "
                f"item_embeddings@{snapshot.version} is of {encoder_version}; run train_tokenizer for this encoder"
            )
        tokenizer = load_tokenizer(context.artifacts.fetch(manifest)).to(ranks.device)
        contract = context.contract("item_sids")
        table = context.output("item_sids")
    partition = {"sid_version": manifest.version}
    with item_vectors(snapshot, encoder_version, ranks) as items, scratch_folder() as scratch:
        with ranks.together():
            published = _published(table, partition, tokenizer.levels)
            usable = ContentTable.of(items.item_index, items.vectors).rows(items.item_index) >= 0
            fresh, moved = _to_issue(items, published, snapshot, encoder_version)
            rows = np.union1d(fresh, moved)
            rows = rows[usable[rows]]
        encoded = encode_rows(tokenizer, items.vectors, rows, ranks, scratch)
        writer = context.lake.writer(contract, partition, dims={"L": tokenizer.levels})
        retired = np.intersect1d(items.item_index[moved], items.item_index[rows])
        with ranks.together():
            if ranks.is_main:
                _issue_and_write(context, tokenizer, items, published, rows, encoded, writer, table, partition, retired)
        rejected = items.item_index[~usable] if ranks.is_main else ()
        rejects = [reject(f"item_index={int(i)}", "the embedding is zero or not finite") for i in rejected]
    commit_rows(context, ranks, "worker_rejects", rejects)
    # Retiring rewrites the rows of this version; otherwise rows are only appended.
    commit_parts(
        context, ranks, "item_sids", writer.parts, mode="overwrite" if len(retired) else "append",
        partition=partition, details={"encoder_version": encoder_version, **context.counts.details, **partition},
    )  # fmt: skip


def _published(table: Snapshot | None, partition: dict[str, str], levels: int) -> _Published:
    parts = [(np.empty(0, np.int64), np.empty((0, levels), np.int32), np.empty(0, np.float32), np.empty(0, np.uint64))]
    last_issue: dict[int, int] = {}
    for batch in _rows_of(table, partition, [c for c in _COLUMNS if c != "bucket_size"]):
        again = batch["issue"] > 0  # few items were reissued: all others have issue 0
        for item, number in zip(batch["item_index"][again], batch["issue"][again], strict=True):
            last_issue[int(item)] = max(last_issue.get(int(item), 0), int(number))
        force = batch["retired_at"] == 0
        index, sids, norms, content = (
            batch[name][force] for name in ("item_index", "sid", "residual_norm", "content_hash")
        )
        parts.append((index.astype(np.int64), sids.astype(np.int32), norms, digests(content)))
    whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(whole[0], kind="stable")
    index, sids, norms, content = (column[order] for column in whole)
    if len(twice := np.flatnonzero(np.diff(index) == 0)):
        raise ContractError(
            f"table item_sids, {partition}: {counted(len(twice), 'item')} with two semantic IDs in force, for example "
            f"item_index={index[twice[0]]}; overlapping runs of an earlier release left them, run gpl repair"
        )
    return _Published(index, sids, norms, content, last_issue)


def _rows_of(
    table: Snapshot | None, partition: dict[str, str], columns: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    return read_batches(table, table.select(where=partition), columns) if table else iter(())


def _to_issue(
    items: ItemVectors, published: _Published, snapshot: Snapshot, encoder_version: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``items`` without a SID, and rows whose content changed and moved beyond _REISSUE_DISTANCE."""
    has = np.isin(items.item_index, published.item_index)
    held = np.flatnonzero(has)
    old = published.content[np.searchsorted(published.item_index, items.item_index[held])]
    differs = old != items.content[held]
    changed, old = held[differs], old[differs]
    moved = [held[:0]]
    if len(changed):
        wanted = items.item_index[changed]
        files = snapshot.select(where={"encoder_version": encoder_version})
        for batch in read_batches(snapshot, files, ["item_index", "content_hash", "embedding"]):
            at = np.minimum(np.searchsorted(wanted, batch["item_index"]), len(wanted) - 1)
            hit = np.flatnonzero((wanted[at] == batch["item_index"]) & (old[at] == digests(batch["content_hash"])))
            before, after = batch["embedding"][hit], items.vectors[changed[at[hit]]]
            cosine = (before * after).sum(1) / (np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1))
            moved.append(changed[at[hit[1.0 - cosine > _REISSUE_DISTANCE]]])
    return np.flatnonzero(~has), np.unique(np.concatenate(moved))


def encode_rows(
    tokenizer: Tokenizer, vectors: np.ndarray, rows: np.ndarray, ranks: Ranks, scratch: Path
) -> TokenizedItems:
    """All ranks encode, a chunk each at a time; rank 0 holds the results [N], the others none."""
    held, widths = len(rows) if ranks.is_main else 0, (tokenizer.levels, tokenizer.codebooks.shape[2])
    residual = scratch_array(scratch / "residual.npy", np.float32, (held, widths[1]))
    out = TokenizedItems(np.zeros((held, widths[0]), np.int32), np.zeros(held, np.float32), residual)
    step = _ROWS // 4
    for start in range(0, len(rows), step * ranks.size):
        some = rows[start : start + step * ranks.size]
        mine = slice(ranks.rank * step, (ranks.rank + 1) * step)
        parts = [np.zeros((len(some), *whole.shape[1:]), whole.dtype) for whole in out]
        with ranks.together():
            if len(some[mine]):
                for part, encoded in zip(parts, tokenizer.encode(np.asarray(vectors[some[mine]])), strict=True):
                    part[mine] = encoded
        for whole, part in zip(out, map(ranks.summed, parts), strict=True):
            whole[start : start + len(some)] = part[: len(whole)]  # nothing on the other ranks
    return out


def _issue_and_write(
    context: StepContext,
    tokenizer: Tokenizer,
    items: ItemVectors,
    published: _Published,
    rows: np.ndarray,
    encoded: TokenizedItems,
    writer: PartWriter,
    table: Snapshot | None,
    partition: dict[str, str],
    retired: np.ndarray,
) -> None:
    force = ~np.isin(published.item_index, retired)
    place = np.searchsorted(items.item_index, published.item_index[force])
    place = np.minimum(place, len(items.item_index) - 1)  # an item that lost its embedding has no twins
    issued = issue(
        encoded,
        RowView(items.vectors, rows),
        tokenizer.codebooks[-1].cpu().numpy(),
        published.sids[force],
        RowView(items.vectors, place),
    )
    index = items.item_index[rows]
    again = set(retired.tolist())
    number = [published.last_issue.get(int(i), 0) + 1 if int(i) in again else 0 for i in index]
    with writer:
        if len(retired):
            now = int(datetime.now(UTC).timestamp() * 1_000_000)
            for batch in _rows_of(table, partition, _COLUMNS):
                gone = np.isin(batch["item_index"], retired) & (batch["retired_at"] == 0)
                kept = {**batch, "retired_at": np.where(gone, now, batch["retired_at"])}
                writer.write(table_of(writer.contract, kept))
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            columns = {
                "item_index": index[part],
                "issue": np.array(number[part]),
                "sid": issued.sids[part],
                "residual_norm": encoded.residual_norm[part],
                "bucket_size": issued.bucket_size[part],
                "content_hash": items.content_hash[rows[part]],
                "retired_at": np.zeros(len(index[part]), dtype=np.int64),
            }
            writer.write(table_of(writer.contract, columns))
    shift = drift(issued.sids, encoded.residual_norm, published.sids, published.norms, tokenizer.codes)
    message = shift.message(_DRIFT_WARN, _DRIFT_RENEW) if shift else ""
    context.counts.rows_in = len(items.item_index)
    context.counts.details = {
        **partition, "issued": len(rows), "reissued": len(retired), "kept": int(force.sum()), "moved": issued.moved,
        "shared": issued.shared, "repeats": issued.repeats, "warning": message,
        "drift": {"residual": shift.residual_ratio, "perplexity": shift.perplexity_ratio} if shift else {},
    }  # fmt: skip
    log.info("assign_sids: %s", context.counts.details)
    if message:
        context.warn(message)


if __name__ == "__main__":
    worker_main("assign_sids", run)
