"""Encode new and changed items with the frozen encoders: items -> item_embeddings, worker_rejects.

    deepspeed --num_accelerators 1 gpu_workers/encode_items.py --config quickstart --run-date 2026-01-02

Items whose newest content is already encoded under this encoder_version are skipped: their rows stay byte-identical.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, partial

import numpy as np

from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.contracts.raw_values import midnight
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.sids.encoders import EncoderPart, FusionEncoder, build_encoder
from gpl_core.sids.item_content import ItemContent
from gpu_workers.inputs.embeddings import NewestContent, digests, newest_content
from gpu_workers.inputs.feed import assign_files, read_batches, rebatch
from gpu_workers.outputs import commit_parts, commit_rows, reject, table_of
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main

_COLUMNS = ["item_index", "text", "image", "image_uri", "image_embedding", "content_hash", "updated_at"]
_MOST_TEXT = load_contract("items").column("text").max_length
_ITEMS = 2048  # encoded at a time: bounds memory, pictures included
_DONORS = 512  # of so many items those that lack nothing lend their parts to those that do


def encoder_parts(config: Config) -> list[EncoderPart]:
    """The configured parts in the library's form; the width of a precomputed column comes from ``ingest``."""
    length = config.ingest.image_embedding_length
    known: dict[str, dict[str, int | float | str]] = {"precomputed": {"dim": length}} if length else {}
    return [
        EncoderPart(p.name, p.weight, p.path or None, {**known.get(p.name, {}), **p.options})
        for p in config.encoder.parts
    ]


def run(context: StepContext, ranks: Ranks) -> None:
    """Encode this rank's share of the items that are new or changed, and commit once."""
    with ranks.together():
        settings, house = context.config.encoder, context.config.lakehouse
        encoder = build_encoder(
            encoder_parts(context.config), batch_size=settings.batch_size, device=str(ranks.device),
            prefixes=[p for p in (house.root, house.shadow.of, *settings.image_prefixes) if p],
        )  # fmt: skip
        contract = context.contract("item_embeddings")
        known = _known(context, encoder.version)
        writer = context.lake.writer(
            contract, {"encoder_version": encoder.version}, dims={"d": encoder.dim}, rank=ranks.rank
        )
        items = context.snapshot("items")
        donors = cache(partial(_donors, context, encoder, items))
        read = encoded = 0
        rejects: list[dict[str, str]] = []
        missing: Counter[str] = Counter()
        with writer:
            for batch in _pending(items, ranks, known):
                read += batch.pop("seen")
                if not len(batch["item_index"]):
                    continue
                result = encoder.encode(_contents(batch), donors)
                kept = np.array([n not in result.rejected for n in range(len(batch["item_index"]))])
                rows = {name: batch[name][kept] for name in ("item_index", "content_hash", "updated_at")}
                writer.write(table_of(contract, {**rows, "embedding": result.vectors[kept]}))
                encoded += int(kept.sum())
                for position, reason in result.rejected.items():
                    item = int(batch["item_index"][position])
                    found = str(batch["content_hash"][position])
                    rejects.append(reject(f"item_index={item}", reason, f"content_hash={found}"))
                missing.update(result.missing)
                if ranks.is_main:
                    log.info("encode_items: rank 0 read %d items, encoded %d, left out %d", read, encoded, len(rejects))
    in_vain = donors.cache_info().currsize > 0 and not len(donors())
    if ranks.sum(int(in_vain)) and ranks.is_main:  # any rank may be the one that has an incomplete item
        context.warn("no complete item among the first from before this date: missing parts stay 0")
    commit_rows(context, ranks, "worker_rejects", rejects)
    totals = {"encoded": int(ranks.sum(encoded)), "rejected": int(ranks.sum(len(rejects)))}
    parts = {f"without_{p.name}": int(ranks.sum(missing[p.name])) for p in context.config.encoder.parts}
    context.counts.rows_in = int(ranks.sum(read))
    context.counts.rows_dropped = context.counts.rows_in - totals["encoded"]
    context.counts.details |= {"encoder_version": encoder.version, "dim": encoder.dim, **totals, **parts}
    details = {"encoder_version": encoder.version, "dim": encoder.dim}
    commit_parts(context, ranks, "item_embeddings", writer.parts, mode="append", details=details)


def _donors(context: StepContext, encoder: FusionEncoder, items: Snapshot) -> np.ndarray:
    """Vectors [<= _DONORS x d] of the complete ones of the first items from before the run date; equal on all ranks."""
    batches = read_batches(items, items.files, _COLUMNS)
    early = ({c: v[b["updated_at"] < midnight(context.run_date)] for c, v in b.items()} for b in batches)
    first = next(rebatch(early, _DONORS), None)
    found = encoder.encode(_contents(first)) if first is not None else None
    return np.zeros((0, encoder.dim), dtype=np.float32) if found is None else found.vectors[found.complete]


def _known(context: StepContext, encoder_version: str) -> NewestContent:
    snapshot = context.output("item_embeddings")
    if snapshot is None:
        return NewestContent()
    return newest_content(snapshot, snapshot.select(where={"encoder_version": encoder_version}))


def _pending(items: Snapshot, ranks: Ranks, known: NewestContent) -> Iterator[dict]:
    """This rank's items that have to be encoded, at most _ITEMS at a time, with the rows ``seen`` since the last
    batch: of whole files where these can be shared out evenly enough, else every size-th item of all files."""
    shares = assign_files(items.files, ranks.size)
    by_file = ranks.size > 1 and max(map(rows_in, shares)) <= 1.25 * rows_in(items.files) / ranks.size
    for group in read_batches(items, shares[ranks.rank] if by_file else items.files, _COLUMNS, queue_size=2):
        index = group["item_index"].astype(np.int64)
        mine = np.full(len(index), by_file) | (index % ranks.size == ranks.rank)
        wanted = np.flatnonzero(mine & ~known.holds(index, digests(group["content_hash"])))
        yield {"seen": int(mine.sum()), "item_index": index[:0]}
        for start in range(0, len(wanted), _ITEMS):
            chosen = wanted[start : start + _ITEMS]
            yield {"seen": 0} | {name: values[chosen] for name, values in group.items()}


def _contents(batch: Mapping[str, np.ndarray]) -> list[ItemContent]:
    columns = (batch[name] for name in ("item_index", "text", "image", "image_uri", "image_embedding"))
    return [
        ItemContent(int(index), text[:_MOST_TEXT], image or None, uri or None, vector)
        for index, text, image, uri, vector in zip(*columns, strict=True)
    ]


if __name__ == "__main__":
    worker_main("encode_items", run)
