"""Generate interest anchors for the users that the cache lacks: anchor_requests of a date -> interest_anchors.

deepspeed --num_gpus 8 gpu_workers/generate_anchors.py --config shop.yaml --run-date 2026-01-02

The requests are split into units of work. A journal among the run's scratch files records the part files of finished
units; a killed run that is started again keeps them and computes the rest. All parts become visible in one commit.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from gpl_core.checkpoint import read_checkpoint, write_checkpoint
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.grouping import grouped
from gpl_core.interest.content import leaf_content
from gpl_core.interest.model_files import load_bundle, read_description
from gpl_core.interest.packing import unflatten
from gpl_core.interest.search import Anchors, BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.interest.vocabulary import SidVocabulary
from gpl_core.labels.prefix_scoring import PrefixKeys, rounded
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.key_hashes import hash_keys, members
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem, local_folder
from gpl_core.lakehouse.writer import PartWriter
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.feed import assign_files, read_batches, rebatch, require_versions
from gpu_workers.inputs.interest import base_checkpoint, read_catalog
from gpu_workers.inputs.item_tables import content_table
from gpu_workers.outputs import alone_in, commit_parts, commit_rows, reject, table_of
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main

STEP = "generate_anchors"
UNIT_ROWS = 65_536  # requests per unit of work: the most that a kill loses, and the rows of a part file
_KEYS_AT_A_TIME = 8_000_000  # hashes in memory while the cache is looked through: 64 MB
_SEARCH_ROWS = 4_096  # requests searched at a time: enough to fill batches of similar length
_COLUMNS = ("user_id", "sid", "item_index", "length", "sequence_hash", "sid_version", "model_version")


class Journal:
    """Finished units of work on disk, a checkpoint each, with the hashes of their part files."""

    def __init__(self, folder: Path, table_uri: str) -> None:
        self._folder = folder
        self._fs, self._base = filesystem(table_uri)

    def find(self, unit: str) -> dict[str, Any] | None:
        """What `add` recorded for ``unit``; None without a record, or when it or a part file is damaged or gone."""
        state = read_checkpoint(self._file(unit))
        if state is None or state["unit"] != unit:
            return None
        done: dict[str, Any] = state["done"]
        for part, digest in zip(done["parts"], state["digests"], strict=True):
            if self._digest(part) != digest:
                log.warning("%s/%s is damaged or gone: its unit is computed again", self._base, part["path"])
                return None
        return done

    def add(self, unit: str, done: Mapping[str, Any]) -> None:
        """Record a finished unit."""
        digests = [self._digest(part) for part in done["parts"]]
        write_checkpoint(self._file(unit), {"unit": unit, "done": done, "digests": digests})

    def remove(self) -> None:
        """Delete all records; the ranks of a machine share the folder, any of them may be first."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, unit: str) -> Path:
        return self._folder / f"{hash_keys([unit])[0]:016x}.safetensors"

    def _digest(self, part: Mapping[str, Any]) -> str:
        """sha256 of a part file; "" when it is gone."""
        try:
            with self._fs.open(f"{self._base}/{part['path']}", "rb") as handle:
                return file_digest(handle, "sha256").hexdigest()
        except FileNotFoundError:
            return ""


def run(context: StepContext, ranks: Ranks) -> None:
    """Set up the search, work through the units, commit once."""
    scratch = local_folder(context.lake.root, STEP, context.state.fingerprint[:16])
    with alone_in(scratch, ranks):
        _generate(context, ranks, Journal(scratch, context.lake.uri("interest_anchors")))


def _generate(context: StepContext, ranks: Ranks, journal: Journal) -> None:
    tokenizer, model = context.artifact("tokenizer"), context.artifact("interest_model")
    with ranks.together():
        bundle = context.artifacts.fetch(model)
        wanted = read_description(bundle)["settings"].content_width > 0
    with content_table(context, ranks) if wanted else nullcontext() as content, ranks.together():
        search = _search(context, ranks, bundle, tokenizer.version, content)
        keys = PrefixKeys(search.trie.trie, ranks.device)
        snapshot = context.snapshot("anchor_requests")
        files = snapshot.select(start=context.run_date, end=context.run_date)
        share = assign_files(files, ranks.size)[ranks.rank]
        partition = {"model_version": model.version, "dt": context.run_date.isoformat()}
        versions = {"sid_version": tokenizer.version, "model_version": model.version}
        counts = dict.fromkeys(("requests", "cached", "rejected", "generated", "resumed"), 0)
        parts: list[Mapping[str, Any]] = []
        rejects: list[dict[str, str]] = []
        shown = {"desc": f"anchors, rank {ranks.rank}", "position": ranks.rank, "mininterval": 1.0, "disable": None}
        with tqdm(total=rows_in(share), unit="user", **shown) as bar:
            for unit, rows, todo in units(context, snapshot, share, model.version):
                done = journal.find(unit)
                if done is None:
                    writer = context.lake.writer(
                        context.contract("interest_anchors"), partition,
                        dims={**context.config.dims(), "L": search.trie.levels}, rank=ranks.rank,
                    )  # fmt: skip
                    require_versions(rows, "anchor_requests", **versions)
                    bar.update(len(rows["user_id"]) - len(todo))
                    done = _work(search, keys, rows, todo, writer, bar)
                    journal.add(unit, done)
                else:  # computed by an earlier, killed run
                    counts["resumed"] += done["generated"]
                    bar.update(done["requests"])
                parts += done["parts"]
                rejects += done["rejects"]
                for name in ("requests", "cached", "rejected", "generated"):
                    counts[name] += done[name]
    totals = {name: int(ranks.sum(value)) for name, value in counts.items()}
    context.counts.rows_in = totals["requests"]
    context.counts.rows_dropped = totals["cached"] + totals["rejected"]
    context.counts.details.update(totals)
    commit_rows(context, ranks, "worker_rejects", rejects)
    commit_parts(context, ranks, "interest_anchors", parts, mode="append", partition=partition, details=totals)
    journal.remove()  # its parts are in the table now: a forced run must not add them twice
    if ranks.is_main:
        log.info("interest_anchors: %s", ", ".join(f"{value} {name}" for name, value in totals.items()))


def _search(
    context: StepContext, ranks: Ranks, bundle: Path, sid_version: str, content: ContentTable | None
) -> BeamSearch:
    """The beam search with the published model, its adapter merged, over the SIDs in force."""
    facts, settings = read_description(bundle), context.config.anchors
    model = load_bundle(bundle, base_checkpoint(context.config), sid_version=sid_version)
    model.merge()
    model = model.to(ranks.device, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
    catalog = read_catalog(context, sid_version, facts["settings"].codes)
    trie = DeviceTrie(catalog.trie, ranks.device, leaf_content(catalog, content))
    limits = SearchSettings(settings.count, int(facts["max_events"]), settings.tokens_per_batch, settings.prefixes)
    return BeamSearch(model, trie, limits, content)


def units(
    context: StepContext, requests: Snapshot, files: Sequence[DataFile], model_version: str
) -> Iterator[tuple[str, dict[str, np.ndarray], np.ndarray]]:
    """The requests of ``files`` in units of UNIT_ROWS: name, rows, and which of them the cache does not hold.

    A unit's name identifies its rows and what the cache lacks of them, whichever rank reads them: what a killed run
    has left is not taken for a unit of which another run has cached a part since. The cache is scanned once per
    _KEYS_AT_A_TIME requests, so that memory grows with neither.
    """
    for group in grouped(files, lambda f: f.rows, _KEYS_AT_A_TIME):
        cached = cached_keys(context, requests, group, model_version)
        for file in group:
            batches = read_batches(requests, [file], _COLUMNS)
            for number, rows in enumerate(rebatch(batches, UNIT_ROWS)):
                todo = np.flatnonzero(~members(_hashes(rows), cached))
                yield f"{file.path}#{number}x{UNIT_ROWS}:{sha256(todo.tobytes()).hexdigest()}", rows, todo


def cached_keys(context: StepContext, requests: Snapshot, files: Sequence[DataFile], model_version: str) -> np.ndarray:
    """Ascending hashes (uint64) of the (user_id, sequence_hash) in ``files`` that the cache of ``model_version`` holds.

    Rows with another number of anchors or prefixes do not count: readers of the cache ignore them. The requests are
    what the cache lacked when they were written; this finds what has been added since.
    """
    nothing = np.empty(0, dtype=np.uint64)
    cache = context.snapshot("interest_anchors") if context.has("interest_anchors") else None
    held = _added_since(context, requests, cache, model_version) if cache else ()
    if cache is None or not held:
        return nothing
    key = ["user_id", "sequence_hash"]
    wanted = np.unique(np.concatenate([nothing, *(_hashes(rows) for rows in read_batches(requests, files, key))]))
    found = np.zeros(len(wanted), dtype=bool)
    sizes = (context.config.anchors.count, context.config.anchors.prefixes)
    for rows in read_batches(cache, held, [*key, "log_prob", "prefix_log_probs"]):
        if (rows["log_prob"].shape[1], rows["prefix_log_probs"].shape[1]) == sizes:
            hashes = _hashes(rows)
            found[np.searchsorted(wanted, hashes[members(hashes, wanted)])] = True
    return wanted[found]


def _added_since(context: StepContext, requests: Snapshot, cache: Snapshot, model_version: str) -> tuple[DataFile, ...]:
    """The files of ``cache`` that the requests were not compared with; all when their commit does not say."""
    held = cache.select(where={"model_version": model_version})
    mark = requests.mark(context.run_date.isoformat())
    known = mark[1].details.get("cache_version", -1) if mark else -1
    if not 0 <= known <= cache.version:
        return held
    compared = {f.path for f in context.lake.open("interest_anchors", known).files}
    return tuple(f for f in held if f.path not in compared)


def _hashes(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    return hash_keys(rows["user_id"], rows["sequence_hash"])


def _work(
    search: BeamSearch, keys: PrefixKeys, rows: dict[str, np.ndarray], todo: np.ndarray, writer: PartWriter, bar: tqdm
) -> dict[str, Any]:
    """Search the users ``todo`` of one unit and write their rows; returns the journal's record."""
    vocabulary, levels = search.model.vocabulary, search.model.vocabulary.levels
    usable: dict[int, np.ndarray] = {}  # row -> history
    rejects = []
    whole = sound(vocabulary, rows["sid"], rows["length"])
    for row in todo.tolist():
        sid, length = rows["sid"][row], int(rows["length"][row])
        try:
            usable[row] = sid.reshape(-1, levels)[:length] if whole[row] else history_of(vocabulary, sid, length)
        except ContractError as error:
            rejects.append(reject(f"user_id={rows['user_id'][row]}", "unusable sequence", str(error)[:500]))
    users, histories = list(usable), list(usable.values())
    items = [rows["item_index"][row][: len(history)] for row, history in usable.items()]
    with writer:
        for start in range(0, len(users), _SEARCH_ROWS):
            part = slice(start, start + _SEARCH_ROWS)
            some = {name: rows[name][users[part]] for name in ("user_id", "sequence_hash", "sid_version")}
            writer.write(anchor_rows(some, search.search(histories[part], items[part]), keys))
            bar.update(len(users[part]))
    bar.update(len(rejects))
    cached = len(rows["user_id"]) - len(todo)
    counts = {"requests": len(rows["user_id"]), "cached": cached, "rejected": len(rejects), "generated": len(users)}
    return {"parts": writer.parts, "rejects": rejects, **counts}


def sound(vocabulary: SidVocabulary, sid: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which rows of ``sid`` (int [n x H * L]) `history_of` takes, bool [n], all at once."""
    levels = vocabulary.levels
    if sid.ndim != 2 or sid.shape[1] % levels:
        return np.zeros(len(sid), dtype=bool)
    known = np.arange(sid.shape[1]) < length[:, None] * levels
    fits = np.where(known, (sid >= 0) & (sid < vocabulary.codes), sid == -1).all(axis=1)
    return fits & (length > 0) & (length * levels <= sid.shape[1])


def history_of(vocabulary: SidVocabulary, sid: np.ndarray, length: int) -> np.ndarray:
    """The SIDs of a request, int [n x L]; ContractError when it has none, or they are not of ``vocabulary``."""
    history = unflatten(sid, length, vocabulary.levels)
    if not len(history):
        raise ContractError("sid: no event")
    vocabulary.ids(history)
    return history


def anchor_rows(users: Mapping[str, np.ndarray], anchors: Anchors, keys: PrefixKeys) -> pa.Table:
    """Rows of interest_anchors, without its partition columns.

    The prefixes' log-probabilities are rounded: digits that no label needs are random and cannot be compressed.
    """
    columns = {
        **users, "anchor_sids": anchors.sids.reshape(len(anchors.sids), -1), "log_prob": anchors.log_prob,
        "prefixes": anchors.prefixes.reshape(len(anchors.sids), -1), "prefix_log_probs": rounded(*anchors, keys),
        "anchor_count": (anchors.sids[:, :, 0] >= 0).sum(axis=1),
    }  # fmt: skip
    return table_of(load_contract("interest_anchors"), columns)


if __name__ == "__main__":
    worker_main(STEP, run)
