"""A small lakehouse as the steps before scoring and pre-ranking leave it, written through the same writers.

8 items at the corners of a cube-like space, one SID each, but items 6 and 7 share one.
Item 8 has no embedding, item 9's embedding is of the day after.
"""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import gpu_workers
from gpl_core.config import load_config
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import MissingInputError
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.step_run import StepContext
from gpl_core.graph.steps import find_step, start_of
from gpl_core.lakehouse.artifacts import ArtifactStore
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpu_workers.ranks import Ranks
from gpu_workers.worker import WorkerBody

DAY = date(2026, 1, 2)
H, L, K, P, B, WIDTH = 4, 3, 2, 2, 5, 6
DIMS = {"H": H, "L": L, "K": K, "P": P, "B": B, "d": WIDTH}
SETTINGS = (
    "run.start_date=2026-01-02", "run.end_date=2026-01-02", "run.history_start=null", f"sequences.max_length={H}",
    f"anchors.count={K}", f"anchors.prefixes={P}",
    f"labels.block_size={B}", "prerank.steps=30", "prerank.batch_size=64", "prerank.dimension=8",
    "prerank.buckets=97", "prerank.train_days=2",
)  # fmt: skip
SIDS = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 0, 0], [2, 0, 0], [2, 1, 0]])


class LabelsLake:
    """The lakehouse at `root`; requests, feed and impressions are added by the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lake = Lake(str(root))
        self.store = ArtifactStore(str(root))
        vectors = np.random.default_rng(0).normal(size=(10, WIDTH))
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.tokenizer = self.publish("tokenizer", "t" * 24, {"encoder_version": "encoder-1"})
        self.model = self.publish("interest_model", "m" * 24, {"sid_version": self.tokenizer})
        late = int(start_of(DAY + timedelta(days=1)).timestamp() * 1_000_000)
        self.write(
            "item_embeddings",
            {"encoder_version": "encoder-1"},
            [
                {"item_index": i, "content_hash": f"h{i}", "embedding": self.vectors[i].tolist(),
                 "updated_at": late if i == 9 else 1_000 + i}
                for i in (3, 1, 0, 2, 4, 5, 6, 7, 9)
            ],
        )  # fmt: skip
        self.write(
            "item_sids",
            {"sid_version": self.tokenizer},
            [
                {"item_index": i, "issue": 0, "sid": SIDS[i].tolist(), "residual_norm": 0.1, "bucket_size": 1,
                 "content_hash": f"h{i}", "retired_at": 0}
                for i in range(9)
            ],
        )  # fmt: skip

    def copied(self, root: Path) -> LabelsLake:
        """The same lakehouse, file by file, at `root`."""
        shutil.copytree(self.root, root)
        other = copy.copy(self)
        other.root, other.lake, other.store = root, Lake(str(root)), ArtifactStore(str(root))
        return other

    def publish(self, kind: str, fingerprint: str, lineage: dict[str, str], through: date = date(2026, 1, 1)) -> str:
        """Publishes a bundle with a placeholder file; its version."""
        folder = self.root / "made" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.json").write_text("{}")
        return self.store.publish(
            kind, folder, trained_through=through, fingerprint=fingerprint, config_hash="c", lineage=lineage
        ).version

    def write(
        self,
        table: str,
        partition: dict[str, str],
        rows: list[dict[str, Any]],
        files: int = 1,
        contract: Contract | None = None,
    ) -> None:
        """Replaces one partition of `table` by `rows` in `files` files, marked as its step would."""
        contract = contract or load_contract(table)
        self.lake.create(contract)
        parts = []
        for number in range(files):
            with self.lake.writer(contract, partition, dims=DIMS, row_group_rows=16) as writer:
                if rows[number::files]:
                    schema = contract.arrow_schema(partitions=False)
                    writer.write(pa.Table.from_pylist(rows[number::files], schema=schema))
            parts += writer.parts
        mark = SliceMark(contract.owner, {partition.get("dt", "*"): f"{len(rows)}"}, "test")
        self.lake.commit(contract, parts, mark=mark, mode="overwrite", partition=partition)

    def write_requests(self, rows: Sequence[dict[str, Any]], files: int = 1, **overrides: str) -> None:
        """The slice DAY of score_requests: user_id, anchors [(item, p)], history, candidates; the rest is filled in.

        An anchor is named by an item that carries its SID, or is a SID itself. prefixes [(codes, p)]: where given.
        """
        out = []
        for row in rows:
            sids = [SIDS[a].tolist() if isinstance(a, int) else list(a) for a, _ in row["anchors"]]
            pad = K - len(sids)
            prefixes = [*row.get("prefixes", ()), *[((), float(np.exp(-100)))] * P][:P]
            out.append(
                {
                    "user_id": row["user_id"],
                    "source": row.get("source", "unexposed"),
                    "block": row.get("block", 0),
                    "anchor_sids": [code for sid in sids for code in sid] + [-1] * (pad * L),
                    "log_prob": [float(np.log(p)) for _, p in row["anchors"]] + [-100.0] * pad,
                    "prefixes": [c for codes, _ in prefixes for c in (*codes, -1, -1, -1)[:L]],
                    "prefix_log_probs": [float(np.log(p)) for _, p in prefixes],
                    "history": [*row["history"], *[-1] * (H - len(row["history"]))],
                    "candidates": [*row["candidates"], *[-1] * (B - len(row["candidates"]))],
                    "sid_version": self.tokenizer,
                    "model_version": self.model,
                    **overrides,
                }
            )
        self.write("score_requests", {"dt": DAY.isoformat()}, out, files)

    def arguments(self, *overrides: str) -> list[str]:
        """Command-line arguments of an entry point, without a date."""
        return ["--config", "quickstart"] + [
            part for text in (f"lakehouse.root={self.root}", *SETTINGS, *overrides) for part in ("--set", text)
        ]

    def run(
        self, step: str, body: WorkerBody, *overrides: str, day: date = DAY, ranks: Ranks | None = None
    ) -> StepContext:
        """Runs a worker's body in this process, as `worker_main` would on one rank."""
        planner = Planner(load_config("quickstart", self.arguments(*overrides)[3::2]))
        state: StepState = planner.state(find_step(step), day)
        if state.status == "blocked":
            raise MissingInputError(state.reason)
        context = StepContext(planner, step, day, state, "run-1")
        body(context, ranks or Ranks(0, 1, torch.device("cpu")))
        return context

    def launch(self, step: str, *overrides: str, ranks: int = 2) -> None:
        """Runs a worker on the CPU, from outside the project's folder, in the environment that the launcher gives its
        ranks; its own processes would import torch for nothing."""
        root = Path(gpu_workers.__file__).parent.parent
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = str(root / f"gpu_workers/{step}.py")
        command = [sys.executable, script, *self.arguments(*overrides), "--run-date", DAY.isoformat(), "--force"]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}  # fmt: skip
        started = [
            subprocess.Popen(command, cwd=self.root, env={**env, "RANK": str(n), "LOCAL_RANK": str(n)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for n in range(ranks)
        ]  # fmt: skip
        said = [process.communicate(timeout=280)[0] for process in started]
        assert [process.returncode for process in started] == [0] * ranks, said[0][-3000:]

    def read(self, table: str, day: date = DAY) -> list[dict[str, Any]]:
        """Rows of one slice."""
        snapshot = self.lake.open(table)
        return snapshot.read(snapshot.select(start=day, end=day)).to_pylist()
