"""Ranks: what one says all hear, what fails on one fails on all, and rank 0 records it. Under the real launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gpl_core.errors import GateError
from gpl_core.graph.launches import tool
from gpl_core.graph.planner import Planner
from gpu_workers.ranks import Ranks
from tests.support import DAY, ONE, config_file, put, small_config

ROOT = Path(__file__).parents[2]

# Date 1: every rank talks, writes a part, and all parts arrive in one commit. Date 2: rank 1 alone fails.
WORKER = """
import json, os, sys
import numpy as np, torch
from gpl_core.errors import GateError
from gpu_workers.outputs import commit_parts
from gpu_workers.worker import worker_main
from tests.support import DIMS, data_table, legal_rows, listening

TEXTS = ["", "plain", "\\u043a\\u043b\\u044e\\u0447 \\u2615", "\\0", "x" * 200_000, "[1, 2]"]


def body(context, ranks):
    said = {"rank": ranks.rank, "size": ranks.size, "run_id": context.run_id, "inputs": dict(context.state.inputs)}
    if context.run_date.isoformat() == "2026-01-04":
        try:
            with ranks.together():
                if ranks.rank == 1:
                    raise GateError("too many dead codes: \\u2615")
        except Exception as error:
            said["caught"] = [type(error).__name__, str(error)]
            raise
        finally:
            write("failed", ranks, said)
    if context.run_date.isoformat() == "2026-01-05":
        write("after", ranks, said)
        return
    said["broadcast"] = [ranks.broadcast_text(t if ranks.is_main else "not mine") for t in TEXTS] == TEXTS
    said["gathered"] = [ranks.gather_text(t if ranks.rank else "") for t in TEXTS] == [["", t] for t in TEXTS]
    said["nobody"] = ranks.gather_text("")
    said["reduced"] = [f(float(ranks.rank + 1)) for f in (ranks.max, ranks.sum)]
    said["listening"] = sorted(listening(os.getpid()))
    with ranks.together():
        pass
    torch.manual_seed(7)
    said["drawn"] = float(torch.rand(1))
    contract = context.contract("item_embeddings")
    with ranks.together(), context.lake.writer(
        contract, {"encoder_version": "v1"}, dims=DIMS, rank=ranks.rank
    ) as writer:
        if ranks.rank == 1:  # rank 0 has nothing to add
            writer.write(data_table(contract, legal_rows(contract, 3)))
    commit_parts(context, ranks, "item_embeddings", writer.parts, mode="append", details={"by": "both"})
    said["version"] = context.lake.open("item_embeddings").version  # the commit is over on every rank
    write("done", ranks, said)


def write(name, ranks, said):
    with open(os.path.join(os.environ["SAID"], f"{name}-{ranks.rank}.json"), "w") as sink:
        json.dump(said, sink)


if __name__ == "__main__":
    worker_main("encode_items", body)
"""


@dataclass
class Outcome:
    """What a launch of two ranks left behind."""

    code: int
    text: str
    said: dict[str, list[dict]]
    root: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    root = tmp_path_factory.mktemp("runtime")
    put(Planner(small_config(root)).lake, "items", 3)
    script = root / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [tool("deepspeed"), "--num_accelerators", "2", "--master_port", str(port), str(script), "--config",
         str(config_file(root)), "--start-date", str(DAY), "--end-date", str(DAY + 2 * ONE), "--force",
         "--max-failures", "1"],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "SAID": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280,
    )  # fmt: skip
    said = {
        n: [json.loads(p.read_text()) for p in sorted(root.glob(f"{n}-*.json"))] for n in ("done", "failed", "after")
    }
    return Outcome(done.returncode, done.stdout, said, root)


@pytest.mark.deepspeed
def test_two_ranks_hear_each_other(outcome):
    ranks = outcome.said["done"]
    assert [r["rank"] for r in ranks] == [0, 1], outcome.text[-3000:]
    for rank in ranks:
        assert rank["size"] == 2
        assert rank["broadcast"], "rank 0's texts, empty and long ones too, on every rank"
        assert rank["gathered"], "each rank's text where it belongs, empty ones too"
        assert rank["nobody"] == ["", ""]
        assert rank["reduced"] == [2.0, 3.0]
    assert ranks[0]["drawn"] == ranks[1]["drawn"]


@pytest.mark.deepspeed
def test_ranks_of_one_machine_listen_on_loopback_alone(outcome):
    assert [r["listening"] for r in outcome.said["done"]] == [["127.0.0.1"]] * 2, outcome.text[-3000:]


@pytest.mark.deepspeed
def test_two_ranks_see_one_state_and_one_run(outcome):
    first, second = outcome.said["done"]
    assert first["inputs"] == second["inputs"] != {}
    assert first["run_id"] == second["run_id"] != "", "made by each rank for itself, rank 0's counts"


@pytest.mark.deepspeed
def test_the_parts_of_all_ranks_arrive_in_one_commit_before_anyone_goes_on(outcome):
    snapshot = Planner(small_config(outcome.root)).lake.open("item_embeddings")
    assert [r["version"] for r in outcome.said["done"]] == [1, 1]
    assert snapshot.read().num_rows == 3
    ((version, mark),) = snapshot.marks()
    assert (version, mark.step, mark.details["by"]) == (1, "encode_items", "both")
    assert mark.run_id == outcome.said["done"][0]["run_id"]


@pytest.mark.deepspeed
def test_what_fails_on_one_rank_ends_all_with_its_code_and_is_recorded(outcome):
    assert outcome.code == 3, outcome.text[-3000:]
    peer, failing = (r["caught"] for r in outcome.said["failed"])
    assert failing == ["GateError", "too many dead codes: ☕"]
    assert peer[0] == "PeerError"
    assert "rank 1 failed with exit code 3: GateError: too many dead codes: ☕" in peer[1]
    rows = Planner(small_config(outcome.root)).lake.open("job_runs").read().to_pylist()
    found = {r["run_date"]: (r["status"], r["error_class"], r["rows_out"], r["attempt"]) for r in rows}
    assert found.pop(DAY + 2 * ONE) == ("done", "", 0, 1)
    assert found == {DAY: ("done", "", 3, 1), DAY + ONE: ("failed", "PeerError", 0, 1)}
    (failed,) = [r for r in rows if r["status"] == "failed"]
    (done,) = [r for r in rows if r["run_date"] == DAY]
    assert done["core_seconds"] > 0
    assert (done["gpu_seconds"], done["bytes_in"] > 0) == (0.0, True)
    assert failed["core_seconds"] is None, "the ranks parted before they could add up"
    assert "too many dead codes" in failed["error_message"], "the record names the reason, not only that there is one"
    assert "Traceback" not in outcome.text


@pytest.mark.deepspeed
def test_all_ranks_go_on_with_the_next_date_when_a_failure_is_allowed(outcome):
    assert [r["rank"] for r in outcome.said["after"]] == [0, 1], outcome.text[-3000:]


# ---- one rank --------------------------------------------------------------------------------------------------

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_one_rank_needs_nobody():
    assert ALONE.is_main
    assert ALONE.broadcast_text("ключ") == "ключ"
    assert ALONE.gather_text("") == [""]
    assert (ALONE.max(2.0), ALONE.sum(2.0)) == (2.0, 2.0)


def test_one_rank_keeps_its_own_error():
    error = GateError("dead codes")
    with pytest.raises(GateError) as caught, ALONE.together():
        raise error
    assert caught.value is error
    assert caught.value.agreed
