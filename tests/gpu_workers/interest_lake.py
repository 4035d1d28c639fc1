"""A lakehouse as the steps before the interest model leave it, written through the same writers.

By default a small one: items in 12 topics, each with a SID of its own; a user stays in one topic, and goes through it
in a fixed order: there is something to learn, and popularity does not give it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from gpl_core.config import Config, load_config
from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.artifacts import ArtifactStore
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.sids.rqvae import RqVaeSettings
from gpl_core.sids.tokenizer import Tokenizer
from tests.bench.quality.rq_kmeans import fit_rq_kmeans

DAY = date(2026, 1, 2)
LENGTH, LEVELS, CODES = 6, 3, 16
TOPICS, PER_TOPIC = 12, 8
SETTINGS = (
    "run.start_date=2026-01-02", "run.end_date=2026-01-02", "run.history_start=null",
    f"sequences.max_length={LENGTH}", f"tokenizer.codes={CODES}", "anchors.count=5",
    "interest.lora_rank=8", "interest.epochs=3", "interest.tokens_per_batch=512", "interest.valid_share=0.2",
)  # fmt: skip


@dataclass(frozen=True)
class User:
    """One row of user_sequences."""

    user_id: str
    items: Sequence[int]
    sid_version: str = ""
    """Empty: the tokenizer's."""


@dataclass(frozen=True)
class Catalog:
    """Items 0 .. N - 1 as encoder and tokenizer left them."""

    vectors: np.ndarray  # float32 [N x d]
    tokenizer: Tokenizer
    sids: np.ndarray  # int [N x L]


def topic_catalog() -> Catalog:
    """The small catalog of topics."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(TOPICS, 24))
    items = np.repeat(centers, PER_TOPIC, axis=0) + 0.4 * rng.normal(size=(TOPICS * PER_TOPIC, 24))
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    tokenizer = fit_rq_kmeans(items, RqVaeSettings(levels=LEVELS, codes=CODES))
    return Catalog(items, tokenizer, tokenizer.encode(items)[0])


class InterestLake:
    """The lakehouse at ``root``: tokenizer, item_sids and item_stats are there; sequences are added by the test."""

    def __init__(
        self,
        root: Path,
        catalog: Catalog | None = None,
        *,
        config: str = "quickstart",
        settings: Sequence[str] = SETTINGS,
        length: int = LENGTH,
    ) -> None:
        """``config``: the shipped configuration below ``settings``; ``length``: H."""
        catalog = catalog or topic_catalog()
        self.vectors, self.sids = catalog.vectors, catalog.sids
        self.root, self._config, self._settings, self._length = root, config, settings, length
        self.lake = Lake(str(root))
        catalog.tokenizer.save(root / "made")
        self.tokenizer = ArtifactStore(str(root)).publish(
            "tokenizer", root / "made", trained_through=date(2025, 12, 31), fingerprint="f" * 24, config_hash="c",
            lineage={"encoder_version": "encoder-1"},
        )  # fmt: skip
        self.write(
            "item_sids",
            {"sid_version": self.version},
            [
                {
                    "item_index": i, "issue": 0, "sid": sid.tolist(), "residual_norm": 0.1, "bucket_size": 1,
                    "content_hash": "h", "retired_at": 0,
                }
                for i, sid in enumerate(self.sids)
            ],
        )  # fmt: skip

        self.write(
            "item_embeddings",
            {"encoder_version": "encoder-1"},
            [
                {"item_index": i, "content_hash": "h", "embedding": e.tolist(), "updated_at": 0}
                for i, e in enumerate(self.vectors)
            ],
        )

    @property
    def version(self) -> str:
        """The tokenizer's version, which is the sid_version."""
        return self.tokenizer.version

    def config(self, *overrides: str) -> Config:
        """The configuration, on this lakehouse."""
        return load_config(self._config, self.arguments(*overrides)[3::2])

    def arguments(self, *overrides: str) -> list[str]:
        """The same as command-line arguments of an entry point (without dates)."""
        out = ["--config", self._config]
        for text in (f"lakehouse.root={self.root}", *self._settings, *overrides):
            out += ["--set", text]
        return out

    def write(self, table: str, partition: dict[str, str], rows: list[dict], **details: int) -> None:
        """Replace one partition of ``table`` by ``rows``, marked as its step would."""
        contract = load_contract(table)
        self.lake.create(contract)
        with self.lake.writer(contract, partition, dims={"H": self._length, "L": self.sids.shape[1], "K": 5}) as writer:
            if rows:
                writer.write(pa.Table.from_pylist(rows, schema=contract.arrow_schema(partitions=False)))
        name = partition.get("dt", "*")
        self.lake.commit(
            contract, writer.parts, mark=SliceMark(contract.owner, {name: f"{len(rows)}"}, "test", details),
            mode="overwrite", partition=partition,
        )  # fmt: skip

    def users(self, count: int, seed: int = 1) -> list[User]:
        """Users with 2 to LENGTH events, each walking through one topic in its fixed order."""
        rng = np.random.default_rng(seed)
        out = []
        for number in range(count):
            topic, start = rng.integers(TOPICS), rng.integers(PER_TOPIC)
            steps = (start + np.arange(rng.integers(2, LENGTH + 1))) % PER_TOPIC
            out.append(User(f"u{number}", (topic * PER_TOPIC + steps).tolist()))
        return out

    def write_users(self, users: Sequence[User], day: date = DAY) -> None:
        """The slices ``day`` of user_sequences and item_stats, of the same users."""
        self.write_sequences(users, day)
        self.write_stats(users, day)

    def write_sequences(self, users: Sequence[User], day: date = DAY) -> None:
        """The slice ``day`` of user_sequences."""
        self.write("user_sequences", {"dt": day.isoformat()}, [self._sequence(u, day) for u in users])

    def write_stats(self, users: Sequence[User], day: date = DAY) -> None:
        """The slice ``day`` of item_stats, counted from ``users``."""
        counts = np.bincount(np.concatenate([u.items for u in users]), minlength=len(self.sids))
        rows = [
            {"item_index": i, "impressions": 0, "clicks": 0, "positives": int(n), "popularity_share": n / counts.sum()}
            for i, n in enumerate(counts)
            if n
        ]
        self.write("item_stats", {"dt": day.isoformat()}, rows)

    def write_requests(self, users: Sequence[User], model_version: str, day: date = DAY, **details: int) -> None:
        """The slice ``day`` of anchor_requests; ``details``: cache_version, as anchor_requests notes it."""
        rows = []
        for user in users:
            row = self._sequence(user, day)
            rows.append({k: row[k] for k in ("user_id", "sid", "item_index", "length", "sequence_hash", "sid_version")})
            rows[-1]["model_version"] = model_version
        self.write("anchor_requests", {"dt": day.isoformat()}, rows, **details)

    def _sequence(self, user: User, day: date) -> dict:
        length, pad = len(user.items), self._length - len(user.items)
        return {
            "user_id": user.user_id,
            "sid": self.sids[list(user.items)].ravel().tolist() + [-1] * (pad * self.sids.shape[1]),
            "item_index": [*user.items, *[-1] * pad],
            "keep_u": [(7 * i % 10) / 10 for i in range(length)] + [-1.0] * pad,
            "length": length,
            "last_event_time": 0,
            "sequence_hash": "-".join(map(str, user.items)),
            "sid_version": user.sid_version or self.version,
            "day": (day - date(1970, 1, 1)).days,
        }
