"""Inputs of the interest model's two workers: catalog, base checkpoint, content, users' latest sequences."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from gpl_core.config import Config
from gpl_core.errors import LineageError, MissingInputError
from gpl_core.graph.step_run import StepContext
from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.packing import UserHistory, unflatten
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.key_hashes import hash_keys
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import local_folder
from gpl_core.sids.item_catalog import ItemCatalog
from gpu_workers.inputs.feed import assign_files, read_batches
from gpu_workers.inputs.item_tables import sids_in_force

STALE, TRAIN, HELD_OUT = 0, 1, 2

_KEYS_AT_A_TIME = 8_000_000  # user hashes in memory while the latest rows are searched: 64 MB
_SHUFFLE_ROWS = 65_536  # users in memory to be shuffled before they are packed
_MOST_HELD_OUT = 20_000  # more would only make every epoch's evaluation longer


def read_catalog(context: StepContext, sid_version: str, codes: int) -> ItemCatalog:
    """Items and SIDs in force of ``sid_version``; MissingInputError when there are none."""
    items, sids = sids_in_force(context.snapshot("item_sids"), sid_version)
    return ItemCatalog(items, sids, codes)


def base_checkpoint(config: Config) -> Path:
    """The folder of the base model: `interest.base_model`, or a small random model.

    The folder of the small one is named by its settings; it is built elsewhere and renamed, so that ranks and runs may
    race.
    """
    if config.interest.base_model:
        folder = Path(config.interest.base_model)
        if not (folder / "config.json").is_file():
            raise MissingInputError(
                f"interest.base_model: {folder} is not a model folder on this machine (no config.json); give the local "
                "folder of a Qwen2, Qwen3 or Llama checkpoint, or leave it empty for a small random one"
            )
        return folder
    positions = max(1024, 4 * config.tokenizer.levels * config.sequences.max_length)
    settings = TinySettings(max_positions=positions, seed=config.run.seed)
    root = local_folder(config.lakehouse.root, "base")
    target = root / sha256(repr(settings).encode()).hexdigest()[:16]
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with scratch_folder(parent=root) as aside:
            make_tiny_checkpoint(aside, settings)
            with suppress(OSError):  # another rank was faster, with the same weights
                aside.rename(target)
    return target


@dataclass(frozen=True)
class Found:
    """Counts from the search for users' latest rows."""

    train: int = 0
    held_out: int = 0
    superseded: int = 0
    other_sid_version: int = 0
    events: int = 0  # events of the training users


class LatestSequences:
    """Every user's latest row of `user_sequences`, split into training and held-out users by a hash of the user.

    Memory: a byte per row. User keys are processed in as many passes as it takes to keep at most 64 MB of them.
    """

    def __init__(self, snapshot: Snapshot, files: Sequence[DataFile], sid_version: str, held_out_share: float):
        """``files``: the slices that may be read. LineageError when no row is of ``sid_version``."""
        self._snapshot = snapshot
        self._files = sorted(files, key=lambda f: (f.partition["dt"], f.path), reverse=True)
        self._use = {f.path: np.zeros(f.rows, dtype=np.uint8) for f in self._files}
        rows = rows_in(self._files)
        passes = max(1, -(-rows // _KEYS_AT_A_TIME))
        share = min(held_out_share, _MOST_HELD_OUT / max(rows, 1))
        counts = [self._mark(sid_version, share, part, passes) for part in range(passes)]
        self.found = Found(*np.sum([list(vars(c).values()) for c in counts], axis=0).tolist())
        if not self.found.train + self.found.held_out:
            others = sorted({v for f in self._files for b in self._read(f, ["sid_version"]) for v in b["sid_version"]})
            if others:
                raise LineageError(
                    f"table user_sequences@{snapshot.version}: sequences are of sid_version {', '.join(others)}, "
                    f"the tokenizer in force is {sid_version}; run sequences for this date"
                )
            raise MissingInputError(
                f"table user_sequences@{snapshot.version}: no sequence up to this date; run sequences for it, or check "
                "that raw_interactions or raw_impressions have positives of earlier dates"
            )

    def shares(self, ranks: int, *, seed: int, epoch: int) -> list[tuple[DataFile, ...]]:
        """Row-balanced files per rank, shuffled by (seed, epoch)."""
        return assign_files(self._files, ranks, seed=seed, epoch=epoch)

    def histories(
        self, files: Sequence[DataFile], use: int, keep: np.ndarray, levels: int, *, seed: int, epoch: int
    ) -> Iterator[UserHistory]:
        """The users of ``files`` marked ``use`` (TRAIN or HELD_OUT), shuffled within a bounded buffer.

        ``keep`` float [N]: p_keep by item_index; an event is a target when its keep_u is below. Held-out events are all
        targets: down-sampling shapes what is learned, not how it is judged.
        """
        held: list[UserHistory] = []
        turn = 0
        for file in files:
            first = 0
            for batch in self._read(file, ["sid", "item_index", "keep_u", "length"]):
                rows = len(batch["length"])
                wanted = np.flatnonzero(self._use[file.path][first : first + rows] == use)
                first += rows
                for row in wanted:
                    length = int(batch["length"][row])
                    items = batch["item_index"][row][:length]
                    chance = np.where(items < len(keep), keep[np.minimum(items, len(keep) - 1)], 1.0)
                    held.append(
                        UserHistory(
                            unflatten(batch["sid"][row], length, levels),
                            (batch["keep_u"][row][:length] < chance) if use == TRAIN else np.ones(length, dtype=bool),
                            items,
                        )
                    )
                if len(held) >= _SHUFFLE_ROWS:
                    yield from _shuffled(held, [seed, epoch, turn])
                    held, turn = [], turn + 1
        yield from _shuffled(held, [seed, epoch, turn])

    def _mark(self, sid_version: str, share: float, part: int, passes: int) -> Found:
        """Mark the latest rows of the users whose hash is in ``part``: newest slice first, the first row wins."""
        seen = np.empty(0, dtype=np.uint64)
        train = held_out = superseded = other = events = 0
        for file in self._files:
            first = 0
            for batch in self._read(file, ["user_id", "sid_version", "length"]):
                key = hash_keys(batch["user_id"])
                mine = np.flatnonzero(key % np.uint64(passes) == part)
                new = mine[~np.isin(key[mine], seen)]
                superseded += len(mine) - len(new)
                seen = np.union1d(seen, key[new])
                current = new[batch["sid_version"][new] == sid_version]
                other += len(new) - len(current)
                # The high bits as a number in [0, 1); the low ones select a pass.
                out = (key[current] >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
                self._use[file.path][first + current] = np.where(out, HELD_OUT, TRAIN)
                train, held_out = train + int((~out).sum()), held_out + int(out.sum())
                events += int(batch["length"][current[~out]].sum())
                first += len(key)
        return Found(train, held_out, superseded, other, events)

    def _read(self, file: DataFile, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        # One file at a time and unshuffled: rows are identified by their position in the file.
        return read_batches(self._snapshot, [file], columns)


def positives_of(context: StepContext, items: int) -> np.ndarray:
    """Positives per item_index in the window before the run date, float64 [items]."""
    snapshot = context.snapshot("item_stats")
    counts = np.zeros(items)
    files = snapshot.select(start=context.run_date, end=context.run_date)
    for batch in read_batches(snapshot, files, ["item_index", "positives"]):
        known = batch["item_index"] < items
        counts[batch["item_index"][known]] = batch["positives"][known]
    return counts


def _shuffled(held: list[UserHistory], seed: list[int]) -> Iterator[UserHistory]:
    for place in np.random.default_rng(seed).permutation(len(held)):
        yield held[place]
