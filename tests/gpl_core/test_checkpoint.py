"""Checkpoints come back bit for bit or not at all, whatever has happened to the file, and nothing in it is run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpl_core.checkpoint import read_checkpoint, write_checkpoint
from tests.support import DAMAGES, planted_pickle

STATE = {
    "step": 7,
    "best": math.inf,
    "done": False,
    "nothing": None,
    "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(2, 3)}}, "betas": (0.9, 0.99)},
    "rows": [torch.ones(3, dtype=torch.bfloat16), torch.empty(0, 4), torch.tensor([True, False])],
}  # fmt: skip


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_what_was_written_is_read(tmp_path):
    write_checkpoint(tmp_path / "new" / "c.safetensors", STATE)
    assert same(read_checkpoint(tmp_path / "new" / "c.safetensors"), STATE)
    write_checkpoint(tmp_path / "new" / "c.safetensors", {})
    assert read_checkpoint(tmp_path / "new" / "c.safetensors") == {}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.safetensors"]


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(10.0)
    write_checkpoint(tmp_path / "c", {"first": whole[:4], "rest": whole[4:], "turned": whole.reshape(2, 5).T})
    state = read_checkpoint(tmp_path / "c")
    assert torch.equal(state["turned"], whole.reshape(2, 5).T)
    assert torch.equal(torch.cat([state["first"], state["rest"]]), whole)


def test_what_is_neither_tensor_nor_json_is_refused_and_the_file_before_stays(tmp_path):
    write_checkpoint(tmp_path / "c", {"step": 1})
    with pytest.raises(TypeError, match="got set"):
        write_checkpoint(tmp_path / "c", {"step": {1}})
    assert read_checkpoint(tmp_path / "c") == {"step": 1}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_none_and_is_named(tmp_path, caplog, damage: Callable[[Path], None]):
    write_checkpoint(tmp_path / "c.safetensors", STATE)
    damage(tmp_path / "c.safetensors")
    assert read_checkpoint(tmp_path / "c.safetensors") is None
    if (tmp_path / "c.safetensors").exists():
        assert caplog.records[0].getMessage().startswith(f"{tmp_path / 'c.safetensors'} is damaged (")


def test_any_single_bit_that_matters_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, STATE)
    content = path.read_bytes()
    for place in range(0, 8 * len(content), 11):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        found = read_checkpoint(path)
        assert found is None or same(found, STATE), f"bit {place}"


def test_what_others_write_there_is_none_and_never_runs(tmp_path):
    path = tmp_path / "c.safetensors"
    ran = tmp_path / "ran"
    planted_pickle(path, ran)
    pickle.loads(path.read_bytes())  # noqa: S301
    assert ran.exists(), "unpickled it does run"
    ran.rmdir()
    assert read_checkpoint(path) is None
    assert not ran.exists()
    save_file({"a": torch.ones(1)}, path)
    assert read_checkpoint(path) is None
