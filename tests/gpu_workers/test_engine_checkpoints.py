"""Checkpoints of a DeepSpeed training: two ranks that are started again go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support import DAMAGES, planted_pickle

ROOT = Path(__file__).parents[2]

# Trains from the newest checkpoint up to step `sys.argv[2]`, with a checkpoint every three steps.
TRAINING = """
import json, os, sys
from pathlib import Path
import deepspeed, torch
from gpu_workers.engine_checkpoints import EngineCheckpoints
from gpu_workers.ranks import start_ranks

folder, last, stage = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ranks = start_ranks()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Dropout(0.1), torch.nn.Linear(5, 3))
model[0].bias.requires_grad_(False)
config = {
    "train_batch_size": ranks.size, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3,
                                                      "warmup_max_lr": 0.1}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=[p for p in model.parameters() if p.requires_grad],
                                  config=config)
checkpoints = EngineCheckpoints(folder / "checkpoints", ranks)
facts = checkpoints.restore(engine)
begun = facts["step"] if facts else 0
for step in range(begun, last):
    if step % 3 == 0 and step > begun:
        checkpoints.save(f"{step:04d}", engine, {"step": step, "rank": ranks.rank})
    torch.manual_seed(step)
    x = torch.randn(4, 7) + ranks.rank
    engine.backward(engine(x).square().mean())
    engine.step()
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    weights = [p.tolist() for p in model.parameters()]
found = {"begun": begun, "rank": facts and facts["rank"], "rate": engine.get_lr(), "steps": engine.global_steps,
         "weights": weights}
(folder / f"result-{ranks.rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)
"""


def train(folder: Path, last: int, *, ranks: int = 2, stage: int = 2) -> tuple[list[dict], str]:
    """The ranks' results and their log."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}  # fmt: skip
    command = [sys.executable, "-c", TRAINING, str(folder), str(last), str(stage)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(n), "LOCAL_RANK": str(n)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for n in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, said[0][-3000:]
    return [json.loads((folder / f"result-{n}.json").read_text()) for n in range(ranks)], "".join(said)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], tuple[Path, list[dict]]]:
    """(ZeRO stage, ranks) -> folder and results of nine steps without a break."""

    @cache
    def trained(stage: int, ranks: int) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("once")
        return folder, train(folder, 9, ranks=ranks, stage=stage)[0]

    return trained


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1), (1, 2), (3, 1)])],
)
def test_a_training_that_is_started_again_ends_with_the_same_bits(tmp_path, undisturbed, stage, ranks):
    once, expected = undisturbed(stage, ranks)
    twice = shutil.copytree(once, tmp_path / "twice")  # its newest checkpoint has 6 of the 9 steps
    resumed, _ = train(twice, 9, stage=stage, ranks=ranks)
    assert [(r["begun"], r["rank"]) for r in resumed] == [(6, n) for n in range(ranks)]
    for left, right in zip(expected, resumed, strict=True):
        assert {**left, "begun": 6, "rank": right["rank"]} == right


@pytest.mark.deepspeed
def test_a_damaged_share_of_one_rank_makes_all_begin_again(tmp_path, undisturbed):
    once, expected = undisturbed(2, 2)
    twice = shutil.copytree(once, tmp_path / "twice")
    (share,) = twice.glob("checkpoints/*/rank-1.safetensors")
    DAMAGES["bit flipped"](share)
    planted_pickle(twice / "checkpoints/0009/mp_rank_00_model_states.pt", tmp_path / "ran")
    planted_pickle(twice / "checkpoints/0010/rank-0.safetensors", tmp_path / "ran")
    again, said = train(twice, 9)
    assert f"{share} is damaged" in said
    assert again == expected
    assert not (tmp_path / "ran").exists()
    assert [p.name for p in (twice / "checkpoints").iterdir()] == ["0006"]
